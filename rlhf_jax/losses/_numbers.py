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


def widen(x: jax.Array) -> jax.Array:
    """In float32 at least, to be summed: bfloat16 cannot count past 256.

    Args:
      x: float.
    """
    return x.astype(wide(x.dtype))


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 of itself; strict promotion has no opinion on this.

    Args:
      dtype: of floats.
    """
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
