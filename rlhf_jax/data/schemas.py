"""The values that pass between the data modules, and what a row must hold.

Rows are dicts. For fine-tuning: {"messages"}, {"prompt", "response"} or {"text"}. For preferences:
{"prompt", "chosen", "rejected"}, perhaps with a "margin" or with "p_chosen". For prompts:
{"prompt"}, perhaps with an "opening", the words with which the assistant has begun. A prompt is a
text that is gone on with, or a list of messages.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Message = dict[str, str]
Row = dict[str, Any]
Kind = Literal["sft", "preference", "prompt"]
# Stands inside the name of a control token that is only text, from rendering to tokenization; no
# text that is meant to be exchanged holds it (a noncharacter of Unicode).
MARK = "\ufdd0"
_TEXTS = ("text", "response", "opening", "instruction", "output")
ROLES = ("system", "user", "assistant", "tool")
EncodedPrompt = np.ndarray  # int32 [T], the template left open for the assistant


class Encoded(NamedTuple):
    """One document.

    Attributes:
      tokens: int32 [T].
      loss_mask: bool [T], True on the tokens that are trained: every token of every assistant
        turn and the token that ends it.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


class EncodedPair(NamedTuple):
    """Two responses to one prompt.

    Attributes:
      chosen: prompt and the better response; `loss_mask` is True on the response.
      rejected: the same prompt and the worse response.
      margin: how much better, in the units of the ratings; 0 where nobody said. Read by the loss of
        a reward model where its `margin_coef` is set.
      p_chosen: the probability that the chosen one is better, as a judge has it: a soft label; 1
        where nobody said. Read by losses whose `labels` are "soft".
    """

    chosen: Encoded
    rejected: Encoded
    margin: float
    p_chosen: float = 1.0


class DropCounts(Counter[str]):
    """Counts of what was kept, dropped (by reason) and truncated on the way to the model.

    Loaders count what they leave out, encoders also what they keep: one object may go through both.

    >>> counts = DropCounts()
    >>> counts.keep(); counts.keep(); counts.truncate(); counts.drop("empty response")
    >>> counts.summary()
    'kept 2 of 3, dropped 1 (1 empty response), truncated 1'
    """

    KEPT = "kept"
    TRUNCATED = "truncated"

    def keep(self, count: int = 1) -> None:
        """Counts rows that went through, truncated ones included."""
        self[self.KEPT] += count

    def truncate(self, count: int = 1) -> None:
        """Counts rows that lost their oldest turns; they count as kept as well."""
        if count:
            self[self.TRUNCATED] += count

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts rows that were left out and why."""
        if count:
            self[reason] += count

    @property
    def dropped(self) -> int:
        """The number of rows that were left out, whatever the reason."""
        return sum(self.values()) - self[self.KEPT] - self[self.TRUNCATED]

    def summary(self) -> str:
        """One line for the log."""
        line = f"kept {self[self.KEPT]:,} of {self[self.KEPT] + self.dropped:,}"
        if self.dropped:
            special = (self.KEPT, self.TRUNCATED)
            reasons = [(reason, n) for reason, n in self.most_common() if n]
            inside = ", ".join(f"{n:,} {reason}" for reason, n in reasons if reason not in special)
            line += f", dropped {self.dropped:,} ({inside})"
        if self[self.TRUNCATED]:
            line += f", truncated {self[self.TRUNCATED]:,}"
        return line


def one_line(error: Exception) -> str:
    """Returns the message of an error on one line, of characters that any terminal can write."""
    text = str(error).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_characters(row: Row) -> None:
    """Checks that every text of a row can be written and tokenized.

    Raises:
      ValueError: a text holds half of a surrogate pair, as cutting within an emoji leaves it, or
        the noncharacter `MARK`; names the column.
    """
    for column, value in row.items():
        try:
            text = json.dumps([column, value], ensure_ascii=False, default=str)
            text.encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"{column!a} holds {half!a}, half of a surrogate pair (a character that "
                "was cut in two): mend the text, or leave out the row"
            ) from error
        if MARK in text:
            raise ValueError(
                f"{column!a} holds {MARK!a}, no character of Unicode, which is kept for marks "
                "between rendering and tokenization: take it out of the text"
            )


def require(row: Row, fields: Sequence[str], what: str) -> None:
    """Checks that fields are there and hold text or lists, and the numbers beside them.

    Raises:
      ValueError: names the fields that are missing and those found, or the one that is wrong.
    """
    missing = [field for field in fields if field not in row]
    if missing:
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"{what} needs {', '.join(fields)}; missing: {missing}; found: {found}")
    # Of ShareGPT rows the answers are single turns.
    kinds = (str, list, tuple) + ((dict,) if row.get("conversations") is not None else ())
    for field in fields:
        if field in _TEXTS and not isinstance(row[field], str):
            raise ValueError(f"{field} must be text, not {type(row[field]).__name__}")
        if not isinstance(row[field], kinds):
            raise ValueError(
                f"{field} must be text or a list of messages, not {type(row[field]).__name__}"
            )
    margin = row.get("margin", 0.0)
    try:
        finite = math.isfinite(float(margin))
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"margin={margin!s:.40} must be a finite number")
    p_chosen = row.get("p_chosen", 1.0)
    try:
        within = 0 <= float(p_chosen) <= 1
    except (TypeError, ValueError, OverflowError):
        within = False
    if not within:
        raise ValueError(f"p_chosen={p_chosen!s:.40} must be a probability, in [0, 1]")


def require_sft(row: Row) -> None:
    """Checks a row of one of the shapes that `encode.encode_row` takes; see `require`."""
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


def check_messages(messages: Any, where: str) -> list[Message]:
    """Returns the messages; raises ValueError naming what is missing and what was found."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(
            f"{where}: messages must be a list of dicts, not {type(messages).__name__}"
        )
    for number, message in enumerate(messages):
        found = sorted(message) if isinstance(message, dict) else type(message).__name__
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: message {number} needs role and content; found: {found}")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: role {message['role']!r} must be one of {ROLES}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ValueError(f"{where}: content of message {number} must be text, not {kind}")
    return list(messages)
