"""Alignment by supervised losses: quality prompts and token weights (Quark, C-RLFT, FIGA, CoH)."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import subtractable

Scalar = float | jax.Array


def quark_loss(
    log_probs: jax.Array,
    kl: jax.Array,
    entropies: jax.Array,
    *,
    kl_coef: Scalar,
    entropy_coef: Scalar,
) -> jax.Array:
    """Likelihood under a reward-quantile token, held near the reference and kept random.

        L_t = −log π(y_t | r_k, x, y_{<t}) + α KL_t − β H_t

    Source: Lu et al. 2022 (Quark, arXiv 2205.13636), §2, with α = 0.05. Entropy term (β = 0.06) and
    the direction KL(π_θ ‖ π_ref) as in the released code.

    Args:
      log_probs: log π of the samples, [..., T] float, differentiated.
      kl: KL(π_θ ‖ π_ref) at each token, same shape, differentiated: `kl_divergence`.
      entropies: H, same shape, differentiated: `entropy`.
      kl_coef: α.
      entropy_coef: β.

    Returns:
      [..., T], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> one = jnp.array([1.0])
    >>> print(quark_loss(-one, one, one, kl_coef=0.5, entropy_coef=0.25))
    [1.25]
    """
    check.same_shape(check.floats(log_probs=log_probs, kl=kl, entropies=entropies))
    check.scalars(kl_coef=kl_coef, entropy_coef=entropy_coef)
    return -log_probs + subtractable(kl_coef * kl) - subtractable(entropy_coef * entropies)


def quality_weights(rewards: jax.Array, *, beta: Scalar) -> jax.Array:
    """Weight of a training example by the quality of its source (C-RLFT).

        w = exp(r_c / β),   L = −w Σ_t log π(y_t | x, c, y_{<t})

    The loss is `policy_gradient_loss(sequence_log_prob, w)`; c is the class, told in the prompt.

    Source: Wang et al. 2023 (OpenChat, arXiv 2309.11235), §3.

    Args:
      rewards: r_c of the class of each example, [...] float.
      beta: β, positive.

    Returns:
      [...], unreduced, constant.

    Raises:
      AssertionError: rewards are not float.
      ValueError: beta is not positive.

    >>> print(quality_weights(jnp.array([0.0, -1.0]), beta=0.5).round(3))
    [1.    0.135]
    """
    check.floats(rewards=rewards)
    check.scalars(beta=beta)
    check.require(beta > 0, f"beta={beta} must be positive")
    return jax.lax.stop_gradient(jnp.exp(rewards / beta))


def figa_weights(
    tokens: jax.Array,
    other_tokens: jax.Array,
    *,
    weight: Scalar,
    where: jax.Array,
    other_where: jax.Array,
) -> jax.Array:
    """Weights for the tokens that an edit touches: of one response, compared with another.

        w_t = weight if token t is inserted or substituted in every shortest edit, else 0

    Call it twice: on the revised answer with a positive weight (say what was added), on the
    initial answer with a negative one (unsay what was removed). The loss is
    `policy_gradient_loss(log_probs, w)`. Edits are counted by the Levenshtein distance; where
    several shortest edits exist, a token that one of them keeps weighs 0.

    Source: Guo et al. 2023 (FIGA, arXiv 2311.04072), §3.2.

    Args:
      tokens: [..., T] int.
      other_tokens: [..., S] int.
      weight: of touched tokens.
      where: True on the real tokens of the first, [..., T] bool.
      other_where: True on the real tokens of the second, [..., S] bool.

    Returns:
      [..., T] float32, unreduced, constant, 0 where masked.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> revised, initial = jnp.array([5, 7, 9]), jnp.array([5, 8, 9])
    >>> real = jnp.ones(3, bool)
    >>> print(figa_weights(revised, initial, weight=0.5, where=real, other_where=real))
    [0.  0.5 0. ]
    """
    check.same_shape(check.integers(tokens=tokens), check.masks(where=where))
    check.same_shape(
        check.integers(other_tokens=other_tokens), check.masks(other_where=other_where)
    )
    rows = (*tokens.shape[:-1], *other_tokens.shape[-1:])
    check.fits("tokens", rows, {"other_tokens": other_tokens})
    check.scalars(weight=weight)
    touched = jnp.vectorize(_touched, signature="(t),(s),(t),(s)->(t)")
    changed = touched(tokens, other_tokens, where, other_where)
    return jnp.where(changed, jnp.asarray(weight, jnp.float32), jnp.float32(0))


def hindsight_loss_mask(is_output: jax.Array, *, where: jax.Array) -> jax.Array:
    """Tokens that chain of hindsight trains: the model's outputs, not the feedback between them.

        m_t = output_{t+1} ∧ real_{t+1} ∧ real_t

    Source: Liu et al. 2023 (chain of hindsight, arXiv 2302.02676), §2: in "prompt, feedback,
    answer, feedback, answer" the answers are trained and all else is context.

    Args:
      is_output: True on tokens that the model is to produce, [..., T] bool.
      where: True on real tokens, [..., T] bool.

    Returns:
      [..., T−1] bool, aligned with `token_log_probs`.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> print(hindsight_loss_mask(jnp.array([False, True, True]), where=jnp.ones(3, bool)))
    [ True  True]
    """
    check.same_shape(check.masks(is_output=is_output, where=where))
    return (is_output & where)[..., 1:] & where[..., :-1]


def hindsight_visible(key: jax.Array, where: jax.Array, *, max_rate: Scalar) -> jax.Array:
    """Hides a few past tokens at random, so that an answer can't be copied from the one before.

        rate ~ U(0, max_rate) for each row,   visible_t = real_t ∧ u_t ≥ rate

    The first real token of a row always stays. Give it to the model as the mask of what may be
    attended to; the loss mask does not change.

    Source: Liu et al. 2023 (chain of hindsight, arXiv 2302.02676), §2, hides 0 to 5%.

    Args:
      key: a typed PRNG key; it is consumed.
      where: True on real tokens, [..., T] bool.
      max_rate: the largest share that may be hidden, in [0, 1].

    Returns:
      [..., T] bool.

    Raises:
      AssertionError: `where` is not bool.
      ValueError: max_rate is outside [0, 1].

    >>> real = jnp.array([True, True, False])
    >>> print(hindsight_visible(jax.random.key(0), real, max_rate=0.0))
    [ True  True False]
    """
    check.masks(where=where)
    check.scalars(max_rate=max_rate)
    check.require(max_rate >= 0, f"max_rate={max_rate} must be between 0 and 1")
    check.require(max_rate <= 1, f"max_rate={max_rate} must be between 0 and 1")
    rate_key, token_key = jax.random.split(key)
    rate = jax.random.uniform(rate_key, (*where.shape[:-1], 1), maxval=max_rate)
    kept = jax.random.uniform(token_key, where.shape) >= jnp.broadcast_to(rate, where.shape)
    first = where & (jnp.cumsum(where, axis=-1, dtype=jnp.int32) == 1)
    return where & (kept | first)


def _touched(a: jax.Array, b: jax.Array, a_real: jax.Array, b_real: jax.Array) -> jax.Array:
    """True on the tokens of a, [T], that no shortest edit between a and b, [S], keeps."""
    before = _edit_distances(a, b, a_real, b_real)
    after = _edit_distances(a[::-1], b[::-1], a_real[::-1], b_real[::-1])[::-1, ::-1]
    same = (a[:, None] == b[None, :]) & a_real[:, None] & b_real[None, :]
    on_shortest = before[:-1, :-1] + after[1:, 1:] == before[-1, -1]
    return a_real & ~jnp.any(same & on_shortest, axis=1)


def _edit_distances(a: jax.Array, b: jax.Array, a_real: jax.Array, b_real: jax.Array) -> jax.Array:
    """Levenshtein distances of all prefixes, [T+1, S+1]; padding costs nothing.

    Along a row D_j = min(D_{j−1} + c_j, up_j), which is a running minimum once the running cost of
    insertions is taken off: one scan over a is enough.
    """
    inserted = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(b_real, dtype=jnp.int32)])

    def next_row(row: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, real = now
        substituted = row[:-1] + (~((b == token) & b_real & real)).astype(row.dtype)
        deleted = row + real.astype(row.dtype)
        up = deleted.at[1:].min(substituted)
        row = jax.lax.cummin(up - inserted) + inserted
        return row, row

    _, rows = jax.lax.scan(next_row, inserted, (a, a_real))
    return jnp.concatenate([inserted[None], rows])
