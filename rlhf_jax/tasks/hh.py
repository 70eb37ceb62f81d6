"""Be helpful and harmless: Anthropic/hh-rlhf, of the hub or of a folder.

HH has no validation file, and no rule judges its answers. Its train file is the training split; of
its test file one eighth, by a hash of the first question, is the test split, and the rest is
validation: close to the paper's sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.data import sources
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.tasks.task import Task


class HH(Task):
    """Pairs of conversations; what follows the colon is explained in `data.sets.hh`."""

    can_stream = True

    def rows(self, kind: str, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields rows of the files of a split; see `Task.rows`."""
        return sources.iter_rows(kind, self.config.source, split, drops=drops)

    def fingerprint(self, kind: str, split: str) -> list[Any]:
        """Returns path, size and time of each file, or the fingerprints of tables."""
        return sources.fingerprint(kind, self.config.source, split)

    def open_stream(self) -> Sequence[Iterable[Row]]:
        """Opens each training file, or part on the hub."""
        return sources.open_stream(self.config.source)

    def convert_stream(self, kind: str, rows: Iterable[Row], drops: DropCounts) -> Iterable[Row]:
        """Brings training rows to a kind."""
        return sources.convert_stream(kind, self.config.source, rows, drops)
