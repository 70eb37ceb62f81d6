"""Data sets to token ids with loss masks: every row of a list, the masks checked.

This is the module to import: the functions for one row (`rows`) and the tokens that end a response
(`templates`) are named here as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.encode import (
    encode_messages,
    encode_pair,
    encode_prompt,
    encode_response,
    encode_text,
)
from rlhf_jax.data.fields import require, require_sft
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair, EncodedPrompt, Row
from rlhf_jax.data.templates import pieces_of, renderings_kept, stop_tokens
from rlhf_jax.data.tokenizer import pieces_encoded

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
    "encoded_rows",
    "stop_tokens",
]

_CHUNK = 512


def encode_sft(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int, drops: DropCounts | None = None
) -> list[Encoded]:
    """Encodes rows {"messages"}, {"prompt", "response"} or {"text"} and checks their masks.

    Raises:
        ValueError: a row lacks fields (names the row and the fields), no row is left, or see
            `check_masks`.
    """
    encoded = _encode_all("sft", rows, tokenizer, max_length, drops)
    check_masks(encoded, stop_tokens(tokenizer))
    return encoded


def encode_pairs(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int, drops: DropCounts | None = None
) -> list[EncodedPair]:
    """Encodes rows {"prompt", "chosen", "rejected"} with an optional "margin".

    Raises:
        ValueError: see `encode_sft`; or a margin that is not a finite number (names the row).
    """
    pairs = _encode_all("preference", rows, tokenizer, max_length, drops)
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
    return _encode_all("prompt", rows, tokenizer, max_length, drops)


def encoded_rows(
    kind: str, rows: Iterable[Row], tokenizer: Any, *, max_length: int, drops: DropCounts
) -> Iterator[Any]:
    """Yields what each row becomes, or None where it is dropped; their masks are not checked.

    The pieces of some hundred rows are tokenized at once.

    Args:
        kind: "sft", "preference" or "prompt": rows are those of `encode_sft`, `encode_pairs` or
            `encode_prompts`.
        rows: read as they are needed.
        tokenizer: with a chat template.
        max_length: the most tokens of a row.
        drops: counts the rows.

    Raises:
        ValueError: a row is wrong; names the row.
    """
    encode: Any = {"sft": _sft_row, "preference": encode_pair, "prompt": _prompt_row}[kind]
    rows, number = iter(rows), 0
    while chunk := list(itertools.islice(rows, _CHUNK)):
        with renderings_kept(tokenizer):
            pieces = [piece for row in chunk for piece in pieces_of(row, tokenizer)]
            with pieces_encoded(tokenizer, pieces):
                for row in chunk:
                    try:
                        yield encode(row, tokenizer, max_length, drops)
                    except ValueError as error:
                        raise ValueError(f"row {number}: {error}") from error
                    number += 1


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


def _sft_row(row: Row, tokenizer: Any, max_length: int, drops: DropCounts) -> Encoded | None:
    require_sft(row)
    if "messages" in row:
        return encode_messages(row["messages"], tokenizer, max_length, drops)
    if "text" in row:
        return encode_text("", row["text"], tokenizer, max_length, drops)
    return encode_response(row["prompt"], row["response"], tokenizer, max_length, drops)


def _prompt_row(
    row: Row, tokenizer: Any, max_length: int, drops: DropCounts
) -> EncodedPrompt | None:
    require(row, ("prompt",), "a prompt row")
    opening = row.get("opening", "")
    return encode_prompt(row["prompt"], tokenizer, max_length, drops, opening=opening)


def _encode_all(
    kind: str, rows: Iterable[Row], tokenizer: Any, max_length: int, drops: DropCounts | None
) -> list[Any]:
    counts = DropCounts() if drops is None else drops
    found = encoded_rows(kind, rows, tokenizer, max_length=max_length, drops=counts)
    encoded = [one for one in found if one is not None]
    if not encoded:
        raise ValueError(f"no row is left to train on: {counts.summary()}")
    return encoded
