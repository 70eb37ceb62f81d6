"""The launch scripts, with commands that end at once in place of training and of Slurm."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts" / "launch"


def program(folder: Path, text: str, name: str = "program.py") -> list[str]:
    """A command that runs this Python text."""
    (folder / name).write_text(textwrap.dedent(text))
    return [sys.executable, str(folder / name)]


def launch(script: str, *command: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs a script to its end."""
    # The scripts call `python`: this one.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *command],
        env=environment | {"PATH": path} | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_local_starts_numbered_processes_that_find_each_other(tmp_path):
    command = program(
        tmp_path,
        """
        import os, sys
        names = ("NUM_PROCESSES", "PROCESS_ID", "COORDINATOR_ADDRESS")
        words = [os.environ["JAX_" + name] for name in names] + sys.argv[1:]
        sys.stdout.write(" ".join(words) + chr(10))  # at once: three processes share the pipe
        """,
    )
    result = launch("local.sh", "3", *command, "--config", "x")
    assert result.returncode == 0, result.stderr
    rows = sorted(line.split() for line in result.stdout.splitlines())
    assert [row[:2] for row in rows] == [["3", "0"], ["3", "1"], ["3", "2"]]
    assert len({row[2] for row in rows}) == 1 and rows[0][2].startswith("127.0.0.1:")
    assert all(row[3:] == ["--config", "x", "--distributed"] for row in rows)


def test_local_ends_with_the_status_of_a_process_that_failed(tmp_path):
    command = program(tmp_path, "import os; os._exit(7 * int(os.environ['JAX_PROCESS_ID']))")
    assert launch("local.sh", "2", *command).returncode == 7


def test_one_machine_starts_again_after_crashes(tmp_path):
    """Twice it fails, then it works; with one restart it is given up."""
    text = f"""
        import sys
        from pathlib import Path
        log = Path({str(tmp_path / "log")!r})
        tries = len(log.read_text()) if log.exists() else 0
        log.write_text("x" * (tries + 1))
        sys.exit(0 if tries == 2 else 3)
        """
    command = program(tmp_path, text)
    assert launch("one_machine.sh", *command, PAUSE="0", RESTARTS="1").returncode == 3
    assert (tmp_path / "log").read_text() == "xx"
    assert launch("one_machine.sh", *command, PAUSE="0").returncode == 0
    assert (tmp_path / "log").read_text() == "xxx"


@pytest.mark.parametrize("script", ["one_machine.sh", "local.sh"])
def test_sigterm_reaches_the_processes_and_nothing_starts_again(tmp_path, script):
    command = program(
        tmp_path,
        f"""
        import os, signal, sys, time
        from pathlib import Path
        number = os.environ.get("JAX_PROCESS_ID", "0")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
        (Path({str(tmp_path)!r}) / ("ready" + number)).touch()
        time.sleep(60)
        """,
    )
    before = ["2"] if script == "local.sh" else []
    running = subprocess.Popen(["bash", str(SCRIPTS / script), *before, *command])
    ready = [tmp_path / f"ready{i}" for i in range(1 + len(before))]
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in ready):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=20) == 130


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, ""), (130, "requeue 17"), (143, "requeue 17"), (1, "")]
)
def test_slurm_requeues_what_was_asked_to_stop(tmp_path, status, requeued):
    """With stand-ins for srun and scontrol that write down how they were called."""
    log = tmp_path / "log"
    for name, code in (("srun", status), ("scontrol", 0)):
        script = tmp_path / name
        devices = "$JAX_LOCAL_DEVICE_IDS"
        script.write_text(f'#!/bin/sh\necho {name} "$@" {devices} >> {log}\nexit {code}\n')
        script.chmod(0o755)
    settings = {"SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "4"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = launch("slurm.sbatch", "python", "-m", "x", PATH=path, **settings)
    assert result.returncode == status
    called = log.read_text().splitlines()
    assert called[0].startswith("srun ")
    assert called[0].endswith("python -m x --distributed 0,1,2,3")
    assert "--kill-on-bad-exit=0" in called[0]  # or the first to save would kill the others
    assert [line.removesuffix(" 0,1,2,3") for line in called[1:]] == (
        [f"scontrol {requeued}"] if requeued else []
    )


@pytest.mark.parametrize("arguments", [("local.sh",), ("local.sh", "x", "y"), ("one_machine.sh",)])
def test_wrong_arguments_show_the_usage(arguments):
    result = launch(*arguments)
    assert result.returncode == 2 and "usage:" in result.stderr
