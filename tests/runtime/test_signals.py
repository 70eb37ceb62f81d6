"""A signal has the same answer in every phase: one line, what is saved, status 130."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from rlhf_jax.runtime import lock
from rlhf_jax.runtime.signals import SIGNALS, GracefulStop
from rlhf_jax.training.run import CheckpointConfig, Run, Stopped

ROOT = Path(__file__).parents[2]
# A command with phases that say when they have begun, and that nothing but a signal ends.
COMMAND = """
import hashlib, os, signal, sys, threading, time
import jax.numpy as jnp
from experiments import command
from rlhf_jax.training.run import CheckpointConfig, Run

phase, folder = sys.argv.pop(1), sys.argv.pop(1)

def ready(word="ready"):
    print(word, flush=True)

def encoding():
    ready()
    while True:
        sorted(str(i) for i in range(1000))

def compiling():
    threading.Timer(0.5, ready).start()
    # One call that takes an hour, and that asks Python nothing meanwhile.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def waiting():
    ready()
    try:
        time.sleep(600)
    except BaseException:
        raise RuntimeError("something on the way out")

def train(total=10**9, slow_save=False, last=""):
    with Run(folder, total=total, desc="sums", checkpoint=CheckpointConfig(every=2)) as run:
        if slow_save:
            def save(*_):
                ready("saving")
                time.sleep(600)
            run._checkpointer.save = save
        state = run.restore({"x": jnp.zeros(2)})
        for step in run.steps():
            if step == 3:
                ready()
            if last == "step" and step + 1 == total:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05 if total > 100 else 0)
            state = {"x": state["x"] + step}
            run.log(step, {"sum": state["x"][0]})
            run.checkpoint(step, state)
            if last == "after" and step + 1 == total:
                os.kill(os.getpid(), signal.SIGTERM)
    print("sum", int(state["x"][0]))
    return run

def training():
    train()

def saving():
    train(slow_save=True)

def last_step():
    train(5, last="step")

def after_the_last_step():
    train(5, last="after")

def resuming():
    train(5)

def report():
    train(5)
    ready("reporting")
    time.sleep(600)

def printing():
    while True:
        print("line", flush=True)

def printing_less():
    print("line")

command.cli(lambda config: globals()[phase](), default="configs/sft.py:tiny")
"""


@pytest.fixture(autouse=True)
def heeded():
    """What this process ignores, as one that a shell has put behind, its children would ignore."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(phase: str, folder: Path, **settings) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | settings
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", COMMAND, phase, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)


def wait_for(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(process.stderr.read())


def end(process: subprocess.Popen) -> list[str]:
    """The lines on standard error of a process that a signal ends, but for its progress."""
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    return [line for line in errors.splitlines() if not line.startswith("sums: ")]


@pytest.mark.parametrize(
    ("phase", "number"),
    [("encoding", signal.SIGTERM), ("compiling", signal.SIGINT), ("waiting", signal.SIGHUP)],
)
def test_outside_of_a_loop_one_line_and_status_130(tmp_path, phase, number):
    process = start(phase, tmp_path)
    wait_for(process, "ready")
    process.send_signal(number)
    assert end(process) == [
        f"{number.name}: stopped; what was saved before is kept; the same command resumes"
    ]


def test_after_the_loop_the_line_says_what_is_saved(tmp_path):
    process = start("report", tmp_path)
    wait_for(process, "reporting")
    process.send_signal(signal.SIGTERM)
    assert end(process) == [
        f"SIGTERM: stopped; sums is saved at step 5 of 5 in {tmp_path}; the same command resumes"
    ]


def test_a_second_signal_while_saving_is_one_line(tmp_path):
    process = start("saving", tmp_path)
    wait_for(process, "saving")
    process.send_signal(signal.SIGINT)
    wait_for(process, "SIGINT: saving after this step; once more to stop at once")
    process.send_signal(signal.SIGINT)
    assert end(process) == [
        f"SIGINT: stopped; nothing of sums is saved yet in {tmp_path}; the same command resumes"
    ]


@pytest.mark.parametrize("phase", ["last_step", "after_the_last_step"])
def test_a_stop_in_the_last_step_is_not_forgotten(tmp_path, phase):
    process = start(phase, tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopped at step 5 of 5; the same command resumes" in output
    assert "sum" not in output.split() and "Traceback" not in errors
    process = start("resuming", tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "sums: resuming at step 5 of 5" in output and "sum 10" in output


def test_a_terminal_that_closes_leaves_a_saved_run(tmp_path):
    """Printing fails from then on, and the shell sends the signal once more."""
    ours, theirs = pty.openpty()
    streams = {"stdin": theirs, "stderr": theirs, "start_new_session": True}
    process = start("training", tmp_path, **streams)
    os.close(theirs)
    wait_for(process, "ready")
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    process.stdout.close()
    time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 130
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    log = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert max(steps) == len(log) >= 4


@pytest.mark.parametrize("phase", ["printing", "printing_less"])
def test_a_closed_pipe_ends_quietly(tmp_path, phase):
    """As `| head -1` does it."""
    process = start(phase, tmp_path)
    if phase == "printing":
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 141


NUMBERS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_a_flag_the_second_stops_at_once(number):
    caught = []
    before = signal.signal(number, lambda *_: caught.append(1))
    try:
        with GracefulStop() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested and not caught
            os.kill(os.getpid(), number)
            assert caught == [1]
        os.kill(os.getpid(), number)
        assert caught == [1, 1]
    finally:
        signal.signal(number, before)


def test_a_hangup_counts_once():
    caught = []
    before = signal.signal(signal.SIGHUP, lambda *_: caught.append(1))
    try:
        with GracefulStop() as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested and not caught
        os.kill(os.getpid(), signal.SIGHUP)
        assert caught == [1]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [*NUMBERS, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(number):
    """SIGHUP under nohup; SIGINT behind `&` in a script, whose trap sends SIGTERM instead."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with GracefulStop() as stop:
            os.kill(os.getpid(), number)
            assert not stop.requested
    finally:
        signal.signal(number, before)


def test_handlers_are_put_back_when_no_signal_came():
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_of_another_thread_goes_without_handlers(tmp_path):
    """Notebooks may run cells in one."""
    ended = []

    def train():
        with Run(tmp_path, total=2) as run:
            state = run.restore({"x": jnp.zeros(2)})
            for step in run.steps():
                run.checkpoint(step, state)
        ended.append(run)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert ended


def test_a_signal_while_the_state_is_written_stops_this_step(tmp_path):
    """Not the next one, which may be minutes away."""
    done = []
    with (
        pytest.raises(Stopped, match="stopped at step 2 of 6"),
        Run(tmp_path, total=6, checkpoint=CheckpointConfig(every=2)) as run,
    ):
        state = run.restore({"x": jnp.zeros(2)})
        save = run._checkpointer.save

        def save_and_be_told(*arguments):
            if done == [0, 1]:
                os.kill(os.getpid(), signal.SIGTERM)
            save(*arguments)

        run._checkpointer.save = save_and_be_told
        for step in run.steps():
            done.append(step)
            run.checkpoint(step, state)
    assert done == [0, 1]
    assert lock.claim(tmp_path)
    lock.release(tmp_path)
