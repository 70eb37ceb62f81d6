"""Solve arithmetic problems in steps: every step and the answer can be verified.

`arithmetic` is sums of several numbers, `arithmetic:chain_sum:5-8` of 5 to 8, of more digits with
`arithmetic:chain_sum:5-8:2`; `arithmetic:gsm_symbolic` is word problems. See
`data.sets.arithmetic`. A verifier judges sums; the answer of a word problem does not follow from
its text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from rlhf_jax.data.convert import every_row, rows_of_kind
from rlhf_jax.data.schemas import DropCounts, Kind, Row
from rlhf_jax.data.sets import arithmetic
from rlhf_jax.data.sets.arithmetic import Sizes
from rlhf_jax.tasks.task import Task, TaskConfig

# Problems of a split where `data.limit` does not say otherwise.
NUM_PROBLEMS = {"train": 20_000, "validation": 1_000, "test": 1_000, "all": 22_000}


class Arithmetic(Task):
    """Problems with one right solution each, from reasoning-gym."""

    reads = ("limit",)

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self.kind, _, sizes = (self.where or arithmetic.CHAIN_SUM).partition(":")
        if self.kind not in arithmetic.KINDS or (sizes and self.kind != arithmetic.CHAIN_SUM):
            kinds = ", ".join(f"arithmetic:{kind}" for kind in arithmetic.KINDS)
            raise ValueError(
                f"source={config.source!r} must be arithmetic or one of {kinds}; sums may have "
                "sizes, as in arithmetic:chain_sum:5-8"
            )
        self.sizes = sizes_of(sizes, config.source)
        self.judges = ("verifier",) if self.kind == arithmetic.CHAIN_SUM else ()

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields problems with their solution, or as prompts; see `Task.rows`.

        Raises:
          ValueError: preferences are asked for, or reasoning-gym is not installed.
        """
        if kind == "preference":
            raise ValueError(
                f"source={self.config.source!r} has no preferences: its answers are right or wrong"
            )
        rows = [
            {"prompt": problem.question, "response": "".join(problem.steps)}
            for problem in self.problems(split)
        ]
        if kind == "prompt":
            rows = [{"prompt": row["prompt"]} for row in rows]
        return rows_of_kind(rows, kind, split, drops, belongs=every_row)

    def problems(self, split: str, count: int = 0) -> list[arithmetic.Problem]:
        """The first problems of a split: `count`, or `data.limit`, or all of them.

        Raises:
          ValueError: the split has fewer than `count`.
        """
        most = NUM_PROBLEMS[split]
        if count > most:
            raise ValueError(
                f"data.source={self.config.source!r} has {most:,} problems of split {split!r}, and "
                f"{count:,} are asked for"
            )
        return arithmetic.load_problems(
            self.kind, split, count or min(self.config.limit or most, most), self.sizes
        )

    def fingerprint(self, split: str) -> list[Any]:
        """Returns the kind, how hard they are, and how many."""
        return [self.kind, *dataclasses.astuple(self.sizes), NUM_PROBLEMS[split], self.config.limit]


def sizes_of(text: str, source: str) -> Sizes:
    """Sizes from `MIN-MAX` or `MIN-MAX:DIGITS`; those of `Sizes` where empty.

    Raises:
      ValueError: another text, or sizes that make no sense.
    """
    if not text:
        return Sizes()
    found = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?", text)
    if found is None:
        raise ValueError(
            f"source={source!r}: {text!r} must be MIN-MAX or MIN-MAX:DIGITS, as in "
            "arithmetic:chain_sum:5-8 for sums of 5 to 8 numbers of one digit"
        )
    fewest, most, digits = found.groups()
    return Sizes(int(fewest), int(most), int(digits or Sizes.max_digits))
