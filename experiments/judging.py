"""The judges of a run: found, built where missing, and kept apart from what the run learns from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs import common
from configs import reward_model as reward_model_configs
from configs.common import SMOLLM2
from experiments import folders, stages
from experiments.settings import Shared
from rlhf_jax.data.splits import normalise
from rlhf_jax.evaluation.judges import GOLD, LANGUAGE_MODEL, REWARD_MODEL, Judge, make_judges
from rlhf_jax.runtime import distributed
from rlhf_jax.tasks import TaskConfig, make_task
from rlhf_jax.training.record import read_config

# Keys of `config.data` as a run keeps them.
Data = Mapping[str, Any]


def load_judges(names: tuple[str, ...], settings: Shared) -> dict[str, Judge]:
    """Judges by name, see `make_judges` and `require_judges`."""
    return make_judges(names, settings=require_judges(names, settings))


def require_judges(names: tuple[str, ...], settings: Shared) -> dict[str, dict[str, Any]]:
    """Finds the models of judges: SmolLM2, reward models; gold is built where it is missing.

    Args:
      names: as a config has them.
      settings: of the run that they are to judge.

    Returns:
      Name -> keywords of `make_judge`.

    Raises:
      ValueError: a reward model that is to judge has learned from texts that the policy, or the
        reward model that it is trained against, learns from; or the task has no gold reward model.
      FileNotFoundError: a model is missing and is not to be built; names the command.
    """
    found: dict[str, dict[str, Any]] = {}
    build = getattr(getattr(settings, "inputs", None), "build", False)
    for name in names:
        kind, _, folder = name.partition(":")
        if name == LANGUAGE_MODEL:
            model = os.path.join(settings.root, SMOLLM2)
            stages.require(model)
            found[name] = {"default_model": model}
        if kind in (REWARD_MODEL, GOLD):
            argument = "" if folder else gold_argument(settings.scale, settings.data.source)
            argument = (
                ",".join([argument, *common.root_argument(settings.root)]) if argument else ""
            )
            folder = folder or model_folder(argument)
            check_apart(name, folder, data_of(folder, argument), settings)
            found[name] = reward_model_keywords(folder, argument, build=build)
    return found


def gold_argument(scale: str, source: str = "reviews") -> str:
    """The argument of configs/reward_model.py that makes the gold reward model of a scale.

    Raises:
      ValueError: the scale, or the source, has none.
    """
    variant = make_task(TaskConfig(source)).variant
    parts = [common.scale_of_stage("reward_model", scale), *([variant] if variant else []), "gold"]
    argument = ",".join(parts)
    trained_on = reward_model_configs.get_config(argument).data.source
    if type(make_task(TaskConfig(source))) is not type(make_task(TaskConfig(trained_on))):
        raise ValueError(
            f"the judge 'gold' has learned from {trained_on}, and data.source={source!r} is "
            "another task: judges=('reward_model:FOLDER',) names a reward model of your own"
        )
    return argument


def model_folder(argument: str) -> str:
    """Where the reward model of an argument is saved."""
    return common.resolve(reward_model_configs.get_config(argument)).workdir + "/model"


def reward_model_keywords(folder: str, argument: str = "", *, build: bool) -> dict[str, Any]:
    """Keywords of `make_judge` for a reward model: where it is, and what the system asks of it.

    Args:
      folder: of the model.
      argument: of the config file that makes it; empty where none does.
      build: whether to make it here where it is missing.
    """
    stage = "reward_model" if argument else ""
    stages.require(folder, stage=stage, argument=argument, build=build)
    return {
        "default_model": folder,
        "instruction": (data_of(folder) or {}).get("instruction", ""),
    }


def data_of(folder: str, argument: str = "") -> Data | None:
    """The data of a reward model, made or to be made; None where no run here makes it.

    Args:
      folder: of the model.
      argument: of configs/reward_model.py, which may make it.
    """
    if folders.is_run(folder):
        return _ranked(read_config(Path(folder).parent / "config.json")["config"])
    if argument and model_folder(argument) == folder:
        return _ranked(common.resolve(reward_model_configs.get_config(argument)).to_dict())
    return None


def _ranked(config: Mapping[str, Any]) -> Data:
    """The data of a run; what a language model labelled has the source of its labels."""
    labels = config["inputs"].get("labels", "")
    return {**config["data"], **({"source": f"jsonl:{labels}"} if labels else {})}


def learned_from(settings: Shared) -> tuple[str, Data | None] | None:
    """Where the preferences come from that a policy is trained to please; None without a policy.

    Returns:
      The folder of a reward model, or of the run itself; and the data, None where not known.
    """
    folder = getattr(getattr(settings, "inputs", None), "reward_model", "")
    if folder:
        return folder, data_of(folder, argument_of_reward_model(settings))
    if settings.experiment == "dpo":
        return settings.workdir, dataclasses.asdict(settings.data)
    return None


def argument_of_reward_model(settings: Shared) -> str:
    """The argument of configs/reward_model.py that makes the reward model of a run."""
    variant = getattr(getattr(settings, "inputs", None), "reward_variant", "")
    return common.stage_argument("reward_model", settings, *((variant,) if variant else ()))


def check_apart(name: str, folder: str, data: Data | None, settings: Shared) -> None:
    """Refuses a reward model as judge that has read what the policy is trained to please.

    Where it is not known what one of them has read, that is said and the run goes on.

    Args:
      name: of the judge.
      folder: of its model.
      data: of its training; None where not known.
      settings: of the run that it is to judge.

    Raises:
      ValueError: they have texts in common, or are one model.
    """
    learned = learned_from(settings)
    if learned is None:
        return
    other, others_data = learned
    shared: str | None = None
    if distributed.is_main():
        shared = "is" if other == folder else _in_common(data, others_data)
    shared = distributed.from_main(shared)
    if shared is None:
        print(f"note: whether the judge {name!r} has learned from texts of {other} is not known")
    elif shared:
        what = f"is {other}" if shared == "is" else f"has learned from {shared} texts of {other}"
        raise ValueError(
            f"the judge {name!r} {what}, which the policy learns from: add the variant half, whose "
            "texts the judge gold has not read, or name another judge"
        )


def _in_common(one: Data | None, other: Data | None) -> str | None:
    """How many training texts two runs have in common, in words; None where it is not known."""
    if one is None or other is None:
        return None
    texts, others = training_texts(one), training_texts(other)
    if texts is not None and others is not None:
        both = len(texts & others)
        return f"{both:,} of the {len(others):,}" if both else ""
    return "the" if one["source"] == other["source"] else None


def training_texts(data: Data) -> set[str] | None:
    """What people rated among the training rows of a run, normalised; None where nobody did."""
    names = {field.name for field in dataclasses.fields(TaskConfig)}
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names
    }
    try:
        rated = make_task(TaskConfig(**given)).rated_texts("train")
    except (ValueError, OSError):  # Its rows are where they were no more.
        return None
    return None if rated is None else {normalise(text) for text in rated[0]}
