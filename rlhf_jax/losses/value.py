"""Losses of the critic. Both carry the factor ½, so that switching the clip on changes no scale."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import limit, select, subtractable
from rlhf_jax.losses.masking import masked_fill, masked_var

Scalar = float | jax.Array


def value_loss(values: jax.Array, returns: jax.Array) -> jax.Array:
    """Squared error of the critic.

        L_t = ½ (V_φ(s_t) − R̂_t)²

    From an error of 1.8e19 on it is inf in float32; the gradient stays a number.

    Source: slide "Value Function Estimation", printed without the ½. Its R̂_t is `rewards_to_go`,
    the paper's Figure 1 and code have `gae` + old values: the two agree at λ = 1 only.

    Args:
      values: V_φ, [..., T] float, differentiated.
      returns: R̂, same shape, constant: `rewards_to_go`, or `gae` + old values.

    Returns:
      [..., T], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(value_loss(jnp.array([1.0, 2.0]), jnp.array([2.0, 4.0])))
    [0.5 2. ]
    """
    check.same_shape(check.floats(values=values, returns=returns))
    error = subtractable(values - jax.lax.stop_gradient(returns))
    return error * error / 2  # `jnp.square` doubles the error first: inf, and NaN times 0


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip_eps: Scalar
) -> jax.Array:
    """Squared error of a critic that is not credited for moving further than ε from its old value.

        L_t = ½ max((V − R̂)², (clip(V, V_old − ε, V_old + ε) − R̂)²)

    Source: arXiv 2307.04964, §5.4 (part of PPO-max, ε = 0.2) as its released code has it.

    Args:
      values: V, [..., T] float, differentiated.
      old_values: V_old at sampling time, same shape, constant.
      returns: R̂, same shape, constant.
      clip_eps: ε; `float("inf")` gives `value_loss`.

    Returns:
      [..., T], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> values, old, returns = jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.2])
    >>> print(clipped_value_loss(values, old, returns, clip_eps=0.2).round(2))
    [0.5]
    """
    check.same_shape(check.floats(values=values, old_values=old_values, returns=returns))
    check.scalars(clip_eps=clip_eps)
    old_values = jax.lax.stop_gradient(old_values)
    clipped = limit(values, old_values - clip_eps, old_values + clip_eps)
    return jnp.maximum(value_loss(values, returns), value_loss(clipped, returns))


def value_diagnostics(
    values: jax.Array,
    old_values: jax.Array,
    *,
    clip_eps: Scalar,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """What the critic says, and where `clipped_value_loss` may hold it back, at each token.

        clip_fraction_t = 1[|V_t − V_old,t| > ε]

    Nothing is reduced: weigh them as the loss is weighed, or take `masked_mean`.

    Source: Huang et al. 2022, "The 37 implementation details of PPO".

    Args:
      values: V, [..., T] float.
      old_values: V_old at sampling time, same shape.
      clip_eps: ε of the loss; `float("inf")` if it has none.
      where: True on real tokens, same shape, bool; None is everywhere.

    Returns:
      [..., T] each, unreduced, constant: critic/value, critic/clip_fraction (0 or 1). 0 where
      masked.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> values, old_values = jnp.array([1.0, 2.0]), jnp.array([0.9, 1.5])
    >>> print(value_diagnostics(values, old_values, clip_eps=0.2)["critic/clip_fraction"])
    [0. 1.]
    """
    check.same_shape(check.floats(values=values, old_values=old_values))
    check.scalars(clip_eps=clip_eps)
    if where is not None:
        check.same_shape({"values": values}, check.masks(where=where))
        values, old_values = select(where, values), select(where, old_values)
    values, old_values = jax.lax.stop_gradient((values, old_values))
    return {
        "critic/value": values,
        "critic/clip_fraction": (jnp.abs(values - old_values) > clip_eps).astype(values.dtype),
    }


def explained_variance(values: jax.Array, returns: jax.Array, *, where: jax.Array) -> jax.Array:
    """Share of the variance of the returns that the critic predicts: 1 perfect, 0 no better than
    the mean, below 0 worse.

        1 − Var(R̂ − V) / Var(R̂)

    Source: Huang et al. 2022, "The 37 implementation details of PPO".

    Args:
      values: V, [..., T] float.
      returns: R̂, same shape.
      where: True on real tokens, same shape, bool.

    Returns:
      [] float, constant; 0 if the returns do not vary, or so much that the variance overflows.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> values, returns = jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])
    >>> print(explained_variance(values, returns, where=jnp.ones(2, bool)))
    0.75
    """
    check.same_shape(check.floats(values=values, returns=returns), check.masks(where=where))
    values = jax.lax.stop_gradient(masked_fill(values, where=where))
    returns = jax.lax.stop_gradient(masked_fill(returns, where=where))
    total = masked_var(returns, where=where)
    left = masked_var(returns - values, where=where)
    known = (total > 0) & (total < jnp.inf)
    return jnp.where(known, 1 - left / jnp.where(known, total, 1), 0)
