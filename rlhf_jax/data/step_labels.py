"""Solutions with labelled steps, from text to batches for a process or outcome reward model.

Each step is encoded by itself, so that its last token is known whatever the tokenizer: prompt,
step, step, ..., and the stop token where the solution is whole. A label stands at the last token of
its step; that of the last step at the stop token, where a reader knows that nothing follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.batches import PackedBatches
from rlhf_jax.data.encode import encode_prompt
from rlhf_jax.data.packing import Arrays
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPrompt, Message
from rlhf_jax.data.solutions import Solution
from rlhf_jax.data.templates import ChatTokenizer

# At a token that ends no step, or a step that nobody rated.
UNRATED = -1
NUM_CLASSES = 3
_ANY_LENGTH = 2**30


class EncodedSolution(NamedTuple):
    """A prompt with the steps of a solution.

    Attributes:
      tokens: int32 [T].
      response: bool [T], True on the tokens of the solution.
      ends: int32 [S], index of the last token of each step.
      labels: int32 [S], class of each step: its rating plus one, or `UNRATED`, as behind the first
        wrong one (Lightman et al. 2023, section 2.6).
      token_labels: int32 [T], at each token of a step its label; in the first wrong step that of a
        right one as long as the letters are right.
      right: whether the final answer is right, 0 or 1; NaN where nobody knows.
    """

    tokens: np.ndarray
    response: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    token_labels: np.ndarray
    right: float

    @property
    def begins(self) -> np.ndarray:
        """Int32 [S], index of the first token of each step; without any it is behind the end."""
        first = np.argmax(self.response)
        return np.concatenate([[first], self.ends[:-1] + 1]).astype(np.int32)


def encode_whole_prompt(
    prompt: str | Sequence[Message], tokenizer: ChatTokenizer, max_length: int
) -> EncodedPrompt | None:
    """Encodes a prompt; None where it leaves no room for a step: part of it is another problem."""
    whole = encode_prompt(prompt, tokenizer, _ANY_LENGTH)
    return whole if whole is not None and len(whole) < max_length else None


def encode_steps(
    prompt: np.ndarray, steps: Sequence[str], tokenizer: ChatTokenizer, *, ended: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a prompt with steps, int32 [T], and the last one's index of each, [S].

    Args:
      prompt: encoded, open for the assistant's words, [P].
      steps: texts; one without any token ends where the one before ends.
      tokenizer: that of the model that reads them.
      ended: whether the solution is whole: a stop token then belongs to the last step.
    """
    parts = [tokenizer.encode(tokenizer.as_text(step), first=False) for step in steps]
    if ended and parts:
        parts[-1] = [*parts[-1], tokenizer.eos_token_id]
    ends = len(prompt) + np.cumsum([len(part) for part in parts], dtype=np.int32) - 1
    tokens = np.concatenate([prompt, *(np.array(part, np.int32) for part in parts)])
    return tokens.astype(np.int32), ends.astype(np.int32)


def encode_solution(
    solution: Solution, tokenizer: ChatTokenizer, max_length: int, drops: DropCounts
) -> EncodedSolution | None:
    """Encodes a labelled solution; None where it is dropped.

    A solution that is too long is cut after the last step that fits: what is said of a step depends
    on nothing behind it.

    Args:
      solution: prompt, steps and labels.
      tokenizer: with a chat template.
      max_length: the most tokens.
      drops: counts what is kept, cut and dropped.
    """
    prompt = encode_whole_prompt(solution.prompt, tokenizer, max_length)
    if prompt is None:
        drops.drop("prompt longer than max_length")
        return None
    if not solution.steps:
        drops.drop("no step")
        return None
    ended = solution.right is not None
    tokens, ends = encode_steps(prompt, solution.steps, tokenizer, ended=ended)
    kept = int(np.searchsorted(ends, max_length))
    if not kept:
        drops.drop("first step longer than max_length")
        return None
    length = int(ends[kept - 1]) + 1
    drops.keep()
    drops.truncate(kept < len(ends))
    labels = [UNRATED if label is None else label + 1 for label in solution.labels[:kept]]
    if solution.first_error >= 0:  # what comes behind it is neither right nor wrong
        labels[solution.first_error + 1 :] = [UNRATED] * len(labels[solution.first_error + 1 :])
    token_labels = np.full(length, UNRATED, np.int32)
    token_labels[len(prompt) :] = np.repeat(labels, np.diff(ends[:kept], prepend=len(prompt) - 1))
    wrong = solution.first_error
    if 0 <= wrong < kept and solution.letters_right:
        begins = len(prompt) if wrong == 0 else int(ends[wrong - 1]) + 1
        said = tokens[begins : ends[wrong] + 1]
        right = _tokens_within(said, solution.letters_right, tokenizer)
        token_labels[begins : begins + min(right, len(said) - 1)] = NUM_CLASSES - 1
    return EncodedSolution(
        tokens[:length],
        np.arange(length) >= len(prompt),
        ends[:kept],
        np.array(labels, np.int32),
        token_labels,
        float("nan") if solution.right is None else float(solution.right),
    )


def _tokens_within(tokens: np.ndarray, letters: int, tokenizer: ChatTokenizer) -> int:
    """How many of the first tokens lie within so many letters."""
    count = 0
    while count < len(tokens) and len(tokenizer.decode(tokens[: count + 1].tolist())) <= letters:
        count += 1
    return count


def encode_solutions(
    solutions: Sequence[Solution], tokenizer: Any, *, max_length: int, drops: DropCounts
) -> list[EncodedSolution]:
    """Encodes solutions, without those that are dropped; the tokenizer is one of transformers.

    Raises:
      ValueError: none is left.
    """
    chat = ChatTokenizer(tokenizer)
    found = [encode_solution(one, chat, max_length, drops) for one in solutions]
    kept = [one for one in found if one is not None]
    if not kept:
        raise ValueError(f"no solution is left: {drops.summary()}")
    return kept


class SolutionBatches(PackedBatches):
    """Batches of labelled solutions, several a row.

    Each batch is that of `PackedBatches`, with `loss_mask` True on the tokens of solutions, and

      labels   [B, T] int32   class of the step that ends with the token, or `UNRATED`; with
                              `every_token` of the step that the token is in
      traced   [B, T] bool    tokens of solutions that are right, and no step of which is wrong
      right    [B, T] float32 whether the final answer of the token's solution is right; NaN where
                              nobody knows, and on padding
      begins   [B, T] int32   at the last token of each step the place of its first one in the row;
                              0 elsewhere

    Args:
      solutions: encoded.
      batch_size: rows B, global.
      length: tokens T of a row.
      seed: of the shuffling.
      pad_id: written into padding.
      every_token: whether the label of a step stands at all of its tokens.
    """

    def __init__(
        self,
        solutions: Sequence[EncodedSolution],
        *,
        batch_size: int,
        length: int,
        seed: int,
        pad_id: int,
        every_token: bool = False,
    ):
        documents = [Encoded(one.tokens, one.response) for one in solutions]
        super().__init__(documents, batch_size=batch_size, length=length, seed=seed, pad_id=pad_id)
        self._solutions, self._every_token = solutions, every_token

    def _collate(self, item: list[list[int]]) -> Arrays:
        batch = super()._collate(item)
        shape = batch["tokens"].shape
        labels = np.full(shape, UNRATED, np.int32)
        right, traced = np.full(shape, np.nan, np.float32), np.zeros(shape, bool)
        begins = np.zeros(shape, np.int32)
        filler: list[list[int]] = [[]] * (self._shape.rows - len(item))
        for row, members in enumerate(self._mine(item + filler)):
            start = 0
            for member in members:
                one = self._solutions[member]
                labels[row, start + one.ends] = one.labels
                begins[row, start + one.ends] = start + one.begins
                if self._every_token:
                    labels[row, start : start + len(one.tokens)] = one.token_labels
                right[row, start : start + len(one.tokens)] = one.right
                faultless = one.right == 1.0 and (one.labels > 0).all()
                traced[row, start : start + len(one.tokens)] = one.response & faultless
                start += len(one.tokens)
        return batch | {"labels": labels, "right": right, "traced": traced, "begins": begins}
