"""Two processes of four devices each train as one of eight does; and what happens when one dies.

The processes talk over loopback, as on a cluster: `jax.distributed`, collectives by gloo.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import dpo
from rlhf_jax.data.batches import PackedBatches, PairBatches, PromptBatches
from rlhf_jax.data.schemas import Encoded, EncodedPair
from rlhf_jax.runtime.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PROCESSES = 2
# What a run logs about the machine, not about the model.
TIMES = ("time", "perf/", "memory/")


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """One folder for the compiled programs of all runs: what resumes compiles nothing again."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("programs")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        yield


def environment(devices: int) -> dict[str, str]:
    """For a process with so many host devices; compiled like the tests, see conftest.py."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    return {**os.environ, **settings}


def start(stage: str, folder: Path, *settings: str, processes: int = PROCESSES, devices: int = 8):
    """Starts a stage's processes in a folder of their own."""
    variant = ",".join(["tiny", *settings])
    config = f"{REPOSITORY}/configs/{stage}.py:{variant}"
    command = [sys.executable, "-m", f"experiments.{stage}", "--config", config]
    command += ["--config.workdir", f"runs/{stage}/tiny", "--config.log.tensorboard=False"]
    settings = environment(devices // processes)
    if processes > 1:
        command.append("--distributed")
        settings |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
        settings |= {"JAX_NUM_PROCESSES": str(processes)}
    folder.mkdir(parents=True, exist_ok=True)
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env=settings | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(processes, timeout: float = 1800) -> list[tuple[int, str]]:
    """Status and output of each process."""
    try:
        texts = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def run(stage: str, folder: Path, *settings: str, processes: int = PROCESSES, devices: int = 8):
    """Runs a stage to its end; what process 0 printed."""
    started = start(stage, folder, *settings, processes=processes, devices=devices)
    results = finish(started)
    assert [status for status, _ in results] == [0] * processes, results
    return results[0][1]


def same_numbers(one: Path, other: Path) -> None:
    """Compares all metrics of two runs."""
    left, right = read_metrics(one), read_metrics(other)
    names = {name for name in left if not name.startswith(TIMES)}
    assert names == {name for name in right if not name.startswith(TIMES)}
    assert len(names) > 3
    for name in names:
        np.testing.assert_allclose(left[name], right[name], 1e-4, 1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Where one process of eight devices ran the chain."""
    folder = tmp_path_factory.mktemp("alone")
    run("ppo_max", folder, processes=1)
    return folder


@pytest.mark.slow
def test_the_tiny_chain_gives_the_numbers_of_one_process(alone, tmp_path):
    """SFT, reward model and PPO-max, built one after the other by two processes."""
    run("ppo_max", tmp_path)
    for stage in ("sft", "reward_model", "ppo_max"):
        same_numbers(tmp_path / "runs" / stage / "tiny", alone / "runs" / stage / "tiny")
        written = (tmp_path / "runs" / stage / "tiny" / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in written.splitlines()]
        assert steps == list(range(len(steps)))  # only process 0 writes
    ppo, alone_ppo = (f / "runs" / "ppo_max" / "tiny" for f in (tmp_path, alone))
    left, right = (json.loads((f / "summary.json").read_text()) for f in (ppo, alone_ppo))
    assert left["statistics"]["PPO-max"].keys() == right["statistics"]["PPO-max"].keys()
    for name, value in right["statistics"]["PPO-max"].items():
        np.testing.assert_allclose(left["statistics"]["PPO-max"][name], value, 1e-4, 1e-5)
    assert (ppo / "report.md").exists() and (ppo / "model" / "model.safetensors").exists()


LONG = ("train.steps=80", "eval.every=80", "checkpoint.every=20")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A longer SFT run of one process: long enough to be hit in the middle."""
    folder = tmp_path_factory.mktemp("long")
    run("sft", folder, *LONG, processes=1)
    return folder / "runs" / "sft" / "tiny"


def wait_for_steps(log: Path, count: int, processes, timeout: float = 900) -> None:
    """Until the log has so many lines."""
    deadline = time.monotonic() + timeout
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "no progress"
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_both_resume(uninterrupted, tmp_path, victim):
    """Process 0 is the coordinator of the others: it may die too."""
    folder = tmp_path / "runs" / "sft" / "tiny"
    processes = start("sft", tmp_path, *LONG, devices=2)
    wait_for_steps(folder / "metrics.jsonl", 30, processes)
    processes[victim].kill()
    begun = time.monotonic()
    status, text = finish(processes, timeout=90)[1 - victim]
    assert time.monotonic() - begun < 60
    assert status not in (0, None)
    assert "error" in text.lower() and "process" in text.lower(), text

    text = run("sft", tmp_path, *LONG, devices=2)
    assert "resuming at step" in text
    same_numbers(folder, uninterrupted)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_another_number_resumes(uninterrupted, tmp_path):
    """Pre-emption: SIGTERM saves at once everywhere; then one process of eight devices goes on.

    Here and above a process has one device: several would only make it slower.
    """
    folder = tmp_path / "runs" / "sft" / "tiny"
    processes = start("sft", tmp_path, *LONG, devices=2)
    wait_for_steps(folder / "metrics.jsonl", 30, processes)
    begun = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes, timeout=90)
    assert time.monotonic() - begun < 60
    assert [status for status, _ in results] == [130, 130], results
    assert "the same command resumes" in results[0][1]

    text = run("sft", tmp_path, *LONG, processes=1)
    assert "resuming at step" in text
    same_numbers(folder, uninterrupted)


def test_a_stage_that_does_not_divide_its_work_refuses_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="DPO runs as one process, on all of its devices"):
        dpo.main(None)


class Watched(list):
    """A list that notes which items were read."""

    def __init__(self, items):
        super().__init__(items)
        self.read: set[int] = set()

    def __getitem__(self, index):
        self.read.add(index)
        return super().__getitem__(index)


def documents(count: int) -> list[Encoded]:
    """Different documents of different lengths."""
    return [
        Encoded(np.full(2 + i % 5, 10 + i, np.int32), np.ones(2 + i % 5, bool))
        for i in range(count)
    ]


def packed(items):
    """Twenty documents, one per row."""
    return PackedBatches(items, batch_size=8, length=6, seed=1, packed=False)


def pairs(items):
    """Pairs in two buckets, with filler at the end."""
    return PairBatches(items, max_tokens=128, min_pairs=4, max_pairs=8, seed=1, multiple_of=4)


def prompts(items):
    """Prompts in two buckets."""
    return PromptBatches(items, batch_size=8, seed=1, buckets=(4, 8))


def pair_items(count: int) -> list[EncodedPair]:
    """Pairs of a document and the next one."""
    several = documents(count + 1)
    return [EncodedPair(several[i], several[i + 1], 0.0) for i in range(count)]


@pytest.mark.parametrize(
    ("make", "items"),
    [
        (packed, documents(20)),
        (pairs, pair_items(19)),
        (prompts, [document.tokens for document in documents(20)]),
    ],
)
def test_each_process_reads_only_its_part_of_every_batch(make, items):
    """The parts make up the batch; together the processes read every item once."""
    whole, epoch = make(items), []
    for _ in range(whole.steps_per_epoch):
        epoch.append(next(whole))
    read = []
    parts = []
    for process in range(PROCESSES):
        watched = Watched(items)
        batches = make(watched).share(
            lambda rows, p=process: slice(p * rows // PROCESSES, (p + 1) * rows // PROCESSES)
        )
        watched.read.clear()
        parts.append([next(batches) for _ in epoch])
        read.append(set(watched.read))
        assert batches.state() == whole.state()  # a position is one of whole batches
    for number, batch in enumerate(epoch):
        for name, array in batch.items():
            joined = np.concatenate([parts[p][number][name] for p in range(PROCESSES)])
            np.testing.assert_array_equal(joined, array)
    assert read[0] | read[1] == set(range(len(items)))
    # The last batch of prompts is filled up with others of the epoch.
    assert len(read[0] & read[1]) <= (8 if make is prompts else 0)
