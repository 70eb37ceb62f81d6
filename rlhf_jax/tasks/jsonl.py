"""Rows of your own: JSON lines in any of the shapes that `data.preferences` reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.data import sources
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.tasks.task import Task


class JSONLines(Task):
    """Conversations, pairs or prompts of a file, or of a folder with a file for each split."""

    can_stream = True

    def rows(self, kind: str, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields rows of the files of a split; see `Task.rows`."""
        return sources.iter_rows(kind, self.config.source, split, drops=drops)

    def fingerprint(self, kind: str, split: str) -> list[Any]:
        """Returns path, size and time of each file."""
        return sources.fingerprint(kind, self.config.source, split)

    def open_stream(self) -> Sequence[Iterable[Row]]:
        """Opens the training file."""
        return sources.open_stream(self.config.source)

    def convert_stream(self, kind: str, rows: Iterable[Row], drops: DropCounts) -> Iterable[Row]:
        """Brings training rows to a kind."""
        return sources.convert_stream(kind, self.config.source, rows, drops)
