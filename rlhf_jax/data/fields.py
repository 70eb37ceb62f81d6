"""What a row must hold before it is encoded: its fields, text in them, a finite margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_jax.data.schemas import Row
from rlhf_jax.data.templates import check_messages


def require(row: Row, fields: Sequence[str], what: str) -> None:
    """Checks that fields are there and hold text or lists, and that a margin is a number.

    Raises:
        ValueError: names the fields that are missing and those found, or the one that is wrong.
    """
    missing = [field for field in fields if field not in row]
    if missing:
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"{what} needs {', '.join(fields)}; missing: {missing}; found: {found}")
    # Text is a sequence as well; of ShareGPT rows the answers are single turns.
    kinds = (Sequence, dict) if "conversations" in row else Sequence
    for field in fields:
        if not isinstance(row[field], kinds):
            raise ValueError(
                f"{field} must be text or a list of messages, not {type(row[field]).__name__}"
            )
    margin = row.get("margin", 0.0)
    try:
        finite = math.isfinite(float(margin))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise ValueError(f"margin={margin} must be a finite number")


def require_sft(row: Row) -> None:
    """Checks a row of one of the shapes that `chat.encode_sft` takes; see `require`."""
    what = "an SFT row"
    if "messages" in row:
        check_messages(row["messages"], "messages")
    elif "text" in row:
        require(row, ("text",), what)
    elif "prompt" in row or "response" in row:
        require(row, ("prompt", "response"), what)
    else:
        found = ", ".join(sorted(row)) or "none"
        needs = "messages, or prompt and response, or text"
        raise ValueError(f"{what} needs {needs}; found: {found}")
