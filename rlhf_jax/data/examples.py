"""Encoded examples of a split: rows that are there, or rows that are read as the run trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rlhf_jax.data.endless import Batches
from rlhf_jax.data.schemas import Row
from rlhf_jax.data.streaming import StreamedBatches

T = TypeVar("T")
Make = Callable[..., Batches]


class Examples(Sequence[T]):
    """Documents, pairs or prompts of a split, in memory or in a store on disk.

    Args:
      rows: the encoded rows: a list, or a `store.TokenStore`.

    Attributes:
      streamed: whether rows are read as the run trains; such examples have no length, and no row
        can be looked up.
      rows: what was given.
    """

    streamed = False

    def __init__(self, rows: Sequence[T]):
        self.rows = rows

    def batches(self, make: Make, *, seed: int, **settings: Any) -> Batches | StreamedBatches:
        """Returns endless batches, `make(rows, seed=seed, **settings)`."""
        return make(self.rows, seed=seed, **settings)

    def loaded(self) -> Examples[T]:
        """Returns examples that have a length: these, or those of a stream, read to its end."""
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Returns one row, or a list of those of a slice."""
        return self.rows[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self.rows)


class StreamedExamples(Examples[T]):
    """Examples that are read and encoded in blocks while the run trains; see `streaming`.

    Args:
      open_rows: opens the files from their beginnings.
      encode: encodes the rows of a block.
      load: reads and encodes all rows, for `loaded`.
      name: of the source and the kind of rows; a saved position of another is refused.
      limit: the most rows of an epoch; 0 is all of them.
    """

    streamed = True

    def __init__(
        self,
        open_rows: Callable[[], Sequence[Iterable[Row]]],
        encode: Callable[[list[Row]], list[T]],
        load: Callable[[], Examples[T]],
        *,
        name: str,
        limit: int = 0,
    ):
        self._open, self._encode, self._load = open_rows, encode, load
        self._name, self._limit = name, limit

    def batches(self, make: Make, *, seed: int, **settings: Any) -> StreamedBatches:
        """Returns endless batches: of each block `make(rows, seed=..., **settings)`."""

        def of_block(rows: list[Row], block_seed: int) -> Batches | None:
            found = self._encode(rows)
            return make(found, seed=block_seed, **settings) if found else None

        return StreamedBatches(self._open, of_block, seed=seed, name=self._name, limit=self._limit)

    def loaded(self) -> Examples[T]:
        """Returns all rows, encoded now; for what needs every row at once."""
        return self._load()

    def __len__(self) -> int:
        raise ValueError(self._refusal())

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(self._refusal())

    def __iter__(self) -> Iterator[T]:
        raise ValueError(self._refusal())

    def _refusal(self) -> str:
        return (
            f"{self._name} is read as the run trains, so its rows cannot be counted or looked up: "
            "leave out stream: in the source, or call loaded() on the examples"
        )
