"""Runs the workers of a case in turn and measures them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.cases import MODELS, Case
from benchmarks.environments import cache_folder, python_of

ROOT = Path(__file__).parent.parent
WORKERS = {
    "ours": ("-m", "benchmarks.workers.ours"),
    "torch": (str(ROOT / "benchmarks" / "workers" / "with_torch.py"),),
    "tunix": (str(ROOT / "benchmarks" / "workers" / "with_tunix.py"),),
}
REST = 0.2  # seconds between turns: threads of the one that ran fall asleep


def model_folder(name: str) -> Path:
    """A Hugging Face folder of the model with random weights, and a tokenizer of made-up words."""
    folder = cache_folder() / "models" / name
    if (folder / "tokenizer.json").exists():
        return folder
    import jax
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rlhf_jax.models.config import ModelConfig
    from rlhf_jax.models.files.hf_weights import save_model
    from rlhf_jax.models.transformer import Transformer

    config = ModelConfig(**MODELS[name])
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(jax.jit(lambda key: Transformer(config, key))(jax.random.key(0)), folder)
    special = ["<pad>", "<eos>", "<unk>", "<bos>"]
    words = special + [f"w{i}" for i in range(len(special), config.vocab_size)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Not in config.json: there it would make `generate` stop at <eos>.
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


class Worker:
    """One library in a process of its own, waiting for its turn.

    Args:
      library: "ours" or the name of an environment.
      spec: the case's, with the folder of the model in place of its name.
      cores: CPU cores that it may use.
      log: where its standard error goes.
    """

    def __init__(self, library: str, spec: dict, cores: int, log: Path):
        python = sys.executable if library == "ours" else python_of(library)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = str(ROOT) if library == "ours" else ""
        self.library, self._log = library, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, *WORKERS[library], json.dumps(spec), f"--cores={cores}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        self.facts = self._read()

    def turn(self) -> float:
        """Seconds of one run."""
        self._write("go")
        return self._read()["seconds"]

    def end(self) -> dict:
        """Stops the process; returns its last message."""
        self._write("end")
        last = self._read()
        self._process.wait(30)
        return last

    def kill(self) -> None:
        """Stops the process whatever it does; a process that has ended is left alone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _write(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"the worker for {self.library} failed: {tail}; see {self._log}")
        return json.loads(line)


def measure(
    case: Case,
    libraries: list[str],
    *,
    cores: int = 2,
    warmup: int = 2,
    repeats: int = 7,
    say: Callable[[str], None] = print,
) -> dict:
    """Runs all libraries on a case, alternately.

    Args:
      case: the case.
      libraries: "ours" and names of environments.
      cores: CPU cores for each; they never run at the same time.
      warmup: runs after the first (which compiles) that are not counted.
      repeats: runs that are.
      say: called with a line about each result.

    Returns:
      The contents of the results file: for each library the first run, all counted runs, their
      median and extremes in seconds, peak memory in bytes, versions.
    """
    spec = case.spec | {"model": str(model_folder(case.spec["model"]))}
    logs = cache_folder() / "logs"
    logs.mkdir(exist_ok=True)
    workers: list[Worker] = []
    try:
        for library in libraries:
            workers.append(Worker(library, spec, cores, logs / f"{case.name}-{library}.txt"))
        times = alternate(workers, 1 + warmup + repeats)
        results = {}
        for worker in workers:
            first, *rest = times[worker.library]
            results[worker.library] = summary(first, rest[warmup:]) | worker.end() | worker.facts
    finally:
        for worker in workers:
            worker.kill()
    for library, result in results.items():
        say(f"{case.name:22} {library:6} {tell(result, case.tokens)}")
    return {"title": case.title, "tokens": case.tokens, "spec": case.spec, "results": results}


def alternate(workers: list[Worker], rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn of each worker: A B A B."""
    times: dict[str, list[float]] = {worker.library: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            times[worker.library].append(worker.turn())
            time.sleep(REST)
    return times


def summary(first: float, seconds: list[float]) -> dict:
    """Median, fastest and slowest of the counted runs."""
    return {
        "first_s": first,
        "seconds": seconds,
        "median_s": float(np.median(seconds)),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
    }


def tell(result: dict, tokens: int) -> str:
    """One line about one library."""
    return (
        f"{result['median_s']:8.3f} s [{result['fastest_s']:.3f}, {result['slowest_s']:.3f}]  "
        f"{tokens / result['median_s']:7.0f} tok/s  first {result['first_s']:.1f} s  "
        f"{result['peak_bytes'] / 2**30:.2f} GiB"
    )
