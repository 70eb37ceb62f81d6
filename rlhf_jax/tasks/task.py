"""A task bundles data with what measures it: documents, pairs and prompts of one source.

The source in a config names the task, and what follows the colon says where its rows are:
`reviews`, `hh:FOLDER`, `jsonl:FILE`, `stream:hh`. A task of your own is a subclass with `rows`,
entered in `TASKS`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rlhf_jax.data import prepare
from rlhf_jax.data.candidates import Candidates
from rlhf_jax.data.convert import texts_of
from rlhf_jax.data.digests import rows_digest
from rlhf_jax.data.examples import Examples, StreamedExamples
from rlhf_jax.data.feedback_rows import encode_ranked
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair, EncodedPrompt, Kind, Row
from rlhf_jax.data.solutions import Solution
from rlhf_jax.data.splits import HALVES, check_split
from rlhf_jax.runtime import distributed

STREAM = "stream:"
_COUNTED: dict[Kind, str] = {"sft": "SFT documents", "preference": "pairs", "prompt": "prompts"}
_TOKENIZER_ROWS = 20_000

# The tasks by the word before the first colon of a source.
TASKS: dict[str, type[Task]] = {}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which task, and which of its rows.

    Attributes:
      source: what the user types: "reviews", "hh:FOLDER", "jsonl:FILE", "stream:hh", ...
      domains: of reviews: which of them; empty is films and products.
      half: of reviews: which half of the training texts, "first" or "second"; empty is both. No
        text is in two halves, and held-out texts are in both.
      limit: the most rows; 0 is all of them. Pairs have a count of their own.
      instruction: of reviews: what the system asks of the assistant; empty is plain text.
      min_gap: the least difference of the ratings of a pair that is drawn.
      votes: of reviews: whether a pair has the share of single raters who prefer the chosen.
      seed: of pairs and prompts that are drawn.
    """

    source: str
    domains: tuple[str, ...] = ()
    half: str = ""
    limit: int = 0
    instruction: str = ""
    min_gap: float = 1.0
    votes: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.half not in ("", *HALVES):
            raise ValueError(f"data.half={self.half!r} must be {' or '.join(HALVES)}, or empty")


class Task(abc.ABC):
    """Documents, preferences and prompts of a source, and who may judge answers.

    Subclasses need `rows`; those with many rows give a `fingerprint`, so that encoded rows are kept
    on disk; those whose files can be read as the run trains set `can_stream`, and give
    `open_stream` and `convert_stream`.

    Args:
      config: which rows.

    Attributes:
      reads: the keys of a `TaskConfig` that decide its rows, besides the source and the seed.
        Reading `min_gap` is to draw pairs of rated texts, reading `limit` to draw them from so many
        rows; documents and prompts are limited for every task.
      judges: names of the judges that may speak of the task; none if nothing but a reward model or
        a judge that the user names can.
      variant: of the configs, that reads the task in place of their own; none for most.
      can_stream: whether `stream:` may be put before the source.
      digests: of the rows that were read so far, by kind and split, see `data.digests`. Rows of a
        stream are not among them: its position holds theirs.
      where: what follows the colon in the source: `FOLDER` of `hh:FOLDER`.
      streamed: whether training rows are read as the run trains.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    judges: tuple[str, ...] = ()
    variant: ClassVar[str] = ""
    can_stream: ClassVar[bool] = False

    def __init__(self, config: TaskConfig):
        self.config = config
        self.digests: dict[str, str] = {}
        self.streamed = config.source.startswith(STREAM)
        self.where = config.source.removeprefix(STREAM).partition(":")[2]
        if self.streamed and not self.can_stream:
            able = " and ".join(name for name, task in TASKS.items() if task.can_stream)
            raise ValueError(f"source={config.source!r} cannot be streamed: only {able} can")
        self.check_gap()

    @abc.abstractmethod
    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields rows of a kind, in the shapes of `data.schemas`; see `data.convert.rows_of_kind`.

        Args:
          kind: "sft", "preference" or "prompt".
          split: "train", "validation", "test" or "all".
          drops: counts what is left out.
          count: how many are wanted, for tasks that draw; 0 is all of them.

        Raises:
          ValueError: the source has no rows of the kind, or a row is wrong.
        """

    def solutions(self, split: str, drops: DropCounts) -> Iterator[Solution]:
        """Yields solutions whose steps are rated, for process supervision; all of a split.

        Args:
          split: "train", "validation", "test" or "all".
          drops: counts what is left out.

        Raises:
          ValueError: the source has none, or a row is wrong.
        """
        raise ValueError(
            f"source={self.config.source!r} has no labelled steps: give prm800k:FOLDER, "
            "math_shepherd:FILE, stepwise:FILE or solutions:FILE"
        )

    def check_gap(self) -> None:
        """Refuses to draw pairs of texts that are rated alike.

        Raises:
          ValueError: the task draws pairs, and `min_gap` is not above 0.
        """
        if "min_gap" in self.reads and not self.config.min_gap > 0:
            raise ValueError(
                f"data.min_gap={self.config.min_gap} must be above 0: of two texts that are rated "
                "alike none is better"
            )

    def fingerprint(self, split: str) -> list[Any] | None:
        """Returns what decides the rows of a split, as values that JSON can hold.

        Paths, sizes and times of files; settings that rows depend on. Kind, number of rows and the
        code of the task are known without it. Encoded rows are kept in a store under these; None
        keeps none.
        """
        return None

    def open_stream(self) -> Sequence[Iterable[Row]]:
        """Opens the training rows, of each file as it has them."""
        raise NotImplementedError(f"{type(self).__name__} cannot be streamed")

    def convert_stream(self, kind: Kind, rows: Iterable[Row], drops: DropCounts) -> Iterable[Row]:
        """Brings rows of `open_stream` to a kind."""
        raise NotImplementedError(f"{type(self).__name__} cannot be streamed")

    def texts(self) -> list[str]:
        """Returns texts to train a tokenizer on, for a model from scratch."""
        rows = itertools.islice(self.rows("sft", "train", DropCounts()), _TOKENIZER_ROWS)
        return [text for row in rows for text in texts_of(row)]

    def documents(self, tokenizer: Any, split: str, *, max_length: int) -> Examples[Encoded]:
        """Returns what supervised fine-tuning learns from, with loss masks.

        Args:
          tokenizer: with a chat template.
          split: "train", "validation", "test" or "all"; only "train" is ever streamed.
          max_length: the most tokens.
        """
        return self._examples("sft", tokenizer, split, max_length, self.config.limit)

    def preferences(
        self, tokenizer: Any, split: str, *, max_length: int, count: int
    ) -> Examples[EncodedPair]:
        """Returns pairs of responses, the better one first.

        Args:
          tokenizer: with a chat template.
          split: see `documents`.
          max_length: the most tokens of a side.
          count: the most pairs, where they are not streamed.
        """
        return self._examples("preference", tokenizer, split, max_length, count)

    def feedback(
        self, split: str, drops: DropCounts, *, count: int, responses: int
    ) -> Iterable[Row]:
        """Yields prompts with several responses and their scores, ranking or votes.

        See `data.feedback_rows`.

        Args:
          split: "train", "validation" or "test".
          drops: counts what is left out.
          count: how many prompts are wanted.
          responses: how many responses a prompt gets, for tasks that draw.

        Raises:
          ValueError: the source has none.
        """
        raise ValueError(
            f"data.source={self.config.source!r} has no scores or rankings of several responses: "
            "give reviews, or jsonl:FILE with rows of prompt, responses and scores, ranking or "
            "votes"
        )

    def ranked(
        self, tokenizer: Any, split: str, *, max_length: int, count: int, responses: int
    ) -> list[Candidates]:
        """Returns several responses to each prompt, the best first; see `feedback`.

        Args:
          tokenizer: with a chat template.
          split: see `documents`.
          max_length: the most tokens of a prompt with a response.
          count: the most prompts.
          responses: of a prompt, for tasks that draw.

        Raises:
          ValueError: the source has none, or a row is wrong.
        """
        drops = DropCounts()
        rows = self.feedback(split, drops, count=count, responses=responses)
        found = encode_ranked(
            itertools.islice(rows, count), tokenizer, max_length=max_length, drops=drops
        )
        if not found:
            raise ValueError(
                f"no response of data.source={self.config.source!r} is left: {drops.summary()}"
            )
        print(f"ranked responses ({split}): {drops.summary()}")
        sides = [
            EncodedPair(document, document, score)
            for one in found
            for document, score in zip(one.documents, one.scores, strict=True)
        ]
        self.note("preference", f"{split}, ranked", sides)
        return found

    def rated(
        self, tokenizer: Any, split: str, *, max_length: int, count: int
    ) -> tuple[list[EncodedPair], np.ndarray]:
        """Returns pairs, and how people rated both sides, `[n, 2]`.

        Raises:
          ValueError: nobody rated them.
        """
        self.check_ratings()
        raise NotImplementedError(f"{type(self).__name__} has ratings and no `rated`")

    def check_ratings(self) -> None:
        """Refuses to compare all texts of a batch where `rated` has nothing to give.

        Raises:
          ValueError: Nobody rated them.
        """
        raise ValueError(
            f"loss.comparisons='batch' needs ratings: data.source={self.config.source!r} has none "
            "of pairs, 'reviews' with a data.instruction has; or set loss.comparisons='pairs'"
        )

    def rated_texts(self, split: str) -> tuple[list[str], np.ndarray] | None:
        """Returns texts and how people rated them `[n]`, higher is better, to measure judges by.

        None where nobody rated anything.
        """
        return None

    def prompts(self, tokenizer: Any, split: str, *, max_length: int) -> Examples[EncodedPrompt]:
        """Returns what a policy is asked, open for the assistant's words.

        Args:
          tokenizer: with a chat template.
          split: see `documents`.
          max_length: the most tokens.
        """
        return self._examples("prompt", tokenizer, split, max_length, self.config.limit)

    def references(self, tokenizer: Any, *, max_length: int, count: int) -> list[Encoded]:
        """Returns training responses whose scores a reward model brings to mean 0 and std 1.

        Args:
          tokenizer: with a chat template.
          max_length: the most tokens.
          count: the most responses.
        """
        return [
            pair.chosen for pair in self._load("preference", tokenizer, "train", max_length, count)
        ]

    def shown(self, tokenizer: Any) -> Callable[[str], str]:
        """Returns what of a decoded prompt is shown and judged: by default all of it."""
        return lambda prompt: prompt

    def _examples(
        self, kind: Kind, tokenizer: Any, split: str, max_length: int, count: int
    ) -> Examples[Any]:
        load = functools.partial(self._load, kind, tokenizer, split, max_length, count)
        if not self.streamed or split != "train":
            return load()
        return StreamedExamples(
            self.open_stream,
            functools.partial(self._encode_block, kind, tokenizer, max_length),
            load,
            name=f"{kind} {self.config.source}",
            limit=self.config.limit,
        )

    def _load(
        self, kind: Kind, tokenizer: Any, split: str, max_length: int, count: int
    ) -> Examples[Any]:
        """All rows of a split, encoded; prints what was kept and dropped."""
        check_split(split)
        drops = DropCounts()

        def rows() -> Iterator[Row]:
            return itertools.islice(self.rows(kind, split, drops, count=count), count or None)

        decides = self.fingerprint(split)
        found = prepare.prepared(
            kind,
            rows,
            tokenizer,
            max_length=max_length,
            drops=drops,
            name=f"{self.config.source} ({split})",
            decides=None if decides is None else [*decides, code_of(type(self)), split, count],
            total=count,
        )
        print(f"{_COUNTED[kind]} ({split}): {drops.summary()}")
        self.note(kind, split, found)
        return Examples(found)

    def note(self, kind: Kind, split: str, rows: Sequence[Any]) -> None:
        """Keeps the digest of encoded rows, for a run to compare when it resumes.

        `documents`, `preferences` and `prompts` do it; what takes their place in a subclass must.
        """
        if distributed.is_main():  # It alone compares, and the others read no rows but their own.
            self.digests[f"{kind} {split}"] = rows_digest(rows)

    def _encode_block(
        self, kind: Kind, tokenizer: Any, max_length: int, rows: list[Row]
    ) -> list[Any]:
        """A block of a stream, encoded; prints what was kept and dropped."""
        drops = DropCounts()
        converted = self.convert_stream(kind, rows, drops)
        found = prepare.encode_rows(kind, converted, tokenizer, max_length=max_length, drops=drops)
        print(f"{kind} rows, the next {len(rows):,} of {self.config.source}: {drops.summary()}")
        return found


def make_task(config: TaskConfig) -> Task:
    """Returns the task that a source names.

    Raises:
      ValueError: there is no such task, or it cannot be streamed.
    """
    name = config.source.removeprefix(STREAM).partition(":")[0]
    if name == "pyrit":
        raise ValueError(f"source={config.source!r} names the package: use harm")
    if name not in TASKS:
        raise ValueError(f"source={config.source!r} must be one of {', '.join(TASKS)}")
    return TASKS[name](config)


@functools.cache
def code_of(task: type[Task]) -> str:
    """Hash of the files that define a task: rows chosen by other code are not taken for its own."""
    modules = [sys.modules[one.__module__] for one in task.__mro__ if issubclass(one, Task)]
    files = [path for module in modules if (path := getattr(module, "__file__", None))]
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in files)).hexdigest()
