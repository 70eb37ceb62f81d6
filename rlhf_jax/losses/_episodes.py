"""Where the episodes of a row end, and sums that stop there."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses._numbers import select, widen

Scalar = float | jax.Array


def joined(where: jax.Array, segments: jax.Array | None) -> jax.Array:
    """True where the next token is real and of the same episode.

    Args:
      where: True on real tokens, [..., T] bool.
      segments: [..., T] int, one number an episode; None if a masked token is between episodes.
    """
    both = where & shift_left(where)
    return both if segments is None else both & (segments == shift_left(segments))


def shift_left(x: jax.Array) -> jax.Array:
    """x_{t+1} at t; zero (False) at the end.

    Args:
      x: [..., T].
    """
    return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)


def last_of_row(where: jax.Array) -> jax.Array:
    """True on the last real token.

    Args:
      where: True on real tokens, [..., T] bool.
    """
    real_from_here = jnp.flip(jnp.cumsum(jnp.flip(where, -1), -1, dtype=jnp.int32), -1)
    return where & (real_from_here == 1)


def values_ahead(
    values: jax.Array, where: jax.Array, on: jax.Array, bootstrap: jax.Array | None
) -> jax.Array:
    """V_{t+1}; 0 after the end of an episode, or the bootstrap after the last one of the row.

    Args:
      values: V, [..., T] float.
      where: True on real tokens, [..., T] bool.
      on: `joined`.
      bootstrap: [...] float, or None.
    """
    ahead = select(on, shift_left(values))
    if bootstrap is None:
        return ahead
    bootstrap = select(jnp.any(where, axis=-1), bootstrap).astype(values.dtype)
    return jnp.where(last_of_row(where), bootstrap[..., None], ahead)


def td(
    rewards: jax.Array,
    values: jax.Array,
    discount: Scalar,
    where: jax.Array,
    on: jax.Array,
    bootstrap: jax.Array | None,
) -> jax.Array:
    """δ_t, in float32 at least, 0 where masked.

    Args:
      rewards: r, [..., T] float.
      values: V, [..., T] float.
      discount: γ.
      where: True on real tokens, [..., T] bool.
      on: `joined`.
      bootstrap: [...] float, or None.
    """
    rewards, values = widen(select(where, rewards)), widen(select(where, values))
    ahead = values_ahead(values, where, on, bootstrap)
    return select(where, rewards + discount * ahead - values)


def sums_from_here(x: jax.Array, decay: Scalar, on: jax.Array) -> jax.Array:
    """y_t = x_t + decay · y_{t+1} within an episode, in one pass from the end.

    Args:
      x: [..., T] float, 0 where masked.
      decay: of one step.
      on: `joined`.
    """
    return _scan(x, decay, on, reverse=True)


def sums_up_to_here(x: jax.Array, decay: Scalar, on: jax.Array) -> jax.Array:
    """y_t = x_t + decay · y_{t−1} within an episode, in one pass.

    Args:
      x: [..., T] float, 0 where masked.
      decay: of one step.
      on: `joined`.
    """
    on_from_before = jnp.concatenate([jnp.zeros_like(on[..., :1]), on[..., :-1]], axis=-1)
    return _scan(x, decay, on_from_before, reverse=False)


def sums_of_k(x: jax.Array, decay: Scalar, on: jax.Array, k: int) -> jax.Array:
    """Σ_{l<k} decay^l x_{t+l} within an episode.

    Args:
      x: [..., T] float, 0 where masked.
      decay: of one step.
      on: `joined`.
      k: number of terms.
    """

    def one_more(_: int, sums: jax.Array) -> jax.Array:
        return x + decay * select(on, shift_left(sums))

    return jax.lax.fori_loop(1, min(int(k), x.shape[-1]), one_more, x)


def _scan(x: jax.Array, decay: Scalar, on: jax.Array, *, reverse: bool) -> jax.Array:
    def step(carry: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_t, goes_on = now
        # Selected, not multiplied: a NaN stays in its episode.
        carry = jnp.where(goes_on, x_t + decay * carry, x_t).astype(x.dtype)
        return carry, carry

    time_major = (jnp.moveaxis(x, -1, 0), jnp.moveaxis(on, -1, 0))
    _, sums = jax.lax.scan(step, jnp.zeros_like(x[..., 0]), time_major, reverse=reverse)
    return jnp.moveaxis(sums, 0, -1)
