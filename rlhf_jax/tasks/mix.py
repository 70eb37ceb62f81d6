"""Several sources as one, in shares or in numbers of rows.

  mix:0.4@jsonl:single.jsonl+0.6@jsonl:multi.jsonl     40% and 60% of the rows
  mix:8000@hh:harmless-base+20000@hh:helpful-base      so many rows of each

No row is taken twice, so with shares the source that is shortest for its share says how many rows
there are. Which rows of a source are taken is drawn from the seed; they come in turn, so that any
beginning of the mixture, and what `data.limit` leaves of it, has the same shares. Held-out splits
have them too. Numbers are those of the training split.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rlhf_jax.data.convert import row_key
from rlhf_jax.data.schemas import DropCounts, Kind, Row
from rlhf_jax.tasks.task import STREAM, TASKS, Task, TaskConfig, code_of, make_task

_PLUS = re.compile(r"\+(?=[\d.]+@)")
_PART = re.compile(r"(\d+|\d*\.\d+)@(.+)")
_EXAMPLE = "mix:0.4@hh:FOLDER+0.6@jsonl:FILE"


class Mix(Task):
    """Rows of several tasks; may be judged by who may judge each of them.

    Raises:
      ValueError: the source is no mixture, its shares do not add up to 1, or a part is not known,
        is a stream, or is a mixture itself.

    Attributes:
      parts: the tasks.
      weights: of each, its share of the rows; together 1.
      numbers: of each, its rows in the training split; empty where shares were given.
    """

    reads = ("domains", "half", "min_gap")

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        found = [_PART.fullmatch(part) for part in _PLUS.split(self.where)]
        named = [match for match in found if match is not None]
        if len(named) < 2 or len(named) < len(found):
            raise ValueError(
                f"source={config.source!r} must be WEIGHT@SOURCE, two or more with + between them, "
                f"as in {_EXAMPLE}"
            )
        self.numbers, self.weights = _weights([match[1] for match in named], config.source)
        self.parts = [self._part(match[2]) for match in named]
        first, *others = (part.judges for part in self.parts)
        self.judges = tuple(name for name in first if all(name in other for other in others))

    def check_gap(self) -> None:
        """Leaves it to the parts: those that draw pairs check it, and others have no gap."""

    def _part(self, source: str) -> Task:
        if source.startswith((STREAM, "mix:")):
            raise ValueError(
                f"source={self.config.source!r}: {source!r} cannot be part of a mixture, only "
                f"{', '.join(name for name in TASKS if name != 'mix')} can"
            )
        return make_task(dataclasses.replace(self.config, source=source, instruction=""))

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields rows of all parts in turn; see `Task.rows`. Parts are read twice: first to count.

        Raises:
          ValueError: a part has no rows of the kind, or fewer than are asked of it; names the part.
        """
        most = min(count or math.inf, sum(self.numbers) or math.inf)
        wanted = [_ceil(most * w) if most < math.inf else 0 for w in self.weights]
        there = [
            sum(1 for _ in self._rows_of(number, kind, split, DropCounts(), wanted[number]))
            for number in range(len(self.parts))
        ]
        for part, has, asked in zip(self.parts, there, wanted, strict=True):
            if not has or (self.numbers and split == "train" and has < asked):
                raise ValueError(
                    f"source={self.config.source!r} asks {part.config.source!r} for "
                    f"{max(asked, 1):,} rows ({kind}, {split}), and it has {has:,}: ask for fewer"
                )
        # Rounded: 30 rows for a share of 0.3 are 100, and not 99.99999999999999.
        whole = min(most, *(round(n / w, 6) for n, w in zip(there, self.weights, strict=True)))
        order = list(itertools.islice(_in_turn(self.weights), int(whole)))
        taken = np.bincount(order, minlength=len(self.parts))
        told = ", ".join(
            f"{n:,} of {all_:,} of {part.config.source}"
            for n, all_, part in zip(taken, there, self.parts, strict=True)
        )
        print(f"mixture ({split}): {told}")
        drawn = [
            self._drawn(
                number,
                there[number],
                int(taken[number]),
                self._rows_of(number, kind, split, drops, wanted[number]),
            )
            for number in range(len(self.parts))
        ]
        rows = (next(drawn[number]) for number in order)
        return _once(rows, drops) if kind == "prompt" else rows

    def _rows_of(
        self, number: int, kind: Kind, split: str, drops: DropCounts, count: int
    ) -> Iterator[Row]:
        part = self.parts[number]
        try:
            yield from part.rows(kind, split, drops, count=count)
        except ValueError as error:
            raise ValueError(f"{part.config.source} in a mixture: {error}") from error

    def _drawn(self, number: int, there: int, taken: int, rows: Iterator[Row]) -> Iterator[Row]:
        """Some rows of a part, in their order."""
        draw = np.random.default_rng([self.config.seed, number])
        chosen = np.zeros(there, bool)
        chosen[draw.choice(there, taken, replace=False)] = True
        return itertools.compress(rows, chosen.tolist())

    def fingerprint(self, split: str) -> list[Any] | None:
        """Returns those of all parts with their weights; None where one has none."""
        found = [part.fingerprint(split) for part in self.parts]
        if any(one is None for one in found):
            return None
        codes = [code_of(type(part)) for part in self.parts]
        return [self.config.source, self.config.seed, found, codes]


def _weights(texts: list[str], source: str) -> tuple[list[int], list[float]]:
    """Numbers of rows, if all are whole, and shares."""
    if all(text.isdecimal() and int(text) for text in texts):
        numbers = [int(text) for text in texts]
        return numbers, [number / sum(numbers) for number in numbers]
    shares = [float(text) for text in texts]
    if not all(0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"source={source!r} has the weights {', '.join(texts)}: give shares between 0 and 1 "
            f"that add up to 1 (here {sum(shares):g}), or a whole number of rows for each"
        )
    return [], shares


def _ceil(number: float) -> int:
    """The next whole number; what rounding has added to one is none of it."""
    return math.ceil(round(number, 6))


def _in_turn(weights: list[float]) -> Iterator[int]:
    """Yields parts for ever: at every place each has its share of the places so far, within one."""
    taken = np.zeros(len(weights))
    shares = np.array(weights)
    for place in itertools.count(1):
        # Rounded, so that ties are ties: the first part goes first.
        number = int(np.argmax(np.round(shares * place - taken, 9)))
        taken[number] += 1
        yield number


def _once(rows: Iterable[Row], drops: DropCounts) -> Iterator[Row]:
    """Leaves out prompts that an earlier part had; each part leaves out its own."""
    seen: set[bytes] = set()
    for row in rows:
        key = row_key(row)
        if key in seen:
            drops.drop("duplicate prompt")
        else:
            seen.add(key)
            yield row
