"""One decoder for the Llama family, with its layers stacked and scanned.

The module is an immutable pytree: use it under plain `jax.jit`, `jax.grad` and `jax.eval_shape`.
It holds parameters only; the key/value cache is an argument and a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from rlhf_jax.models import layers
from rlhf_jax.models.cache import KVCache, Prefix
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.placement import all_but_gathered, by_rows, gathered, is_bound

Rope = tuple[jax.Array, jax.Array]


class LayerWeights(nnx.Module):
    """Weights of all layers: every leaf has a leading axis L."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        L, D, F, H = (
            config.num_layers,
            config.hidden_size,
            config.intermediate_size,
            config.head_dim,
        )
        N, K = config.num_heads, config.num_kv_heads
        dtype = jnp.dtype(config.dtype)
        keys = iter(jax.random.split(key, 7))

        def normal(*shape: int, std: float = config.init_std) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(next(keys), (L, *shape), dtype))

        # Residual outputs start smaller, by the square root of the number of additions (GPT-2).
        residual_std = config.init_std / (2 * L) ** 0.5
        self.q, self.k, self.v = normal(D, N * H), normal(D, K * H), normal(D, K * H)
        self.o = normal(N * H, D, std=residual_std)
        self.gate, self.up = normal(D, F), normal(D, F)
        self.down = normal(F, D, std=residual_std)
        self.attention_norm = nnx.Param(jnp.ones((L, D), dtype))
        self.mlp_norm = nnx.Param(jnp.ones((L, D), dtype))
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((L, N * H), dtype))
            self.k_bias = nnx.Param(jnp.zeros((L, K * H), dtype))
            self.v_bias = nnx.Param(jnp.zeros((L, K * H), dtype))
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones((L, H), dtype))
            self.k_norm = nnx.Param(jnp.ones((L, H), dtype))

    def layer(self, index: int) -> LayerWeights:
        """The weights of one layer, without the leading axis."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def each(self) -> tuple[LayerWeights, ...]:
        """The weights of every layer by itself: copies of them all, where slices are copies."""
        count = self.attention_norm.shape[0]
        return tuple(self.layer(index) for index in range(count))


class Transformer(nnx.Module):
    """A Llama-family language model.

    Args:
      config: Sizes and switches.
      key: Random key for the initial weights.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        dtype = jnp.dtype(config.dtype)
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = nnx.Param(config.init_std * jax.random.normal(embed_key, shape, dtype))
        self.layers = LayerWeights(config, layers_key)
        self.final_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(
                config.init_std * jax.random.normal(head_key, shape[::-1], dtype)
            )

    def __call__(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          tokens: `[B, T]` int32.
          segments: `[B, T]` int32, 0 on padding, equal positive ids within one document. No token
            sees another document. A padding mask cast to int is one document per row.

        Returns:
          `[B, T, D]`; what stands on padding is meaningless, and finite.
        """
        return self._forward((tokens, segments))[0][0]

    def together(self, *batches: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        """Hidden states of several batches, of any shapes, in one pass over the layers.

        The same numbers as one call for each; but with weights or gradients spread over devices a
        layer is gathered once, and its gradients are added before they travel.

        Args:
          *batches: Tokens and segments of each, as for a call.
        """
        return self._forward(*batches)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Projects hidden states `[..., D]` to float32 logits `[..., V]`."""
        kernel = self._embedding().T if self.config.tie_embeddings else self._lm_head()
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(flat, kernel, preferred_element_type=jnp.float32)
        return logits.reshape(*hidden.shape[:-1], kernel.shape[-1])

    def logits_of(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        """Float32 logits `[..., N]` of N `tokens` alone, from hidden states `[..., D]`."""
        kernel = self._embedding()[tokens].T
        if not self.config.tie_embeddings:
            kernel = self._lm_head()[:, tokens]
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def _embedding(self) -> jax.Array:
        return gathered(self.embedding[...], "embedding")

    def _lm_head(self) -> jax.Array:
        return gathered(self.lm_head[...], "lm_head")

    def _forward(self, *batches: tuple[jax.Array, jax.Array], prefix: Prefix | None = None):
        """Hidden states of each batch, and keys and values `[L, B, T, K, H]` of each."""
        config = self.config
        mask_1S = None if prefix is None else prefix.mask
        shared = None if prefix is None else (prefix.keys, prefix.values)

        def table(segments_BT):
            positions_BT, lengths_BT = layers.positions_in_segment(segments_BT), None
            if mask_1S is not None:
                self._check_cached(mask_1S.shape[1] + segments_BT.shape[1])
                positions_BT += mask_1S.sum()
            elif config.depends_on_length:
                lengths_BT = layers.lengths_of_segments(segments_BT)
            cos, sin = layers.rope_tables(positions_BT, config, lengths_BT)
            return cos, sin, layers.segment_mask(segments_BT, mask_1S)

        tables = [table(segments_BT) for _, segments_BT in batches]

        def layer(x_BTD, w, shared, cos, sin, mask):
            h = layers.rms_norm(x_BTD, w.attention_norm[...], config.norm_eps)
            q, k, v = layers.project_qkv(h, w, cos, sin, config)
            seen = (k, v) if shared is None else map(layers.behind, shared, (k, v))
            attended = jax.nn.dot_product_attention(  # type: ignore[call-overload]
                q, *seen, mask=mask, implementation=config.attention
            )
            x_BTD = x_BTD + layers.dense(attended.reshape(*x_BTD.shape[:2], -1), w.o[...])
            h = layers.rms_norm(x_BTD, w.mlp_norm[...], config.norm_eps)
            return x_BTD + layers.mlp(h, w), (k, v)

        def all_batches(states, of_layer):
            w, shared = gathered(of_layer[0]), of_layer[1]
            results = [
                layer(by_rows(x_BTD), w, shared, *table)
                for x_BTD, table in zip(states, tables, strict=True)
            ]
            return tuple(zip(*results, strict=True))

        states = tuple(self._embedding()[tokens_BT] for tokens_BT, _ in batches)
        scanned = (self.layers, shared)
        states, kv = jax.lax.scan(remat(all_batches, config.remat), states, scanned)
        final = self.final_norm[...]
        return tuple(layers.rms_norm(x, final, config.norm_eps) for x in states), kv

    def prefix(self, tokens: jax.Array, mask: jax.Array) -> Prefix:
        """Runs the beginning that many sequences share, once.

        Args:
          tokens: `[1, S]` int32, padded on either side, to one of few lengths.
          mask: `[1, S]` bool; a prefix without any token is allowed.
        """
        _, ((keys, values),) = self._forward((tokens, mask.astype(jnp.int32)))
        return Prefix(keys, values, mask)

    def after(self, prefix: Prefix, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """Hidden states of sequences that go on from one prefix, which is not run again.

        The numbers of a call on prefix and sequence together, up to rounding.

        Args:
          prefix: From `prefix`.
          tokens: `[B, T]` int32.
          segments: `[B, T]` int32 as for a call; every document of a row goes on from the prefix.

        Returns:
          `[B, T, D]`, without the columns of the prefix.

        Raises:
          ValueError: S + T is beyond what a model with ``dynamic`` rotary scaling can cache.
        """
        return self._forward((tokens, segments), prefix=prefix)[0][0]

    def prefill(
        self, tokens: jax.Array, mask: jax.Array, *, cache_length: int
    ) -> tuple[jax.Array, KVCache]:
        """Runs the prompt and fills the first P positions of a new cache.

        Args:
          tokens: `[B, P]` int32, left padded: the last column is the last real token.
          mask: `[B, P]` bool.
          cache_length: S >= P, positions to allocate.

        Returns:
          Hidden states `[B, D]` of the last column, and the cache.

        Raises:
          ValueError: S is beyond what a model with ``dynamic`` rotary scaling can cache.
        """
        self._check_cached(cache_length)
        (hidden,), ((keys, values),) = self._forward((tokens, mask.astype(jnp.int32)))
        spare = ((0, 0), (0, 0), (0, cache_length - tokens.shape[1]), (0, 0))

        def per_layer(stacked_LBTKH) -> tuple[jax.Array, ...]:
            heads_first = stacked_LBTKH.swapaxes(2, 3)
            return tuple(jnp.pad(heads_first[i], spare) for i in range(self.config.num_layers))

        return hidden[:, -1], KVCache(
            keys=per_layer(keys),
            values=per_layer(values),
            mask=jnp.pad(mask, spare[:1] + spare[2:3]),
        )

    def _check_cached(self, length: int) -> None:
        """Refuses a cache whose keys would have to change as the sequence grows."""
        scaling = self.config.rope_scaling
        if scaling is None or not self.config.depends_on_length:
            return
        limit = scaling.original_max_length
        if length > limit:
            raise ValueError(
                f"rotary scaling is dynamic: beyond {limit} tokens each new one changes the keys "
                f"of all before it, so that they cannot be cached; {length} tokens, padding "
                f"included, must be at most {limit}"
            )

    def rope(self, positions: jax.Array) -> Rope:
        """Cosine and sine `[..., H / 2]` of integer positions `[...]`, padding not counted."""
        return layers.rope_tables(positions, self.config)

    def decode_step(
        self,
        tokens: jax.Array,
        rope: Rope,
        slot: jax.Array,
        cache: KVCache,
        layer_weights: tuple[LayerWeights, ...] = (),
    ) -> tuple[jax.Array, KVCache]:
        """Feeds one token per sequence and writes it to the cache.

        Args:
          tokens: `[B]` int32.
          rope: From `rope`, for the position of each token within its sequence `[B]`.
          slot: scalar int32, the cache index to write, the same for all sequences; of a branched
            cache the index among the rows' own positions.
          cache: The cache; its buffers are reused when the caller donates or loops over it.
          layer_weights: `layers.each()`, for a caller that takes the layers apart once, outside of
            its loop; empty takes them apart here.

        Returns:
          Hidden states `[B, D]`, and the cache with `slot` filled.
        """
        config = self.config
        cos, sin = rope
        mask = cache.mask.at[:, slot].set(True)
        x_BD = self._embedding()[tokens]
        keys, values, shared = list(cache.keys), list(cache.values), cache.shared
        # Unrolled: with the cache as scan inputs and outputs XLA would copy it at every token.
        for i in range(config.num_layers):
            w = gathered(layer_weights[i] if layer_weights else self.layers.layer(i))
            h = layers.rms_norm(x_BD, w.attention_norm[...], config.norm_eps)
            q_BNH, k_BKH, v_BKH = layers.project_qkv(h, w, cos, sin, config)
            keys[i] = keys[i].at[:, :, slot].set(k_BKH)
            values[i] = values[i].at[:, :, slot].set(v_BKH)
            before = shared and (shared.keys[i], shared.values[i], shared.mask)
            attended = layers.attend_cached(q_BNH, keys[i], values[i], mask, before)
            x_BD = x_BD + attended @ w.o[...]
            h = layers.rms_norm(x_BD, w.mlp_norm[...], config.norm_eps)
            x_BD = x_BD + layers.mlp(h, w)
        hidden = layers.rms_norm(x_BD, self.final_norm[...], config.norm_eps)
        return hidden, KVCache(tuple(keys), tuple(values), mask, shared)


def first_layers(model: Transformer, count: int) -> Transformer:
    """The model that ends after its first `count` layers; all other arrays are shared.

    Half of a language model knows most of what a reward model must tell apart, at half the cost.

    Raises:
      ValueError: it does not have so many.
    """
    if not 1 <= count <= model.config.num_layers:
        raise ValueError(f"layers={count} must be from 1 to {model.config.num_layers}")
    leaves, structure = jax.tree.flatten(model)
    shorter = jax.tree.unflatten(structure, leaves)
    shorter.layers = jax.tree.map(lambda leaf: leaf[:count], model.layers)
    shorter.config = dataclasses.replace(model.config, num_layers=count)
    return shorter


def remat(layer: Callable, policy: str) -> Callable:
    """Wraps a scanned layer in rematerialisation: "none", "dots" or "full"."""
    policies = jax.checkpoint_policies
    saveable = {
        "none": all_but_gathered,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": None,
    }[policy]
    if policy == "none" and not is_bound():
        return layer
    # prevent_cse is only needed outside of scan.
    return jax.checkpoint(layer, policy=saveable, prevent_cse=False)
