"""The prompts of a split as rows and as tokens, for a policy that answers all of them once."""

from __future__ import annotations

import itertools
from typing import Any

from rlhf_jax.data.encode import encode_prompt
from rlhf_jax.data.schemas import DropCounts, EncodedPrompt, Row
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.tasks import Task


def prompts_of(
    task: Task, tokenizer: Any, split: str, count: int, room: int
) -> tuple[list[Row], list[EncodedPrompt]]:
    """The first prompts of a split that fit, as rows and encoded.

    Args:
      task: has them.
      tokenizer: of the policy.
      split: of them.
      count: the most.
      room: tokens of the longest; longer ones lose their oldest turns.

    Raises:
      ValueError: there is none.
    """
    drops, read, chat = DropCounts(), DropCounts(), ChatTokenizer(tokenizer)
    encoded = (
        (row, encode_prompt(row["prompt"], chat, room, read, opening=row.get("opening", "")))
        for row in task.rows("prompt", split, drops)
    )
    found = ((row, prompt) for row, prompt in encoded if prompt is not None)
    both = list(itertools.islice(found, count))
    if not both:
        raise ValueError(f"data.source={task.config.source!r} has no prompts of {split}")
    print(f"prompts ({split}): {read.summary()}")
    rows, prompts = [row for row, _ in both], [prompt for _, prompt in both]
    task.note("prompt", split, prompts)
    return rows, prompts
