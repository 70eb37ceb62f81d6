"""Arithmetic that is the same in many losses."""

import jax
import jax.numpy as jnp


def select(where: jax.Array, x: jax.Array, fill: float | jax.Array = 0.0) -> jax.Array:
    """x where `where`, else fill, for arrays of one shape.

    The first thing that happens to what a mask covers. Not `jnp.where`: it converts before it
    selects, and `jax_debug_nans` would find the NaN of padding in the conversion.

    Args:
      where: bool.
      x: same shape.
      fill: one number.
    """
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    return jax.lax.select(jnp.asarray(where), x, jnp.full_like(x, fill))
