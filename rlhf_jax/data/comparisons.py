"""Scores to comparisons: which pairs of scored texts to put side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class _Partners(NamedTuple):
    """Positions sorted by group and score; i beats start[i]..low[i], loses to high[i]..end[i]."""

    order: np.ndarray
    start: np.ndarray
    low: np.ndarray
    high: np.ndarray
    end: np.ndarray


def check_scores(scores: Sequence[float], texts: Sequence[str] | None = None) -> None:
    """Raises ValueError that names the first row whose score is NaN or infinite."""
    for row, score in enumerate(scores):
        if not math.isfinite(score):
            text = f": {texts[row][:60]!r}" if texts is not None else ""
            raise ValueError(f"row {row} has rating {score}, not a finite number{text}")


def score_pairs(
    scores: Sequence[float],
    groups: Sequence[str],
    *,
    min_gap: float,
    num_pairs: int,
    seed: int,
    max_per_group: int | None = None,
) -> np.ndarray:
    """Draws distinct pairs within a group whose scores differ by at least `min_gap`.

    A row is drawn uniformly among those that have a partner, then its partner uniformly among its
    partners: a group weighs as much as it has rows, not as it has pairs. Once half of all pairs is
    asked for, all are listed and a random subset is taken.

    Args:
      scores: [n] finite numbers.
      groups: [n] pairs are formed inside a group only (a domain, a prompt).
      min_gap: the least difference of scores, positive.
      num_pairs: how many; fewer come back where fewer exist.
      seed: of the draw.
      max_per_group: at most so many pairs of a group (lists all pairs: for small groups).

    Returns:
      int64 [m, 2]: rows (better, worse).

    Raises:
      ValueError: a score that is not finite (names the row), or min_gap <= 0.
    """
    partners = _find_partners(scores, groups, min_gap)
    available = int((partners.low - partners.start).sum())
    generator = np.random.default_rng(seed)
    if max_per_group is None and 2 * num_pairs < available:
        pairs = _draw(partners, num_pairs, generator)
    else:
        pairs = generator.permutation(_list(partners), axis=0)
        if max_per_group is not None:
            pairs = _cap(pairs, [groups[i] for i in partners.order], max_per_group)
        pairs = pairs[:num_pairs]
    return partners.order[pairs]


def _find_partners(scores: Sequence[float], groups: Sequence[str], min_gap: float) -> _Partners:
    if not min_gap > 0:
        raise ValueError(f"min_gap={min_gap} must be positive")
    check_scores(scores)
    values = np.asarray(scores, dtype=np.float64)
    _, ids = np.unique(np.asarray(list(groups)), return_inverse=True)
    order = np.lexsort((values, ids))
    values, ids = values[order], ids[order]
    start, end = np.searchsorted(ids, ids, "left"), np.searchsorted(ids, ids, "right")
    low, high = start.copy(), end.copy()
    for group in np.unique(ids):
        (inside,) = np.nonzero(ids == group)
        block = values[inside]
        # Mean ratings are fractions: 1e-9 forgives rounding, so that 1.9 and 0.9 are 1 apart.
        low[inside] = inside[0] + np.searchsorted(block, block - (min_gap - 1e-9), "right")
        high[inside] = inside[0] + np.searchsorted(block, block + (min_gap - 1e-9), "left")
    return _Partners(order, start, low, high, end)


def _draw(partners: _Partners, count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns [count, 2] sorted positions (better, worse), without repetition."""
    below = partners.low - partners.start
    total = below + partners.end - partners.high
    (candidates,) = np.nonzero(total)
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        first = generator.choice(candidates, size=count - len(found))
        pick = (generator.random(len(first)) * total[first]).astype(np.int64)
        is_below = pick < below[first]
        second = np.where(
            is_below,
            partners.start[first] + pick,
            partners.high[first] + pick - below[first],
        )
        better, worse = np.where(is_below, first, second), np.where(is_below, second, first)
        found |= dict.fromkeys(zip(better.tolist(), worse.tolist(), strict=True))
    return np.array(list(found), dtype=np.int64)


def _list(partners: _Partners) -> np.ndarray:
    """Returns all pairs as sorted positions (better, worse), [m, 2]."""
    blocks = [
        np.stack([np.full(low - start, i), np.arange(start, low)], axis=1)
        for i, (start, low) in enumerate(zip(partners.start, partners.low, strict=True))
    ]
    return np.concatenate([*blocks, np.zeros((0, 2), dtype=np.int64)]).astype(np.int64)


def _cap(pairs: np.ndarray, groups: list[str], limit: int) -> np.ndarray:
    """Keeps the first `limit` pairs of each group."""
    taken: dict[str, int] = {}
    keep = []
    for position, (better, _) in enumerate(pairs):
        taken[groups[better]] = taken.get(groups[better], 0) + 1
        if taken[groups[better]] <= limit:
            keep.append(position)
    return pairs[keep]
