"""Arithmetic that is the same in many losses, and what keeps overflow from becoming NaN.

A number past the largest float is infinite, and infinity is not a number any more once it meets
0 · ∞ or ∞ − ∞, forward or backward. So what may overflow is limited before it is used.
"""

import jax
import jax.numpy as jnp

LOG_RATIO_LIMIT = 20.0  # e^20 = 4.9e8


def select(where: jax.Array, x: jax.Array, fill: float | jax.Array = 0.0) -> jax.Array:
    """x where `where`, else fill, for arrays of one shape.

    The first thing that happens to what a mask covers. Not `jnp.where`: it converts before it
    selects, and `jax_debug_nans` would find the NaN of padding in the conversion.

    Args:
      where: bool.
      x: same shape.
      fill: one number.
    """
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    return jax.lax.select(jnp.asarray(where), x, jnp.full_like(x, fill))


def limit(x: jax.Array, low: float | jax.Array, high: float | jax.Array) -> jax.Array:
    """x kept within [low, high]; no gradient from outside, and none at the ends.

    Not `jnp.clip`: that one multiplies the gradient by 0 outside, which is NaN if it has
    overflowed. Here it is selected. NaN stays NaN.

    Args:
      x: float.
      low: one number, or same shape.
      high: one number, or same shape.
    """
    return jax.lax.clamp(jnp.asarray(low, x.dtype), x, jnp.asarray(high, x.dtype))


def subtractable(x: jax.Array) -> jax.Array:
    """x kept within a quarter of the range of its type (8.5e37), infinity included.

    The difference of two such numbers is a number, and so is its product with 0.

    Args:
      x: float.
    """
    largest = float(jnp.finfo(x.dtype).max) / 4
    return limit(x, -largest, largest)


def log_ratio(log_probs: jax.Array, other_log_probs: jax.Array) -> jax.Array:
    """log π − log π_b, within ±20; no gradient from outside.

    A token that has become e^20 times as likely is no step of a trust region: sampler and trainer
    disagree. Unlimited its ratio is infinite from 88.7 on, and NaN with an advantage of 0.

    Source: verl (`verl/trainer/ppo/core_algos.py`, `compute_policy_loss`) has the same limit.

    Args:
      log_probs: log π, float.
      other_log_probs: log π_b, same shape, constant.
    """
    difference = log_probs - jax.lax.stop_gradient(other_log_probs)
    return limit(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def log_loss(x: jax.Array, p: float | jax.Array) -> jax.Array:
    """−p log σ(x) − (1 − p) log σ(−x), where a label that is certain counts alone: 0 · ∞ is 0.

    Args:
      x: float, infinite ones included.
      p: one number, or same shape, constant.
    """
    yes, no = p * jax.nn.softplus(-x), (1 - p) * jax.nn.softplus(x)
    return jnp.where(jnp.asarray(p == 1), yes, jnp.where(jnp.asarray(p == 0), no, yes + no))


def widen(x: jax.Array) -> jax.Array:
    """In float32 at least, to be summed: bfloat16 cannot count past 256.

    Args:
      x: float.
    """
    return x.astype(wide(x.dtype))


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 of itself; strict promotion has no opinion on this.

    Args:
      dtype: of floats.
    """
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
