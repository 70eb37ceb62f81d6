"""Policies that are asked with words before the prompt, which nobody else reads.

A policy that was trained on quality prompts answers well where it is asked to: r, x in place of x.
What it says is measured and judged as an answer to x: its log-probabilities are log π(y | r, x),
those of the reference log π_ref(y | x), and no judge sees r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.rollouts.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class Conditioned:
    """A policy with the words that it is asked with.

    Attributes:
      model: the policy.
      prefix: their tokens.
      bos: a token behind which they stand where a prompt begins with it; below 0 is none.
    """

    model: Any
    prefix: tuple[int, ...]
    bos: int = -1


def with_conditions(generate: Callable[..., Rollout]) -> Callable[..., Rollout]:
    """`rollout.make_generate`'s function, which may also be given a `Conditioned` policy.

    Its rollouts have the prompts without the prefix: whatever reads them takes the answers for
    answers to these.

    Args:
      generate: from `make_generate`, with one sample a prompt.
    """

    def ask(policy: Any, tokens: jax.Array, mask: jax.Array, key: jax.Array) -> Rollout:
        if not isinstance(policy, Conditioned):
            return generate(policy, tokens, mask, key)
        longer = with_prefix(tokens, mask, policy.prefix, policy.bos)
        drawn = generate(policy.model, *longer, key)
        return dataclasses.replace(
            drawn,
            tokens=jnp.concatenate([tokens, drawn.responses], axis=-1),
            mask=jnp.concatenate([mask, drawn.response_mask], axis=-1),
        )

    return ask


def with_prefix(
    tokens: jax.Array, mask: jax.Array, prefix: tuple[int, ...], bos: int = -1
) -> tuple[jax.Array, jax.Array]:
    """Prompts that begin with a prefix of N tokens.

    Args:
      tokens: `[B, P]` int32, left padded.
      mask: `[B, P]` bool; a row without tokens stays one.
      prefix: N tokens.
      bos: stays before the prefix where a prompt begins with it; below 0 is none.

    Returns:
      Tokens and mask `[B, P + N]`, left padded.

    >>> tokens, mask = jnp.array([[0, 5, 6]]), jnp.array([[False, True, True]])
    >>> print(with_prefix(tokens, mask, (8, 9))[0], with_prefix(tokens, mask, (8,), bos=5)[0])
    [[0 8 9 5 6]] [[0 5 8 6]]
    """
    count, width = len(prefix), tokens.shape[1]
    first = jnp.argmax(mask, axis=1)[:, None]
    begins = jnp.take_along_axis(tokens, first, axis=1) == bos
    place = first + begins  # [B, 1], the column at which the prefix goes in
    column = jnp.broadcast_to(jnp.arange(width + count), (tokens.shape[0], width + count))
    # Before the place all is as it was, and behind the prefix `count` columns further right.
    source = jnp.clip(jnp.where(column < place, column, column - count), 0, width - 1)
    inserted = (column >= place) & (column < place + count)
    words = jnp.asarray(prefix, tokens.dtype)[jnp.clip(column - place, 0, count - 1)]
    longer = jnp.where(inserted, words, jnp.take_along_axis(tokens, source, axis=1))
    real = jnp.where(inserted, True, jnp.take_along_axis(mask, source, axis=1))
    return longer, real & jnp.any(mask, axis=1, keepdims=True)
