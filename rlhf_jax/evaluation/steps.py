"""How well a reward model finds wrong steps: first-error F1, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NO_ERROR = -1


class FirstErrors(NamedTuple):
    """How often the first wrong step is found.

    Attributes:
      wrong: share of the solutions with a wrong step whose first one is named exactly; NaN without
        any such solution.
      right: share of those without a wrong step of which none is named; NaN without any.
      f1: harmonic mean of both.
    """

    wrong: float
    right: float
    f1: float


def first_error(scores: Sequence[float] | np.ndarray, *, threshold: float = 0.5) -> int:
    """Index of the first step whose P(right) is below the threshold; -1 where none is.

    Args:
      scores: P(right) of each step, [S].
      threshold: steps below it count as wrong.
    """
    below = np.asarray(scores, np.float64) < threshold
    return int(below.argmax()) if below.any() else NO_ERROR


def first_error_f1(predicted: Sequence[int], actual: Sequence[int]) -> FirstErrors:
    """Compares first errors as ProcessBench does (Zheng et al. 2024, arXiv 2412.06559, sec 3.3).

        F1 = 2 a_wrong a_right / (a_wrong + a_right)

    where a_wrong is the share of solutions with a wrong step whose first one is found, and a_right
    that of the others in which no step is called wrong. A model that calls nothing wrong gets 0.

    Args:
      predicted: index of the first wrong step of each solution, -1 where there is none.
      actual: the same, as it is.

    Raises:
      ValueError: other numbers of both.

    >>> first_error_f1([2, -1, -1, 0], [2, -1, 1, -1])
    FirstErrors(wrong=0.5, right=0.5, f1=0.5)
    """
    if len(predicted) != len(actual):
        raise ValueError(f"{len(predicted)} predictions for {len(actual)} solutions")
    hit = np.asarray(predicted) == np.asarray(actual)
    has_error = np.asarray(actual) != NO_ERROR
    wrong = float(hit[has_error].mean()) if has_error.any() else float("nan")
    right = float(hit[~has_error].mean()) if (~has_error).any() else float("nan")
    total = wrong + right
    return FirstErrors(wrong, right, 2 * wrong * right / total if total else 0.0)


def expected_calibration_error(
    probabilities: Sequence[float] | np.ndarray,
    outcomes: Sequence[bool] | np.ndarray,
    *,
    bins: int = 10,
) -> float:
    """Expected calibration error (Naeini et al. 2015): how far stated chances are from shares.

        ECE = Σ_b (n_b / n) |mean outcome of b − mean probability of b|

    over bins of equal width.

    Args:
      probabilities: [N], each in [0, 1].
      outcomes: [N] bool.
      bins: how many.

    Returns:
      In [0, 1]; NaN without any.

    Raises:
      ValueError: other numbers of both, or a probability outside of [0, 1].
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    if p.shape != y.shape:
        raise ValueError(f"{p.size} probabilities for {y.size} outcomes")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities must be in [0, 1]")
    if not p.size:
        return float("nan")
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs((y[bin_of == b] - p[bin_of == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / p.size)


def brier_score(
    probabilities: Sequence[float] | np.ndarray, outcomes: Sequence[bool] | np.ndarray
) -> float:
    """Mean squared distance of stated chances from what came (Brier 1950); lower is better.

    Args:
      probabilities: [N].
      outcomes: [N] bool.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    return float(np.mean((p - y) ** 2)) if p.size else float("nan")
