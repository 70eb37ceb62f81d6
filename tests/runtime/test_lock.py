"""A run folder has one process at a time, and a lock that no crash leaves behind."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments import folders, sft, stages
from rlhf_jax.runtime import lock
from rlhf_jax.training.run import Run

ROOT = Path(__file__).parents[2]
# Claims a folder, has a child that outlives it, and says so; at a word it finishes its run.
HOLDER = """
import json, os, sys, time
from pathlib import Path
from rlhf_jax.runtime import lock
folder = Path(sys.argv[1])
assert lock.claim(folder)
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
if sys.stdin.readline() == "finish\\n":
    (folder / "summary.json").write_text("{}")
lock.release(folder)
"""


class Holder:
    """Another process that holds a folder."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HOLDER, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.child = int(self.process.stdout.readline())

    def tell(self, word: str) -> None:
        """Lets it go on; "finish" or anything else."""
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """As a machine does that has no memory left."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def holder(tmp_path):
    """Another process in the folder `run`."""
    other = Holder(tmp_path / "run")
    yield other
    other.kill()
    os.kill(other.child, signal.SIGKILL)


def test_a_second_process_is_refused_by_one_line_and_a_kill_frees_the_folder(holder, tmp_path):
    folder = tmp_path / "run"
    named = f"process {holder.process.pid} on {socket.gethostname()} since "
    for attempt in (lambda: lock.claim(folder), lambda: Run(folder, total=1).__enter__()):
        with pytest.raises(lock.FolderInUse) as error:
            attempt()
        assert f"{folder} is in use by {named}" in str(error.value)
        assert "\n" not in str(error.value)
    assert not (folder / "config.json").exists()
    assert lock.holder(folder).startswith(named)
    holder.kill()  # its forked child lives on
    assert lock.holder(folder) == ""
    assert lock.claim(folder)
    lock.release(folder)


def test_a_process_does_not_stand_in_its_own_way(tmp_path):
    assert lock.claim(tmp_path / "run") and not lock.claim(tmp_path / "run")
    with Run(tmp_path / "run", total=1):
        pass
    # A folder that was removed is another one.
    (tmp_path / "run" / ".lock").unlink()
    assert lock.claim(tmp_path / "run")
    lock.release(tmp_path / "run")
    lock.release(tmp_path / "run")


def test_a_run_keeps_the_folder_as_long_as_it_lasts(tmp_path):
    """A run on its own until the end of its `with`, one of an experiment until its summary."""
    with Run(tmp_path, total=1) as run:
        assert not lock.claim(tmp_path)
    assert lock.claim(tmp_path)
    with Run(tmp_path, total=1) as run:
        pass
    assert not lock.claim(tmp_path)
    run.finish({})
    assert lock.claim(tmp_path)
    lock.release(tmp_path)


def test_a_run_that_cannot_begin_frees_its_folder(tmp_path):
    (tmp_path / "config.json").write_text("torn")
    with pytest.raises(ValueError, match="torn"), Run(tmp_path, total=1):
        pass
    assert lock.claim(tmp_path)
    lock.release(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with Run(tmp_path, total=1):
        assert lock.holder(tmp_path) == ""
    told = capsys.readouterr().out
    assert told == (
        f"note: {tmp_path} cannot be locked ({os.strerror(code)}): start one run at a time in it\n"
    )


def model_of_a_run(folder: Path) -> str:
    """What a stage leaves before its summary."""
    (folder / "model").mkdir(parents=True)
    for name in ("config.json", "model/config.json"):
        (folder / name).write_text(json.dumps({"config": {}}))
    return str(folder / "model")


@pytest.fixture
def built(monkeypatch):
    """The stages that this process builds."""
    calls = []
    monkeypatch.setattr(folders, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(sft, "main", calls.append)
    return calls


@pytest.mark.parametrize("build", [True, False])
def test_a_stage_that_another_process_runs_is_waited_for(holder, tmp_path, capsys, built, build):
    folder = model_of_a_run(tmp_path / "run")
    threading.Timer(0.5, holder.tell, ["finish"]).start()
    assert stages.require(folder, stage="sft", argument="tiny", build=build) == folder
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path / 'run'} is being made by process {holder.process.pid} on ")
    assert told.count("waiting for it") == told.count("\n") == 1
    assert not built


def test_a_stage_whose_process_stops_is_finished_here(holder, tmp_path, built):
    folder = model_of_a_run(tmp_path / "run")
    threading.Timer(0.5, holder.tell, ["stop"]).start()
    assert stages.require(folder, stage="sft", argument="tiny", build=True) == folder
    assert len(built) == 1


def test_a_stage_that_another_process_begins_first_is_waited_for(holder, tmp_path, monkeypatch):
    """Both saw that it was missing, and the other was faster."""
    folder = model_of_a_run(tmp_path / "run")
    monkeypatch.setattr(folders, "WAIT_SECONDS", 0.05)
    waits, calls = [], []

    def main(config):
        calls.append(config)
        if len(calls) == 1:
            raise lock.FolderInUse(tmp_path / "run", "somebody")

    monkeypatch.setattr(sft, "main", main)
    monkeypatch.setattr(folders, "wait_for_others", waits.append)
    assert stages.require(folder, stage="sft", argument="tiny", build=True) == folder
    assert len(calls) == 2 and waits == [tmp_path / "run"] * 2
