"""The values that pass between the data modules."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

Message = dict[str, str]
Row = dict[str, Any]
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
        margin: how much better, in the units of the ratings; 0 where nobody said. For those who
            look at the data: no loss here reads it.
    """

    chosen: Encoded
    rejected: Encoded
    margin: float


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
