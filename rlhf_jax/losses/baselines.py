"""Baselines b(s_t): subtracted from a return, they lower the variance and leave the mean alone.

Scores are [..., K]: the last axis holds the K samples of one prompt. The fourth baseline of the
slides is the critic: `rewards_to_go(...) - values`, or `gae`. All are constants of the loss.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import widen

Scalar = float | jax.Array


def batch_mean_baseline(scores: jax.Array) -> jax.Array:
    """One baseline for all: the mean score of the batch.

        b = 1/N Σ_i r_i

    Source: slide "Policy Gradient Methods", Φ_t = R − b(s_t).

    Args:
      scores: r, any shape, float.

    Returns:
      same shape, the same number everywhere, constant.

    Raises:
      AssertionError: scores are not float.

    >>> print(batch_mean_baseline(jnp.array([1.0, 3.0])))
    [2. 2.]
    """
    check.floats(scores=scores)
    mean = jnp.mean(widen(scores)).astype(scores.dtype)
    return jax.lax.stop_gradient(jnp.broadcast_to(mean, scores.shape))


def leave_one_out_baseline(scores: jax.Array) -> jax.Array:
    """For each sample, the mean of the other samples of its prompt (RLOO).

        b_i = 1/(K−1) Σ_{j≠i} r_j

    Source: Ahmadian et al. 2024 (arXiv 2402.14740); Kool et al. 2019.

    Args:
      scores: r, [..., K] float.

    Returns:
      [..., K], constant.

    Raises:
      AssertionError: scores are not float.
      ValueError: K < 2.

    >>> print(leave_one_out_baseline(jnp.array([1.0, 3.0, 5.0])))
    [4. 3. 2.]
    """
    check.floats(scores=scores)
    k, wide = _samples_per_prompt(scores), widen(scores)
    others = jnp.sum(wide, axis=-1, keepdims=True) - wide
    return jax.lax.stop_gradient((others / (k - 1)).astype(scores.dtype))


def group_mean_baseline(scores: jax.Array) -> jax.Array:
    """For each sample, the mean over the samples of its prompt, itself included.

        b_i = 1/K Σ_j r_j

    Source: Shao et al. 2024 (arXiv 2402.03300), §4.1.

    Args:
      scores: r, [..., K] float.

    Returns:
      [..., K], the same number for all samples of a prompt, constant.

    Raises:
      AssertionError: scores are not float.
      ValueError: K < 2.

    >>> print(group_mean_baseline(jnp.array([1.0, 3.0, 5.0])))
    [3. 3. 3.]
    """
    check.floats(scores=scores)
    _samples_per_prompt(scores)
    mean = jnp.mean(widen(scores), axis=-1, keepdims=True).astype(scores.dtype)
    return jax.lax.stop_gradient(jnp.broadcast_to(mean, scores.shape))


def group_advantages(scores: jax.Array, *, eps: Scalar = 1e-4) -> jax.Array:
    """Scores normalised within the samples of each prompt (GRPO).

        Â_i = (r_i − mean(r)) / (std(r) + ε)

    Source: Shao et al. 2024 (arXiv 2402.03300), §4.1.2; std divides by K, ε as in common code.

    Args:
      scores: r, [..., K] float.
      eps: ε; large against rounding, so that equal scores give 0.

    Returns:
      [..., K], unreduced, constant.

    Raises:
      AssertionError: scores are not float.
      ValueError: K < 2.

    >>> print(group_advantages(jnp.array([1.0, 3.0]), eps=0.0))
    [-1.  1.]
    """
    check.floats(scores=scores)
    check.scalars(eps=eps)
    _samples_per_prompt(scores)
    wide = widen(scores)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    std = jnp.std(wide, axis=-1, keepdims=True)
    return jax.lax.stop_gradient(((wide - mean) / (std + eps)).astype(scores.dtype))


def _samples_per_prompt(scores: jax.Array) -> int:
    k = scores.shape[-1]
    check.require(k >= 2, f"samples per prompt is {k}, must be at least 2 to compare them")
    return k
