"""One row to token ids with a loss mask.

A prompt that is a string is continued as it stands: BOS, prompt, response, EOS. If it (or a text
without a prompt) begins with a control token, it is formatted already: its control tokens are such,
and BOS or a stop token that is there is not added. Elsewhere the name of a control token is text:
what a user writes cannot end a turn or begin another. A list of messages
goes through the tokenizer's chat template. Either way the pieces are tokenized one by one, so that
the ids of the prompt followed by those of the response are the ids of the whole: what the policy
samples after a prompt is what it is trained on.

Over-long rows lose their oldest turns first (never the system message), then the beginning of the
last question. A row whose response does not fit, or leaves no room for a prompt that it has, is
dropped: the functions return None. Nothing is dropped in silence, `drops` counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.schemas import (
    DropCounts,
    Encoded,
    EncodedPair,
    EncodedPrompt,
    Kind,
    Message,
    Row,
    check_characters,
    check_messages,
    require,
    require_sft,
)
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.data.truncate import Segments, cut_head, fit, segments_of

EMPTY = "empty response"
IDENTICAL = "identical chosen and rejected"
IDENTICAL_TOKENS = "identical tokens"
TOO_LONG = "response longer than max_length"


def encode_row(
    kind: Kind, row: Row, tokenizer: ChatTokenizer, max_length: int, drops: DropCounts
) -> Encoded | EncodedPair | EncodedPrompt | None:
    """Encodes a row of a kind; the shapes are in `schemas`.

    Raises:
      ValueError: a field is missing or holds something else.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a dict of columns, not {type(row).__name__}")
    check_characters(row)
    if kind == "preference":
        return encode_pair(row, tokenizer, max_length, drops)
    if kind == "prompt":
        require(row, ("prompt",), "a prompt row")
        opening = row.get("opening", "")
        require({"opening": opening}, ("opening",), "a prompt row")
        return encode_prompt(row["prompt"], tokenizer, max_length, drops, opening=opening)
    require_sft(row)
    if "messages" in row:
        return encode_messages(row["messages"], tokenizer, max_length, drops)
    if "text" in row:
        return encode_text("", row["text"], tokenizer, max_length, drops)
    return encode_response(row["prompt"], row["response"], tokenizer, max_length, drops)


def encode_messages(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    max_length: int,
    drops: DropCounts | None = None,
) -> Encoded | None:
    """Encodes a conversation; every turn of the assistant is trained, its stop token included.

    Args:
      messages: what follows the last turn of the assistant is left out.
      tokenizer: see `templates.ChatTokenizer`.
      max_length: the most tokens.
      drops: counts the row.

    Raises:
      ValueError: a message lacks its role or content, or see `ChatTokenizer.pieces`.
    """
    drops = DropCounts() if drops is None else drops
    said = check_messages(messages, "messages")
    while said and said[-1]["role"] != "assistant":
        said = said[:-1]
    if not any(message["role"] != "assistant" for message in said):
        drops.drop("no question" if said else "no assistant turn")
        return None
    if not said[-1]["content"].strip() and not said[-1].get("tool_calls"):
        drops.drop(EMPTY)
        return None
    return _count(fit(said, tokenizer, max_length), said, drops)


def encode_text(
    prompt: str,
    response: str,
    tokenizer: ChatTokenizer,
    max_length: int,
    drops: DropCounts | None = None,
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
    cut = cut_head(head, prompt, tokenizer, max_length - len(answer))
    if cut is None:
        drops.drop(TOO_LONG)
        return None
    drops.keep()
    drops.truncate(len(cut) < len(head))
    return _join([(cut, False), (answer, True)])


def encode_response(
    prompt: str | Sequence[Message],
    response: str,
    tokenizer: ChatTokenizer,
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
    return _count(fit(said, tokenizer, max_length), said, drops, last_only=True)


def encode_pair(
    row: Row, tokenizer: ChatTokenizer, max_length: int, drops: DropCounts | None = None
) -> EncodedPair | None:
    """Encodes {"prompt", "chosen", "rejected"}; the prompt is truncated alike for both.

    Pairs whose sides have the same tokens are dropped as well as those of the same text: a template
    that trims what is said, or a tokenizer that folds letters, leaves no difference to learn from.

    Raises:
      ValueError: missing fields, a margin that is not a finite number, or a `p_chosen` that is no
        probability.
    """
    drops = DropCounts() if drops is None else drops
    require(row, ("prompt", "chosen", "rejected"), "a preference row")
    for side in ("chosen", "rejected"):
        if not isinstance(row[side], str):
            raise ValueError(f"{side} must be text, not {type(row[side]).__name__}")
    prompt, sides = row["prompt"], (row["chosen"], row["rejected"])
    if not all(side.strip() for side in sides):
        drops.drop(EMPTY)
        return None
    if sides[0].strip() == sides[1].strip():
        drops.drop(IDENTICAL)
        return None
    encode = _pair_of_strings if isinstance(prompt, str) else _pair_of_messages
    fitted = encode(prompt, sides, tokenizer, max_length)
    if fitted is None:
        drops.drop(TOO_LONG)
        return None
    chosen, rejected, truncated = fitted
    if np.array_equal(chosen.tokens, rejected.tokens):
        drops.drop(IDENTICAL_TOKENS)
        return None
    drops.keep()
    drops.truncate(truncated)
    margin, p_chosen = float(row.get("margin", 0.0)), float(row.get("p_chosen", 1.0))
    return EncodedPair(chosen, rejected, margin, p_chosen)


def encode_prompt(
    prompt: str | Sequence[Message],
    tokenizer: ChatTokenizer,
    max_length: int,
    drops: DropCounts | None = None,
    *,
    opening: str = "",
) -> EncodedPrompt | None:
    """Encodes a prompt, open for the assistant's words.

    Args:
      prompt: text to go on with, or messages.
      tokenizer: see `templates.ChatTokenizer`.
      max_length: the most tokens.
      drops: counts the prompt.
      opening: words with which the assistant has begun its turn: the policy goes on with them.
    """
    drops = DropCounts() if drops is None else drops
    content = prompt if isinstance(prompt, str) else _last_content(prompt)
    if not (opening or content).strip():
        drops.drop("empty prompt")
        return None
    begun = tokenizer.encode(tokenizer.as_text(opening), first=False)
    room = max_length - len(begun)
    if isinstance(prompt, str):
        head = _head(prompt, tokenizer)
        ids = cut_head(head, prompt, tokenizer, room)
        truncated = ids is not None and len(ids) < len(head)
    else:
        fitted = fit(prompt, tokenizer, room, opened=True)
        ids = None if fitted is None else [i for part, _ in fitted[1] for i in part]
        truncated = fitted is not None and fitted[0] != list(prompt)
    if ids is None:
        drops.drop("prompt longer than max_length")
        return None
    drops.keep()
    drops.truncate(truncated)
    return np.array([*ids, *begun], dtype=np.int32)


def _pair_of_strings(
    prompt: str, sides: tuple[str, str], tokenizer: ChatTokenizer, max_length: int
) -> tuple[Encoded, Encoded, bool] | None:
    """Both sides and whether the prompt was truncated; None if an answer does not fit."""
    answers = [_answer(prompt, side, tokenizer) for side in sides]
    head = _head(prompt, tokenizer)
    cut = cut_head(head, prompt, tokenizer, max_length - max(map(len, answers)))
    if cut is None:
        return None
    chosen, rejected = (_join([(cut, False), (answer, True)]) for answer in answers)
    return chosen, rejected, len(cut) < len(head)


def _pair_of_messages(
    prompt: Any, sides: tuple[str, str], tokenizer: ChatTokenizer, max_length: int
) -> tuple[Encoded, Encoded, bool] | None:
    """The same of a prompt that is a list of messages."""
    asked = kept = check_messages(prompt, "prompt")
    whole = [segments_of([*asked, _assistant(side)], tokenizer) for side in sides]
    sizes = [sum(len(ids) for ids, _ in segments) for segments in whole]
    if max(sizes) > max_length:
        longer = sides[sizes.index(max(sizes))]
        fitted = fit([*asked, _assistant(longer)], tokenizer, max_length)
        if fitted is None:
            return None
        kept = fitted[0][:-1]
        whole = [segments_of([*kept, _assistant(side)], tokenizer) for side in sides]
    chosen, rejected = (_join(segments, last_only=True) for segments in whole)
    return chosen, rejected, kept != asked


def _head(prompt: str, tokenizer: ChatTokenizer) -> list[int]:
    """Returns BOS (if there is one) and the ids of a prompt that is a string."""
    bos = tokenizer.leading_bos
    if prompt and tokenizer.is_formatted(prompt):
        ids = tokenizer.encode(prompt.lstrip(), first=True)
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
    return ([] if bos is None else [bos]) + tokenizer.encode(tokenizer.as_text(prompt), first=True)


def _answer(prompt: str, response: str, tokenizer: ChatTokenizer) -> list[int]:
    """Returns the ids of the response and EOS, or the stop token with which it ends already."""
    if not tokenizer.is_formatted(prompt or response):
        ids = tokenizer.encode(tokenizer.as_text(response), first=not prompt)
        return [*ids, tokenizer.eos_token_id]
    ended = tokenizer.ends_turn(response.rstrip())
    text = response.rstrip() if ended else response
    ids = tokenizer.encode(text if prompt else text.lstrip(), first=not prompt)
    if not prompt and ids[:1] == [tokenizer.leading_bos]:  # `_head` gives it.
        ids = ids[1:]
    return ids if ended else [*ids, tokenizer.eos_token_id]


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
