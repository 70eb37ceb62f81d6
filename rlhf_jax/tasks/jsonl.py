"""Rows of your own: JSON lines in any of the shapes that `data.convert` reads.

One file is split 80/10/10 by a hash of the prompts; a folder has a file for each split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.convert import every_row, first_text, rows_of_kind
from rlhf_jax.data.feedback_rows import as_pairs
from rlhf_jax.data.jsonl import existing, read_jsonl, stamps
from rlhf_jax.data.schemas import DropCounts, Kind, Row
from rlhf_jax.data.splits import SPLITS, split_of
from rlhf_jax.tasks.task import Task, TaskConfig


class JSONLines(Task):
    """Conversations, pairs or prompts: `jsonl:FILE` or `jsonl:FOLDER`."""

    can_stream = True

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self._path = Path(self.where)

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields rows of a split; see `Task.rows`."""
        if not self._path.is_dir():
            rows = _of_kind(read_jsonl(existing(self._path)), kind)
            return rows_of_kind(rows, kind, split, drops)
        names = SPLITS if split == "all" else [split]
        files = [existing(self._path / f"{name}.jsonl") for name in names]
        rows = _of_kind((row for file in files for row in read_jsonl(file)), kind)
        return rows_of_kind(rows, kind, split, drops, belongs=every_row)

    def feedback(
        self, split: str, drops: DropCounts, *, count: int, responses: int
    ) -> Iterable[Row]:
        """Yields the rows that have responses; see `Task.feedback`.

        Raises:
          ValueError: no row has any.
        """
        del count, responses
        folder = self._path.is_dir()
        rows = read_jsonl(existing(self._path / f"{split}.jsonl" if folder else self._path))
        several = [
            row
            for row in rows
            if isinstance(row, dict)
            and "responses" in row
            and (folder or split in ("all", split_of(first_text(row))))
        ]
        if not several:
            raise ValueError(
                f"{self._path} has no rows of {split} with responses, and scores, a ranking or "
                "votes of them"
            )
        return several

    def fingerprint(self, split: str) -> list[Any]:
        """Returns path, size and time of the files."""
        is_folder = self._path.is_dir()
        return stamps(sorted(self._path.glob("*.jsonl")) if is_folder else [existing(self._path)])

    def open_stream(self) -> Sequence[Iterable[Row]]:
        """Opens the file with the training rows."""
        folder = self._path.is_dir()
        return [read_jsonl(existing(self._path / "train.jsonl" if folder else self._path))]

    def convert_stream(self, kind: Kind, rows: Iterable[Row], drops: DropCounts) -> Iterable[Row]:
        """Brings rows to a kind; of one file without splits, those of training."""
        belongs = every_row if self._path.is_dir() else None
        return rows_of_kind(rows, kind, "train", drops, belongs=belongs)


def _of_kind(rows: Iterable[Row], kind: Kind) -> Iterable[Row]:
    """Rows with several responses as the pairs that follow from them; others as they are."""
    if kind != "preference":
        return rows
    return (pair for row in rows for pair in (as_pairs(row) if isinstance(row, dict) else [row]))
