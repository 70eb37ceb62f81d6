"""Endless batches with a position that can be saved.

An epoch's batches are a function of (seed, epoch) alone, so the position is two numbers.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np

from rlhf_jax.data.packing import Arrays


class Shape(NamedTuple):
    """Rows and tokens of a batch: one compiled program each."""

    rows: int
    length: int


class Batches(abc.ABC):
    """An endless iterator over the batches of one epoch after the other."""

    def __init__(self, size: int, seed: int):
        if not size:
            raise ValueError("there are no examples to make batches of")
        self._size, self._seed = size, seed
        self._epoch, self._step = 0, 0
        self._planned: tuple[int, list[Any]] | None = None
        self._share: Callable[[int], slice] | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Arrays:
        plan = self._plan_of(self._epoch)
        batch = self._collate(plan[self._step])
        self._step += 1
        if self._step == len(plan):
            self._epoch, self._step = self._epoch + 1, 0
        return batch

    def share(self, rows: Callable[[int], slice]) -> Self:
        """Reads only some rows of every batch from now on: the part of one process of several.

        The plan of an epoch, and so the position, is that of whole batches: a run may resume with
        another number of processes.

        Args:
          rows: from the rows of a batch to those of this process; `Sharding.local_rows`.
        """
        self._share = rows
        return self

    def _mine(self, rows: list[Any]) -> list[Any]:
        """The rows of a whole batch that this process reads."""
        return rows if self._share is None else rows[self._share(len(rows))]

    def once(self) -> Iterator[Arrays]:
        """Goes once through the first epoch, for evaluation; the position stays where it is."""
        for item in self._plan(np.random.default_rng([self._seed, 0])):
            yield self._collate(item)

    @property
    def epoch(self) -> int:
        """How many times the data has been gone through."""
        return self._epoch

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the current epoch; packing may give the next one a few more or fewer."""
        return len(self._plan_of(self._epoch))

    def count_text(self) -> str:
        """For a banner: the number of examples."""
        return f"{self._size:,}"

    def epochs_text(self, steps: int) -> str:
        """For a banner: how many epochs some steps are."""
        return f"{self.steps_per_epoch:,} an epoch, {steps / self.steps_per_epoch:.2f} epochs"

    @property
    @abc.abstractmethod
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that batches can have."""

    def state(self) -> dict[str, int]:
        """Returns the position: what `restore` needs to go on with the batch after the last."""
        return {
            "epoch": self._epoch,
            "step": self._step,
            "seed": self._seed,
            "size": self._size,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Moves to a position.

        Raises:
          ValueError: the position is one in other data or under another seed.
        """
        for name, value in (("seed", self._seed), ("size", self._size)):
            if int(state[name]) != value:
                raise ValueError(
                    f"the saved position has {name}={state[name]}, these batches {name}={value}: "
                    "resume with the data and the seed of the saved run"
                )
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def _plan_of(self, epoch: int) -> list[Any]:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(np.random.default_rng([self._seed, epoch])))
        return self._planned[1]

    @abc.abstractmethod
    def _plan(self, generator: np.random.Generator) -> list[Any]:
        """Returns what each batch of an epoch holds."""

    @abc.abstractmethod
    def _collate(self, item: Any) -> Arrays:
        """Makes the arrays of one batch."""


def positive(name: str, value: int) -> int:
    """Returns the value; raises ValueError if it is below 1."""
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value
