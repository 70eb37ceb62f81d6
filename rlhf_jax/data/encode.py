"""One row to token ids with a loss mask.

A prompt that is a string is continued as it stands: BOS, prompt, response, EOS. A list of messages
goes through the tokenizer's chat template. Either way the pieces are tokenized one by one, so that
the ids of the prompt followed by those of the response are the ids of the whole: what the policy
samples behind a prompt is what it is trained on.

Over-long rows lose their oldest turns first (never the system message), then the beginning of the
last question. A row whose response does not fit, or leaves no room for a prompt that it has, is
dropped: the functions return None. Nothing is dropped in silence, `drops` counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.fields import require
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair, EncodedPrompt, Message, Row
from rlhf_jax.data.templates import check_messages, leading_bos, render_pieces
from rlhf_jax.data.tokenizer import encode_piece

Segments = list[tuple[list[int], bool]]  # Ids of a piece, and whether it is trained.

EMPTY = "empty response"
IDENTICAL = "identical chosen and rejected"
TOO_LONG = "response longer than max_length"


def encode_messages(
    messages: Sequence[Message], tokenizer: Any, max_length: int, drops: DropCounts | None = None
) -> Encoded | None:
    """Encodes a conversation; every turn of the assistant is trained, its stop token included.

    Args:
        messages: what follows the last turn of the assistant is left out.
        tokenizer: with a chat template.
        max_length: the most tokens.
        drops: counts the row.

    Raises:
        ValueError: a message lacks its role or content, or see `templates.render_pieces`.
    """
    drops = DropCounts() if drops is None else drops
    said = check_messages(messages, "messages")
    while said and said[-1]["role"] != "assistant":
        said = said[:-1]
    if not said or not said[-1]["content"].strip():
        drops.drop(EMPTY if said else "no assistant turn")
        return None
    return _count(_fit(said, tokenizer, max_length), said, drops)


def encode_text(
    prompt: str, response: str, tokenizer: Any, max_length: int, drops: DropCounts | None = None
) -> Encoded | None:
    """Encodes BOS, prompt, response, EOS; response and EOS are trained.

    The response is taken as it stands: its leading space is the one between the two.
    """
    drops = DropCounts() if drops is None else drops
    if not response.strip():
        drops.drop(EMPTY)
        return None
    answer = _answer(prompt, response, tokenizer)
    head = _head(prompt, tokenizer)
    cut = _cut_head(head, prompt, tokenizer, max_length - len(answer))
    if cut is None:
        drops.drop(TOO_LONG)
        return None
    drops.keep()
    drops.truncate(len(cut) < len(head))
    return _join([(cut, False), (answer, True)])


def encode_response(
    prompt: str | Sequence[Message],
    response: str,
    tokenizer: Any,
    max_length: int,
    drops: DropCounts | None = None,
) -> Encoded | None:
    """Encodes a response to a string (see `encode_text`) or to messages.

    Only the response is trained, not the assistant's turns within the prompt.
    """
    drops = DropCounts() if drops is None else drops
    if isinstance(prompt, str):
        return encode_text(prompt, response, tokenizer, max_length, drops)
    if not response.strip():
        drops.drop(EMPTY)
        return None
    said = [*check_messages(prompt, "prompt"), _assistant(response)]
    return _count(_fit(said, tokenizer, max_length), said, drops, last_only=True)


def encode_pair(
    row: Row, tokenizer: Any, max_length: int, drops: DropCounts | None = None
) -> EncodedPair | None:
    """Encodes {"prompt", "chosen", "rejected"}; the prompt is truncated alike for both.

    Raises:
        ValueError: missing fields, or a margin that is not a finite number.
    """
    drops = DropCounts() if drops is None else drops
    require(row, ("prompt", "chosen", "rejected"), "a preference row")
    prompt, sides = row["prompt"], (row["chosen"], row["rejected"])
    if not all(side.strip() for side in sides):
        drops.drop(EMPTY)
        return None
    if sides[0].strip() == sides[1].strip():
        drops.drop(IDENTICAL)
        return None
    encode = _pair_of_strings if isinstance(prompt, str) else _pair_of_messages
    pair = encode(prompt, sides, tokenizer, max_length, drops)
    if pair is None:
        drops.drop(TOO_LONG)
        return None
    drops.keep()
    return EncodedPair(*pair, float(row.get("margin", 0.0)))


def encode_prompt(
    prompt: str | Sequence[Message],
    tokenizer: Any,
    max_length: int,
    drops: DropCounts | None = None,
    *,
    opening: str = "",
) -> EncodedPrompt | None:
    """Encodes a prompt, open for the assistant's words.

    Args:
      prompt: Text to go on with, or messages.
      tokenizer: With a chat template.
      max_length: The most tokens.
      drops: Counts the prompt.
      opening: Words with which the assistant has begun its turn: the policy goes on with them.
    """
    drops = DropCounts() if drops is None else drops
    content = prompt if isinstance(prompt, str) else _last_content(prompt)
    if not (opening or content).strip():
        drops.drop("empty prompt")
        return None
    begun = encode_piece(tokenizer, opening, first=False)
    room = max_length - len(begun)
    if isinstance(prompt, str):
        head = _head(prompt, tokenizer)
        ids = _cut_head(head, prompt, tokenizer, room)
        truncated = ids is not None and len(ids) < len(head)
    else:
        fitted = _fit(prompt, tokenizer, room, opened=True)
        ids = None if fitted is None else [i for part, _ in fitted[1] for i in part]
        truncated = fitted is not None and fitted[0] != list(prompt)
    if ids is None:
        drops.drop("prompt longer than max_length")
        return None
    drops.keep()
    drops.truncate(truncated)
    return np.array([*ids, *begun], dtype=np.int32)


def _pair_of_strings(
    prompt: str, sides: tuple[str, str], tokenizer: Any, max_length: int, drops: DropCounts
) -> tuple[Encoded, Encoded] | None:
    answers = [_answer(prompt, side, tokenizer) for side in sides]
    head = _head(prompt, tokenizer)
    cut = _cut_head(head, prompt, tokenizer, max_length - max(map(len, answers)))
    if cut is None:
        return None
    drops.truncate(len(cut) < len(head))
    chosen, rejected = (_join([(cut, False), (answer, True)]) for answer in answers)
    return chosen, rejected


def _pair_of_messages(
    prompt: Any, sides: tuple[str, str], tokenizer: Any, max_length: int, drops: DropCounts
) -> tuple[Encoded, Encoded] | None:
    asked = check_messages(prompt, "prompt")
    whole = [_segments([*asked, _assistant(side)], tokenizer) for side in sides]
    sizes = [sum(len(ids) for ids, _ in segments) for segments in whole]
    if max(sizes) > max_length:
        longer = sides[sizes.index(max(sizes))]
        fitted = _fit([*asked, _assistant(longer)], tokenizer, max_length)
        if fitted is None:
            return None
        kept = fitted[0][:-1]
        drops.truncate(kept != asked)
        whole = [_segments([*kept, _assistant(side)], tokenizer) for side in sides]
    chosen, rejected = (_join(segments, last_only=True) for segments in whole)
    return chosen, rejected


def _fit(
    messages: Sequence[Message], tokenizer: Any, max_length: int, *, opened: bool = False
) -> tuple[list[Message], Segments] | None:
    """Encodes messages, without the oldest ones that do not fit; None if that is not enough."""
    kept: list[Message] | None = list(messages)
    while kept is not None:
        segments = _segments(kept, tokenizer, opened=opened)
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
    most = [sizes[min(ends[answers[start - 1]] + 1, len(sizes) - 1)] for start in starts]
    enough = (start for start, size in zip(starts, most, strict=True) if size >= excess)
    return system + rest[next(enough, starts[-1]) :]


def _shorter_question(messages: list[Message], excess: int, tokenizer: Any) -> list[Message] | None:
    """Cuts `excess` tokens off the beginning of the only question left."""
    asked = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        return None
    ids = encode_piece(tokenizer, messages[asked[0]]["content"], first=False)[excess:]
    content = tokenizer.decode(ids).lstrip("\ufffd ")
    if not content or len(content) >= len(messages[asked[0]]["content"]):
        return None
    question: Message = {"role": "user", "content": content}
    return [*messages[: asked[0]], question, *messages[asked[0] + 1 :]]


def _segments(messages: Sequence[Message], tokenizer: Any, *, opened: bool = False) -> Segments:
    pieces = render_pieces(messages, tokenizer, opened=opened)
    return [
        (encode_piece(tokenizer, piece.text, first=number == 0), piece.trained)
        for number, piece in enumerate(pieces)
    ]


def _head(prompt: str, tokenizer: Any) -> list[int]:
    """Returns BOS (if there is one) and the ids of a prompt that is a string."""
    bos = leading_bos(tokenizer)
    return ([] if bos is None else [bos]) + encode_piece(tokenizer, prompt, first=True)


def _answer(prompt: str, response: str, tokenizer: Any) -> list[int]:
    """Returns the ids of the response and EOS."""
    return [*encode_piece(tokenizer, response, first=not prompt), tokenizer.eos_token_id]


def _cut_head(head: list[int], prompt: str, tokenizer: Any, room: int) -> list[int] | None:
    """Takes tokens from the beginning of the prompt, behind BOS; None if none of it fits."""
    start = int(leading_bos(tokenizer) is not None)
    if room < start + bool(prompt):
        return None
    excess = max(0, len(head) - room)
    return head[:start] + head[start + excess :]


def _join(segments: Segments, *, last_only: bool = False) -> Encoded:
    """Concatenates; the first token of a document has nothing to be predicted from."""
    ids = np.concatenate([np.array(part, dtype=np.int32) for part, _ in segments])
    trained = [flag and not (last_only and part is not segments[-1][0]) for part, flag in segments]
    mask = np.repeat(trained, [len(part) for part, _ in segments])
    mask[0] = False
    return Encoded(ids, mask)


def _count(
    fitted: tuple[list[Message], Segments] | None,
    messages: list[Message],
    drops: DropCounts,
    *,
    last_only: bool = False,
) -> Encoded | None:
    if fitted is None:
        drops.drop(TOO_LONG)
        return None
    drops.keep()
    drops.truncate(fitted[0] != messages)
    return _join(fitted[1], last_only=last_only)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _last_content(prompt: Sequence[Message]) -> str:
    messages = check_messages(prompt, "prompt")
    return messages[-1]["content"] if messages else ""
