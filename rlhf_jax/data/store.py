"""Encoded rows on disk: written once, mapped into memory by every process that reads them.

At the size of HH-RLHF (160,000 pairs) Python objects for every row take some GiB in each process,
and encoding takes minutes. A store is flat arrays in a folder; opening it reads the lengths, and a
row's tokens are read from disk when a batch needs them: a process touches its share of the rows and
no others. Rows are views of read-only memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair, EncodedPrompt
from rlhf_jax.runtime.files import naming

_TYPES = {"tokens": np.dtype(np.int32), "loss_mask": np.dtype(bool)}
_META = "store.json"
_BLOCK = 2**24  # Tokens that are read at a time where all are.


class _Column:
    """The documents of one column: one file of tokens, one of masks, and where each ends."""

    def __init__(self, folder: Path, name: str):
        self.lengths = np.load(folder / f"{name}.lengths.npy")
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self.arrays = {
            field: np.memmap(folder / f"{name}.{field}", dtype=dtype, mode="r")
            for field, dtype in _TYPES.items()
        }

    def __getitem__(self, index: int) -> Encoded:
        end = int(self._ends[index])
        start = end - int(self.lengths[index])
        return Encoded(*(np.asarray(array[start:end]) for array in self.arrays.values()))


class TokenStore(Sequence[Any]):
    """Documents, pairs or prompts of a folder; see `write`.

    Attributes:
      kind: "sft", "preference" or "prompt".
      lengths: int64 [n] tokens of each row; of a pair, of its longer side.
      total: tokens of all rows, of pairs on both sides.
      margins: float64 [n] of pairs, else empty.
      p_chosen: float64 [n] soft labels of pairs, else empty.
      counts: what was kept, dropped and truncated when the rows were encoded.
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / _META).read_text())
        self.kind, self.counts = meta["kind"], DropCounts(meta["counts"])
        self._columns = [_Column(folder, name) for name in _columns_of(self.kind)]
        self.margins = np.load(folder / "margins.npy")
        self.p_chosen = np.load(folder / "p_chosen.npy")
        self.total = sum(int(column.lengths.sum()) for column in self._columns)
        self.lengths = np.max([column.lengths for column in self._columns], axis=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        """Returns one row, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        first, *second = [column[index] for column in self._columns]
        if self.kind == "prompt":
            return first.tokens
        if not second:
            return first
        numbers = float(self.margins[index]), float(self.p_chosen[index])
        return EncodedPair(first, second[0], *numbers)

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields all that decides the rows, file by file and block by block, for a digest."""
        if self.kind == "preference":
            yield {"margins": self.margins, "p_chosen": self.p_chosen}
        for name, column in zip(_columns_of(self.kind), self._columns, strict=True):
            yield {f"{name}.lengths": column.lengths}
            for field, array in column.arrays.items():
                for start in range(0, len(array), _BLOCK):
                    yield {f"{name}.{field}": array[start : start + _BLOCK]}


class _Writer:
    """Appends rows to the files of a store, for which the errors of the system name `store`."""

    def __init__(self, folder: Path, kind: str, store: Path):
        self._folder, self._kind, self._store = folder, kind, store
        self._names = _columns_of(kind)
        self._files = {
            (name, field): (folder / f"{name}.{field}").open("wb")
            for name in self._names
            for field in _TYPES
        }
        self._lengths: dict[str, list[int]] = {name: [] for name in self._names}
        self._margins: list[float] = []
        self._p_chosen: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with naming(self._store), contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)

    def add(self, row: Encoded | EncodedPair | EncodedPrompt) -> None:
        """Appends a row of the writer's kind."""
        sides: tuple[Any, ...] = (row,)
        if isinstance(row, EncodedPair):
            sides = (row.chosen, row.rejected)
            self._margins.append(row.margin)
            self._p_chosen.append(row.p_chosen)
        for name, side in zip(self._names, sides, strict=True):
            if isinstance(side, np.ndarray):
                side = Encoded(side, np.zeros(len(side), bool))
            self._lengths[name].append(len(side.tokens))
            with naming(self._store):
                for field, dtype in _TYPES.items():
                    self._files[name, field].write(getattr(side, field).astype(dtype).tobytes())

    def finish(self, counts: DropCounts) -> None:
        """Writes what is known at the end."""
        meta = {"kind": self._kind, "counts": dict(counts)}
        with naming(self._store):
            for name, lengths in self._lengths.items():
                np.save(self._folder / f"{name}.lengths.npy", np.array(lengths, dtype=np.int64))
            np.save(self._folder / "margins.npy", np.array(self._margins))
            np.save(self._folder / "p_chosen.npy", np.array(self._p_chosen))
            (self._folder / _META).write_text(json.dumps(meta))


def write(folder: Path, kind: str, rows: Iterable[Any], counts: DropCounts) -> TokenStore:
    """Writes rows into a new folder and opens it.

    The folder appears under its name when it is complete: a writer that is killed leaves nothing
    that could be mistaken for a store, and of two writers the first wins.

    Args:
      folder: what to make; its parent is made as well.
      kind: "sft", "preference" or "prompt".
      rows: `Encoded`, `EncodedPair` or prompts; read to the end, one by one.
      counts: saved with the rows, as they stand after the last one.

    Raises:
      OSError: it cannot be written, names `folder`; or what a row raises that cannot be read.
    """
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    try:
        with _Writer(unfinished, kind, folder) as writer:
            for row in rows:
                writer.add(row)
        writer.finish(counts)
        if not exists(folder):
            with naming(folder):
                os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return TokenStore(folder)


def exists(folder: Path) -> bool:
    """Whether there is a complete store."""
    return (folder / _META).exists()


def lengths_of(items: Sequence[Any]) -> np.ndarray:
    """Returns the tokens of each document, pair (its longer side) or prompt, int64 [n].

    A store knows them without reading its rows, also where it is below `examples.Examples`.
    """
    items = getattr(items, "rows", items)
    if isinstance(items, TokenStore):
        return items.lengths
    return np.array([_length(item) for item in items], dtype=np.int64)


def margins_of(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Returns the margin of each pair, float64 [n]; 0 where nobody said; see `lengths_of`."""
    pairs = getattr(pairs, "rows", pairs)
    if isinstance(pairs, TokenStore):
        return pairs.margins
    return np.array([pair.margin for pair in pairs], dtype=np.float64)


def labels_of(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Returns p_chosen of each pair, float64 [n]; 1 where nobody said; see `lengths_of`."""
    pairs = getattr(pairs, "rows", pairs)
    if isinstance(pairs, TokenStore):
        return pairs.p_chosen
    return np.array([pair.p_chosen for pair in pairs], dtype=np.float64)


def total_tokens(items: Sequence[Any]) -> int:
    """Returns the tokens of all documents or pairs (both sides), without padding."""
    items = getattr(items, "rows", items)
    if isinstance(items, TokenStore):
        return items.total
    sides = ((i.chosen, i.rejected) if isinstance(i, EncodedPair) else (i,) for i in items)
    return sum(_length(side) for both in sides for side in both)


def _length(item: Encoded | EncodedPair | EncodedPrompt) -> int:
    if isinstance(item, EncodedPair):
        return max(len(item.chosen.tokens), len(item.rejected.tokens))
    return len(item.tokens) if isinstance(item, Encoded) else len(item)


def _columns_of(kind: str) -> list[str]:
    return ["chosen", "rejected"] if kind == "preference" else ["document"]
