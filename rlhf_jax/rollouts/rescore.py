"""What other models say of answers that were drawn: log-probabilities, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlhf_jax.data.schemas import EncodedPrompt
from rlhf_jax.models.heads import ScalarModel, next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.answers import Answer, buckets_to
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.sharding import Sharding


@jax.jit
def _log_probs(
    model: Transformer, tokens: jax.Array, segments: jax.Array, temperature: float
) -> jax.Array:
    return next_token_log_probs(model, tokens, segments, temperature=temperature)[0]


@jax.jit
def _scores(model: ScalarModel, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    return model.scores(tokens, segments)


def answers_log_probs(
    model: Transformer,
    prompts: Sequence[EncodedPrompt],
    answers: Sequence[Sequence[Answer]],
    *,
    pad_id: int,
    temperature: float = 1.0,
    rows: int = 128,
    sharding: Sharding,
) -> list[list[float]]:
    """log π of each answer's tokens given its prompt, in nats; `Answer.log_prob` under its own.

    The mean of the difference over samples of a policy is its KL to the model.

    Args:
      model: reads prompts and answers.
      prompts: N, encoded.
      answers: those to each prompt, with their tokens as they were drawn.
      pad_id: written into padding.
      temperature: that of the sampler.
      rows: of a batch.
      sharding: where batches go.

    Returns:
      A number for each answer of each prompt.
    """

    def read(tokens: jax.Array, segments: jax.Array, said: np.ndarray) -> np.ndarray:
        values = distributed.fetch(_log_probs(model, tokens, segments, temperature))
        return np.where(said[:, 1:], values, 0.0).sum(axis=1)

    return _in_batches(read, prompts, answers, pad_id, rows, sharding)


def answers_scores(
    model: ScalarModel,
    prompts: Sequence[EncodedPrompt],
    answers: Sequence[Sequence[Answer]],
    *,
    pad_id: int,
    rows: int = 128,
    sharding: Sharding,
) -> list[list[float]]:
    """The score that a reward model gives each answer, read at its last token.

    Args:
      model: the reward model.
      prompts: N, encoded.
      answers: those to each prompt, with their tokens as they were drawn.
      pad_id: written into padding.
      rows: of a batch.
      sharding: where batches go.
    """

    def read(tokens: jax.Array, segments: jax.Array, said: np.ndarray) -> np.ndarray:
        del said
        return distributed.fetch(_scores(model, tokens, segments))

    return _in_batches(read, prompts, answers, pad_id, rows, sharding)


def _in_batches(
    read: Callable[[jax.Array, jax.Array, np.ndarray], np.ndarray],
    prompts: Sequence[EncodedPrompt],
    answers: Sequence[Sequence[Answer]],
    pad_id: int,
    rows: int,
    sharding: Sharding,
) -> list[list[float]]:
    """A number for each answer, in batches of few shapes that are padded on the right."""
    flat = [
        (len(prompt), np.array([*prompt, *answer.tokens], np.int32))
        for prompt, some in zip(prompts, answers, strict=True)
        for answer in some
    ]
    found = np.zeros(len(flat))
    edges = buckets_to(max((len(tokens) for _, tokens in flat), default=1), 32)
    bucket_of = np.searchsorted(edges, [len(tokens) for _, tokens in flat])
    for bucket, length in enumerate(edges):
        members = np.flatnonzero(bucket_of == bucket)
        for start in range(0, len(members), rows):
            some = members[start : start + rows]
            tokens = np.full((rows, length), pad_id, np.int32)
            segments, said = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
            for row, i in enumerate(some):
                begins, text = flat[i]
                tokens[row, : len(text)], segments[row, : len(text)] = text, 1
                said[row, begins : len(text)] = True
            placed = sharding.put_whole({"tokens": tokens, "segments": segments})
            found[some] = read(placed["tokens"], placed["segments"], said)[: len(some)]
    values = iter(found.tolist())
    return [[next(values) for _ in some] for some in answers]
