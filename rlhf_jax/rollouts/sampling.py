"""Which token comes next: filters on logits, and the draw."""

import math

import jax
import jax.numpy as jnp

_MINUS_INFINITY = -1e30  # finite: an infinite logit turns 0 * inf into NaN


def top_k_filter(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest of `logits [..., V]` (ties with the k-th are kept)."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < threshold, _MINUS_INFINITY, logits)


def top_p_filter(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the smallest set whose probability reaches p (Holtzman et al. 2020, sec 3.1).

    A sum counts as p where rounding is all that it lacks: .5 and .3 reach .8, though their float32
    sum is smaller. For V tokens that is a tolerance of ε (4 + log₂ V), 1e-6 for 4 tokens and 3e-6
    for 150,000: XLA adds in a tree of log₂ V levels, and four roundings lie around it. Logits of
    less than 32 bits are summed in float32.

    Args:
      logits: `[..., V]`, of any scale.
      p: in (0, 1].

    Returns:
      `[..., V]`: the logits that are kept, ties with the last of them too, and -1e30.
    """
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    wide = ordered.astype(jnp.promote_types(ordered.dtype, jnp.float32))
    probabilities = jax.nn.softmax(wide, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    rounding = float(jnp.finfo(wide.dtype).eps) * (4 + math.log2(logits.shape[-1]))
    # A token stays when those before it have less than p. None is before the first, which stays.
    stays = (before < p - rounding).at[..., 0].set(True)
    smallest_kept = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest_kept, _MINUS_INFINITY, logits)


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Divides positive and multiplies negative logits of tokens already `seen [..., V]`.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in the signed form in common use.
    """
    changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, changed, logits)


def sample(
    key: jax.Array, logits: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """Draws one token per row.

    Args:
      key: random key, consumed.
      logits: `[B, V]` float32.
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: number of tokens to draw from; 0 is all.
      top_p: probability mass to draw from; 1 is all.

    Returns:
      `[B]` int32.
    """
    if temperature == 0.0:
        return _argmax(logits)
    logits = logits / temperature
    if top_k:
        logits = top_k_filter(logits, top_k)
    if top_p < 1.0:
        logits = top_p_filter(logits, top_p)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    # Not `categorical`: there XLA fuses noise and argmax into one loop, three times slower on CPU.
    return _argmax(jax.lax.optimization_barrier(logits + noise))


def _argmax(x: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis as two plain reductions, which vectorise on CPU."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    largest = x == jnp.max(x, axis=-1, keepdims=True)
    # With NaN nothing is equal, and the result is still a token.
    return jnp.min(jnp.where(largest, index, x.shape[-1] - 1), axis=-1)
