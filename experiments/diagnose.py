"""Which stage is bad? Reads the folders of SFT, reward model and PPO, and prints one page.

  python -m experiments.diagnose runs/ppo_max/quickstart

The stages before are found in the run's config.json. Each finding has its evidence and what to
change first; the worst stage comes first, since the stages after it cannot be better.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import command, reporting
from rlhf_jax.evaluation import diagnosis
from rlhf_jax.evaluation.diagnosis import Finding, HeldOutPairs
from rlhf_jax.runtime.metrics import METRICS_FILE, read_metrics
from rlhf_jax.training.record import read_config, read_summary


def read_run(folder: Path) -> tuple[diagnosis.Log, dict[str, Any]]:
    """Log and summary of a run folder; empty where a model is of no run."""
    log = read_metrics(folder) if (folder / METRICS_FILE).exists() else {}
    return log, read_summary(folder) or {}


def read_pairs(folder: Path) -> HeldOutPairs | None:
    """What the reward model made of held-out pairs; None where its run left nothing."""
    path = folder / reporting.HELD_OUT
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return HeldOutPairs(**{**arrays, "scale": float(arrays["scale"])})


def stage_folder(inputs: Mapping[str, Any], key: str) -> Path:
    """The run folder of a model that a run started from."""
    return Path(inputs[key]).parent


def diagnose(folder: Path) -> list[Finding]:
    """Findings on a run of PPO and the stages before it.

    Raises:
      ValueError: the folder holds no run of PPO.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no run (no config.json): give the folder of a PPO run")
    config = read_config(path)["config"]
    if config.get("experiment") != "ppo_max":
        raise ValueError(f"{folder} is a run of {config.get('experiment')}: give that of a PPO run")
    inputs = config["inputs"]
    log, summary = read_run(folder)
    if not log:
        raise ValueError(f"{folder} has logged nothing yet")
    reward_model = stage_folder(inputs, "reward_model")
    pairs = read_pairs(reward_model)
    answers = summary.get("statistics", {}).get("SFT", {})
    return [
        *diagnosis.diagnose_sft(*read_run(stage_folder(inputs, "reference")), answers),
        *diagnosis.diagnose_reward_model(*read_run(reward_model), pairs),
        *diagnosis.diagnose_ppo(log, pairs),
    ]


def main(folder: str) -> None:
    """Prints the page."""
    findings = diagnose(Path(folder))
    print(f"{folder}\n\n{diagnosis.page(findings)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of a run of experiments.ppo_max, finished or not")
    try:
        main(parser.parse_args().folder)
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
