"""What other models say of answers that were drawn: log-probabilities, scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlhf_jax.data.packing import assign_buckets
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

    def read(tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return _log_probs(model, tokens, segments, temperature)

    texts, begins = _joined(prompts, answers)
    values = read_in_batches(read, texts, pad_id=pad_id, rows=rows, sharding=sharding)
    # At place t stands the log-probability of token t + 1.
    sums = [
        float(of[begin - 1 : len(text) - 1].sum(dtype=np.float64))
        for of, begin, text in zip(values, begins, texts, strict=True)
    ]
    return _as_nested(sums, answers)


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

    texts, _ = _joined(prompts, answers)
    read = functools.partial(_scores, model)
    values = read_in_batches(read, texts, pad_id=pad_id, rows=rows, sharding=sharding)
    return _as_nested(list(map(float, values)), answers)


def read_in_batches(
    read: Callable[[jax.Array, jax.Array], jax.Array],
    texts: Sequence[np.ndarray],
    *,
    pad_id: int,
    rows: int,
    sharding: Sharding,
) -> list[np.ndarray]:
    """What a model says of each text, read in batches of few shapes.

    Args:
      read: a row of results for each row of tokens and segments `[rows, T]`, which are padded on
        the right.
      texts: tokens int32 [n] of each.
      pad_id: written into padding.
      rows: of a batch.
      sharding: where batches go.

    Returns:
      The row of each text, in their order.
    """
    found: list[np.ndarray] = [np.zeros(0)] * len(texts)
    lengths = [len(text) for text in texts]
    edges = buckets_to(max(lengths, default=1), 32)
    bucket_of = assign_buckets(lengths, edges)
    for bucket, length in enumerate(edges):
        members = np.flatnonzero(bucket_of == bucket).tolist()
        for start in range(0, len(members), rows):
            some = members[start : start + rows]
            tokens = np.full((rows, length), pad_id, np.int32)
            segments = np.zeros((rows, length), np.int32)
            for row, i in enumerate(some):
                tokens[row, : lengths[i]], segments[row, : lengths[i]] = texts[i], 1
            placed = sharding.put_whole({"tokens": tokens, "segments": segments})
            values = distributed.fetch(read(placed["tokens"], placed["segments"]))
            for row, i in enumerate(some):
                found[i] = values[row]
    return found


def _joined(
    prompts: Sequence[EncodedPrompt], answers: Sequence[Sequence[Answer]]
) -> tuple[list[np.ndarray], list[int]]:
    """Each prompt with each of its answers, and where the answer begins."""
    both = [
        (np.array([*prompt, *answer.tokens], np.int32), len(prompt))
        for prompt, some in zip(prompts, answers, strict=True)
        for answer in some
    ]
    return [text for text, _ in both], [begin for _, begin in both]


def _as_nested(values: Sequence[float], answers: Sequence[Sequence[Answer]]) -> list[list[float]]:
    """A number for each answer of each prompt."""
    each = iter(values)
    return [[next(each) for _ in some] for some in answers]
