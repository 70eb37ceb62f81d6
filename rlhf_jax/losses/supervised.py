"""Alignment by supervised losses: quality contrast (RRHF, SLiC-HF, PRO, ORPO, unlikelihood).

All are the auxiliary term of the slides' L_total = −Σ_t log π(y_t⁺ | x, y_{<t}⁺) + L_aux, most with
the first term included. (The slides print log(y_t⁺ | ·), and leave y⁻ out of the expectation.)
For quality prompts (Quark, C-RLFT, ...) see `quality`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import select, subtractable
from rlhf_jax.losses.log_probs import sequence_log_prob
from rlhf_jax.losses.masking import masked_sum

Scalar = float | jax.Array


def rrhf_loss(
    log_probs: jax.Array,
    scores: jax.Array,
    *,
    where: jax.Array,
    rank_weight: Scalar,
    length_power: Scalar = 1.0,
) -> jax.Array:
    """Ranks K responses by their length-normalised likelihood, and imitates the best one.

        p_i = 1/|y_i|^a Σ_t log π(y_{i,t} | x, y_{i,<t})
        L = w Σ_{r_i < r_j} max(0, p_i − p_j) − Σ_t log π(y_{best,t} | x, y_{best,<t})

    Source: Yuan et al. 2023 (RRHF, arXiv 2304.05302), §3 (w = 1; in the code 100).

    Args:
      log_probs: log π, [..., K, T] float, differentiated.
      scores: r, [..., K] float, constant; higher is better.
      where: True on response tokens, [..., K, T] bool; a response without tokens is left out.
      rank_weight: w.
      length_power: a.

    Returns:
      [...], one number a prompt, unreduced.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> log_probs, scores = jnp.array([[-1.0, -1.0], [-0.5, -0.5]]), jnp.array([2.0, 1.0])
    >>> print(rrhf_loss(log_probs, scores, where=jnp.ones((2, 2), bool), rank_weight=1.0))
    2.5
    """
    check.same_shape(check.floats(log_probs=log_probs), check.masks(where=where))
    check.fits("where", where.shape[:-1], check.floats(scores=scores))
    check.scalars(rank_weight=rank_weight, length_power=length_power)
    total, present = masked_sum(log_probs, where=where, axis=-1), jnp.any(where, axis=-1)
    length = jnp.maximum(jnp.sum(where, axis=-1, dtype=total.dtype), 1)
    p = total / length**length_power
    scores = select(present, scores)
    both = present[..., :, None] & present[..., None, :]
    worse = both & (scores[..., :, None] < scores[..., None, :])
    excess = jax.nn.relu(p[..., :, None] - p[..., None, :])
    ranking = masked_sum(excess, where=worse, axis=(-2, -1))
    best = jnp.argmax(select(present, scores, -jnp.inf), axis=-1)
    imitation = -jnp.take_along_axis(total, best[..., None], axis=-1)[..., 0]
    return rank_weight * ranking + imitation


def slic_loss(
    chosen_log_probs: jax.Array,
    rejected_log_probs: jax.Array,
    target_log_probs: jax.Array,
    *,
    margin: Scalar,
    target_weight: Scalar,
) -> jax.Array:
    """Calibrates likelihoods with a hinge, held to a target response; no reference model.

        L = max(0, δ − log π(y⁺|x) + log π(y⁻|x)) − λ log π(y_ref|x)

    Source: Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), eq 1, with δ = 1.

    Args:
      chosen_log_probs: log π(y⁺|x), [...] float, differentiated; sums, not means.
      rejected_log_probs: log π(y⁻|x), same shape, differentiated.
      target_log_probs: log π(y_ref|x), same shape, differentiated; y_ref is an SFT target, and may
        be y⁺.
      margin: δ.
      target_weight: λ.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> chosen, rejected = jnp.array([-2.0]), jnp.array([-2.5])
    >>> print(slic_loss(chosen, rejected, chosen, margin=1.0, target_weight=0.5))
    [1.5]
    """
    check.same_shape(
        check.floats(
            chosen_log_probs=chosen_log_probs,
            rejected_log_probs=rejected_log_probs,
            target_log_probs=target_log_probs,
        )
    )
    check.scalars(margin=margin, target_weight=target_weight)
    hinge = jax.nn.relu(margin - chosen_log_probs + rejected_log_probs)
    return hinge - subtractable(target_weight * target_log_probs)


def pro_loss(
    log_probs: jax.Array, rewards: jax.Array, *, where: jax.Array, sft_weight: Scalar
) -> jax.Array:
    """Preference ranking: each response against all that are worse, hotter the clearer the gap.

        s_i = 1/|y_i| Σ_t log π(y_{i,t} | x, y_{i,<t})
        T_i = r_k − r_i for i > k,   T_k = max_{i>k} T_i
        L = Σ_{k=1}^{K−1} −log( e^{s_k T_k} / (e^{s_k T_k} + Σ_{i>k} e^{s_i T_i}) )
            − w (K−1)² Σ_t log π(y_{1,t} | x, y_{1,<t})

    Source: Song et al. 2023 (PRO, arXiv 2306.17492), §3; T here is one over the paper's
    temperature. (K−1)² as in the released code.

    Args:
      log_probs: log π, [..., K, T] float, best response first, differentiated.
      rewards: r, [..., K] float, falling, constant.
      where: True on response tokens, [..., K, T] bool; responses without tokens are left out, and
        must come last.
      sft_weight: w.

    Returns:
      [...], one number a prompt, unreduced.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> log_probs, rewards = jnp.array([[-1.0], [-1.0]]), jnp.array([2.0, 1.0])
    >>> print(pro_loss(log_probs, rewards, where=jnp.ones((2, 1), bool), sft_weight=0.0).round(3))
    0.693
    """
    check.same_shape(check.floats(log_probs=log_probs), check.masks(where=where))
    check.fits("where", where.shape[:-1], check.floats(rewards=rewards))
    check.scalars(sft_weight=sft_weight)
    s = sequence_log_prob(log_probs, where=where, normalize=True)
    present = jnp.any(where, axis=-1)
    rewards = jax.lax.stop_gradient(select(present, rewards))
    square = (*s.shape, s.shape[-1])
    k, i = (jax.lax.broadcasted_iota(jnp.int32, square, len(square) - n) for n in (2, 1))
    worse = (i > k) & present[..., None, :]
    gaps = jnp.where(worse, rewards[..., :, None] - rewards[..., None, :], 0)
    largest = jnp.max(gaps, axis=-1)
    own = jnp.where(i == k, largest[..., :, None], gaps)
    heat = subtractable(jnp.broadcast_to(s[..., None, :], square) * own)
    log_total = jax.nn.logsumexp(heat, axis=-1, where=worse | (i == k))
    of_k = subtractable(s * largest)
    ranking = jnp.where(jnp.any(worse, axis=-1) & present, log_total - of_k, 0)
    pairs = jnp.square(jnp.sum(present, axis=-1, dtype=s.dtype) - 1)
    imitation = -masked_sum(log_probs, where=where, axis=-1)[..., 0]
    return jnp.sum(ranking, axis=-1) + sft_weight * pairs * imitation


def orpo_loss(
    chosen_log_probs: jax.Array, rejected_log_probs: jax.Array, *, weight: Scalar
) -> jax.Array:
    """Imitates the chosen response and raises its odds over the rejected; no reference model.

        odds(y) = P/(1 − P),   P = exp(mean_t log π(y_t | x, y_{<t}))
        L = −log P(y⁺) − λ log σ(log odds(y⁺) − log odds(y⁻))

    Source: Hong et al. 2024 (ORPO, arXiv 2403.07691), eq 6 and 7 (λ = 0.1). P = 1 has infinite
    odds, so log P is kept 1e-6 below 0 there.

    Args:
      chosen_log_probs: log P(y⁺), [...] float, means over tokens, differentiated.
      rejected_log_probs: log P(y⁻), same shape, differentiated.
      weight: λ.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(orpo_loss(jnp.array([-1.0]), jnp.array([-1.0]), weight=0.0))
    [1.]
    """
    check.same_shape(
        check.floats(chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs)
    )
    check.scalars(weight=weight)
    log_odds = (chosen_log_probs - log1m_exp(chosen_log_probs)) - (
        rejected_log_probs - log1m_exp(rejected_log_probs)
    )
    return -chosen_log_probs + weight * jax.nn.softplus(-log_odds)


def unlikelihood_loss(log_probs: jax.Array) -> jax.Array:
    """Pushes down what should not be said.

        L = −log(1 − π(y⁻ | x))

    Source: Welleck et al. 2019 (arXiv 1908.04319), §4. π = 1 would cost infinity, so log π is
    kept 1e-6 below 0.

    Args:
      log_probs: log π of unwanted tokens, [..., T], or of responses, [...], float, differentiated.

    Returns:
      same shape, unreduced.

    Raises:
      AssertionError: log_probs are not float.

    >>> print(unlikelihood_loss(jnp.log(jnp.array([0.5]))).round(3))
    [0.693]
    """
    check.floats(log_probs=log_probs)
    return -log1m_exp(log_probs)


def log1m_exp(x: jax.Array) -> jax.Array:
    """Log of the probability that is left, accurate at both ends and finite.

        log(1 − exp(x)),   x ≤ 0

    Source: Mächler 2012, "Accurately computing log(1 − exp(−|a|))", eq 7. x is first kept at or
    below −1e-6.

    Args:
      x: [...] float.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: x is not float.

    >>> print(log1m_exp(jnp.log(jnp.array([0.5]))).round(3))
    [-0.693]
    """
    check.floats(x=x)
    x = jnp.minimum(x, jnp.asarray(-1e-6, x.dtype))
    near = x > -jnp.log(2.0).astype(x.dtype)
    of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -1)))
    return jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -1, x))))
