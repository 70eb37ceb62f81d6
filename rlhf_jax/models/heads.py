"""What is read off a decoder: log-probabilities of tokens, and one number per token or sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rlhf_jax.losses import entropy, select_log_probs
from rlhf_jax.models.placement import rows_per_device
from rlhf_jax.models.transformer import Transformer

# Float32 logits that a device holds at once; the backward pass takes about three times as much.
LOGITS_BYTES = 2**29


def next_token_log_probs(
    model: Transformer,
    tokens: jax.Array,
    segments: jax.Array,
    *,
    start: int = 1,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """log π(y_t | y_<t) of the tokens from column `start` on.

    Logits are made for these columns only, `chunk` columns at a time, and made again in the
    backward pass: a `[B, T, V]` float32 array never lives from one pass to the other.

    Args:
      model: the language model.
      tokens: `[B, T]` int32.
      segments: `[B, T]` int32, see `Transformer.__call__`.
      start: first column that is predicted, at least 1. For a rollout, the prompt length P.
      temperature: logits are divided by it; 1 is the model itself.
      with_entropy: also return the entropy of each of these distributions, in nats.
      chunk: columns whose logits exist at once; 0 is as many as `LOGITS_BYTES` of a device hold.
        Devices exchange the gradient of the LM head once for each chunk.

    Returns:
      Log-probabilities `[B, T - start]` float32, and the entropies of the same shape or None.
    """
    return log_probs_of(
        model,
        model(tokens, segments)[:, start - 1 : -1],
        tokens[:, start:],
        temperature=temperature,
        with_entropy=with_entropy,
        chunk=chunk,
    )


def log_probs_of(
    model: Transformer,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """The same from hidden states `[B, W, D]` that predict `targets [B, W]`: nothing is shifted."""

    def head(hidden, targets):
        logits = model.logits(hidden)
        log_probs = select_log_probs(logits, targets, temperature=temperature)
        return log_probs, entropy(logits / temperature) if with_entropy else None

    chunk = chunk or fitting_columns(targets.shape[0], model.config.vocab_size)
    return by_columns(head, hidden, targets, chunk=chunk)


def by_columns(head: Callable[..., Any], *arrays: jax.Array, chunk: int) -> Any:
    """What a function makes of columns, some of them at a time and again in the backward pass.

    Args:
      head: from arrays `[B, C, ...]` to a tree of arrays `[B, C]`; no column looks at another.
      *arrays: `[B, W, ...]` each.
      chunk: C, how many columns exist at once.

    Returns:
      The tree of `head`, with arrays `[B, W]`.
    """
    head, width = jax.checkpoint(head), arrays[0].shape[1]
    if width <= chunk:
        return head(*arrays)
    count = -(-width // chunk)

    def split(x):
        """`[B, W, ...]` -> `[count, B, chunk, ...]`."""
        x = jnp.pad(x, ((0, 0), (0, count * chunk - width)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :width]

    results = jax.lax.map(lambda parts: head(*parts), tuple(map(split, arrays)))
    return jax.tree.map(join, results)


def fitting_columns(rows: int, vocab_size: int) -> int:
    """How many columns of logits for `rows` sequences a device makes at once, at least 1."""
    return max(1, LOGITS_BYTES // (4 * rows_per_device(rows) * vocab_size))


class ScalarModel(nnx.Module):
    """A decoder with a linear head that gives one number per token: reward model and critic.

    The trunk keeps its language-model head, so that a reward model can be trained with the LM
    loss (Zheng et al. 2023, eq 2), both heads on one trunk.

    Args:
      trunk: the decoder; its weights are shared with the caller's, not copied.
      key: random key for the head, drawn from N(0, 1/(D+1)) as in Stiennon et al. 2020. None
        gives a head of zeros, the usual start of a critic that has no reward model to start from.
    """

    def __init__(self, trunk: Transformer, key: jax.Array | None = None):
        width = trunk.config.hidden_size
        self.trunk = trunk
        kernel = jnp.zeros((width,), jnp.float32)
        if key is not None:
            kernel = jax.random.normal(key, (width,), jnp.float32) / (width + 1) ** 0.5
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((), jnp.float32))

    def values(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """`[B, T]` float32: at column t, the number read after token t."""
        return self.read(self.trunk(tokens, segments))

    def read(self, hidden: jax.Array) -> jax.Array:
        """Applies the head to hidden states `[..., D]` in float32."""
        return hidden.astype(jnp.float32) @ self.kernel[...] + self.bias[...]

    def scores(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """`[B]` float32: the number read at the last real token, on whichever side padding is."""
        hidden = self.trunk(tokens, segments)
        return self.read(hidden_at(hidden, last_real_index(segments > 0)))

    def normalized(self, mean: jax.Array, std: jax.Array) -> ScalarModel:
        """The same model with its numbers mapped to `(r - mean) / std`."""
        changed = nnx.clone(self)
        changed.kernel = nnx.Param(self.kernel[...] / std)
        changed.bias = nnx.Param((self.bias[...] - mean) / std)
        return changed


def last_real_index(mask: jax.Array) -> jax.Array:
    """Index `[B]` of the last True of each row of `mask [B, T]`; 0 where there is none."""
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1]), 0), axis=-1)


@functools.partial(jax.vmap, in_axes=(0, 0))
def hidden_at(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """Picks column `index [B]` of `hidden [B, T, D]`: `[B, D]`."""
    return hidden[index]
