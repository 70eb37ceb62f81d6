"""Masked reductions: values under the mask may be anything, NaN included, and change nothing.

Sums are accumulated in float32 at least: bfloat16 cannot count past 256. An empty mask gives 0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._episodes import joined, last_of_row
from rlhf_jax.losses._numbers import select, widen

Axis = int | Sequence[int] | None
Scalar = float | jax.Array


def masked_fill(x: jax.Array, *, where: jax.Array, fill: Scalar = 0.0) -> jax.Array:
    """Replaces the values that `where` leaves out; no gradient flows to them.

        y = x where `where`, else fill

    Element-wise losses take no mask. Where padding may hold NaN or inf, fill their *inputs* first:
    a mask on the loss alone keeps the value clean, but 0 · NaN is NaN in the backward pass.

    Args:
      x: values, [...] float.
      where: True where x counts, same shape, bool.
      fill: the value to put elsewhere.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, x is not float, or `where` is not bool.

    >>> print(masked_fill(jnp.array([1.0, jnp.nan]), where=jnp.array([True, False])))
    [1. 0.]
    """
    check.same_shape(check.floats(x=x), check.masks(where=where))
    check.scalars(fill=fill)
    return select(where, x, fill)


def masked_sum(x: jax.Array, *, where: jax.Array, axis: Axis = None) -> jax.Array:
    """Sum over the elements that count.

        Σ_i m_i x_i

    Args:
      x: values, [...] float.
      where: True where x counts, same shape, bool.
      axis: axes to reduce, static under `jit`; None reduces all.

    Returns:
      x without the reduced axes, in the dtype of x. Nothing counted: 0.

    Raises:
      AssertionError: shapes differ, x is not float, or `where` is not bool.

    >>> print(masked_sum(jnp.array([1.0, 2.0, jnp.nan]), where=jnp.array([True, True, False])))
    3.0
    """
    total, _ = _sum_and_count(x, where, axis)
    return total.astype(x.dtype)


def masked_mean(x: jax.Array, *, where: jax.Array, axis: Axis = None) -> jax.Array:
    """Mean over the elements that count (never over B·T).

        Σ_i m_i x_i / Σ_i m_i

    Args:
      x: values, [...] float.
      where: True where x counts, same shape, bool.
      axis: axes to reduce, static under `jit`; None reduces all, which weighs every token the same.

    Returns:
      x without the reduced axes, in the dtype of x. Nothing counted: 0.

    Raises:
      AssertionError: shapes differ, x is not float, or `where` is not bool.

    >>> print(masked_mean(jnp.array([1.0, 2.0, jnp.nan]), where=jnp.array([True, True, False])))
    1.5
    """
    total, count = _sum_and_count(x, where, axis)
    return (total / jnp.maximum(count, 1.0)).astype(x.dtype)


def masked_var(x: jax.Array, *, where: jax.Array, axis: Axis = None) -> jax.Array:
    """Variance (biased, divided by n) of the elements that count, in two passes.

        Σ_i m_i (x_i − x̄)² / Σ_i m_i

    Args:
      x: values, [...] float.
      where: True where x counts, same shape, bool.
      axis: axes to reduce, static under `jit`; None reduces all.

    Returns:
      x without the reduced axes, in the dtype of x. Nothing counted: 0.

    Raises:
      AssertionError: shapes differ, x is not float, or `where` is not bool.

    >>> print(masked_var(jnp.array([1.0, 3.0, jnp.nan]), where=jnp.array([True, True, False])))
    1.0
    """
    total, count = _sum_and_count(x, where, axis, keepdims=True)
    mean = jnp.broadcast_to(total / jnp.maximum(count, 1.0), x.shape)
    squares = jnp.square(widen(select(where, x)) - mean)
    return masked_mean(squares, where=where, axis=axis).astype(x.dtype)


def masked_whiten(
    x: jax.Array, *, where: jax.Array, shift_mean: bool = True, eps: Scalar = 1e-8
) -> jax.Array:
    """Divides by the standard deviation over the whole array, after taking away the mean.

        y = (x − x̄) / √(Var x + ε)    (+ x̄ if not shift_mean)

    Source: Ziegler et al. 2019 (arXiv 1909.08593), as catalogued in "The N implementation details
    of RLHF with PPO": the variance is biased, ε = 1e-8, rewards keep their mean.

    Args:
      x: values, [...] float.
      where: True where x counts, same shape, bool.
      shift_mean: leave the mean at 0; if False it is put back; static under `jit`.
      eps: added to the variance.

    Returns:
      [...], unreduced, 0 where masked.

    Raises:
      AssertionError: shapes differ, x is not float, or `where` is not bool.

    >>> print(masked_whiten(jnp.array([1.0, 3.0, 9.0]), where=jnp.array([True, True, False])))
    [-1.  1.  0.]
    """
    check.same_shape(check.floats(x=x), check.masks(where=where))
    check.scalars(eps=eps)
    check.static(shift_mean=shift_mean)
    wide = widen(select(where, x))
    mean, var = masked_mean(wide, where=where), masked_var(wide, where=where)
    white = (wide - mean) * jax.lax.rsqrt(var + eps)
    return select(where, white if shift_mean else white + mean).astype(x.dtype)


def last_token_mask(where: jax.Array, *, segments: jax.Array | None = None) -> jax.Array:
    """Marks the last real token of each row: where a sequence-level score is paid.

        m_t = 1[t = max{s : where_s}]

    Args:
      where: True on real tokens, [..., T] bool.
      segments: one number an episode, [..., T] int, where several share a row: the last token of
        each is marked; None for one a row.

    Returns:
      [..., T] bool with one True a row, or an episode; none if the row is empty.

    Raises:
      AssertionError: `where` is not bool.

    >>> print(last_token_mask(jnp.array([True, True, False])))
    [False  True False]
    """
    check.masks(where=where)
    if segments is not None:
        check.same_shape({"where": where}, check.integers(segments=segments))
        return where & ~joined(where, segments)
    return last_of_row(where)


def _sum_and_count(
    x: jax.Array, where: jax.Array, axis: Axis, keepdims: bool = False
) -> tuple[jax.Array, jax.Array]:
    check.same_shape(check.floats(x=x), check.masks(where=where))
    check.static(axis=axis)
    axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
    total = jnp.sum(widen(select(where, x)), axis=axis, keepdims=keepdims)
    return total, jnp.sum(where, axis=axis, keepdims=keepdims, dtype=total.dtype)
