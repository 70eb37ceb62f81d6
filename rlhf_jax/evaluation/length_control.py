"""Win rates at equal lengths: what a judge would prefer if no response were the longer one."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_jax.evaluation.comparison import Interval, bootstrap_interval

# Of both coefficients: one policy may win every time, and then none is largest.
_RIDGE = 1e-2
_STEPS = 30
_LARGEST_STEP = 4.0


def length_controlled_win_rate(
    outcomes: Any, lengths_a: Any, lengths_b: Any, *, seed: int = 0, num_resamples: int = 500
) -> Interval:
    """The win rate of A that is left once the length of its responses is accounted for.

        P(A wins) = σ(θ + γ tanh((|y_A| − |y_B|) / s)),  LC win rate = σ(θ)

    with s the standard deviation of the differences; θ and γ by logistic regression, in which a tie
    is half a win. This is the regression of AlpacaEval 2 without the term for the difficulty of a
    prompt, which takes several models to be fitted. Where one policy is longer by the same every
    time, length and policy cannot be told apart: the rate is then between its own and one half.
    The interval is a 95% bootstrap over prompts.

    Source: Dubois et al. 2024, "Length-Controlled AlpacaEval", arXiv 2404.04475, section 3.

    Args:
      outcomes: [N], 1 where A wins, 0 where it loses, ½ for a tie.
      lengths_a: [N], of A's responses, in whatever unit.
      lengths_b: [N], of B's.
      seed: of the bootstrap.
      num_resamples: of the bootstrap.

    Returns:
      An `Interval`; the plain win rate where all responses to a prompt are of one length.

    Raises:
      ValueError: the shapes differ, there is no prompt, or an outcome is outside [0, 1].
    """
    y = np.asarray(outcomes, np.float64)
    longer = np.asarray(lengths_a, np.float64) - np.asarray(lengths_b, np.float64)
    if y.ndim != 1 or not y.size or longer.shape != y.shape:
        raise ValueError(f"outcomes and lengths must be [N] with N > 0, got {y.shape}")
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError("outcomes must be in [0, 1]")
    # The root mean square where all differences are alike: they have no deviation.
    scale = longer.std() or np.sqrt(np.mean(longer**2)) or 1.0
    features = np.stack([np.ones_like(y), np.tanh(longer / scale)], axis=1)

    def rate(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        del axis
        rows = np.atleast_2d(drawn).astype(np.int64)
        times = np.stack([np.bincount(row, minlength=y.size) for row in rows]).astype(np.float64)
        return _sigmoid(_fitted(features, y, times)[:, 0]).squeeze()

    return bootstrap_interval(np.arange(y.size), rate, seed=seed, num_resamples=num_resamples)


def _fitted(features: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients `[R, 2]` of logistic regressions with weights `[R, N]`, by Newton's method."""
    found = np.zeros((len(weights), features.shape[1]))
    products = features[:, :, None] * features[:, None, :]
    for _ in range(_STEPS):
        p = _sigmoid(found @ features.T)
        gradient = (weights * (y - p)) @ features - _RIDGE * found
        curvature = np.einsum("rn,nij->rij", weights * p * (1 - p), products)
        curvature = curvature + _RIDGE * np.eye(features.shape[1])
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        size = np.linalg.norm(step, axis=1, keepdims=True)
        found = found + step * np.minimum(1, _LARGEST_STEP / np.maximum(size, 1e-12))
    return found


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
