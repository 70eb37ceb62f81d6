"""Shows what a config trains on: examples with their loss masks, lengths, what was dropped.

  python -m experiments.inspect_data --config configs/sft.py:quickstart --count 3

Trained tokens are green, what is only read is grey; without a terminal or with NO_COLOR set, the
trained stretches stand between [[ and ]].
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments import data, harness
from rlhf_jax.data.inspect import legend, lengths_line, render, use_color
from rlhf_jax.data.schemas import EncodedPair
from rlhf_jax.data.tokenizer import load_tokenizer, train_bpe


def tokenizer_of(config: ConfigDict) -> Any:
    """The tokenizer that the experiment would use; trained here where no run has saved it yet."""
    inputs = config.inputs
    folder = next(inputs[key] for key in ("model", "reference") if key in inputs)
    if folder and (Path(folder).exists() or not folder.startswith("runs/")):
        return load_tokenizer(folder)
    sft = config
    if "tokenizer" not in config:
        print(f"{folder} is missing: training the tokenizer of configs/sft.py:{inputs.variant}")
        sft = importlib.import_module("configs.sft").get_config(inputs.variant)
    if sft.inputs.model:
        return load_tokenizer(sft.inputs.model)
    return train_bpe(data.tokenizer_texts(sft), sft.tokenizer.vocab_size)


def examples_of(config: ConfigDict, tokenizer: Any, split: str) -> Sequence[Any]:
    """Pairs, prompts or documents: what the config's data section is for."""
    if "pairs" in config.data:
        return data.preference_pairs(config, tokenizer, split, config.data.pairs)
    if "prompt_buckets" in config.data:
        return data.prompts(config, tokenizer, split)
    return data.sft_documents(config, tokenizer, split)


def length_of(example: Any) -> int:
    """Tokens of a document or prompt; of a pair, those of the longer side."""
    if isinstance(example, EncodedPair):
        return max(len(example.chosen.tokens), len(example.rejected.tokens))
    return len(example.tokens) if hasattr(example, "tokens") else len(example)


def main(config: ConfigDict, count: int, split: str) -> None:
    """Prints `count` examples of a split."""
    tokenizer = tokenizer_of(config)
    examples = examples_of(config, tokenizer, split)
    print(lengths_line([length_of(example) for example in examples]))
    color = use_color(sys.stdout)
    print(f"\n{legend(color=color)}")
    for number, example in enumerate(examples[:count]):
        print(f"\n--- {split} {number}\n{render(example, tokenizer, color=color)}")


if __name__ == "__main__":
    COUNT = flags.DEFINE_integer("count", 3, "how many examples to show", lower_bound=0)
    SPLIT = flags.DEFINE_string("split", "train", "train, validation or test")
    harness.cli(
        lambda config: main(config, COUNT.value, SPLIT.value),
        default="configs/sft.py:quickstart",
    )
