"""Which of two is better, and how sure that is: win rates, pair accuracy, bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_MAX_BOOTSTRAP_CELLS = 4_000_000


class Interval(NamedTuple):
    """A statistic with the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


class WinRate(NamedTuple):
    """Shares of prompts on which A wins, ties and loses; `win_rate` counts a tie as one half.

    `low` and `high` bound the 95% interval of `win_rate`.
    """

    win: float
    tie: float
    lose: float
    win_rate: float
    low: float
    high: float
    num_prompts: int

    def summary(self) -> str:
        """One line: `win 61.0% tie 4.0% lose 35.0%, win rate 63.0% [58.9, 67.0], 512 prompts`."""
        shares = f"win {self.win:.1%} tie {self.tie:.1%} lose {self.lose:.1%}"
        interval = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{shares}, win rate {self.win_rate:.1%} {interval}, {self.num_prompts} prompts"


def win_tie_lose(
    scores_a: Any,
    scores_b: Any,
    *,
    tie_tol: float = 0.0,
    seed: int = 0,
    num_resamples: int = 2000,
) -> WinRate:
    """Compares two policies prompt by prompt, with a paired 95% bootstrap interval.

        o_i = 1[a_i − b_i > tol] + ½ 1[|a_i − b_i| ≤ tol],  win rate = mean o_i

    The outcomes o_i, one per prompt, are resampled, so the pairing is kept.

    Args:
      scores_a: float [N], a judge's scores of A's responses; or [N, S] for S responses per prompt,
        which are compared one by one and averaged within the prompt before resampling.
      scores_b: the same for B, same shape.
      tie_tol: largest absolute difference that is a tie.
      seed: seed of the bootstrap.
      num_resamples: number of bootstrap resamples.

    Returns:
      A `WinRate`, shares in [0, 1].

    Raises:
      ValueError: shapes differ, no prompt, a score is NaN, or `tie_tol` is negative.
    """
    outcomes = paired_outcomes(scores_a, scores_b, tie_tol=tie_tol)
    per_prompt = outcomes.reshape(len(outcomes), -1).mean(axis=1)
    interval = bootstrap_interval(per_prompt, seed=seed, num_resamples=num_resamples)
    win, tie, lose = (float((outcomes == outcome).mean()) for outcome in (1.0, 0.5, 0.0))
    return WinRate(win, tie, lose, *interval, num_prompts=len(outcomes))


def paired_outcomes(scores_a: Any, scores_b: Any, *, tie_tol: float = 0.0) -> np.ndarray:
    """1 where A scores higher than B, 0 where lower, ½ for a tie.

    Two judges on the same pairs are compared by an interval of the difference of their outcomes:
    `bootstrap_interval(paired_outcomes(a, b) - paired_outcomes(other_a, other_b))`.

    Args:
      scores_a: float [N] or [N, S].
      scores_b: float, same shape.
      tie_tol: largest absolute difference that is a tie.

    Returns:
      float64, same shape, unreduced.

    Raises:
      ValueError: shapes differ, no prompt, a score is NaN, or `tie_tol` is negative.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim not in (1, 2) or a.size == 0:
        raise ValueError(
            f"both scores must be [N] or both [N, S] with N, S > 0, got {a.shape} and {b.shape}"
        )
    if not tie_tol >= 0:
        raise ValueError(f"tie_tol must be >= 0, got {tie_tol}")
    for name, scores in (("scores_a", a), ("scores_b", b)):
        if np.isnan(scores).any():
            raise ValueError(f"{name} is NaN for prompt {np.argwhere(np.isnan(scores))[0][0]}")
    # Equal infinities are a tie; their difference would be NaN.
    difference = np.subtract(a, b, out=np.zeros_like(a), where=a != b)
    return np.where(difference > tie_tol, 1.0, np.where(difference < -tie_tol, 0.0, 0.5))


def bootstrap_interval(
    x: Any,
    statistic: Callable[..., Any] = np.mean,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic (Efron 1979): resample the N values with replacement.

    Args:
      x: float [N], one value for each independent unit (a prompt, not a token).
      statistic: reduces the last axis and takes `axis=-1`, e.g. `np.mean`, `np.median`.
      level: coverage of the interval, in (0, 1).
      num_resamples: number of resamples.
      seed: the same seed gives the same interval.

    Returns:
      `Interval(value, low, high)`.

    Raises:
      ValueError: `x` is not [N] with N > 0, or a setting is out of range.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"x must be [N] with N > 0, got shape {x.shape}")
    if not 0 < level < 1 or num_resamples < 1:
        raise ValueError(f"need 0 < level < 1 and num_resamples >= 1, got {level}, {num_resamples}")
    value = float(statistic(x, axis=-1))
    # Every resample of equal values is x itself. SciPy refuses a single one, and warns of NaN.
    if (x == x[0]).all() or math.isnan(value):
        return Interval(value, value, value)
    # Imported here: it takes a second, and code that compares nothing need not wait for it.
    from scipy.stats import bootstrap

    with np.errstate(invalid="ignore"):  # its standard error of infinite estimates, unused here
        result = bootstrap(
            (x,),
            statistic,
            n_resamples=num_resamples,
            batch=max(1, _MAX_BOOTSTRAP_CELLS // x.size),
            vectorized=True,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    return Interval(value, float(low), float(high))


def pair_accuracy(chosen_scores: Any, rejected_scores: Any) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts one half.

    Args:
      chosen_scores: float [N].
      rejected_scores: float [N].

    Returns:
      In [0, 1].

    Raises:
      ValueError: shapes differ, no pair, or a score is NaN.
    """
    return float(paired_outcomes(chosen_scores, rejected_scores).mean())


def calibration_error(chosen_scores: Any, rejected_scores: Any, *, num_bins: int = 10) -> float:
    """Expected calibration error of a reward model's pair probabilities.

    A pair is predicted with confidence c = σ(|r_chosen - r_rejected|) in [½, 1]; it is right when
    the chosen response scores higher, half right for a tie. ECE = Σ_bins n_b/N |acc_b - mean c_b|
    over equal bins of [½, 1] (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599).

    Args:
      chosen_scores: float [N].
      rejected_scores: float [N].
      num_bins: number of bins.

    Returns:
      In [0, 1]; 0 where the scores mean what Bradley-Terry says they mean.

    Raises:
      ValueError: as `pair_accuracy`, or `num_bins` is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
    outcomes = paired_outcomes(chosen_scores, rejected_scores)
    chosen, rejected = np.asarray(chosen_scores, float), np.asarray(rejected_scores, float)
    gap = np.subtract(chosen, rejected, out=np.zeros(chosen.shape), where=chosen != rejected)
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    bins = np.minimum((2 * (confidence - 0.5) * num_bins).astype(int), num_bins - 1)
    # n_b |acc_b - conf_b| is the absolute sum of the differences in the bin.
    sums = np.bincount(bins.ravel(), weights=(outcomes - confidence).ravel(), minlength=num_bins)
    return float(np.abs(sums).sum() / outcomes.size)
