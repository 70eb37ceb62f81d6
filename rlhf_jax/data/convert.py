"""Rows of any shape to rows of a kind: of one split, each prompt once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from rlhf_jax.data import preferences
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.data.splits import fraction_of, split_of

NO_TRANSCRIPT = "no transcript"


class Request(NamedTuple):
    """The arguments of `load_rows` that loaders read; `where` is what stands behind the colon."""

    kind: str
    where: str
    split: str
    drops: DropCounts
    streaming: bool = False
    seed: int = 0
    domains: Sequence[str] = ()
    num_pairs: int = 0
    min_gap: float = 0.0
    words: tuple[int, int] = (0, 0)
    allow_harmful: bool = False


def every_row(row: Row) -> bool:
    """For rows that are all of the split."""
    return True


def hh_rows(rows: Iterable[Row], request: Request, name: str) -> Iterator[Row]:
    """Rows of the file `name` that belong to the split; what is no transcript is counted."""

    def belongs(row: Row) -> bool:
        is_test = name == "test" and fraction_of(_key(row)) < 1 / 8
        return name == "train" or request.split in ("all", "test" if is_test else "validation")

    return converted_rows(_transcripts(rows, request.drops), request, belongs)


def _transcripts(rows: Iterable[Row], drops: DropCounts) -> Iterator[Row]:
    """Leaves out rows whose texts do not begin with a turn; lists of messages pass."""
    for row in rows:
        texts = [row[side] for side in ("chosen", "rejected") if side in row]
        if "prompt" not in row and not all(
            isinstance(text, list) or preferences.is_transcript(text) for text in texts
        ):
            drops.drop(NO_TRANSCRIPT)
            continue
        yield row


def converted_rows(
    rows: Iterable[Row], request: Request, belongs: Callable[[Row], bool] | None = None
) -> Iterator[Row]:
    """Brings rows to the kind; keeps those that belong to the split, and each prompt row once.

    Args:
        rows: of any shape that `preferences` reads.
        request: kind, split and counts.
        belongs: whether a converted row is of the split; by default a hash of its text says so.

    Raises:
        ValueError: a row is of no such shape; names the row.
    """
    seen: set[bytes] = set()
    for number, row in enumerate(rows):
        try:
            converted = KINDS[request.kind](row, request.drops)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if converted is None:
            continue
        if not (belongs(converted) if belongs else _is_in_split(converted, request)):
            continue
        if request.kind == "prompt":
            text = json.dumps(converted, sort_keys=True, ensure_ascii=False)
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if key in seen:
                request.drops.drop("duplicate prompt")
                continue
            seen.add(key)
        yield converted


def _is_in_split(row: Row, request: Request) -> bool:
    """Whether the row belongs to the split; a pair without a prompt must do so with both texts."""
    found = {split_of(_key(row))}
    if request.kind == "preference" and not row["prompt"]:
        found.add(split_of(row["rejected"]))
    if len(found) > 1:
        request.drops.drop("texts of two splits")
    return request.split == "all" or found == {request.split}


def _key(row: Row) -> str:
    """Returns the text that decides the split: of a conversation, what was said first."""
    said = row.get("messages") or row.get("prompt")
    if said and not isinstance(said, str):
        return next((m["content"] for m in said if m["role"] != "system"), "")
    return said or row.get("text") or row.get("chosen") or row.get("response") or ""


KINDS: dict[str, Callable[[Row, DropCounts | None], Row | None]] = {
    "sft": preferences.as_sft,
    "preference": preferences.as_preference,
    "prompt": preferences.as_prompt,
}
