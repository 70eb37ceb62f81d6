"""Endless batches of rows that are read while the run trains: nothing is loaded first.

Rows are drawn in turn from the files (or parts) of a source, each with the same chance until it is
at its end, and taken in blocks. A block is encoded, shuffled and cut into batches as a small data
set of its own; so shuffling reaches as far as the draw and the block do, not over the whole data.

What cannot be known before the end: how many rows there are, and so how long an epoch is, how many
epochs some steps are, and how many rows will be dropped. Duplicate prompts are found within a block
only.

The order of an epoch is a function of (seed, epoch, block size) and the files, so a position is
three numbers: epoch, block, and batches taken of the block. Restoring it reads (without encoding)
the rows of the blocks before: some seconds for 160,000 rows of local files. A position holds a
digest of the rows that were read as well, and other rows are refused.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from rlhf_jax.data.endless import Batches, Shape, positive
from rlhf_jax.data.packing import Arrays
from rlhf_jax.data.schemas import Row

BLOCK_ROWS = 16_384

Open = Callable[[], Sequence[Iterable[Row]]]
Make = Callable[[list[Row], int], Batches | None]


class StreamedBatches:
    """Stands in for `endless.Batches` where rows are streamed.

    Args:
      open_rows: opens the files from their beginnings.
      make: batches of a block's rows under a seed; None if no row of the block is left.
      seed: of the draw and of the shuffling.
      name: of the source; a saved position of another is refused.
      block_rows: rows of a block.
      limit: the most rows of an epoch; 0 is all of them.
    """

    def __init__(
        self,
        open_rows: Open,
        make: Make,
        *,
        seed: int,
        name: str,
        block_rows: int = BLOCK_ROWS,
        limit: int = 0,
    ):
        self._open, self._make, self._seed = open_rows, make, seed
        self._block_rows, self._limit = positive("block_rows", block_rows), limit
        self._source = zlib.crc32(name.encode())
        self._share: Callable[[int], slice] | None = None
        self._epoch, self._block, self._step = 0, 0, 0
        self._rows: Iterator[Row] | None = None
        self._read, self._digest = 0, hashlib.sha256()  # Of the rows of this epoch so far.
        self._expected: tuple[int, str] | None = None
        self._batches: Batches | None = None

    def __iter__(self) -> StreamedBatches:
        return self

    def __next__(self) -> Arrays:
        block = self._current()
        last = self._step + 1 == block.steps_per_epoch
        batch = next(block)
        self._step += 1
        if last:
            self._block, self._step, self._batches = self._block + 1, 0, None
        return batch

    def share(self, rows: Callable[[int], slice]) -> Self:
        """See `endless.Batches.share`; every process reads all rows and lays out its own."""
        self._share = rows
        if self._batches is not None:
            self._batches.share(rows)
        return self

    @property
    def epoch(self) -> int:
        """How many times the data has been gone through."""
        return self._epoch

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that batches can have."""
        return self._current().shapes

    def count_text(self) -> str:
        """For the banner, in place of the number of rows."""
        return f"streamed in blocks of {self._block_rows:,}"

    def epochs_text(self, steps: int) -> str:
        """For the banner, in place of the epochs that some steps are."""
        return "the length of an epoch is not known"

    def describe(self) -> str:
        """One line for the log: shapes."""
        return ", ".join(f"{shape.rows}x{shape.length}" for shape in self.shapes)

    def state(self) -> dict[str, Any]:
        """Returns the position."""
        read, digest = self._expected or (self._read, self._digest.hexdigest()[:16])
        return {
            "epoch": self._epoch,
            "block": self._block,
            "step": self._step,
            "seed": self._seed,
            "block_rows": self._block_rows,
            "source": self._source,
            "read": read,
            "digest": digest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Moves to a position; the next batch is refused if the rows before it have changed.

        Raises:
          ValueError: the position is one in another source, or under other settings.
        """
        mine = self.state()
        for name in ("seed", "block_rows", "source"):
            if name not in state or int(state[name]) != mine[name]:
                raise ValueError(
                    f"the saved position has {name}={state.get(name)}, this stream has "
                    f"{name}={mine[name]}: resume with the source and the seed of the saved run"
                )
        self._move(int(state["epoch"]), int(state["block"]), int(state["step"]))
        self._read, self._digest = 0, hashlib.sha256()
        # Positions of version 0.1 hold no digest.
        self._expected = (int(state["read"]), state["digest"]) if state.get("read") else None

    def _move(self, epoch: int, block: int, step: int) -> None:
        self._epoch, self._block, self._step = epoch, block, step
        self._rows, self._batches = None, None

    def _current(self) -> Batches:
        """The batches of the current block, at the current step."""
        if self._batches is None:
            self._batches = self._next_block()
            if self._share is not None:
                self._batches.share(self._share)
            self._batches.restore(self._batches.state() | {"step": self._step})
        return self._batches

    def _next_block(self) -> Batches:
        """Reads on until a block has rows left; at the end of the data the next epoch begins."""
        wanted, found = self._epoch + 2, None
        while found is None:
            if self._rows is None:
                self._rows = self._rows_of(self._epoch)
                skipped = self._block * self._block_rows
                collections.deque(itertools.islice(self._rows, skipped), maxlen=0)
            rows = list(itertools.islice(self._rows, self._block_rows))
            if not rows:
                self._move(self._epoch + 1, 0, 0)
                if self._epoch == wanted:
                    raise ValueError("no row of the stream is left to train on")
                continue
            found = self._make(rows, _block_seed(self._seed, self._epoch, self._block))
            self._block += found is None
        return found

    def _rows_of(self, epoch: int) -> Iterator[Row]:
        order = np.random.default_rng([self._seed, epoch])
        self._read, self._digest = 0, hashlib.sha256()
        return self._watched(itertools.islice(drawn(self._open(), order), self._limit or None))

    def _watched(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The same rows, digested; a restored position is compared where it was saved."""
        for row in rows:
            text = json.dumps(row, sort_keys=True, default=str)
            self._digest.update(text.encode())
            self._read += 1
            if self._expected is not None and self._read == self._expected[0]:
                if self._digest.hexdigest()[:16] != self._expected[1]:
                    break
                self._expected = None
            yield row
        if self._expected is not None:
            raise ValueError(
                f"the first {self._expected[0]:,} rows of the stream are not those that the saved "
                "run has read: put them back, choose another --config.workdir, or remove the folder"
            )


def _block_seed(seed: int, epoch: int, block: int) -> int:
    return int(np.random.default_rng([seed, epoch, block]).integers(2**31))


def drawn(sources: Sequence[Iterable[Row]], order: np.random.Generator) -> Iterator[Row]:
    """Yields all rows: each from a source drawn at random among those that are not at their end."""
    left = [iter(rows) for rows in sources]
    while left:
        number = int(order.integers(len(left)))
        try:
            yield next(left[number])
        except StopIteration:
            del left[number]
