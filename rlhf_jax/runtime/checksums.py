"""Checksums of arrays: the same however an array is sharded, and whatever it was copied through."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A number for each array that another value of any of its elements changes.

    They are computed where the arrays are and in integers, so neither the sharding nor the order
    of the sum matters, and every process gets the same. With several processes: collective.

    Args:
      arrays: Name -> array of numbers.
    """
    # One program for all of them; arrays of different devices do not meet in one.
    groups: dict[frozenset, dict[str, jax.Array]] = {}
    for name, array in arrays.items():
        place = array.sharding.device_set if isinstance(array, jax.Array) else ()
        groups.setdefault(frozenset(place), {})[name] = array
    sums: dict[str, int] = {}
    for group in groups.values():
        sums |= {name: int(total) for name, total in jax.device_get(_sums(group)).items()}
    return sums


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(x: jax.Array) -> jax.Array:
    bits = _bits(x)
    # An odd weight for each place, so that numbers that change places change the sum.
    place = functools.reduce(
        lambda total, axis: (
            total * jnp.uint32(1_000_003) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        ),
        range(bits.ndim),
        jnp.zeros(bits.shape, jnp.uint32),
    )
    weight = (place * jnp.uint32(2_654_435_761)) | jnp.uint32(1)
    return jnp.sum((bits ^ (bits >> 15)) * weight, dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32; an element of eight bytes becomes two."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
