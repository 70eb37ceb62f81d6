"""Kullback-Leibler divergences between policies, on samples or exact, and their weight."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import LOG_RATIO_LIMIT, limit, widen

Scalar = float | jax.Array


def kl_estimate(log_probs: jax.Array, ref_log_probs: jax.Array, *, estimator: str) -> jax.Array:
    """Per-token estimate of KL(π ‖ π_ref) on tokens drawn from π.

        d = log π − log π_ref
        k1 = d        unbiased, can be negative
        k2 = d²/2     biased, low variance
        k3 = exp(−d) − 1 + d      unbiased, never negative

    In k3 d is kept at or above −20, where its exponential grows to 4.9e8; beyond there is no
    gradient. (No token that π draws is e^20 times as likely under π_ref.) k2 may overflow to inf.

    Source: Schulman, "Approximating KL Divergence" (2020). k3 is computed with expm1: for small d
    `exp(−d) − 1` loses every digit in float32 and goes below 0.

    Args:
      log_probs: log π, [...] float, differentiated. The tokens must come from this policy.
      ref_log_probs: log π_ref, same shape, constant.
      estimator: "k1", "k2" or "k3"; static under `jit`.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.
      ValueError: the estimator is unknown.

    >>> print(kl_estimate(jnp.array([-1.0]), jnp.array([-3.0]), estimator="k2"))
    [2.]
    """
    check.same_shape(check.floats(log_probs=log_probs, ref_log_probs=ref_log_probs))
    check.require(estimator in ("k1", "k2", "k3"), f"estimator={estimator!r} must be k1, k2 or k3")
    log_ratio = log_probs - jax.lax.stop_gradient(ref_log_probs)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return jnp.square(log_ratio) / 2
    log_ratio = limit(log_ratio, -LOG_RATIO_LIMIT, jnp.inf)
    return jnp.expm1(-log_ratio) + log_ratio


def old_policy_kl(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
    """Per-token estimate of KL(π_old ‖ π_θ) on tokens drawn from π_old: PPO-penalty's distance.

        ρ − 1 − log ρ,   ρ = π_θ / π_old

    This is k3 of the old policy against the new, but differentiated in the second: its gradient
    is that of the exact KL in expectation, (ρ − 1) ∇log π_θ, and 0 at ρ = 1. `kl_estimate` is for
    the other case, where the sampled policy is the one that learns.

    log ρ is kept at or below 20, as in `importance_weights`; beyond there is no gradient. Below,
    the pull back to π_old stays, however far.

    Source: Schulman, "Approximating KL Divergence" (2020); Schulman et al. 2017 (arXiv
    1707.06347), eq 8.

    Args:
      log_probs: log π_θ, [...] float, differentiated.
      old_log_probs: log π_old, same shape, constant. The tokens must come from this policy.

    Returns:
      [...], unreduced, never negative.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(old_policy_kl(jnp.log(jnp.array([1.0])), jnp.log(jnp.array([0.5]))).round(3))
    [0.307]
    """
    check.same_shape(check.floats(log_probs=log_probs, old_log_probs=old_log_probs))
    log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
    log_ratio = limit(log_ratio, -jnp.inf, LOG_RATIO_LIMIT)
    return jnp.expm1(log_ratio) - log_ratio


def kl_divergence(logits_p: jax.Array, logits_q: jax.Array) -> jax.Array:
    """KL between two next-token distributions, exact over the vocabulary.

        KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)

    Both arguments are differentiated: PPO-penalty and TRPO move q (p = π_old), Quark moves p. Wrap
    the constant one in `jax.lax.stop_gradient`. Logits of −inf in p (top-p) add nothing.

    Source: slides "TRPO" and "PPO-Penalty" (Schulman et al. 2015 and 2017), at one state s_t.

    Args:
      logits_p: [..., V] float.
      logits_q: same shape.

    Returns:
      [...] float32, unreduced, not negative up to rounding.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
    >>> print(kl_divergence(p, q).round(3))
    0.223
    """
    check.same_shape(check.floats(logits_p=logits_p, logits_q=logits_q))
    log_p = jax.nn.log_softmax(widen(logits_p), axis=-1)
    log_q = jax.nn.log_softmax(widen(logits_q), axis=-1)
    possible = log_p > -jnp.inf
    log_p, log_q = jnp.where(possible, log_p, 0.0), jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)  # impossible: 1 · (0 − 0)


def adaptive_kl_coef(
    coef: jax.Array,
    kl: jax.Array,
    *,
    target: Scalar,
    horizon: Scalar,
    steps: Scalar = 1,
) -> jax.Array:
    """Next weight of the KL reward: up when the measured KL is above target, down when below.

        e = clip(KL/KL_target − 1, −0.2, 0.2)
        β ← β (1 + e · steps/horizon)

    Source: Ziegler et al. 2019 (arXiv 1909.08593), §2.2, with K_β = steps/horizon as in
    its released code (target 6, horizon 10,000 episodes).

    Args:
      coef: β, [] float.
      kl: measured KL, [] float, in the unit of the target (theirs is the sum over a response).
      target: KL_target.
      horizon: the larger, the slower; in the unit of `steps`.
      steps: how much was seen since the last update, e.g. episodes in the batch.

    Returns:
      [] float, constant.

    Raises:
      AssertionError: shapes differ, or a type is not float.
      ValueError: target or horizon is not positive.

    >>> print(adaptive_kl_coef(jnp.array(0.1), jnp.array(12.0), target=6.0, horizon=10).round(4))
    0.102
    """
    check.same_shape(check.floats(coef=coef, kl=kl))
    check.scalars(target=target, horizon=horizon, steps=steps)
    check.require(target > 0, f"target={target} must be positive")
    check.require(horizon > 0, f"horizon={horizon} must be positive")
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return jax.lax.stop_gradient(coef * (1 + error * steps / horizon))


def adaptive_penalty_coef(coef: jax.Array, kl: jax.Array, *, target: Scalar) -> jax.Array:
    """Next weight of PPO-penalty: doubled when the step went too far, halved when not far enough.

        β ← 2β if KL > 1.5 KL_target;  β/2 if KL < KL_target/1.5;  else β

    Source: Schulman et al. 2017 (arXiv 1707.06347), §4.

    Args:
      coef: β, [] float.
      kl: measured mean KL(π_old ‖ π_θ), [] float.
      target: KL_target.

    Returns:
      [] float, constant.

    Raises:
      AssertionError: shapes differ, or a type is not float.
      ValueError: target is not positive.

    >>> print(adaptive_penalty_coef(jnp.array(0.1), jnp.array(0.02), target=0.01))
    0.2
    """
    check.same_shape(check.floats(coef=coef, kl=kl))
    check.scalars(target=target)
    check.require(target > 0, f"target={target} must be positive")
    factor = jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
    return jax.lax.stop_gradient(coef * factor.astype(coef.dtype))
