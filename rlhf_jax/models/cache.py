"""What a decoder keeps of the tokens that it has read, so that it need not read them again."""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class KVCache:
    """Keys and values of the positions seen so far.

    Attributes:
      keys: L arrays `[B, K, S, H]`, one per layer: a decode step updates each in place.
      values: L arrays `[B, K, S, H]`.
      mask: `[B, S]` bool, True where a real token is stored.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array


@flax.struct.dataclass
class Prefix:
    """Keys and values of a beginning that many sequences share; see `Transformer.after`.

    Attributes:
      keys: `[L, 1, S, K, H]`.
      values: `[L, 1, S, K, H]`.
      mask: `[1, S]` bool, True on real tokens.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
