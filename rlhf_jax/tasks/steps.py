"""Solve problems in steps that are rated one by one: process supervision as it is distributed.

  prm800k:FOLDER                 PRM800K, people's ratings of steps, a folder with its files
  prm800k:FOLDER:alternatives    the same, with the steps that were rated and not taken
  math_shepherd:FILE             Math-Shepherd, ratings from continuations
  stepwise:FILE                  TRL's form
  solutions:FILE                 our own, see `data.solutions`

`solutions` gives the rated steps. For the other stages documents are the solutions whose final
answer is right, and prompts the problems. Files are split 80/10/10 by a hash of the prompt; PRM800K
has a test set of its own.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from rlhf_jax.data import solutions
from rlhf_jax.data.convert import every_row, first_text, rows_of_kind
from rlhf_jax.data.jsonl import existing, read_jsonl, stamps
from rlhf_jax.data.schemas import DropCounts, Kind, Row
from rlhf_jax.data.solutions import Solution
from rlhf_jax.data.splits import check_split, clean_text, fraction_of, split_of
from rlhf_jax.tasks.task import Task, TaskConfig

# Of PRM800K's training problems, the share that is kept for validation.
VALIDATION = 0.1
ALTERNATIVES = "alternatives"
WRONG, UNKNOWN = "final answer is wrong", "nobody knows whether the final answer is right"
OF_THE_TEST = "problem of the test set"


class Steps(Task):
    """Documents and prompts of a task that has `solutions`."""

    place: ClassVar[str] = "FILE"

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        if not self.where:
            name = config.source.partition(":")[0]
            raise ValueError(f"source={config.source!r} must say where it is: {name}:{self.place}")

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields right solutions with their prompts, or prompts; see `Task.rows`.

        Raises:
          ValueError: preferences are asked for, or a row is wrong.
        """
        if kind == "preference":
            raise ValueError(
                f"source={self.config.source!r} has no preferences: its steps are rated one by one"
            )
        found = self.solutions(split, drops)
        rows = _right(found, drops) if kind == "sft" else ({"prompt": s.prompt} for s in found)
        return rows_of_kind(rows, kind, split, drops, belongs=every_row)


class StepsFile(Steps):
    """One file of solutions, split by a hash of the prompts."""

    @abc.abstractmethod
    def read(self, path: Path, drops: DropCounts) -> Iterator[Solution]:
        """Yields the solutions of the file; counts in `drops` what is left out."""

    def solutions(self, split: str, drops: DropCounts) -> Iterator[Solution]:
        """Yields the solutions of a split; see `Task.solutions`."""
        check_split(split)
        read = self.read(existing(Path(self.where)), drops)
        return (s for s in read if split in ("all", split_of(_question(s))))

    def fingerprint(self, split: str) -> list[Any]:
        """Returns path, size and time of the file."""
        return stamps([existing(Path(self.where))])


class MathShepherd(StepsFile):
    """Solutions whose steps are rated by what their continuations reach."""

    def read(self, path: Path, drops: DropCounts) -> Iterator[Solution]:
        """Yields the solutions of the file; see `data.solutions.read_math_shepherd`."""
        return solutions.read_math_shepherd(path, drops)


class Stepwise(StepsFile):
    """Rows as TRL's trainer of process reward models reads them."""

    def read(self, path: Path, drops: DropCounts) -> Iterator[Solution]:
        """Yields the solutions of the file; see `data.solutions.read_stepwise`."""
        return solutions.read_stepwise(path, drops)


class Solutions(StepsFile):
    """Rows that `data.solutions.write_solutions` wrote."""

    def read(self, path: Path, drops: DropCounts) -> Iterator[Solution]:
        """Yields the solutions of the file; see `data.solutions.read_solutions`."""
        return solutions.read_solutions(path, drops)


class PRM800K(Steps):
    """People's ratings of steps towards the problems of MATH.

    The files `*_test` are the test split. Of the training files a tenth of the problems, by their
    hash, is validation, and what belongs to a problem of the test files is left out.
    """

    place = "FOLDER"

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        folder, colon, last = self.where.rpartition(":")
        self._alternatives = bool(colon) and last == ALTERNATIVES
        self._folder = Path(folder if self._alternatives else self.where)

    def solutions(self, split: str, drops: DropCounts) -> Iterator[Solution]:
        """Yields the solutions of a split; see `Task.solutions`.

        Raises:
          FileNotFoundError: the folder has no file of the split.
          ValueError: a row is of another form.
        """
        check_split(split)
        if split == "test":
            return self._read(self._files("test"), drops)
        if split == "all":
            return self._read(self._files("train", "test"), drops)
        return self._held_apart(split, self._files("train"), drops)

    def fingerprint(self, split: str) -> list[Any]:
        """Returns path, size and time of all files: those of the test set decide the others."""
        return stamps(self._files("train", "test"))

    def _held_apart(self, split: str, files: list[Path], drops: DropCounts) -> Iterator[Solution]:
        """Solutions of the training files to problems of a split that no test file has."""
        tested = {
            clean_text(solutions.prm800k_problem(row))
            for path in self._found("test")
            for row in read_jsonl(path)
        }
        for solution in self._read(files, drops):
            question = _question(solution)
            if clean_text(question) in tested:
                drops.drop(OF_THE_TEST)
            elif split == ("validation" if fraction_of(question) < VALIDATION else "train"):
                yield solution

    def _read(self, files: list[Path], drops: DropCounts) -> Iterator[Solution]:
        for path in files:
            yield from solutions.read_prm800k(path, drops, alternatives=self._alternatives)

    def _files(self, *names: str) -> list[Path]:
        """The files of train or test; some of them must be there."""
        found = [path for name in names for path in self._found(name)]
        if not found:
            wanted = " or ".join(f"phase{phase}_{names[0]}.jsonl" for phase in (1, 2))
            raise FileNotFoundError(
                f"source={self.config.source!r} has no {wanted}, gzipped or not: give the folder "
                "prm800k/data of https://github.com/openai/prm800k"
            )
        return found

    def _found(self, name: str) -> list[Path]:
        """The files of both phases that are there; of one and its gzipped twin the first."""
        paths = (
            [self._folder / f"phase{phase}_{name}.jsonl{ending}" for ending in ("", ".gz")]
            for phase in (1, 2)
        )
        return [there[0] for both in paths if (there := [p for p in both if p.is_file()])]


def _question(solution: Solution) -> str:
    """The text that decides the split."""
    return first_text({"prompt": solution.prompt})


def _right(found: Iterable[Solution], drops: DropCounts) -> Iterator[Row]:
    """Documents of the solutions whose final answer is known to be right."""
    for solution in found:
        if solution.right:
            yield {"prompt": solution.prompt, "response": solution.response}
        else:
            drops.drop(UNKNOWN if solution.right is None else WRONG)
