"""What config.json holds: versions, devices and git commit of a run."""

import json
import math
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runtime.run_info import git_state, run_info, to_json


def _git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    result = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    _git(folder, "init", "-q")
    (folder / "module.py").write_text("x = 1\n")
    _git(folder, "add", "module.py")
    _git(folder, "commit", "-qm", "first")
    return folder


def test_run_info_says_what_it_ran_on():
    info = run_info({"seed": 3})
    assert info["versions"]["jax"] == jax.__version__
    assert info["versions"]["numpy"] == np.__version__
    assert all(info["versions"][name] for name in ("python", "jaxlib", "flax", "rlhf_jax"))
    assert info["devices"]["count"] == jax.device_count()
    assert info["devices"]["platform"] == "cpu"
    assert info["config"] == {"seed": 3}
    assert json.loads(json.dumps(info, allow_nan=False)) == info


def test_missing_package_has_no_version(monkeypatch):
    monkeypatch.setattr("rlhf_jax.runtime.run_info._PACKAGES", ("no-such-package-anywhere",))
    assert run_info({})["versions"]["no-such-package-anywhere"] is None


def test_git_commit_and_dirty_flag(repository):
    commit = _git(repository, "rev-parse", "HEAD")
    assert git_state(repository / "module.py") == {"commit": commit, "dirty": False}
    (repository / "runs.txt").write_text("a new file is no change of the code\n")
    assert git_state(repository / "module.py")["dirty"] is False
    (repository / "module.py").write_text("x = 2\n")
    assert git_state(repository / "module.py") == {"commit": commit, "dirty": True}


def test_untracked_file_in_a_checkout_has_no_commit(repository):
    installed = repository / "venv" / "module.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert git_state(installed) == {"commit": None, "dirty": None}


def test_outside_git_and_without_git(tmp_path, monkeypatch):
    nothing = {"commit": None, "dirty": None}
    assert git_state(tmp_path / "module.py") == nothing
    monkeypatch.setenv("PATH", "")
    assert git_state(Path(__file__)) == nothing


def test_to_json_keeps_values_and_makes_legal_json():
    value = {
        1: (1, 2.5, None, True, "x"),
        "numpy": np.float32(0.5),
        "array": jnp.arange(2),
        "nan": math.nan,
        "inf": -math.inf,
        "type": int,
    }
    converted = to_json(value)
    assert converted == {
        "1": [1, 2.5, None, True, "x"],
        "numpy": 0.5,
        "array": [0, 1],
        "nan": "NaN",
        "inf": "-Infinity",
        "type": "<class 'int'>",
    }
    json.dumps(converted, allow_nan=False)
