"""Losses of the reward model, one for each form of feedback."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import log_loss, select, widen
from rlhf_jax.losses.log_probs import sequence_log_prob
from rlhf_jax.losses.masking import masked_mean

Scalar = float | jax.Array


def pointwise_loss(rewards: jax.Array, ratings: jax.Array) -> jax.Array:
    """Feedback as a score: regression.

        L = (r(x, y) − r̃(x, y))²

    Source: slide "反馈数据收集", training method 1 (打分式).

    Args:
      rewards: r, [...] float, differentiated.
      ratings: r̃, same shape, constant.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(pointwise_loss(jnp.array([1.0]), jnp.array([3.0])))
    [4.]
    """
    check.same_shape(check.floats(rewards=rewards, ratings=ratings))
    return jnp.square(rewards - jax.lax.stop_gradient(ratings))


def bradley_terry_loss(
    chosen_rewards: jax.Array, rejected_rewards: jax.Array, *, margin: Scalar = 0.0
) -> jax.Array:
    """Feedback as a pair: the chosen response should score higher, by the margin.

        L = −log σ(r(x, y_w) − r(x, y_l) − m)

    Only differences count: adding a constant to all rewards changes nothing.

    Source: arXiv 2307.04964, eq 1; slide "Reward Modeling". Both leave out the minus. Margin:
    Llama 2 (arXiv 2307.09288), eq 2. No ε inside the logarithm: it would silence the gradient of
    the pairs that are most wrong.

    Args:
      chosen_rewards: r(x, y_w), [...] float, differentiated.
      rejected_rewards: r(x, y_l), same shape, differentiated.
      margin: m, a number or an array of the same shape, constant.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(bradley_terry_loss(jnp.array([1.0]), jnp.array([1.0])).round(3))
    [0.693]
    """
    pair = check.floats(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check.same_shape(pair)
    if getattr(margin, "shape", ()):
        check.fits("chosen_rewards", chosen_rewards.shape, check.floats(margin=margin))
    else:
        check.scalars(margin=margin)
    difference = chosen_rewards - rejected_rewards - jax.lax.stop_gradient(margin)
    return jax.nn.softplus(-difference).astype(chosen_rewards.dtype)


def pairwise_ranking_loss(rewards: jax.Array, ranks: jax.Array, *, where: jax.Array) -> jax.Array:
    """Feedback as a ranking of K: the mean Bradley-Terry loss over all its ordered pairs.

        L = −1/C(K,2) Σ_{i ranked above j} log σ(r_i − r_j)

    Tied pairs say nothing and are not counted (without ties the divisor is C(K,2)).

    Source: Ouyang et al. 2022 (arXiv 2203.02155), eq 1; slide "反馈数据收集", method 3 (排序式).

    Args:
      rewards: r, [..., K] float, differentiated.
      ranks: [..., K] int or float, constant; lower is better, equal is a tie.
      where: True on the candidates that are there, [..., K] bool.

    Returns:
      [...], one number a ranking, unreduced; 0 if it has no ordered pair.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> rewards, ranks = jnp.array([1.0, 1.0, 1.0]), jnp.array([2, 0, 1])
    >>> print(pairwise_ranking_loss(rewards, ranks, where=jnp.ones(3, bool)).round(3))
    0.693
    """
    check.same_shape(
        check.floats(rewards=rewards), check.numbers(ranks=ranks), check.masks(where=where)
    )
    rewards, ranks = select(where, rewards), select(where, ranks)
    both = where[..., :, None] & where[..., None, :]
    above = both & (ranks[..., :, None] < ranks[..., None, :])
    losses = jax.nn.softplus(rewards[..., None, :] - rewards[..., :, None])
    return masked_mean(losses, where=above, axis=(-2, -1))


def plackett_luce_loss(rewards: jax.Array, *, where: jax.Array) -> jax.Array:
    """Feedback as a ranking of K: likelihood of choosing the best, then the best of the rest, …

        L = −Σ_{k=1}^{K−1} [ r_(k) − log Σ_{j≥k} exp r_(j) ]

    K = 2 is the Bradley-Terry loss.

    Source: Plackett 1975; Rafailov et al. 2023 (arXiv 2305.18290), eq 18.

    Args:
      rewards: r, [..., K] float, best first, differentiated.
      where: True on the candidates that are there, [..., K] bool.

    Returns:
      [...], one number a ranking, unreduced.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> print(plackett_luce_loss(jnp.zeros(3), where=jnp.ones(3, bool)).round(3))
    1.792
    """
    check.same_shape(check.floats(rewards=rewards), check.masks(where=where))
    rewards = select(where, rewards)
    size = rewards.shape[-1]
    square = (*rewards.shape, size)
    k, j = (jax.lax.broadcasted_iota(jnp.int32, square, len(square) - n) for n in (2, 1))
    remaining = (j == k) | ((j > k) & where[..., None, :])
    candidates = jnp.broadcast_to(rewards[..., None, :], square)
    log_total = jax.nn.logsumexp(candidates, axis=-1, where=remaining)
    return jnp.sum(jnp.where(where, log_total - rewards, 0), axis=-1)


def soft_preference_loss(
    rewards_a: jax.Array, rewards_b: jax.Array, prob_a: jax.Array
) -> jax.Array:
    """Feedback as a probability that a is better (AI feedback, several annotators).

        L = −[p log σ(r_a − r_b) + (1 − p) log σ(r_b − r_a)]

    p = 1 is the Bradley-Terry loss. A difference may be infinite (or overflow): the loss is then 0
    if p is certain and says so, too, else inf.

    Source: Lee et al. 2023 (arXiv 2309.00267), §2; Bai et al. 2022 (arXiv 2212.08073), §4.1.

    Args:
      rewards_a: r_a, [...] float, differentiated.
      rewards_b: r_b, same shape, differentiated.
      prob_a: p, same shape, constant.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(soft_preference_loss(jnp.array([1.0]), jnp.array([1.0]), jnp.array([0.9])).round(3))
    [0.693]
    """
    check.same_shape(check.floats(rewards_a=rewards_a, rewards_b=rewards_b, prob_a=prob_a))
    return log_loss(rewards_a - rewards_b, jax.lax.stop_gradient(prob_a))


def preference_accuracy(chosen_rewards: jax.Array, rejected_rewards: jax.Array) -> jax.Array:
    """Whether the chosen response scores higher; a tie is worth one half.

        1[r_w > r_l] + ½ 1[r_w = r_l]

    A model that gives every response the same score is at chance, not at 0.

    Source: arXiv 2307.04964, fig 3. Its released code counts ties as wrong, so that a model in
    bfloat16 starts below chance.

    Args:
      chosen_rewards: r_w, [...] float.
      rejected_rewards: r_l, same shape.

    Returns:
      [...] float32 of 0, ½ or 1, unreduced, constant. NaN scores count 0.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(preference_accuracy(jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 2.0])))
    [0.  0.5 1. ]
    """
    pair = check.floats(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check.same_shape(pair)
    higher, equal = chosen_rewards > rejected_rewards, chosen_rewards == rejected_rewards
    return higher.astype(jnp.float32) + 0.5 * equal.astype(jnp.float32)


def language_model_loss(
    log_probs: jax.Array,
    *,
    where: jax.Array,
    normalize: bool = False,
    per_token: bool = False,
) -> jax.Array:
    """Negative log-likelihood of a response: SFT, ptx, and the LM term of the reward model.

        L = −Σ_t log p_LM(y_t | x, y_{<t})    (÷ |y| if normalize)

    The terms of the sum, for another reduction: `per_token`.

    Source: arXiv 2307.04964, eq 2: L_RM = −λ log σ(r_w − r_l) − β_rm log p_LM(y_w | x), with
    λ = β_rm = 1. The slide prints + β_rm log(r′): r′ is the LM head, and the sign is a minus.

    Args:
      log_probs: log p_LM, [..., T] float, differentiated.
      where: True on response tokens, [..., T] bool.
      normalize: divide by the number of tokens; static under `jit`.
      per_token: leave the sum to the caller; static under `jit`.

    Returns:
      [...], one number a response, unreduced; with `per_token` [..., T], 0 where masked.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> log_probs, where = jnp.array([-1.0, -2.0, -9.0]), jnp.array([True, True, False])
    >>> print(language_model_loss(log_probs, where=where))
    3.0
    """
    check.static(per_token=per_token)
    if not per_token:
        return -sequence_log_prob(log_probs, where=where, normalize=normalize)
    check.same_shape(check.floats(log_probs=log_probs), check.masks(where=where))
    check.static(normalize=normalize)
    losses = -select(where, log_probs)
    if not normalize:
        return losses
    length = jnp.maximum(jnp.sum(where, axis=-1, keepdims=True, dtype=jnp.float32), 1)
    return (widen(losses) / length).astype(losses.dtype)
