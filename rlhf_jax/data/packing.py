"""Which documents share a row, and which lengths share a shape."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.schemas import Encoded

Arrays = dict[str, np.ndarray]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each document, in the order given, into the first row that has room for it.

    Args:
      lengths: [n] tokens of each document.
      capacity: tokens of a row.

    Returns:
      Rows of positions in `lengths`; every position is in exactly one row.

    Raises:
      ValueError: a document is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(
            f"a document of {longest} tokens does not fit into rows of length={capacity}: encode "
            f"with max_length<={capacity}, or raise the length"
        )
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for position, length in enumerate(lengths):
        fits = room[: len(rows)] >= length
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(position)
        room[row] -= length
    return rows


def lay_out(rows: Sequence[Sequence[Encoded]], length: int, *, pad_id: int) -> Arrays:
    """Writes rows of documents into arrays, from the left.

    Returns:
      {"tokens" [R, length] int32, "segments" [R, length] int32, "loss_mask" [R, length] bool}:
      segments count the documents of a row from 1, 0 is padding. The first token of a document
      is never trained.
    """
    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, dtype=np.int32)
    segments = np.zeros(shape, dtype=np.int32)
    loss_mask = np.zeros(shape, dtype=bool)
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            end = start + len(document.tokens)
            tokens[row, start:end] = document.tokens
            segments[row, start:end] = number
            loss_mask[row, start + 1 : end] = document.loss_mask[1:]
            start = end
    return {"tokens": tokens, "segments": segments, "loss_mask": loss_mask}


def bucket_lengths(
    lengths: Sequence[int] | np.ndarray, *, num_buckets: int, multiple: int = 16
) -> tuple[int, ...]:
    """Returns at most `num_buckets` padded lengths that waste the fewest tokens.

    Exact, by dynamic programming over the multiples of `multiple`: the cost of a bucket is its
    length times the number of documents in it.

    Args:
      lengths: [n] tokens of each document.
      num_buckets: the most distinct lengths.
      multiple: every length is a multiple of it.

    Raises:
      ValueError: no lengths, or num_buckets < 1.
    """
    if not len(lengths) or num_buckets < 1:
        raise ValueError(f"{len(lengths)} lengths, num_buckets={num_buckets}: both must be >= 1")
    rounded = -(-np.asarray(lengths) // multiple) * multiple
    edges, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    num_edges = len(edges)
    # best[j]: least cost of the first j edges; previous[k][j]: where the last of k buckets starts.
    best = np.concatenate([[0.0], np.full(num_edges, np.inf)])
    totals, previous = [], []
    for _ in range(min(num_buckets, num_edges)):
        costs = best[:, None] + (below[None, 1:] - below[:, None]) * edges[None, :]
        costs = np.where(np.arange(num_edges + 1)[:, None] <= np.arange(num_edges), costs, np.inf)
        previous.append(costs.argmin(axis=0))
        best = np.concatenate([[np.inf], costs.min(axis=0)])
        totals.append(best[-1])
    used = int(np.argmin(totals))
    chosen, end = [], num_edges
    for starts in reversed(previous[: used + 1]):
        chosen.append(int(edges[end - 1]))
        end = int(starts[end - 1])
    return tuple(reversed(chosen))


def assign_buckets(lengths: Sequence[int] | np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """Returns for each length the position of the smallest bucket that holds it, int64 [n].

    Raises:
      ValueError: a length exceeds the largest bucket, or the buckets are not increasing.
    """
    if list(buckets) != sorted(set(buckets)) or not buckets:
        raise ValueError(f"buckets={list(buckets)} must be increasing lengths")
    longest = int(np.max(lengths, initial=0))
    if longest > buckets[-1]:
        raise ValueError(
            f"a document of {longest} tokens exceeds the largest bucket {buckets[-1]}: encode with "
            f"max_length<={buckets[-1]}, or add a bucket"
        )
    return np.searchsorted(np.asarray(buckets), np.asarray(lengths, dtype=np.int64), side="left")


def shuffled_groups(
    bucket_of: np.ndarray, num_buckets: int, generator: np.random.Generator
) -> list[list[int]]:
    """Returns the members of each bucket in a random order."""
    order = generator.permutation(len(bucket_of))
    return [[int(i) for i in order[bucket_of[order] == b]] for b in range(num_buckets)]


def fill_buckets(
    groups: Sequence[list[int]], rows: Sequence[int], *, even: bool = True
) -> list[tuple[int, list[int]]]:
    """Cuts each bucket into full batches; what is left moves up to the next bucket.

    In the last bucket the rest is spread over its batches (`even`), or makes the last batch.
    """
    plan: list[tuple[int, list[int]]] = []
    carried: list[int] = []
    for bucket, (group, size) in enumerate(zip(groups, rows, strict=True)):
        members = carried + group
        is_last = bucket == len(rows) - 1
        full = len(members) if is_last else len(members) - len(members) % size
        carried = members[full:]
        if is_last and even:
            chunks = spread(members, size)
        else:
            chunks = [members[start : start + size] for start in range(0, full, size)]
        plan += [(bucket, chunk) for chunk in chunks]
    return plan


def spread(items: list[Any], size: int) -> list[list[Any]]:
    """Cuts a list into the fewest parts of at most `size` items, of nearly equal lengths."""
    parts = -(-len(items) // size)
    bounds = [len(items) * part // parts for part in range(parts + 1)] if parts else []
    return [items[a:b] for a, b in itertools.pairwise(bounds)]
