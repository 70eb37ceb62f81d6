"""Weights that turn unreduced losses into one number.

Losses are unreduced. A reducer turns the mask of a whole batch into weights that sum to one (or to
a count), and a microbatch sums `loss * weight`. Since the weights were made from the whole batch,
gradients of 4 microbatches of 8 ragged sequences add up to that of one batch of 32 exactly.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp


def token_mean(where: jax.Array) -> jax.Array:
    """Every token counts the same; long responses weigh more (the released code of PPO-max)."""
    return where / jnp.maximum(where.sum(), 1)


def sequence_mean(where: jax.Array) -> jax.Array:
    """Every sequence counts the same: mean over its tokens, then over sequences that have any."""
    lengths = where.sum(axis=-1, keepdims=True)
    sequences = (lengths > 0).sum()
    return where / jnp.maximum(lengths, 1) / jnp.maximum(sequences, 1)


def sequence_sum(where: jax.Array) -> jax.Array:
    """Sum over tokens, mean over sequences: Ê_t as the slides write it, 1/|D| Σ_τ Σ_t."""
    sequences = where.any(axis=-1).sum()
    return where / jnp.maximum(sequences, 1)


REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
}


def reduction_weights(name: str, where: jax.Array) -> jax.Array:
    """Weights `[B, T]` float32 of the reducer `name` for the mask `where [B, T]`.

    Raises:
      ValueError: unknown name.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"reduction={name!r} is unknown; use one of {sorted(REDUCTIONS)}")
    return REDUCTIONS[name](where).astype(jnp.float32)


def weighted_sum(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ x · w over entries with positive weight; other entries may be NaN."""
    chex.assert_equal_shape((x, weights))
    return jnp.sum(jnp.where(weights > 0, x, 0.0) * weights)
