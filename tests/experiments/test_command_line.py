"""Experiments as commands, each in a process of its own: stop, resume, wrong input."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.runtime.lock import FolderInUse
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.training.run import Run

ROOT = Path(__file__).parent.parent.parent


def command(experiment: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{experiment}", *flags]


def environment(tmp_path) -> dict[str, str]:
    # One device: the command line of a user without settings.
    return {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}


def run(tmp_path, *arguments, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    )


@pytest.mark.slow
def test_a_killed_run_resumes_in_a_new_process_with_the_same_numbers(tmp_path):
    config = "configs/sft.py:tiny,train.steps=60,eval.every=20"
    flags = lambda name: ("--config", config, f"--config.workdir={tmp_path / name}")  # noqa: E731

    whole = run(tmp_path, "sft", *flags("whole"))
    assert whole.returncode == 0, whole.stderr

    process = subprocess.Popen(
        command("sft", *flags("parts")), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE
    )
    log = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.time() + 200
    while time.time() < deadline and (not log.exists() or len(log.read_text().splitlines()) < 5):
        time.sleep(0.05)
    with pytest.raises(FolderInUse, match=f"in use by process {process.pid} on "):
        Run(tmp_path / "parts", total=60).__enter__()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert b"the same command resumes" in output

    rest = run(tmp_path, "sft", *flags("parts"))
    assert rest.returncode == 0, rest.stderr
    assert "resuming at step" in rest.stdout
    one, other = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for name in one.keys() - {"time"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("root", ["", "elsewhere"])
def test_ctrl_c_outside_of_the_loop_is_one_line_and_programs_are_kept(tmp_path, root):
    root = tmp_path / root if root else ROOT
    program = (
        "import jax\n"
        "from experiments import command\n"
        "def main(config):\n"
        "    print(jax.config.jax_compilation_cache_dir)\n"
        "    raise KeyboardInterrupt\n"
        "command.cli(main, default='configs/sft.py:tiny')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *([] if root == ROOT else [f"--config.root={root}"])],
        cwd=ROOT,
        env={k: v for k, v in environment(tmp_path).items() if k != "JAX_COMPILATION_CACHE_DIR"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 130
    assert result.stderr.strip() == (
        "interrupted: the same command resumes from the last checkpoint"
    )
    assert Path(result.stdout.splitlines()[-1]) == root / "runs" / ".compilation_cache"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("configs/ppo_max.py:tiny,no_such",), "unknown variant 'no_such'"),
        (("configs/ppo_max.py:tiny", "--config.ppo.no_such=1"), "unknown config key"),
        (("configs/ppo_max.py:tiny", "--config.ppo.clip_eps=abc"), "could not convert"),
        (("configs/no_such.py",), "no config file 'configs/no_such.py'"),
        (("configs/ppo_max.py:paper_zh",), "experiments.sft --config configs/sft.py:paper_zh`"),
    ],
)
def test_wrong_command_lines_end_with_one_line(tmp_path, flags, message):
    result = run(tmp_path, "ppo_max", "--config", *flags)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.stderr
