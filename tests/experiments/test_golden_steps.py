"""A golden first step of each stage: what a move of code must not change.

Each stage runs at `tiny` (float32, one CPU device) for its first step through its own `main`; the
numbers it logs, and the sum and norm of the weights it saves, are compared with golden_steps.json
to 1e-6. A change that is meant to move them says so in its commit and rewrites the file:

  python -m tests.experiments.test_golden_steps

Sums differ in the last bits between processors and versions of jax. The file says what it was
written on; elsewhere the numbers must agree to 1e-3, which still catches a changed formula.
"""

import contextlib
import json
import platform
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import dpo as dpo_configs
from configs import ppo_max as ppo_configs
from configs import reward_model as reward_configs
from configs import sft as sft_configs
from experiments import dpo, ppo_max, reward_model, sft
from tests import conftest

assert conftest  # its settings also hold when this file rewrites the numbers

GOLDEN = Path(__file__).with_name("golden_steps.json")
STAGES = ("sft", "reward_model", "ppo_max", "dpo")


def written_on() -> dict[str, str]:
    """What decides the last bits: processor, generation included, and version of jax."""
    processor = platform.machine()
    with contextlib.suppress(OSError):
        # Generations of one maker may share their model name.
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        told = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
        parts = ("model name", "cpu family", "model")
        processor = ", ".join(told[part] for part in parts if part in told)
    return {"processor": processor, "jax": jax.__version__}


def first_steps(root: Path) -> dict[str, dict[str, float]]:
    """Runs the first step of each stage below `root`; numbers by stage."""
    one = "tiny,sharding.devices=1"
    config = sft_configs.get_config(f"{one},train.steps=1")
    config.workdir = str(root / "sft")
    sft.main(config)
    model = str(root / "sft" / "model")
    config = reward_configs.get_config(f"{one},train.steps=1")
    config.workdir, config.inputs.model = str(root / "reward_model"), model
    reward_model.main(config)
    scorer = str(root / "reward_model" / "model")
    # The first iteration trains the critic alone.
    config = ppo_configs.get_config(f"{one},train.iterations=2")
    config.workdir = str(root / "ppo_max")
    config.inputs.update(model=model, reference=model, reward_model=scorer)
    ppo_max.main(config)
    config = dpo_configs.get_config(f"{one},train.steps=1")
    config.workdir, config.inputs.model = str(root / "dpo"), model
    config.compare.update(ppo_max=str(root / "none"), reward_model=scorer)
    dpo.main(config)
    return {stage: numbers_of(root / stage) for stage in STAGES}


def numbers_of(folder: Path) -> dict[str, float]:
    """What a run logged, and the sum and norm of its weights in float64."""
    numbers = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        numbers |= {
            f"{step}/{name}": value
            for name, value in row.items()
            if isinstance(value, int | float) and name != "time"
        }
    leaves = [leaf.astype(np.float64) for leaf in load_weights(folder / "model").values()]
    numbers["weights/sum"] = float(sum(leaf.sum() for leaf in leaves))
    numbers["weights/norm"] = float(np.sqrt(sum((leaf**2).sum() for leaf in leaves)))
    return numbers


def load_weights(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a saved model."""
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays |= load_file(path)
    return arrays


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The numbers of this checkout."""
    return first_steps(tmp_path_factory.mktemp("golden"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_first_step_is_the_golden_one(steps, stage):
    golden = json.loads(GOLDEN.read_text())
    tolerance = 1e-6 if golden["written_on"] == written_on() else 1e-3
    wanted, found = golden[stage], steps[stage]
    assert sorted(wanted) == sorted(found)
    for name, value in wanted.items():
        np.testing.assert_allclose(
            found[name], value, rtol=tolerance, atol=tolerance, err_msg=f"{stage} {name}"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = first_steps(Path(folder))
    GOLDEN.write_text(json.dumps({"written_on": written_on(), **found}, indent=1) + "\n")
