"""Policy losses. All are minimised, and unreduced: say at the call how tokens are averaged."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import log_ratio, select, subtractable
from rlhf_jax.losses.kl import old_policy_kl

Scalar = float | jax.Array
Clip = Scalar | tuple[Scalar, Scalar]


def policy_gradient_loss(log_probs: jax.Array, weights: jax.Array) -> jax.Array:
    """Policy gradient with any weight Φ; its gradient is minus the slides' estimator of ∇J.

        L_t = −Φ_t log π_θ(a_t | s_t)

    Φ from this library: `total_return`, `rewards_to_go`, either less a baseline
    (`leave_one_out_baseline` is RLOO, `group_advantages` is GRPO, the values are the critic's),
    `td_errors`, `k_step_advantages`, `gae`.

    Source: slide "Policy Gradient Methods"; arXiv 2307.04964, eq 5. The slide's Ê_t is a mean over
    sequences of the sum over tokens, the released code's the mean over tokens: both are reductions
    that the caller names.

    Args:
      log_probs: log π_θ, [..., T] or [...] float, differentiated.
      weights: Φ, same shape, constant.

    Returns:
      same shape, unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(policy_gradient_loss(jnp.array([-1.0, -2.0]), jnp.array([2.0, -1.0])))
    [ 2. -2.]
    """
    check.same_shape(check.floats(log_probs=log_probs, weights=weights))
    return -jax.lax.stop_gradient(weights) * log_probs


def importance_weights(log_probs: jax.Array, behaviour_log_probs: jax.Array) -> jax.Array:
    """Ratio of the policy to the one that sampled: corrects an expectation under another policy.

        ρ = π_θ(a | s) / π_b(a | s),   E_b[ρ f] = E_θ[f]

    log ρ is kept within ±20, so that ρ is at most 4.9e8 and never infinite. Outside the gradient is
    0, in whatever direction. Log-probabilities of whole responses may well differ by more: there
    the limit binds, and the expectation is another.

    Source: slide "Importance Sampling". With π_b = π_ref it is the paper's ablation (an infinite
    experience buffer, arXiv 2307.04964, §5.3.2).

    Args:
      log_probs: log π_θ, [...] float, differentiated.
      behaviour_log_probs: log π_b, same shape, constant.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(importance_weights(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))))
    [2.]
    """
    check.same_shape(check.floats(log_probs=log_probs, behaviour_log_probs=behaviour_log_probs))
    return jnp.exp(log_ratio(log_probs, behaviour_log_probs))


def ppo_clip_loss(
    log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, *, clip_eps: Clip
) -> jax.Array:
    """PPO's clipped surrogate: no reward for leaving [1−ε, 1+ε] in the profitable direction.

        ρ_t = π_θ(a_t | s_t) / π_old(a_t | s_t)
        L_t = −min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t)

    ρ_t is `importance_weights`, with its limit of e^±20. It matters where A_t < 0 and ρ_t is huge,
    which the clip leaves alone: such a token costs e^20 |A_t| and moves nothing, as in verl, rather
    than outweigh every other token of the batch. No advantage, no loss, whatever the ratio.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq 7; slide "PPO-Clip", which prints the
    objective that is maximised and calls it a loss: this is its negative. What the clip limits is
    the ratio, not π_old as the paper has it. Two sides, [1−ε_low, 1+ε_high]: Yu et al. 2025 (DAPO,
    arXiv 2503.14476), §3.1 "clip-higher", which leaves unlikely tokens more room to rise.

    Args:
      log_probs: log π_θ, [..., T] float, differentiated.
      old_log_probs: log π_old, same shape, constant.
      advantages: A, same shape, constant.
      clip_eps: ε, or a pair (ε_low, ε_high); `float("inf")` for the unclipped surrogate.

    Returns:
      [..., T], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> new, old = jnp.log(jnp.array([0.6, 0.6])), jnp.log(jnp.array([0.4, 0.4]))
    >>> print(ppo_clip_loss(new, old, jnp.array([1.0, -1.0]), clip_eps=0.2))
    [-1.2  1.5]
    """
    _check(log_probs, old_log_probs, advantages=advantages)
    low, high = _sides(clip_eps)
    ratio = importance_weights(log_probs, old_log_probs)
    advantages = jax.lax.stop_gradient(advantages)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def ppo_penalty_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    kl: jax.Array,
    *,
    kl_coef: Scalar,
) -> jax.Array:
    """PPO with a penalty on the distance from the old policy instead of a clip.

        L_t = −(ρ_t A_t − β KL(π_old(·|s_t) ‖ π_θ(·|s_t)))

    At ρ = 1 its gradient is the policy gradient: the KL is then at its minimum. The weight may
    adapt between updates: `adaptive_penalty_coef`. ρ is `importance_weights`, with its limit.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq 8; slide "PPO-Penalty", which leaves the KL
    outside the expectation and calls the maximised objective a loss.

    Args:
      log_probs: log π_θ, [..., T] float, differentiated.
      old_log_probs: log π_old, same shape, constant.
      advantages: A, same shape, constant.
      kl: KL(π_old ‖ π_θ) at each token, same shape, differentiated: `kl_divergence(old, new)` of
        logits, or `old_policy_kl` of the sampled tokens.
      kl_coef: β.

    Returns:
      [..., T], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> log_probs, kl = jnp.log(jnp.array([0.5])), jnp.array([0.1])
    >>> print(ppo_penalty_loss(log_probs, log_probs, jnp.array([1.0]), kl, kl_coef=2.0))
    [-0.8]
    """
    _check(log_probs, old_log_probs, advantages=advantages, kl=kl)
    check.scalars(kl_coef=kl_coef)
    gain = subtractable(trpo_surrogate(log_probs, old_log_probs, advantages))
    return subtractable(kl_coef * kl) - gain


def trpo_surrogate(
    log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array
) -> jax.Array:
    """TRPO's objective, to be maximised under a KL bound: see `rlhf_jax.methods.trust_region`.

        J_t = ρ_t A_t   subject to   E_t[KL(π_old(·|s_t) ‖ π_θ(·|s_t))] ≤ δ

    ρ is `importance_weights`, with its limit.

    Source: Schulman et al. 2015 (arXiv 1502.05477), eq 14; slide "TRPO".

    Args:
      log_probs: log π_θ, [..., T] float, differentiated.
      old_log_probs: log π_old, same shape, constant.
      advantages: A, same shape, constant.

    Returns:
      [..., T], unreduced. A gain, not a loss.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> new, old = jnp.log(jnp.array([0.6])), jnp.log(jnp.array([0.4]))
    >>> print(trpo_surrogate(new, old, jnp.array([2.0])))
    [3.]
    """
    _check(log_probs, old_log_probs, advantages=advantages)
    return importance_weights(log_probs, old_log_probs) * jax.lax.stop_gradient(advantages)


def entropy_bonus(entropies: jax.Array, *, weight: Scalar, max_entropy: Scalar) -> jax.Array:
    """Reward for a policy that stays random, switched off once it is random enough.

        B = w H(π) 1[H(π) < δ]

    Subtract it from the loss. Without the limit the entropy runs away: δ stops that.

    Source: slide "Entropy Bonus"; arXiv 2307.04964, §5.3.2 and fig 16 (w = 0.01, δ = 30), which
    give no formula for the limit: this is one reading. The released code takes w |H − δ| of the
    mean over tokens, where H ≤ log V ≈ 10.4 never reaches δ, so that it is a plain bonus.

    Args:
      entropies: H, [...] float, differentiated; per token, or of whatever δ is meant for.
      weight: w.
      max_entropy: δ; `float("inf")` for a plain bonus.

    Returns:
      [...], unreduced. A gain, not a loss.

    Raises:
      AssertionError: entropies are not float.

    >>> print(entropy_bonus(jnp.array([1.0, 3.0]), weight=0.5, max_entropy=2.0))
    [0.5 0. ]
    """
    check.floats(entropies=entropies)
    check.scalars(weight=weight, max_entropy=max_entropy)
    return weight * jnp.where(entropies < max_entropy, entropies, 0)


def ppo_diagnostics(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    *,
    clip_eps: Clip,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """How far the policy has moved from the one that sampled, at each token.

        approx_kl_t = ρ_t − 1 − log ρ_t  (k3)
        clip_fraction_t = 1[ρ_t < 1 − ε or ρ_t > 1 + ε]

    Nothing is reduced: weigh them as the loss is weighed, or take `masked_mean`, and of the ratio
    `jnp.max(ratio, where=where, initial=0)`. On the first minibatch, before any update, approx_kl
    is 0 and the ratio 1: anything else means that sampler and trainer disagree.

    Source: Schulman, "Approximating KL Divergence" (2020); Huang et al. 2022, "The 37
    implementation details of PPO".

    Args:
      log_probs: log π_θ, [..., T] float.
      old_log_probs: log π_old, same shape.
      clip_eps: ε of the loss, or its pair (ε_low, ε_high).
      where: True on real tokens, same shape, bool; None is everywhere.

    Returns:
      [..., T] each, unreduced, constant: policy/approx_kl, policy/clip_fraction (0 or 1),
      policy/ratio. Where masked: 0, 0, 1.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> new, old = jnp.log(jnp.array([0.6, 0.4])), jnp.log(jnp.array([0.4, 0.4]))
    >>> print(ppo_diagnostics(new, old, clip_eps=0.2)["policy/clip_fraction"])
    [1. 0.]
    """
    _check(log_probs, old_log_probs)
    low, high = _sides(clip_eps)
    if where is not None:
        check.same_shape({"log_probs": log_probs}, check.masks(where=where))
        log_probs, old_log_probs = select(where, log_probs), select(where, old_log_probs)
    new, old = jax.lax.stop_gradient((log_probs, old_log_probs))
    ratio = importance_weights(new, old)
    outside = (1 - ratio > low) | (ratio - 1 > high)
    return {
        "policy/approx_kl": old_policy_kl(new, old),
        "policy/clip_fraction": outside.astype(ratio.dtype),
        "policy/ratio": ratio,
    }


def _sides(clip_eps: Clip) -> tuple[Scalar, Scalar]:
    """ε below 1, and above."""
    pair = clip_eps if isinstance(clip_eps, tuple | list) else (clip_eps, clip_eps)
    if len(pair) != 2 or not all(check.is_scalar(eps) for eps in pair):
        rule = "must be a single number or a pair (low, high)"
        raise AssertionError(f"clip_eps is {check.describe(clip_eps)}, but {rule}")
    return pair[0], pair[1]


def _check(log_probs: jax.Array, old_log_probs: jax.Array, **others: jax.Array) -> None:
    check.same_shape(check.floats(log_probs=log_probs, old_log_probs=old_log_probs, **others))
