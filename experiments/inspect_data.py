"""Shows what a config trains on: examples with their loss masks, lengths, what was dropped.

  python -m experiments.inspect_data --config configs/sft.py:quickstart --count 3

Trained tokens are green, what is only read is grey; without a terminal or with NO_COLOR set, the
trained stretches are enclosed in [[ and ]].
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import common
from experiments import command
from experiments.settings import PairData, PromptData
from rlhf_jax.data.inspect import legend, lengths_line, render, use_color
from rlhf_jax.data.store import lengths_of
from rlhf_jax.data.tokenizer import load_tokenizer, train_bpe


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a tokenizer comes from.

    Attributes:
      folder: folder of a model that has it; empty if there is none.
      stage: argument of configs/sft.py, whose run would train it.
    """

    folder: str
    stage: str


def tokenizer_of(origin: Origin) -> Any:
    """The tokenizer that the experiment would use; trained here where no run has saved it yet."""
    folder = origin.folder
    if folder and (Path(folder).exists() or not folder.startswith("runs/")):
        return load_tokenizer(folder)
    if folder:
        print(f"{folder} is missing: training the tokenizer of configs/sft.py:{origin.stage}")
    config = importlib.import_module("configs.sft").get_config(origin.stage)
    sft = command.open_config("sft", config, settings_of("sft"))
    if sft.inputs.model:
        return load_tokenizer(sft.inputs.model)
    return train_bpe(sft.task().texts(), sft.tokenizer.vocab_size)


def settings_of(experiment: str) -> Any:
    """The dataclass of its keys."""
    return importlib.import_module(f"experiments.{experiment}").Settings


def examples_of(settings: Any, tokenizer: Any, split: str) -> Sequence[Any]:
    """Pairs, prompts or documents: what the config's data section is for."""
    task, data = settings.task(), settings.data
    if isinstance(data, PairData):
        pairs = task.preferences(tokenizer, split, max_length=data.max_length, count=data.pairs)
        return pairs.loaded()
    if isinstance(data, PromptData):
        asked = settings.prompt_task()
        return asked.prompts(tokenizer, split, max_length=data.longest_prompt).loaded()
    return task.documents(tokenizer, split, max_length=data.max_length).loaded()


def main(config: ConfigDict, count: int, split: str) -> None:
    """Prints `count` examples of a split."""
    experiment = config.get("experiment") or "sft"
    settings = command.open_config(experiment, config, settings_of(experiment))
    origin = Origin(settings.inputs.model, common.stage_argument("sft", settings))
    tokenizer = tokenizer_of(origin)
    examples = examples_of(settings, tokenizer, split)
    print(lengths_line(lengths_of(examples)))
    color = use_color(sys.stdout)
    print(f"\n{legend(color=color)}")
    for number, example in enumerate(examples[:count]):
        print(f"\n--- {split} {number}\n{render(example, tokenizer, color=color)}")


if __name__ == "__main__":
    COUNT = flags.DEFINE_integer("count", 3, "how many examples to show", lower_bound=0)
    SPLIT = flags.DEFINE_string("split", "train", "train, validation or test")
    command.cli(
        lambda config: main(config, COUNT.value, SPLIT.value),
        default="configs/sft.py:quickstart",
    )
