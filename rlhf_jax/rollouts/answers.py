"""Many answers to each of many prompts: one read of a prompt, few shapes, texts with their numbers.

For whoever looks at answers rather than trains on the batch that drew them: votes, best-of-N,
labels by comparison, rejection sampling. A `Rollout` keeps all rows of a batch together; here every
prompt has the list of its answers, in the order of the prompts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.batches import pad_prompts
from rlhf_jax.data.packing import assign_buckets
from rlhf_jax.data.schemas import EncodedPrompt
from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.rollouts.rollout import Rollout, SamplingConfig, make_generate
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.host_memory import release_freed_memory
from rlhf_jax.runtime.sharding import Sharding

SHORTEST_BUCKET = 16

# The same settings share one compiled function, whichever model asks: weights are its argument.
compiled_generate = functools.lru_cache(maxsize=16)(make_generate)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    Attributes:
      text: without special tokens.
      tokens: as they were drawn, EOS included.
      log_prob: log π of all tokens together, at the sampling temperature, in nats.
      entropy: mean over the tokens of the policy's entropy, in nats.
      ended: whether it ends with EOS; otherwise it was cut.
    """

    text: str
    tokens: tuple[int, ...]
    log_prob: float
    entropy: float
    ended: bool


def sample_answers(
    model: Any,
    prompts: Sequence[EncodedPrompt],
    tokenizer: Any,
    *,
    samples: int,
    sampling: SamplingConfig,
    key: jax.Array,
    rows: int = 256,
    prompt_buckets: Sequence[int] = (),
    generate: Callable[..., Rollout] | None = None,
    sharding: Sharding | None = None,
) -> list[list[Answer]]:
    """Draws `samples` answers to each prompt, which the model reads once.

    A prompt's draws depend on the key and on the prompts before it, not on those that follow: with
    more prompts the first ones have answers of the same tokens. Batches of a bucket have one shape,
    which only a bucket of few prompts makes smaller, and each shape has one program. A second call
    with the same settings compiles nothing, for whatever model of the same sizes: a run asks its
    policy of every round by the same function.

    Args:
      model: the policy.
      prompts: N encoded prompts, int32 arrays `[n]` of different lengths.
      tokenizer: says what ends an answer, and turns tokens into text.
      samples: answers to each prompt.
      sampling: how they are drawn.
      key: random key, consumed.
      rows: the most answers that are drawn at a time.
      prompt_buckets: increasing lengths to which prompts are padded; empty are powers of two
        from 16.
      generate: from `rollout.make_generate`, with the same `samples` and `sampling`; None makes it
        once for all calls with these settings.
      sharding: where batches go; None is one device.

    Returns:
      N lists of `samples` answers each.

    Raises:
      ValueError: no row for all samples of a prompt, an empty prompt, one longer than the longest
        bucket, or a `generate` of another number of samples or tokens.
    """
    if not 1 <= samples <= rows:
        raise ValueError(f"samples={samples} must be from 1 to rows={rows}, those drawn at a time")
    stops = stop_tokens(tokenizer)
    if generate is None:
        generate = compiled_generate(
            sampling,
            eos_ids=stops,
            pad_id=tokenizer.pad_token_id,
            samples=samples,
            sharding=sharding,
        )
    found: list[list[Answer]] = [[] for _ in prompts]
    for length, number, size, members in _batches(
        [len(prompt) for prompt in prompts],
        prompt_buckets,
        rows // samples,
        1 if sharding is None else sharding.data,
    ):
        asked = filled([prompts[i] for i in members], length, size, tokenizer.pad_token_id)
        placed = asked if sharding is None else sharding.put_whole(asked)
        batch_key = jax.random.fold_in(jax.random.fold_in(key, length), number)
        drawn = distributed.fetch(generate(model, placed["tokens"], placed["mask"], batch_key))
        _check_shape(drawn, size * samples, sampling.max_new_tokens)
        answers = _answers(drawn, len(members) * samples, tokenizer, stops)
        for position, i in enumerate(members):
            found[i] = answers[position * samples : (position + 1) * samples]
        release_freed_memory()
    return found


def buckets_to(longest: int, shortest: int = SHORTEST_BUCKET) -> tuple[int, ...]:
    """Powers of two times the shortest bucket, up to the first that holds `longest` tokens.

    >>> buckets_to(50)
    (16, 32, 64)
    """
    buckets = [shortest]
    while buckets[-1] < longest:
        buckets.append(2 * buckets[-1])
    return tuple(buckets)


def filled(prompts: Sequence[EncodedPrompt], length: int, size: int, pad_id: int) -> dict:
    """`data.batches.pad_prompts` with rows of padding up to `size`, for which nothing is drawn."""
    empty = np.zeros(0, np.int32)
    return pad_prompts([*prompts, *[empty] * (size - len(prompts))], length, pad_id=pad_id)


def texts_after(
    tokenizer: Any, before: Sequence[Iterable[int]], drawn: Sequence[Iterable[int]]
) -> list[str]:
    """Texts of tokens that follow others, without special tokens.

    Decoded alone, the first of them would lose its leading space with some tokenizers.

    Args:
      tokenizer: turns tokens into text.
      before: what stands before them, B sequences.
      drawn: B sequences.
    """
    heads = [tuple(map(int, ids)) for ids in before]
    different = list(dict.fromkeys(heads))  # many continuations have one beginning
    spoken = tokenizer.batch_decode(list(map(list, different)), skip_special_tokens=True)
    lengths = {head: len(text) for head, text in zip(different, spoken, strict=True)}
    whole = [[*head, *map(int, rest)] for head, rest in zip(heads, drawn, strict=True)]
    texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
    return [text[lengths[head] :] for head, text in zip(heads, texts, strict=True)]


def _batches(
    lengths: Sequence[int], buckets: Sequence[int], most: int, devices: int
) -> Iterator[tuple[int, int, int, list[int]]]:
    """Length, number within the bucket, prompts of the shape, and positions of each batch."""
    if 0 in lengths:
        raise ValueError(f"prompt {list(lengths).index(0)} is empty: there is nothing to answer")
    buckets = tuple(buckets) or buckets_to(max(lengths, default=1))
    bucket_of = assign_buckets(lengths, buckets)
    for bucket, length in enumerate(buckets):
        members = np.flatnonzero(bucket_of == bucket).tolist()
        # A bucket with few prompts has a smaller shape: what is drawn for a row does not depend on
        # the number of rows, see `jax_threefry_partitionable`.
        size = min(most, devices * (buckets_to(-(-len(members) // devices), 1)[-1]))
        for number, start in enumerate(range(0, len(members), size)):
            yield length, number, size, members[start : start + size]


def _check_shape(drawn: Rollout, rows: int, new_tokens: int) -> None:
    got = drawn.log_probs.shape
    if got != (rows, new_tokens):
        raise ValueError(
            f"generate drew {got[0]} rows of {got[1]} tokens in place of {rows} of {new_tokens}: "
            "make it by make_generate with the same samples and sampling"
        )


def _answers(drawn: Rollout, count: int, tokenizer: Any, stops: Sequence[int]) -> list[Answer]:
    """The first `count` rows."""
    split = drawn.prompt_length
    where = np.asarray(drawn.response_mask)
    heads = [drawn.tokens[row, :split][drawn.mask[row, :split]] for row in range(count)]
    tokens = [drawn.responses[row][where[row]] for row in range(count)]
    texts = texts_after(tokenizer, heads, [ids[~np.isin(ids, stops)] for ids in tokens])
    lengths = where.sum(1)
    return [
        Answer(
            text=texts[row],
            tokens=tuple(tokens[row].tolist()),
            log_prob=float(np.sum(drawn.log_probs[row], dtype=np.float64)),
            entropy=float(np.sum(drawn.entropies[row], dtype=np.float64) / lengths[row]),
            ended=bool(drawn.ended[row]),
        )
        for row in range(count)
    ]
