"""Examples to batches of few static shapes, for fine-tuning, for pairs and for prompts.

The functions at the end take `Examples`: endless batches to train on, or all of them once.

Every batch size is global: it counts rows over all devices and all accumulated microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.endless import Batches, Shape, positive
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.packing import (
    Arrays,
    assign_buckets,
    bucket_lengths,
    fill_buckets,
    first_fit,
    lay_out,
    shuffled_groups,
    spread,
)
from rlhf_jax.data.schemas import Encoded, EncodedPair, EncodedPrompt
from rlhf_jax.data.store import lengths_of, total_tokens
from rlhf_jax.data.streaming import StreamedBatches

_FITTED = 16_384  # Documents that are packed together.


class PackedBatches(Batches):
    """Batches for supervised fine-tuning: several documents a row, or one.

    Each batch is {"tokens" [B, T] int32, "segments" [B, T] int32 (0 = padding), "loss_mask" [B, T]
    bool}. An epoch holds every document exactly once; its rows are spread over as few batches as
    hold them, evenly, and what is left of a batch is rows of padding.

    Args:
      encoded: the documents.
      batch_size: rows B, global.
      length: tokens T of a row.
      seed: of the shuffling.
      pad_id: written into padding.
      packed: several documents a row, by first fit in a new order each epoch.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        *,
        batch_size: int,
        length: int,
        seed: int,
        pad_id: int = 0,
        packed: bool = True,
    ):
        super().__init__(len(encoded), seed)
        self._encoded, self._packed = encoded, packed
        self._shape, self._pad_id = Shape(positive("batch_size", batch_size), length), pad_id
        self._lengths = lengths_of(encoded)
        first_fit([int(self._lengths.max())], length)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The one shape of all batches."""
        return (self._shape,)

    def _plan(self, generator: np.random.Generator) -> list[list[list[int]]]:
        order = generator.permutation(self._size)
        rows = [[int(i)] for i in order]
        if self._packed:
            # First fit takes time that grows with the square of its documents: some at a time.
            rows = [
                [int(some[position]) for position in row]
                for some in np.split(order, range(_FITTED, self._size, _FITTED))
                for row in first_fit(self._lengths[some].tolist(), self._shape.length)
            ]
        # First fit fills early rows best: mix them.
        shuffled = [rows[i] for i in generator.permutation(len(rows))]
        return spread(shuffled, self._shape.rows)

    def _collate(self, item: list[list[int]]) -> Arrays:
        filler: list[list[int]] = [[]] * (self._shape.rows - len(item))
        rows = [[self._encoded[i] for i in row] for row in self._mine(item + filler)]
        return lay_out(rows, self._shape.length, pad_id=self._pad_id)


class PairBatches(Batches):
    """Token-balanced batches for reward models and DPO: short pairs come in larger batches.

    Each batch is {"tokens" [B, 2, T] int32, "segments" [B, 2, T] int32, "loss_mask" [B, 2, T] bool,
    "margin" [B] float32, "p_chosen" [B] float32, "valid" [B] bool, "index" [B] int32}, padded on
    the right; side 0 is chosen, 1 is rejected. "index" says which of `pairs` a row is, so that
    whatever is known of each pair (log-probabilities under a reference) can be looked up; filler
    has index 0.

    Pairs that do not fill a batch of their bucket move up to the next; only batches of the longest
    bucket hold filler, whose rows are flagged invalid.

    Args:
      pairs: the pairs.
      max_tokens: the most tokens of a batch, padding included: 2 * B * T.
      min_pairs: the fewest rows B.
      max_pairs: the most rows B.
      seed: of the shuffling.
      pad_id: written into padding.
      num_buckets: the most shapes; the lengths waste the fewest tokens on these pairs.
      multiple_of: B is a multiple of it (devices).
      parts: microbatches: what does not divide by them as well is filled up, so that which pairs
        make a batch does not depend on how it is split.
      buckets: the lengths T, in place of num_buckets.

    Raises:
      ValueError: min_pairs of the longest bucket exceed max_tokens, or the three disagree.
    """

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        *,
        max_tokens: int,
        min_pairs: int,
        max_pairs: int,
        seed: int,
        pad_id: int = 0,
        num_buckets: int = 4,
        multiple_of: int = 1,
        parts: int = 1,
        buckets: Sequence[int] | None = None,
    ):
        super().__init__(len(pairs), seed)
        self._pairs, self._pad_id = pairs, pad_id
        self._filled_to = multiple_of * positive("parts", parts)
        lengths, self._used = self._measured(pairs)
        edges = tuple(buckets or bucket_lengths(lengths, num_buckets=num_buckets))
        self._bucket_of = assign_buckets(lengths, edges)
        self._shapes = tuple(
            _pair_shape(length, self._sides, max_tokens, min_pairs, max_pairs, multiple_of)
            for length in edges
        )

    # What a subclass with other groups than pairs says of them.
    _sides = 2

    def _measured(self, pairs: Sequence[Any]) -> tuple[np.ndarray, int]:
        """The longest side of each pair, int64 [n], and the tokens of all sides together."""
        return lengths_of(pairs), total_tokens(pairs)

    def _padded(self, pairs: Sequence[Any], shape: Shape) -> Arrays:
        """The arrays of some pairs."""
        return pad_pairs(pairs, shape, self._pad_id)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """One shape for each bucket, from the shortest to the longest."""
        return self._shapes

    def describe(self) -> str:
        """One line for the log: shapes, batches of an epoch and the share of padding."""
        plan = self._plan_of(self._epoch)
        room = sum(self._sides * self._shapes[b].rows * self._shapes[b].length for b, _ in plan)
        shapes = ", ".join(f"{shape.rows}x{shape.length}" for shape in self._shapes)
        return (
            f"{len(self._shapes)} shapes (pairs x tokens: {shapes}), {len(plan)} batches an epoch, "
            f"{1 - self._used / room:.0%} padding"
        )

    def _plan(self, generator: np.random.Generator) -> list[tuple[int, list[int]]]:
        groups = shuffled_groups(self._bucket_of, len(self._shapes), generator)
        plan = fill_buckets(groups, [shape.rows for shape in self._shapes])
        return [plan[i] for i in generator.permutation(len(plan))]

    def _collate(self, item: tuple[int, list[int]]) -> Arrays:
        bucket, members = item
        shape = self._shapes[bucket]
        rows = -(-shape.rows // self._filled_to) * self._filled_to
        filler = [-1] * (rows - len(members))
        mine = self._mine(members + filler)
        shape = Shape(len(mine), shape.length)
        batch = self._padded([self._pairs[i] for i in mine if i >= 0], shape)
        return batch | {"index": np.array([max(i, 0) for i in mine], dtype=np.int32)}


class PromptBatches(Batches):
    """Batches of prompts for roll-outs.

    Each batch is {"tokens" [B, P] int32, "mask" [B, P] bool}, padded on the left to the bucket's
    length P. Every row is a prompt: what does not fill a batch moves up to the next bucket, and the
    last batch of an epoch is filled with other prompts of the epoch.

    Args:
      prompts: int32 [T] each.
      batch_size: prompts B of a batch, global.
      seed: of the shuffling.
      pad_id: written into padding.
      buckets: the lengths P; by default at most `num_buckets` that waste the fewest tokens.
      num_buckets: see buckets.
      multiple: the lengths are multiples of it.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        batch_size: int,
        seed: int,
        pad_id: int = 0,
        buckets: Sequence[int] | None = None,
        num_buckets: int = 2,
        multiple: int = 8,
    ):
        super().__init__(len(prompts), seed)
        self._prompts, self._pad_id = prompts, pad_id
        lengths = lengths_of(prompts)
        edges = tuple(
            buckets or bucket_lengths(lengths, num_buckets=num_buckets, multiple=multiple)
        )
        self._bucket_of = assign_buckets(lengths, edges)
        self._shapes = tuple(Shape(positive("batch_size", batch_size), edge) for edge in edges)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """One shape for each bucket, from the shortest to the longest."""
        return self._shapes

    def _plan(self, generator: np.random.Generator) -> list[tuple[int, list[int]]]:
        groups = shuffled_groups(self._bucket_of, len(self._shapes), generator)
        rows = self._shapes[0].rows
        plan = fill_buckets(groups, [rows] * len(groups), even=False)
        bucket, members = plan[-1]
        if len(members) < rows:
            order = [int(i) for i in generator.permutation(self._size)]
            taken = set(members)
            others = [i for i in order if i not in taken] or members
            missing = rows - len(members)
            filled = members + [others[n % len(others)] for n in range(missing)]
            plan[-1] = (bucket, filled)
        return [plan[i] for i in generator.permutation(len(plan))]

    def _collate(self, item: tuple[int, list[int]]) -> Arrays:
        bucket, members = item
        chosen = [self._prompts[i] for i in self._mine(members)]
        return pad_prompts(chosen, self._shapes[bucket].length, pad_id=self._pad_id)


def pad_pairs(pairs: Sequence[EncodedPair], shape: Shape, pad_id: int = 0) -> Arrays:
    """Pads up to `shape.rows` pairs on the right; see `PairBatches` for what comes back."""
    documents = [[document] for pair in pairs for document in (pair.chosen, pair.rejected)]
    missing = shape.rows - len(pairs)
    flat = lay_out(documents + [[]] * (2 * missing), shape.length, pad_id=pad_id)
    batch = {name: array.reshape(shape.rows, 2, shape.length) for name, array in flat.items()}
    margins = [pair.margin for pair in pairs] + [0.0] * missing
    batch["margin"] = np.array(margins, dtype=np.float32)
    labels = [pair.p_chosen for pair in pairs] + [1.0] * missing
    batch["p_chosen"] = np.array(labels, dtype=np.float32)
    batch["valid"] = np.arange(shape.rows) < len(pairs)
    return batch


def pad_prompts(prompts: Sequence[EncodedPrompt], length: int, *, pad_id: int = 0) -> Arrays:
    """Pads prompts on the left: {"tokens" [B, length] int32, "mask" [B, length] bool}."""
    tokens = np.full((len(prompts), length), pad_id, dtype=np.int32)
    mask = np.zeros((len(prompts), length), dtype=bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return {"tokens": tokens, "mask": mask}


def _pair_shape(
    length: int, sides: int, max_tokens: int, min_pairs: int, max_pairs: int, multiple_of: int
) -> Shape:
    """Returns the rows of a bucket: as many as max_tokens and max_pairs allow."""
    if not 1 <= min_pairs <= max_pairs:
        raise ValueError(f"min_pairs={min_pairs}, max_pairs={max_pairs}: need 1 <= min <= max")
    positive("multiple_of", multiple_of)
    fit = min(max_tokens // (sides * length), max_pairs)
    rows = fit - fit % multiple_of
    if rows < min_pairs or not rows:
        least = -(-min_pairs // multiple_of) * multiple_of
        raise ValueError(
            f"max_tokens={max_tokens} and max_pairs={max_pairs} allow {rows} pairs of {sides} x "
            f"{length} tokens (a multiple of {multiple_of}), but min_pairs={min_pairs}: set "
            f"max_tokens>={sides * length * least} and max_pairs>={least}, or lower min_pairs or "
            "max_length"
        )
    return Shape(rows, length)


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
    parts: int = 1,
    num_buckets: int = 3,
    longest: int | None = None,
) -> PairBatches | StreamedBatches:
    """Returns endless token-balanced batches of pairs; see `PairBatches`.

    Args:
      examples: the pairs.
      max_tokens: the most tokens of a batch.
      min_pairs: the fewest pairs of a batch.
      max_pairs: the most pairs of a batch.
      seed: of the shuffling.
      pad_id: written into padding.
      multiple_of: batches hold a multiple of so many pairs.
      parts: microbatches, see `PairBatches`.
      num_buckets: the most lengths, chosen for these pairs; not for streamed ones.
      longest: the most tokens of a side. Of streamed pairs the lengths that fit best cannot be
      known: they take a quarter, a half and the whole of it.

    Raises:
      ValueError: pairs are streamed and `longest` is missing; or see `PairBatches`.
    """
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_pairs": min_pairs,
        "max_pairs": max_pairs,
        "pad_id": pad_id,
        "multiple_of": multiple_of,
        "parts": parts,
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


def _loaded(examples: Sequence[Any]) -> Sequence[Any]:
    """Examples with a length."""
    return examples.loaded() if isinstance(examples, Examples) else examples


def once_packed(
    documents: Sequence[Encoded], *, rows: int, length: int, pad_id: int
) -> list[Arrays]:
    """Returns all documents once, packed like training batches, for evaluation."""
    batches = PackedBatches(
        _loaded(documents), batch_size=rows, length=length, seed=0, pad_id=pad_id
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
    parts: int = 1,
    num_buckets: int = 3,
) -> list[Arrays]:
    """Returns all pairs once, for evaluation; for the settings see `pair_batches`."""
    batches = PairBatches(
        _loaded(pairs),
        max_tokens=max_tokens,
        min_pairs=min_pairs,
        max_pairs=max_pairs,
        seed=0,
        pad_id=pad_id,
        multiple_of=multiple_of,
        parts=parts,
        num_buckets=num_buckets,
    )
    return list(batches.once())


def fixed_prompts(
    prompts: Sequence[EncodedPrompt], batch_size: int, length: int, pad_id: int, split: str
) -> list[Arrays]:
    """Returns all prompts in whole batches of one length, always the same.

    Args:
      prompts: of a split that is not trained on.
      batch_size: prompts of a batch; what does not fill the last one is left out.
      length: to which they are padded on the left.
      pad_id: written into padding.
      split: its name, for the error.

    Raises:
      ValueError: there are fewer prompts than one batch has.
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
      batch: arrays `[B, ...]`.
      times: samples per prompt.

    Returns:
      Arrays `[B * times, ...]`.
    """
    return {name: np.repeat(rows, times, axis=0) for name, rows in batch.items()}
