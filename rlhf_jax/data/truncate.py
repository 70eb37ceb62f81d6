"""What goes first from a row that is too long: its oldest turns, then the start of the question.

The system message stays; a response is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.schemas import Message
from rlhf_jax.data.templates import ChatTokenizer

Segments = list[tuple[list[int], bool]]  # Ids of a piece, and whether it is trained.


def fit(
    messages: Sequence[Message], tokenizer: ChatTokenizer, max_length: int, *, opened: bool = False
) -> tuple[list[Message], Segments] | None:
    """Encodes messages, without the oldest ones that do not fit; None if that is not enough."""
    kept: list[Message] | None = list(messages)
    while kept is not None:
        segments = segments_of(kept, tokenizer, opened=opened)
        excess = sum(len(ids) for ids, _ in segments) - max_length
        if excess <= 0:
            return kept, segments
        kept = _later_turns(kept, segments, excess) or _shorter_question(kept, excess, tokenizer)
    return None


def _later_turns(messages: list[Message], segments: Segments, excess: int) -> list[Message] | None:
    """Drops the oldest turns, the system message excepted; None if one turn is left.

    Drops those that must go by any count: with its answers a turn takes at most the tokens up to
    the end of the next question. The caller looks whether that was enough.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(system) :]
    starts = [n for n, message in enumerate(rest) if message["role"] == "user" and n]
    if not starts:
        return None
    sizes = np.cumsum([len(ids) for ids, _ in segments])
    ends = [0, *(number for number, (_, trained) in enumerate(segments) if trained)]
    answers = np.cumsum([message["role"] == "assistant" for message in rest])
    if answers[-1] >= len(ends):  # Not every answer is a piece of its own: one turn at a time.
        return system + rest[starts[0] :]
    most = [sizes[min(ends[answers[start - 1]] + 1, len(sizes) - 1)] for start in starts]
    enough = (start for start, size in zip(starts, most, strict=True) if size >= excess)
    return system + rest[next(enough, starts[-1]) :]


def _shorter_question(
    messages: list[Message], excess: int, tokenizer: ChatTokenizer
) -> list[Message] | None:
    """Cuts `excess` tokens off the beginning of the only question left."""
    asked = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        return None
    ids = tokenizer.encode(messages[asked[0]]["content"], first=False)[excess:]
    content = tokenizer.decode(ids).lstrip("\ufffd ")
    if not content or len(content) >= len(messages[asked[0]]["content"]):
        return None
    question: Message = {"role": "user", "content": content}
    return [*messages[: asked[0]], question, *messages[asked[0] + 1 :]]


def segments_of(
    messages: Sequence[Message], tokenizer: ChatTokenizer, *, opened: bool = False
) -> Segments:
    pieces = tokenizer.pieces(messages, opened=opened)
    return [
        (tokenizer.encode(piece.text, first=number == 0), piece.trained)
        for number, piece in enumerate(pieces)
    ]


def cut_head(head: list[int], prompt: str, tokenizer: ChatTokenizer, room: int) -> list[int] | None:
    """Takes tokens from the beginning of the prompt, after BOS; None if none of it fits."""
    start = int(tokenizer.leading_bos is not None)
    if room < start + bool(prompt):
        return None
    excess = max(0, len(head) - room)
    return head[:start] + head[start + excess :]
