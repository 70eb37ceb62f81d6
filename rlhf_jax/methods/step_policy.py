"""A language model that proposes the steps of a search: `search.Propose`.

A step is a line. What it continues is built from text: the ids of the prompt, then the ids of each
step encoded by itself, as `data.encode` joins the pieces of a row. So a prefix is the same however
its steps were drawn, and a scorer that encodes steps in this way reads the same tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.packing import assign_buckets, fill_buckets
from rlhf_jax.data.schemas import EncodedPrompt
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.methods.search import Partial, Step
from rlhf_jax.rollouts.answers import buckets_to, compiled_generate, filled, texts_after
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.host_memory import release_freed_memory
from rlhf_jax.runtime.sharding import Sharding

_STEP_ENDS: weakref.WeakKeyDictionary[Any, tuple[int, ...]] = weakref.WeakKeyDictionary()


def step_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens whose text contains a line break, special tokens left out.

    Every id is decoded once, and the result is kept as long as the tokenizer.
    """
    known = _STEP_ENDS.get(tokenizer)
    if known is None:
        special = set(tokenizer.all_special_ids)
        ids = [i for i in range(len(tokenizer)) if i not in special]
        texts = tokenizer.batch_decode([[i] for i in ids])
        known = tuple(i for i, text in zip(ids, texts, strict=True) if "\n" in text)
        _STEP_ENDS[tokenizer] = known
    return known


class StepPolicy:
    """Continues partial solutions by one step each, drawn from a language model.

    A step ends with the first token whose text contains a line break, which belongs to it, with a
    token that ends a response, which gives no text, or at its longest, `sampling.max_new_tokens`:
    the next step then goes on in the same line. A solution is whole where the model ended its
    response, or where a line is finished and `is_final` says so; of half a line nobody knows
    whether more digits would follow.

    Prompt and steps together have at most `max_length` tokens. A step is cut there. A solution
    that has no room left gets steps without text and without tokens that do not end it: the
    search gives it up, as any that does not end.

    Each call draws from a key of its own, so the same calls in the same order give the same steps.
    A partial solution is read once for all its continuations. Batches have one shape for each
    bucket and number of continuations, and each shape one program; rows that nothing fills are
    computed nevertheless, so `rows` should be near problems x beams x width.

    Args:
      model: the policy; another one of the same sizes may be put into `model` at any time.
      prompts: encoded, int32 `[n]`, by the index of the problem.
      tokenizer: turns steps into tokens and back.
      sampling: how a step is drawn; the repetition penalty sees only the step.
      key: random key, consumed.
      max_length: the most tokens of prompt and steps together.
      rows: the most steps that are drawn at a time.
      buckets: increasing lengths to which prefixes are padded on the left; empty are powers of two
        from 16, up to `max_length`.
      is_final: whether the steps so far, finished lines without the prompt, are a whole solution.
      sharding: where batches go; None is one device.

    Raises:
      ValueError: a prompt that is empty or leaves no room for a step, or buckets too short for
        what `max_length` allows.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[EncodedPrompt],
        tokenizer: Any,
        *,
        sampling: SamplingConfig,
        key: jax.Array,
        max_length: int,
        rows: int = 64,
        buckets: Sequence[int] = (),
        is_final: Callable[[str], bool] = lambda text: False,
        sharding: Sharding | None = None,
    ):
        for problem, prompt in enumerate(prompts):
            if not 1 <= len(prompt) < max_length:
                raise ValueError(
                    f"prompt {problem} has {len(prompt)} tokens: it needs at least 1, and fewer "
                    f"than max_length={max_length}, so that a step has room"
                )
        self.model = model
        self._prompts, self._max_length, self._rows = prompts, max_length, rows
        powers = [length for length in buckets_to(max_length) if length < max_length]
        self._buckets = tuple(buckets) or (*powers, max_length)
        if self._buckets[-1] < max_length - 1:
            raise ValueError(
                f"buckets={self._buckets} must hold the {max_length - 1} tokens that "
                f"max_length={max_length} allows before a step: add a bucket, or lower max_length"
            )
        self._tokenizer, self._chat = tokenizer, ChatTokenizer(tokenizer)
        self._breaks = step_end_ids(tokenizer)
        self._sampling, self._key, self._calls = sampling, key, 0
        self._is_final, self._sharding = is_final, sharding
        self._ids: dict[str, list[int]] = {}

    def __call__(self, partials: Sequence[Partial], count: int) -> list[list[Step]]:
        """Continues each of P partial solutions by `count` steps, drawn independently.

        Raises:
          ValueError: a solution that has ended, or no row for all continuations of one.
        """
        if not 1 <= count <= self._rows:
            raise ValueError(
                f"count={count} must be from 1 to rows={self._rows}, the steps drawn at a time"
            )
        ended = [partial.text for partial in partials if partial.ended]
        if ended:
            raise ValueError(f"a solution that has ended has no next step: {ended[0]!r}")
        key = jax.random.fold_in(self._key, self._calls)
        self._calls += 1
        prefixes = [self.prefix(partial) for partial in partials]
        proposed = [[Step("", tokens=0)] * count for _ in partials]
        size = self._rows // count
        for number, (length, members) in enumerate(self._plan(prefixes, size)):
            asked = filled(
                [prefixes[i] for i in members], length, size, self._tokenizer.pad_token_id
            )
            drawn = self._draw(asked, jax.random.fold_in(key, number), count)
            of_rows = [i for i in members for _ in range(count)]
            steps = self._steps([(partials[i], prefixes[i]) for i in of_rows], drawn)
            for position, i in enumerate(members):
                proposed[i] = steps[position * count : (position + 1) * count]
            release_freed_memory()
        return proposed

    def prefix(self, partial: Partial) -> np.ndarray:
        """What the model reads before the next step: int32 `[n]`."""
        ids = list(self._prompts[partial.problem])
        for step in partial.steps:
            if step.text not in self._ids:
                text = self._chat.as_text(step.text)
                self._ids[step.text] = self._chat.encode(text, first=False)
            ids += self._ids[step.text]
        return np.array(ids, np.int32)

    def _plan(self, prefixes: Sequence[np.ndarray], size: int) -> list[tuple[int, list[int]]]:
        """Length and members of each batch of those that have room."""
        open_ = [i for i, prefix in enumerate(prefixes) if len(prefix) < self._max_length]
        if not open_:
            return []
        bucket_of = assign_buckets([len(prefixes[i]) for i in open_], self._buckets)
        groups: list[list[int]] = [[] for _ in range(max(bucket_of) + 1)]
        for i, bucket in zip(open_, bucket_of, strict=True):
            groups[bucket].append(i)
        # What does not fill a batch is padded to the next length: fewer batches.
        plan = fill_buckets(groups, [size] * len(groups), even=False)
        return [(self._buckets[bucket], members) for bucket, members in plan]

    def _draw(self, asked: dict[str, np.ndarray], key: jax.Array, count: int) -> Any:
        """The rollout of a batch of prefixes, on the host."""
        generate = compiled_generate(
            self._sampling,
            eos_ids=(*self._chat.stop_tokens, *self._breaks),
            pad_id=self._tokenizer.pad_token_id,
            samples=count,
            sharding=self._sharding,
        )
        if self._sharding is not None:
            asked = self._sharding.put_whole(asked)
        return distributed.fetch(generate(self.model, asked["tokens"], asked["mask"], key))

    def _steps(self, continued: Sequence[tuple[Partial, np.ndarray]], drawn: Any) -> list[Step]:
        """The first rows of a rollout as steps of what they continue."""
        where, stops = np.asarray(drawn.response_mask), self._chat.stop_tokens
        tokens = [
            drawn.responses[row][where[row]][: self._max_length - len(prefix)].tolist()
            for row, (_, prefix) in enumerate(continued)
        ]
        spoken = [ids[:-1] if ids[-1] in stops else ids for ids in tokens]
        texts = texts_after(self._tokenizer, [prefix for _, prefix in continued], spoken)
        steps = []
        for (partial, _), ids, text in zip(continued, tokens, texts, strict=True):
            ends = ids[-1] in stops
            if ids[-1] in self._breaks:
                ends = self._is_final(partial.text + text)
            steps.append(Step(text, tokens=len(ids), ends=bool(ends)))
        return steps
