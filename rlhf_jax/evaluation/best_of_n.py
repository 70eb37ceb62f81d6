"""Best-of-n: how far it is from the policy that draws, and what its answers are worth."""

from __future__ import annotations

import math

import numpy as np


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ policy) in nats, where no two answers score the same.

        log n − (n − 1) / n

    Where answers are drawn more than once it is less (Beirami et al. 2024, theorem 1).

    Args:
      n: answers of which the best one is given.

    Raises:
      ValueError: n is below 1.

    >>> round(best_of_n_kl(16), 3)
    1.835
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return math.log(n) - (n - 1) / n


def expected_best_of_n(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The value that the best of n answers has on average, by all subsets of N answers.

    With the answers in order of their scores, the r-th of N is the best of n of them with
    probability C(r − 1, n − 1) / C(N, n) (Nakano et al. 2021, appendix I).

    Args:
      scores: `[P, N]`, by which the best one is chosen.
      values: `[P, N]`, what is wanted of the chosen one, as the scores of another judge.
      n: from 1 to N.

    Returns:
      float64 `[P]`, for each prompt.

    Raises:
      ValueError: other shapes of both, NaN among the scores, or not 1 <= n <= N.
    """
    scores, values = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    if scores.shape != values.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape} and values {values.shape} must both be [P, N]")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN")
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"n={n} must be from 1 to N={total}")
    chance = np.array([math.comb(rank, n - 1) / math.comb(total, n) for rank in range(total)])
    return np.take_along_axis(values, scores.argsort(axis=1, kind="stable"), axis=1) @ chance
