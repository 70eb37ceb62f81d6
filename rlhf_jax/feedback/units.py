"""Judgements as numbers to measure agreement on: a row for each annotator, a column a unit."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from rlhf_jax.feedback.answers import PAIR, RANKING, SCORE, Answer, outcome
from rlhf_jax.feedback.judgements import Judgements


@dataclasses.dataclass(frozen=True)
class Units:
    """What annotators said, unit by unit.

    A unit is an item in mode `score` (the score) and `pair` (1 for its first response, -1 for the
    second, 0 for a tie), each two responses of a `ranking` (the same), and each of the `steps`.

    Attributes:
      annotators: R names.
      values: float64 [R, U], NaN where one said nothing.
      gold: float64 [U], NaN where no answer is known.
      clusters: int64 [U], the index of the unit's item.
    """

    annotators: list[str]
    values: np.ndarray
    gold: np.ndarray
    clusters: np.ndarray


def units_of(judgements: Judgements) -> Units:
    """The units of all items, in their order."""
    annotators = judgements.annotators()
    columns, gold, clusters = [], [], []
    for number, item in enumerate(judgements.items.values()):
        count, said = len(item.texts), judgements.answers(item.id)
        rows = [numbers(judgements.mode, said.get(name), count) for name in annotators]
        known = numbers(judgements.mode, item.gold, count)
        columns.append(np.reshape(rows, (len(annotators), len(known))))
        gold.append(known)
        clusters.append(np.full(len(known), number))
    return Units(
        annotators, np.concatenate(columns, 1), np.concatenate(gold), np.concatenate(clusters)
    )


def numbers(mode: str, answer: Answer | None, count: int) -> np.ndarray:
    """An answer to an item of `count` texts, a number a unit; NaN where it says nothing.

    >>> numbers("ranking", [2, 1, None], 3).tolist()
    [-1.0, 1.0, 1.0]
    """
    pairs = list(itertools.combinations(range(count), 2)) if mode in (PAIR, RANKING) else []
    length = len(pairs) or (1 if mode == SCORE else count)
    if answer is None:
        return np.full(length, np.nan)
    if pairs:
        said: list[float | None] = [outcome(mode, answer, one, other) for one, other in pairs]
    else:
        said = [*answer] if isinstance(answer, list) else [float(answer)]
    return np.array([np.nan if one is None else one for one in said], np.float64)
