"""Runs that are killed at drawn moments, and what they come to: the run that nobody killed.

SIGKILL leaves no time for a last word. It comes while steps run, while a checkpoint is written and
while the model is saved; the same command goes on. Another draw: KILL_SEED=7 pytest FILE.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import dpo as dpo_configs
from configs import ppo_max as ppo_configs
from configs import reward_model as reward_configs
from configs import sft as sft_configs
from experiments import dpo, ppo_max, reward_model, sft
from rlhf_jax.runtime import host_memory
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.training.run import Run
from tests.experiments.test_golden_steps import load_weights

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("KILL_SEED", "0"))
STAGES = {
    "sft": (sft, sft_configs),
    "reward_model": (reward_model, reward_configs),
    "ppo_max": (ppo_max, ppo_configs),
    "dpo": (dpo, dpo_configs),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, for all processes of this file."""
    return tmp_path_factory.mktemp("cache")


def inputs_of(stage: str, chain, root: Path) -> dict[str, str]:
    """The keys that name what a stage reads."""
    model = str(chain.sft)
    scorer = str(chain.reward_model)
    return {
        "sft": {},
        "reward_model": {"inputs.model": model},
        "ppo_max": {
            "inputs.model": model,
            "inputs.reference": model,
            "inputs.reward_model": scorer,
        },
        "dpo": {
            "inputs.model": model,
            "compare.ppo_max": str(root / "none"),
            "compare.reward_model": str(root / "none"),
        },
    }[stage]


def run_here(stage: str, workdir: Path, keys: dict[str, str]) -> None:
    """Runs a stage in this process, from its beginning or from where it stopped."""
    module, configs = STAGES[stage]
    config = configs.get_config("tiny,sharding.devices=1,log.tensorboard=False")
    config.workdir = str(workdir)
    for key, value in keys.items():
        group, name = key.split(".")
        config[group][name] = value
    module.main(config)


def killed(stage: str, workdir: Path, keys: dict[str, str], cache: Path, moment, delay) -> None:
    """Runs the command of a stage, and kills it some seconds after `moment()` holds."""
    flags = [f"--config.{key}={value}" for key, value in {"workdir": workdir, **keys}.items()]
    config = f"configs/{stage}.py:tiny,sharding.devices=1,log.tensorboard=False"
    with (workdir.parent / "output").open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.{stage}", "--config", config, *flags],
            cwd=ROOT,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
            stdout=output,
            stderr=output,
        )
        while process.poll() is None and not moment():
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, (workdir.parent / "output").read_text()[-3000:]


def logged(workdir: Path, lines: int):
    """So many steps stand in the log."""
    log = workdir / "metrics.jsonl"
    return lambda: log.exists() and log.read_bytes().count(b"\n") >= lines


def writing(workdir: Path):
    """A checkpoint is being written; what an earlier kill cut off is removed first."""
    seen_without = []

    def holds() -> bool:
        if any((workdir / "checkpoints").glob("*tmp*")):
            return bool(seen_without)
        seen_without[:] = [True]
        return False

    return holds


def saving(workdir: Path):
    """The model is being saved, or was a moment ago."""
    names = (".model.partial", "model")
    return lambda: any((workdir / name).exists() for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "second"), tuple(zip(STAGES, (writing, saving) * 2, strict=True))
)
def test_killed_runs_end_as_the_one_that_was_not(chain, cache, tmp_path, stage, second):
    print(f"KILL_SEED={SEED}")  # shown where the test fails
    draw = random.Random(f"{SEED} {stage}")
    keys, parts = inputs_of(stage, chain, tmp_path), tmp_path / "parts"
    whole = {"sft": chain.sft.parent, "reward_model": chain.reward_model.parent}.get(stage)
    if whole is None:
        whole = tmp_path / "whole"
        run_here(stage, whole, keys)

    killed(stage, parts, keys, cache, logged(parts, draw.randint(1, 2)), draw.uniform(0, 0.02))
    killed(stage, parts, keys, cache, second(parts), draw.uniform(0, 0.01))
    assert not (parts / "summary.json").exists()
    run_here(stage, parts, keys)

    assert (parts / "summary.json").exists()
    weights, others = load_weights(whole / "model"), load_weights(parts / "model")
    assert weights.keys() == others.keys() and weights
    for name, array in weights.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)
    one, other = read_metrics(whole), read_metrics(parts)
    assert other["step"].tolist() == list(range(len(other["step"])))  # none doubled, none lost
    for name in one.keys() - {"time"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.slow
def test_memory_of_the_host_does_not_grow_with_iterations(chain, tmp_path, monkeypatch):
    """Neither arrays, nor programs, nor the log are kept: 120 iterations cost a few MiB at most."""
    resident, original = {}, Run.log

    def watched(self, step, metrics):
        original(self, step, metrics)
        host_memory.release_freed_memory()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident[step + 1] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    monkeypatch.setattr(Run, "log", watched)
    sizes = {"iterations": 150, "prompts_per_iteration": 4, "minibatch": 4}
    model = str(chain.sft)
    config = ppo_configs.get_config("tiny,sharding.devices=1,log.tensorboard=False")
    config.workdir = str(tmp_path / "run")
    config.inputs.update(model=model, reference=model, reward_model=str(chain.reward_model))
    config.train.update(sizes)
    config.sampling.max_new_tokens = 4
    config.eval.update(every=1000, prompts=4, final_prompts=4, samples=1)
    config.checkpoint.every = 60
    ppo_max.main(config)
    assert resident[150] - resident[30] < 6, resident
