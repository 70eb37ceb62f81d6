"""Examples to batches: endless ones to train on, or all of them once.

Every batch size is global: it counts rows over all devices and all accumulated microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.examples import Examples
from rlhf_jax.data.packing import Arrays
from rlhf_jax.data.schemas import Encoded, EncodedPair, EncodedPrompt
from rlhf_jax.data.shapes import PackedBatches, PairBatches, PromptBatches, pad_prompts
from rlhf_jax.data.streaming import StreamedBatches


def packed_batches(
    examples: Sequence[Encoded],
    *,
    rows: int,
    length: int,
    seed: int,
    pad_id: int,
    packed: bool = True,
) -> PackedBatches | StreamedBatches:
    """Returns endless batches of `rows` rows of documents; see `PackedBatches`."""
    settings = {"batch_size": rows, "length": length, "pad_id": pad_id, "packed": packed}
    return _batches(examples, PackedBatches, seed, settings)


def pair_batches(
    examples: Sequence[EncodedPair],
    *,
    max_tokens: int,
    min_pairs: int,
    max_pairs: int,
    seed: int,
    pad_id: int,
    multiple_of: int,
    num_buckets: int = 3,
    longest: int | None = None,
) -> PairBatches | StreamedBatches:
    """Returns endless token-balanced batches of pairs; see `PairBatches`.

    Args:
      examples: The pairs.
      max_tokens: The most tokens of a batch.
      min_pairs: The fewest pairs of a batch.
      max_pairs: The most pairs of a batch.
      seed: Of the shuffling.
      pad_id: Written into padding.
      multiple_of: Batches hold a multiple of so many pairs.
      num_buckets: The most lengths, chosen for these pairs; not for streamed ones.
      longest: The most tokens of a side. Of streamed pairs the lengths that fit best cannot be
      known: they take a quarter, a half and the whole of it.

    Raises:
      ValueError: Pairs are streamed and `longest` is missing; or see `PairBatches`.
    """
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_pairs": min_pairs,
        "max_pairs": max_pairs,
        "pad_id": pad_id,
        "multiple_of": multiple_of,
        "num_buckets": num_buckets,
    }
    if isinstance(examples, Examples) and examples.streamed:
        if longest is None:
            raise ValueError("lengths of streamed pairs are not known: give longest=max_length")
        settings["buckets"] = tuple(sorted({max(1, longest // part) for part in (4, 2, 1)}))
    return _batches(examples, PairBatches, seed, settings)


def prompt_batches(
    examples: Sequence[EncodedPrompt],
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    pad_id: int,
) -> PromptBatches | StreamedBatches:
    """Returns endless batches of prompts, left padded to a length of `buckets`."""
    settings = {"batch_size": batch_size, "buckets": tuple(buckets), "pad_id": pad_id}
    return _batches(examples, PromptBatches, seed, settings)


def _batches(examples: Sequence[Any], make: Any, seed: int, settings: dict[str, Any]) -> Any:
    """Batches of `Examples`, or of a list."""
    known = examples if isinstance(examples, Examples) else Examples(examples)
    return known.batches(make, seed=seed, **settings)


def _rows_of(examples: Sequence[Any]) -> Sequence[Any]:
    """What is below `Examples`: a store knows its lengths without reading a row."""
    return examples.loaded().rows if isinstance(examples, Examples) else examples


def once_packed(
    documents: Sequence[Encoded], *, rows: int, length: int, pad_id: int
) -> list[Arrays]:
    """Returns all documents once, packed like training batches, for evaluation."""
    batches = PackedBatches(
        _rows_of(documents), batch_size=rows, length=length, seed=0, pad_id=pad_id
    )
    return list(batches.once())


def once_pairs(
    pairs: Sequence[EncodedPair],
    *,
    max_tokens: int,
    min_pairs: int,
    max_pairs: int,
    pad_id: int,
    multiple_of: int,
    num_buckets: int = 3,
) -> list[Arrays]:
    """Returns all pairs once, for evaluation; for the settings see `pair_batches`."""
    batches = PairBatches(
        _rows_of(pairs),
        max_tokens=max_tokens,
        min_pairs=min_pairs,
        max_pairs=max_pairs,
        seed=0,
        pad_id=pad_id,
        multiple_of=multiple_of,
        num_buckets=num_buckets,
    )
    return list(batches.once())


def fixed_prompts(
    prompts: Sequence[EncodedPrompt], batch_size: int, length: int, pad_id: int, split: str
) -> list[Arrays]:
    """Returns all prompts in whole batches of one length, always the same.

    Args:
      prompts: Of a split that is not trained on.
      batch_size: Prompts of a batch; what does not fill the last one is left out.
      length: To which they are padded on the left.
      pad_id: Written into padding.
      split: Its name, for the error.

    Raises:
      ValueError: There are fewer prompts than one batch has.
    """
    whole = len(prompts) - len(prompts) % batch_size
    if not whole:
        raise ValueError(
            f"{split} has {len(prompts)} prompts, fewer than one batch of {batch_size}: lower "
            "train.prompts_per_iteration (ppo_max) or eval.batch (dpo)"
        )
    return [
        pad_prompts(prompts[i : i + batch_size], length, pad_id=pad_id)
        for i in range(0, whole, batch_size)
    ]


def each_repeated(batch: Arrays, times: int) -> Arrays:
    """Repeats every row `times` times in a row: samples of one prompt stand side by side.

    Args:
      batch: Arrays `[B, ...]`.
      times: Samples per prompt.

    Returns:
      Arrays `[B * times, ...]`.
    """
    return {name: np.repeat(rows, times, axis=0) for name, rows in batch.items()}
