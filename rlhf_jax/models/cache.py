"""What a decoder keeps of the tokens that it has read, so that it need not read them again."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
    """Keys and values of the positions seen so far.

    Attributes:
      keys: L arrays `[B, K, S, H]`, one per layer: a decode step updates each in place.
      values: L arrays `[B, K, S, H]`.
      mask: `[B, S]` bool, True where a real token is stored.
      shared: what groups of adjacent rows have seen together, before their own positions: a cache
        of C rows, the first for the first B / C rows here. It does not change.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    shared: KVCache | None = None

    def branched(self, times: int, at: int) -> KVCache:
        """A cache for `times` rows that go on from each row here, without a copy for each.

        Args:
          times: rows that go on from one, adjacent.
          at: positions that are filled, and become shared; the others become the rows' own.
        """

        def own(x: jax.Array) -> jax.Array:
            batch, heads, length, size = x.shape
            return jnp.zeros((batch * times, heads, length - at, size), x.dtype)

        def filled(x: jax.Array) -> jax.Array:
            return x[:, :, :at]

        batch, length = self.mask.shape
        return KVCache(
            keys=tuple(map(own, self.keys)),
            values=tuple(map(own, self.values)),
            mask=jnp.zeros((batch * times, length - at), bool),
            shared=KVCache(
                keys=tuple(map(filled, self.keys)),
                values=tuple(map(filled, self.values)),
                mask=self.mask[:, :at],
            ),
        )


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
