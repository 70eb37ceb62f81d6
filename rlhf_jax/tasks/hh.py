"""Be helpful and harmless: Anthropic/hh-rlhf, of the hub or of a folder.

HH has no validation file, and no rule judges its answers. Its train file is the training split; of
its test file one eighth, by a hash of the first question, is the test split, and the rest is
validation: close to the paper's sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.convert import first_text, is_transcript, rows_of_kind
from rlhf_jax.data.schemas import DropCounts, Kind, Row
from rlhf_jax.data.sets import hh
from rlhf_jax.data.splits import fraction_of
from rlhf_jax.tasks.task import Task

_FILES = {"train": ("train",), "all": ("train", "test")}  # Else the test file.


class HH(Task):
    """Pairs of conversations; what follows the colon is explained in `data.sets.hh`."""

    can_stream = True

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields rows of the files of a split; see `Task.rows`."""
        opened = [
            (name, hh.readers(self.where, name, streaming=self.streamed))
            for name in _FILES.get(split, ("test",))
        ]
        return itertools.chain.from_iterable(
            _rows_of(
                itertools.chain.from_iterable(read() for read in readers), name, kind, split, drops
            )
            for name, readers in opened
        )

    def fingerprint(self, split: str) -> list[Any]:
        """Returns path, size and time of each file, or the fingerprints of tables."""
        if self.streamed and not Path(self.where).exists():
            # Without downloading it: the hub's rows have not changed since 2022.
            return [self.config.source, "hub"]
        return hh.fingerprint(self.where, _FILES.get(split, ("test",)), streaming=self.streamed)

    def open_stream(self) -> Sequence[Iterable[Row]]:
        """Opens each training file, or part on the hub."""
        return [read() for read in hh.readers(self.where, "train", streaming=True)]

    def convert_stream(self, kind: Kind, rows: Iterable[Row], drops: DropCounts) -> Iterable[Row]:
        """Brings training rows to a kind."""
        return _rows_of(rows, "train", kind, "train", drops)


def _rows_of(
    rows: Iterable[Row], name: str, kind: Kind, split: str, drops: DropCounts
) -> Iterator[Row]:
    """Rows of the file `name` that belong to the split; what is no transcript is counted."""

    def belongs(row: Row) -> bool:
        is_test = name == "test" and fraction_of(first_text(row)) < 1 / 8
        return name == "train" or split in ("all", "test" if is_test else "validation")

    return rows_of_kind(_transcripts(rows, drops), kind, split, drops, belongs=belongs)


def _transcripts(rows: Iterable[Row], drops: DropCounts) -> Iterator[Row]:
    """Leaves out rows whose texts do not begin with a turn; lists of messages pass."""
    for row in rows:
        texts = [row[side] for side in ("chosen", "rejected") if side in row]
        if "prompt" not in row and not all(
            isinstance(text, list) or is_transcript(text) for text in texts
        ):
            drops.drop("no transcript")
            continue
        yield row
