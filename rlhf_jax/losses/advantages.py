"""Returns and advantages: what a token was worth.

One index everywhere: r_t is the reward for token t, V_t = V(s_t) the value before it. `where`
marks the real tokens of each row, which stand together; before and after may be padding of any
value, NaN included. After the last real token the value is 0, or `bootstrap` if the response was
cut off. Several separate runs of real tokens in a row are several episodes, and so are runs of one
number in `segments`, which stand back to back: all but the last of a row have ended. (To one that
was cut off in the middle, add γV to its last reward.)

Everything here is a constant of the losses, so no gradient flows through it.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._episodes import joined, sums_from_here, sums_of_k, td, values_ahead
from rlhf_jax.losses._numbers import select, widen

Scalar = float | jax.Array


def rewards_to_go(
    rewards: jax.Array,
    *,
    discount: Scalar,
    where: jax.Array,
    bootstrap: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Discounted sum of the rewards from each token on.

        R_t = r_t + γ R_{t+1} = Σ_{l≥0} γ^l r_{t+l}

    Source: slide "Value Function Estimation" (R̂_t) and Algorithm 1, line 3. The slide's G_τ prints
    γ^{k−1} with no k: the exponent is t−τ.

    Args:
      rewards: r, [..., T] float.
      discount: γ.
      where: True on real tokens, [..., T] bool.
      bootstrap: value after the last real token of the row, [...] float; None is 0.
      segments: one number an episode, [..., T] int, where they stand back to back; None if a masked
        token is between them.

    Returns:
      [..., T], unreduced, 0 where masked, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> print(rewards_to_go(jnp.array([1.0, 1.0]), discount=0.5, where=jnp.array([True, True])))
    [1.5 1. ]
    """
    _check(where, bootstrap, segments, rewards=rewards)
    check.scalars(discount=discount)
    dtype, rewards = rewards.dtype, widen(select(where, rewards))
    on = joined(where, segments)
    ahead = values_ahead(jnp.zeros_like(rewards), where, on, bootstrap)
    first = select(where, rewards + discount * ahead)
    return _constant(sums_from_here(first, discount, on), dtype)


def total_return(
    rewards: jax.Array,
    *,
    discount: Scalar,
    where: jax.Array,
    bootstrap: jax.Array | None = None,
) -> jax.Array:
    """Discounted sum of all rewards of a response, counted from its first real token.

        R(τ) = Σ_{t≥0} γ^t r_t

    Source: slide "Policy Gradient Methods", Φ_t = R(τ).

    Args:
      rewards: r, [..., T] float.
      discount: γ.
      where: True on real tokens, [..., T] bool.
      bootstrap: value after the last real token of the row, [...] float; None is 0.

    Returns:
      [...], one number a sequence, unreduced, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> print(total_return(jnp.array([1.0, 1.0]), discount=0.5, where=jnp.array([True, True])))
    1.5
    """
    _check(where, bootstrap, None, rewards=rewards)
    check.scalars(discount=discount)
    dtype, rewards = rewards.dtype, widen(select(where, rewards))
    position = jnp.maximum(jnp.cumsum(where, axis=-1, dtype=jnp.int32) - 1, 0)
    weights = jax.lax.pow(jnp.full(where.shape, discount, rewards.dtype), position)
    ahead = values_ahead(jnp.zeros_like(rewards), where, joined(where, None), bootstrap)
    received = select(where, rewards + discount * ahead)
    return _constant(jnp.sum(received * weights, axis=-1), dtype)


def td_errors(
    rewards: jax.Array,
    values: jax.Array,
    *,
    discount: Scalar,
    where: jax.Array,
    bootstrap: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """One-step temporal-difference errors.

        δ_t = r_t + γ V_{t+1} − V_t

    Source: slide "Advantage Function" (TD error).

    Args:
      rewards: r, [..., T] float.
      values: V, [..., T] float.
      discount: γ.
      where: True on real tokens, [..., T] bool.
      bootstrap: value after the last real token of the row, [...] float; None is 0.
      segments: one number an episode, [..., T] int, where they stand back to back; None if a masked
        token is between them.

    Returns:
      [..., T], unreduced, 0 where masked, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> rewards, values, where = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), jnp.ones(2, bool)
    >>> print(td_errors(rewards, values, discount=1.0, where=where))
    [0.  0.5]
    """
    _check(where, bootstrap, segments, rewards=rewards, values=values)
    check.scalars(discount=discount)
    deltas = td(rewards, values, discount, where, joined(where, segments), bootstrap)
    return _constant(deltas, jnp.result_type(rewards, values))


def k_step_advantages(
    rewards: jax.Array,
    values: jax.Array,
    *,
    discount: Scalar,
    k: int,
    where: jax.Array,
    bootstrap: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Advantage from k real rewards and the value after them.

        Â_t^k = Σ_{l=0}^{k−1} γ^l δ_{t+l} = R̂_t^k − V_t

    Source: slide "Advantage Function" (k-step advantage), which prints γ^{l−1} δ_{t+l} for
    l = 1 … k: one step too late.

    Args:
      rewards: r, [..., T] float.
      values: V, [..., T] float.
      discount: γ.
      k: number of steps, at least 1, static under `jit`; a response that ends earlier ends the sum.
      where: True on real tokens, [..., T] bool.
      bootstrap: value after the last real token of the row, [...] float; None is 0.
      segments: one number an episode, [..., T] int, where they stand back to back; None if a masked
        token is between them.

    Returns:
      [..., T], unreduced, 0 where masked, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.
      ValueError: k < 1.

    >>> rewards, values, where = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), jnp.ones(2, bool)
    >>> print(k_step_advantages(rewards, values, discount=1.0, k=2, where=where))
    [0.5 0.5]
    """
    _check(where, bootstrap, segments, rewards=rewards, values=values)
    check.scalars(discount=discount)
    check.integer(k=k)
    check.require(k >= 1, f"k={k} must be at least 1")
    on = joined(where, segments)
    deltas = td(rewards, values, discount, where, on, bootstrap)
    return _constant(sums_of_k(deltas, discount, on, k), jnp.result_type(rewards, values))


def k_step_returns(
    rewards: jax.Array,
    values: jax.Array,
    *,
    discount: Scalar,
    k: int,
    where: jax.Array,
    bootstrap: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Return from k real rewards and the value after them (TD-k).

        R̂_t^k = r_t + γ r_{t+1} + … + γ^{k−1} r_{t+k−1} + γ^k V_{t+k}

    Source: slide "Advantage Function" (TD-k return).

    Args:
      rewards: r, [..., T] float.
      values: V, [..., T] float.
      discount: γ.
      k: number of steps, at least 1, static under `jit`; a response that ends earlier ends the sum.
      where: True on real tokens, [..., T] bool.
      bootstrap: value after the last real token of the row, [...] float; None is 0.
      segments: one number an episode, [..., T] int, where they stand back to back; None if a masked
        token is between them.

    Returns:
      [..., T], unreduced, 0 where masked, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.
      ValueError: k < 1.

    >>> rewards, values, where = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), jnp.ones(2, bool)
    >>> print(k_step_returns(rewards, values, discount=1.0, k=1, where=where))
    [0.5 1. ]
    """
    _check(where, bootstrap, segments, rewards=rewards, values=values)
    check.scalars(discount=discount)
    check.integer(k=k)
    check.require(k >= 1, f"k={k} must be at least 1")
    on = joined(where, segments)
    deltas = td(rewards, values, discount, where, on, bootstrap)
    returns = sums_of_k(deltas, discount, on, k) + widen(select(where, values))
    return _constant(returns, jnp.result_type(rewards, values))


def gae(
    rewards: jax.Array,
    values: jax.Array,
    *,
    discount: Scalar,
    lambda_: Scalar,
    where: jax.Array,
    bootstrap: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Generalised advantage estimation: the λ-weighted mix of all k-step advantages.

        Â_t = δ_t + γλ Â_{t+1} = Σ_{l≥0} (γλ)^l δ_{t+l}

    λ = 0 gives δ_t; λ = 1 gives R_t − V_t. The critic's target in PPO is Â_t + V_t.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq 16; slide "Advantage Function". The slide's
    case λ = 1 prints r_{t+l+1}: the reward at t+l belongs there. Its sums are infinite; a response
    ends, and its value is 0 from there on.

    Args:
      rewards: r, [..., T] float.
      values: V, [..., T] float.
      discount: γ.
      lambda_: λ, 0 (low variance) to 1 (no bias).
      where: True on real tokens, [..., T] bool.
      bootstrap: value after the last real token of the row, [...] float, for responses that were
        cut off; None is 0.
      segments: one number an episode, [..., T] int, where they stand back to back; None if a masked
        token is between them.

    Returns:
      [..., T], unreduced, 0 where masked, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> rewards, values, where = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), jnp.ones(2, bool)
    >>> print(gae(rewards, values, discount=1.0, lambda_=0.5, where=where))
    [0.25 0.5 ]
    """
    _check(where, bootstrap, segments, rewards=rewards, values=values)
    check.scalars(discount=discount, lambda_=lambda_)
    on = joined(where, segments)
    deltas = td(rewards, values, discount, where, on, bootstrap)
    sums = sums_from_here(deltas, discount * lambda_, on)
    return _constant(sums, jnp.result_type(rewards, values))


def _check(
    where: jax.Array, bootstrap: jax.Array | None, segments: jax.Array | None, **rows: jax.Array
) -> None:
    """Numbers, mask and segments of one shape; one bootstrap a row, or none."""
    ids = {} if segments is None else check.integers(segments=segments)
    check.same_shape(check.floats(**rows), check.masks(where=where), ids)
    if bootstrap is not None:
        check.fits("where", where.shape[:-1], check.floats(bootstrap=bootstrap))


def _constant(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sums are in float32 at least until here."""
    return jax.lax.stop_gradient(x.astype(dtype))
