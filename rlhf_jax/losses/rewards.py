"""Reward shaping: from the score of a response to the rewards of its tokens.

Rewards are constants of every loss, so no gradient flows through anything here: a KL penalty that
is part of the reward must not be differentiated a second time.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._episodes import joined, sums_up_to_here
from rlhf_jax.losses._numbers import select, widen
from rlhf_jax.losses.masking import (
    last_token_mask,
    masked_whiten,
)
from rlhf_jax.losses.moments import RunningMoments, check_moments

Scalar = float | jax.Array


def kl_shaped_rewards(
    scores: jax.Array,
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    *,
    kl_coef: Scalar,
    where: jax.Array,
) -> jax.Array:
    """Reward of each token: a KL penalty everywhere, the score on the last real token.

        r_t = 1[t = last] r(x, y) − η (log π(y_t | x, y_{<t}) − log π_SFT(y_t | x, y_{<t}))

    Source: arXiv 2307.04964, eq 19; slide "Token Level KL-Penalty", which prints the score at
    every token and a KL between whole responses. The sum over tokens is `sequence_kl_reward`.

    Args:
      scores: r(x, y), [...] float.
      log_probs: log π of the sampling policy, [..., T] float.
      ref_log_probs: log π_SFT, [..., T] float.
      kl_coef: η.
      where: True on real response tokens, [..., T] bool.

    Returns:
      [..., T], unreduced, 0 where masked, constant. An empty response gets nothing.

    Raises:
      AssertionError: shapes differ, or a type is wrong (an integer score is an error).

    >>> log_probs, ref, where = jnp.array([-1.0, -1.0]), jnp.array([-2.0, -1.0]), jnp.ones(2, bool)
    >>> print(kl_shaped_rewards(jnp.array(0.5), log_probs, ref, kl_coef=0.5, where=where))
    [-0.5  0.5]
    """
    _check_kl_reward(scores, log_probs, ref_log_probs, where, kl_coef)
    log_ratio = widen(select(where, log_probs)) - widen(select(where, ref_log_probs))
    score = jnp.where(last_token_mask(where), widen(scores)[..., None], 0)
    shaped = select(where, score - kl_coef * log_ratio)
    return jax.lax.stop_gradient(shaped.astype(jnp.result_type(log_probs, scores)))


def sequence_kl_reward(
    scores: jax.Array,
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    *,
    kl_coef: Scalar,
    where: jax.Array,
) -> jax.Array:
    """Reward of a whole response: its score less the KL penalty, both at the end.

        r_total = r(x, y) − η Σ_t (log π(y_t | x, y_{<t}) − log π_SFT(y_t | x, y_{<t}))

    Source: arXiv 2307.04964, eq 3; slide "Reward Modeling" (KL divergence), estimated on the
    sample itself.

    Args:
      scores: r(x, y), [...] float.
      log_probs: log π of the sampling policy, [..., T] float.
      ref_log_probs: log π_SFT, [..., T] float.
      kl_coef: η.
      where: True on real response tokens, [..., T] bool.

    Returns:
      [...], unreduced, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> log_probs, ref, where = jnp.array([-1.0, -1.0]), jnp.array([-2.0, -1.0]), jnp.ones(2, bool)
    >>> print(sequence_kl_reward(jnp.array(0.5), log_probs, ref, kl_coef=0.5, where=where))
    0.0
    """
    _check_kl_reward(scores, log_probs, ref_log_probs, where, kl_coef)
    log_ratio = widen(select(where, log_probs)) - widen(select(where, ref_log_probs))
    total = widen(scores) - kl_coef * jnp.sum(log_ratio, axis=-1)
    return jax.lax.stop_gradient(total.astype(jnp.result_type(log_probs, scores)))


def rolling_discounted_sum(
    rewards: jax.Array,
    *,
    discount: Scalar,
    where: jax.Array,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Discounted sum of the rewards up to each token: what classic reward scaling measures.

        S_t = γ S_{t−1} + r_t

    Keep `RunningMoments` of S over the real tokens and divide rewards by its standard deviation
    (`scale_rewards`). With γ = 1 and a reward only at the end, S on the last token is the score,
    so moments taken there (`where=last_token_mask(where)`) are the moments of the scores.

    Source: Engstrom et al. 2020 (arXiv 2005.12729), §2; arXiv 2307.04964, §5.3.1 "Reward Scaling"
    (the text; the released code takes the spread of the scores).

    Args:
      rewards: r, [..., T] float.
      discount: γ.
      where: True on real tokens, [..., T] bool.
      segments: one number an episode, [..., T] int, where they stand back to back; None if a masked
        token is between them.

    Returns:
      [..., T], unreduced, 0 where masked, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> rewards, where = jnp.array([1.0, 0.0, 1.0]), jnp.ones(3, bool)
    >>> print(rolling_discounted_sum(rewards, discount=0.5, where=where))
    [1.   0.5  1.25]
    """
    ids = {} if segments is None else check.integers(segments=segments)
    check.same_shape(check.floats(rewards=rewards), check.masks(where=where), ids)
    check.scalars(discount=discount)
    sums = sums_up_to_here(widen(select(where, rewards)), discount, joined(where, segments))
    return jax.lax.stop_gradient(sums.astype(rewards.dtype))


def scale_rewards(rewards: jax.Array, moments: RunningMoments) -> jax.Array:
    """Reward scaling: divides by a running standard deviation, keeps the mean.

        r̃ = r / σ

    Two readings of σ, both from `RunningMoments`: of the scores seen so far (released code), or of
    their `rolling_discounted_sum` (text of the paper). A σ of 0 (no spread seen yet) divides by 1.

    Source: arXiv 2307.04964, §5.3.1; slide "Reward Scaling". The slide swaps the words: σ(A) is the
    standard deviation, Ā the mean.

    Args:
      rewards: r, any shape, float: scores [...] or token rewards [..., T].
      moments: of the history, this batch included.

    Returns:
      same shape, unreduced, constant.

    Raises:
      AssertionError: rewards are not float.

    >>> from rlhf_jax.losses import RunningMoments, update_moments
    >>> scores = jnp.array([1.0, 5.0])
    >>> print(scale_rewards(scores, update_moments(RunningMoments.zeros(), scores)))
    [0.5 2.5]
    """
    check.floats(rewards=rewards)
    check_moments(moments=moments)
    return jax.lax.stop_gradient((widen(rewards) / moments.std_or_one).astype(rewards.dtype))


def normalize_rewards(rewards: jax.Array, moments: RunningMoments, *, clip: Scalar) -> jax.Array:
    """Reward normalisation and clipping, part of PPO-max.

        r̃ = clip((r − r̄) / σ, −δ, δ)

    r̄ and σ are running moments over the history of training. A σ of 0 divides by 1.

    Source: arXiv 2307.04964, §5.3.1 (δ of 0.3 and 0.8); slide "Reward Normalization and Clipping".

    Args:
      rewards: r, any shape, float.
      moments: of the history, this batch included.
      clip: δ; `float("inf")` for none.

    Returns:
      same shape, unreduced, constant.

    Raises:
      AssertionError: rewards are not float.

    >>> from rlhf_jax.losses import RunningMoments, update_moments
    >>> scores = jnp.array([1.0, 5.0])
    >>> print(normalize_rewards(scores, update_moments(RunningMoments.zeros(), scores), clip=0.8))
    [-0.8  0.8]
    """
    check.floats(rewards=rewards)
    check_moments(moments=moments)
    check.scalars(clip=clip)
    normal = (widen(rewards) - moments.mean) / moments.std_or_one
    return jax.lax.stop_gradient(jnp.clip(normal, -clip, clip).astype(rewards.dtype))


def normalize_advantages(
    advantages: jax.Array, *, where: jax.Array, clip: Scalar | None = None
) -> jax.Array:
    """Advantage normalisation and clipping, over the real tokens of the minibatch.

        Ã = clip((A − Ā) / σ(A), −δ, δ)

    Source: arXiv 2307.04964, §5.3.1 (δ of 0.5 and 0.12); slide "Advantages Normalization and
    Clipping", which swaps the words: σ(A) is the standard deviation, Ā the mean. Not part of
    PPO-max. ε = 1e-8 is added to the variance.

    Args:
      advantages: A, [..., T] float.
      where: True on real tokens, same shape, bool.
      clip: δ; None for none.

    Returns:
      same shape, unreduced, 0 where masked, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> advantages = jnp.array([1.0, 3.0, 9.0])
    >>> print(normalize_advantages(advantages, where=jnp.array([True, True, False]), clip=0.5))
    [-0.5  0.5  0. ]
    """
    check.same_shape(check.floats(advantages=advantages), check.masks(where=where))
    normal = jax.lax.stop_gradient(masked_whiten(advantages, where=where))
    if clip is None:
        return normal
    check.scalars(clip=clip)
    return jnp.clip(normal, -clip, clip)


def _check_kl_reward(
    scores: jax.Array,
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    where: jax.Array,
    kl_coef: Scalar,
) -> None:
    tokens = check.floats(log_probs=log_probs, ref_log_probs=ref_log_probs)
    check.same_shape(tokens, check.masks(where=where))
    check.fits("where", where.shape[:-1], check.floats(scores=scores))
    check.scalars(kl_coef=kl_coef)
