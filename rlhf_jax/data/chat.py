"""Data sets to token ids with loss masks: every row of a list, the masks checked.

This is the module to import: the functions for one row (`rows`) and the tokens that end a response
(`templates`) are named here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.data.fields import require, require_sft
from rlhf_jax.data.rows import (
    encode_messages,
    encode_pair,
    encode_prompt,
    encode_response,
    encode_text,
)
from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.data.types import DropCounts, Encoded, EncodedPair, EncodedPrompt, Row

__all__ = [
    "check_masks",
    "encode_messages",
    "encode_pair",
    "encode_pairs",
    "encode_prompt",
    "encode_prompts",
    "encode_response",
    "encode_sft",
    "encode_text",
    "stop_tokens",
]

_T = TypeVar("_T")


def encode_sft(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int, drops: DropCounts | None = None
) -> list[Encoded]:
    """Encodes rows {"messages"}, {"prompt", "response"} or {"text"} and checks their masks.

    Raises:
        ValueError: a row lacks fields (names the row and the fields), no row is left, or see
            `check_masks`.
    """
    counts = DropCounts() if drops is None else drops

    def encode(row: Row) -> Encoded | None:
        require_sft(row)
        if "messages" in row:
            return encode_messages(row["messages"], tokenizer, max_length, counts)
        if "text" in row:
            return encode_text("", row["text"], tokenizer, max_length, counts)
        return encode_response(row["prompt"], row["response"], tokenizer, max_length, counts)

    encoded = _encode_all(rows, encode, counts)
    check_masks(encoded, stop_tokens(tokenizer))
    return encoded


def encode_pairs(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int, drops: DropCounts | None = None
) -> list[EncodedPair]:
    """Encodes rows {"prompt", "chosen", "rejected"} with an optional "margin".

    Raises:
        ValueError: see `encode_sft`; or a margin that is not a finite number (names the row).
    """
    counts = DropCounts() if drops is None else drops
    pairs = _encode_all(rows, lambda row: encode_pair(row, tokenizer, max_length, counts), counts)
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    check_masks(sides, stop_tokens(tokenizer))
    return pairs


def encode_prompts(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int, drops: DropCounts | None = None
) -> list[EncodedPrompt]:
    """Encodes rows {"prompt"}; `max_length` is the most tokens of a prompt.

    Raises:
        ValueError: a row without a prompt, or no row is left.
    """
    counts = DropCounts() if drops is None else drops

    def encode(row: Row) -> EncodedPrompt | None:
        require(row, ("prompt",), "a prompt row")
        return encode_prompt(row["prompt"], tokenizer, max_length, counts)

    return _encode_all(rows, encode, counts)


def check_masks(encoded: Sequence[Encoded], stops: Sequence[int]) -> None:
    """Checks that something is trained, and that stopping is.

    Raises:
        ValueError: no token of any document is trained, or a trained stretch does not end with a
            stop token.
    """
    if not any(document.loss_mask.any() for document in encoded):
        raise ValueError(
            f"the loss mask is zero on all of {len(encoded)} documents, so nothing would be "
            "trained: check the roles of the messages and max_length"
        )
    tokens = np.concatenate([document.tokens for document in encoded])
    mask = np.concatenate([document.loss_mask for document in encoded])
    last = np.cumsum([len(document.tokens) for document in encoded]) - 1
    goes_on = np.append(mask[1:], False)
    goes_on[last] = False
    wrong = np.flatnonzero(mask & ~goes_on & ~np.isin(tokens, stops))
    if len(wrong):
        number = int(np.searchsorted(last, wrong[0]))
        position = int(wrong[0] - (last[number - 1] + 1 if number else 0))
        raise ValueError(
            f"document {number}: the trained tokens up to position {position} end without a stop "
            f"token (ids {list(stops)}): the stop token is outside the loss mask"
        )


def _encode_all(
    rows: Iterable[Row], encode: Callable[[Row], _T | None], drops: DropCounts
) -> list[_T]:
    """Encodes row by row; an error names the row."""
    encoded = []
    for number, row in enumerate(rows):
        try:
            one = encode(row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if one is not None:
            encoded.append(one)
    if not encoded:
        raise ValueError(f"no row is left to train on: {drops.summary()}")
    return encoded
