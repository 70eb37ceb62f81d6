"""The guard against wrong numbers of XLA's CPU compiler, each case in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src import xla_bridge

from rlhf_jax.runtime import compiler_guard
from rlhf_jax.runtime.compiler_guard import FLAG, NAME, guard_cpu_compiler

ROOT = Path(__file__).resolve().parent.parent.parent
# XLA's default, set by a user, which keeps the guard away.
AS_IT_IS = f"--{NAME}=+individual_dot"

# The versions of jax, of those that were tried, in which a case is wrong without the guard.
CASES = {
    "constant": ("0.10.2", "0.11.0", "0.11.2", "0.12.0.1"),
    "rows": ("0.10.2",),  # jax's issue 39103
}

# Prints the largest error of each case against NumPy in float64, as a share of the largest number.
PROGRAM = """
import json, os
import jax, jax.numpy as jnp, numpy as np
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler

rng = np.random.default_rng(0)
square = rng.normal(size=(5, 60, 60)).astype(np.float32)
long = rng.normal(size=(32769, 3)).astype(np.float32)

def constant(x, np=jnp):
    return np.sum((x @ np.full_like(x, 0.37)) * x, -1)

def rows(x):
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x)

def errors():
    wanted = {
        "constant": constant(square.astype(np.float64), np),
        "rows": np.sum(long.astype(np.float64) ** 2, -1),
    }
    found = {"constant": jax.jit(constant)(square), "rows": jax.jit(rows)(long)}
    scale = lambda name: np.abs(wanted[name]).max()
    return {n: float(np.nan_to_num(np.abs(found[n] - wanted[n]).max() / scale(n), nan=np.inf))
            for n in found}

def report(guarded):
    facts = {"flags": os.environ.get("XLA_FLAGS"), "devices": jax.device_count()}
    print(json.dumps({"guarded": guarded, "errors": errors(), **facts}))
"""


def run(program: str, flags: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a program after `PROGRAM` in a new process with these XLA_FLAGS."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def report_of(flags: str) -> dict:
    """The report of a process that calls the guard after it has imported jax."""
    return json.loads(run("report(guard_cpu_compiler())", flags).stdout)


def test_fused_products_are_right_under_the_guard():
    report = report_of("--xla_force_host_platform_device_count=2")
    assert report["guarded"]
    assert report["flags"] == f"--xla_force_host_platform_device_count=2 {FLAG}"
    assert report["devices"] == 2  # what the user has set holds too
    assert all(error < 1e-6 for error in report["errors"].values()), report


def test_a_setting_of_the_user_stays_with_its_wrong_numbers():
    report = report_of(AS_IT_IS)
    assert not report["guarded"] and report["flags"] == AS_IT_IS
    for case, versions in CASES.items():
        if jax.__version__ in versions:
            assert report["errors"][case] > 1e-3, report


COMMAND = """
from experiments import command, ppo_max, preflight  # what they import must not start jax
command.cli(lambda config: report(None), default="configs/sft.py:tiny")
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", AS_IT_IS])
def test_commands_run_under_the_guard_and_say_so_once(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    done = run(COMMAND, flags)
    *told, report = done.stdout.splitlines()
    assert json.loads(report)["flags"] == (flags or FLAG)
    assert len([line for line in told if FLAG in line]) == (not flags)
    assert NAME not in done.stderr
    if not flags:
        assert all(error < 1e-6 for error in json.loads(report)["errors"].values())


LATE = """
import warnings
jax.devices()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not guard_cpu_compiler()
print(*(f"{w.category.__name__} {w.message}" for w in caught), sep="\\n")
"""


def test_a_call_that_comes_too_late_warns():
    (warning,) = run(LATE, "").stdout.splitlines()
    assert warning.startswith("RuntimeWarning jax had started before XLA_FLAGS could be set: ")
    assert warning.endswith(f"set XLA_FLAGS={FLAG} before Python starts")


@pytest.fixture
def not_started(monkeypatch):
    """As if this process had not used a device; whatever the guard sets is undone."""
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "")


def test_a_second_call_adds_nothing(not_started):
    assert guard_cpu_compiler() and not guard_cpu_compiler()
    assert os.environ["XLA_FLAGS"] == FLAG


@pytest.mark.parametrize(
    ("platforms", "guarded"),
    [("cpu", True), (None, True), ("cuda,cpu", True), ("cuda", False), ("tpu", False)],
)
def test_only_where_a_cpu_may_compute(platforms, guarded, not_started):
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", platforms)
    try:
        assert guard_cpu_compiler() == guarded
    finally:
        jax.config.update("jax_platforms", before)


def test_a_flag_that_jaxlib_does_not_know_is_not_set(not_started, monkeypatch):
    """XLA would end the process: "Unknown flag in XLA_FLAGS"."""
    monkeypatch.setattr(compiler_guard, "NAME", "xla_cpu_no_such_flag")
    assert not guard_cpu_compiler()
    assert os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize("content", ["", AS_IT_IS])
def test_flags_in_a_file_are_read_and_left_alone(content, not_started, monkeypatch, tmp_path):
    """XLA takes a value that begins with no dash for the name of a file with flags."""
    file = tmp_path / "flags"
    file.write_text(content)
    monkeypatch.setenv("XLA_FLAGS", str(file))
    if content:
        assert not guard_cpu_compiler()
    else:
        with pytest.warns(RuntimeWarning, match="names the file"):
            assert not guard_cpu_compiler()
    assert os.environ["XLA_FLAGS"] == str(file)
