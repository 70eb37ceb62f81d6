"""Solutions in steps that are rated one by one: our own rows, and three forms they come in.

  {"prompt", "steps", "labels", "right"}     our own, `read_solutions`
  {"question", "label"}                      PRM800K (OpenAI), `read_prm800k`
  {"input", "label", "task"}                 Math-Shepherd, `read_math_shepherd`
  {"prompt", "completions", "labels"}        stepwise supervision (TRL), `read_stepwise`

Readers yield solutions one by one. What a form is known to have and nobody can learn from is
counted and left out; a row of another form stops them with file, line and field.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.jsonl import numbered_rows
from rlhf_jax.data.schemas import (
    DropCounts,
    Message,
    Row,
    check_characters,
    check_messages,
    one_line,
)
from rlhf_jax.runtime.files import write_whole

RATINGS = NEGATIVE, NEUTRAL, POSITIVE = (-1, 0, 1)
# Reasons for which rows are left out.
NO_STEPS, EMPTY_STEP = "no steps", "step without text"
QUALITY_CONTROL, SCREENING = "quality-control question", "screening question"
_UNFINISHED = {"bad_problem": "bad problem", "give_up": "labeller gave up"}
NO_QUESTION = "no question before 'Step 1:'"

_FINISHED = ("solution", "found_error")
_TAG = "ки"
_FIRST = re.compile("[Ss]tep 1:")


@dataclasses.dataclass(frozen=True)
class Solution:
    """A prompt, and the steps of an answer to it with what is known of each.

    Attributes:
      prompt: a text that the steps go on with, or a list of messages that they answer.
      steps: each with its line break, where it has one.
      labels: of each step: -1 wrong, 0 neither wrong nor of use, 1 right, None not rated. The
        class of `losses.process.step_label_loss` is the rating plus 1.
      right: whether the final answer is right; None where nobody knows.
      letters_right: of the first wrong step, how many letters are right before it goes wrong; 0
        where nobody knows.

    Raises:
      ValueError: labels are not as many as steps, or one of them is no rating.

    >>> Solution("1 + 1 + 1 =", ("= 2 + 1\\n", "= 4"), (1, -1), False).first_error
    1
    """

    prompt: str | list[Message]
    steps: tuple[str, ...]
    labels: tuple[int | None, ...]
    right: bool | None = None
    letters_right: int = 0

    def __post_init__(self):
        if len(self.steps) != len(self.labels):
            raise ValueError(
                f"labels has {len(self.labels)} entries for {len(self.steps)} steps: give one for "
                "each, null where a step is not rated"
            )
        for number, label in enumerate(self.labels):
            _check_rating(label, f"labels[{number}]")

    @property
    def response(self) -> str:
        """The whole answer: its steps, one behind the other."""
        return "".join(self.steps)

    @property
    def first_error(self) -> int:
        """Index of the first step that is rated -1; -1 where none is."""
        return next((i for i, label in enumerate(self.labels) if label == NEGATIVE), -1)


def read_solutions(
    path: str | os.PathLike[str], drops: DropCounts | None = None
) -> Iterator[Solution]:
    """Yields the solutions of a file in our own form, as `write_solutions` leaves it.

    One JSON object a line: "prompt" (text, or a list of messages), "steps" (texts), "labels" (-1,
    0, 1 or null for each), and "right" (true, false, or null, as where it is missing).

    Args:
      path: of JSON lines, gzipped or not.
      drops: counts solutions without steps, and those with a step without text.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a row is of another form; names file, line and field.
    """
    return _read(path, lambda row: [_own(row)], drops)


def write_solutions(path: str | os.PathLike[str], solutions: Iterable[Solution]) -> None:
    """Writes solutions for `read_solutions`, one a line: the whole file or none of it.

    Raises:
      OSError: the file cannot be written; names it.
    """
    rows = (json.dumps(_row(solution), ensure_ascii=False) for solution in solutions)
    write_whole(path, "".join(f"{row}\n" for row in rows))


def read_prm800k(
    path: str | os.PathLike[str], drops: DropCounts, *, alternatives: bool = False
) -> Iterator[Solution]:
    """Yields the solutions of a file of PRM800K; see `from_prm800k`.

    Args:
      path: phase1_train.jsonl or a file like it, gzipped or not.
      drops: counts what is left out, by reason.
      alternatives: whether the steps that were rated and not taken follow the solution that they
        belong to; see `prm800k_alternatives`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a row is of another form; names file, line and field.
    """

    def convert(row: Row) -> Iterator[Solution]:
        solution = from_prm800k(row, drops)
        if solution is not None:
            yield solution
            yield from prm800k_alternatives(row) if alternatives else ()

    return _read(path, convert, drops)


def read_math_shepherd(path: str | os.PathLike[str], drops: DropCounts) -> Iterator[Solution]:
    """Yields the solutions of a file of Math-Shepherd; see `from_math_shepherd`, `read_prm800k`."""
    return _read(path, lambda row: [from_math_shepherd(row, drops)], drops)


def read_stepwise(path: str | os.PathLike[str], drops: DropCounts) -> Iterator[Solution]:
    """Yields the solutions of a file in TRL's form; see `from_stepwise`, `read_prm800k`."""
    return _read(path, lambda row: [from_stepwise(row)], drops)


def from_prm800k(row: Row, drops: DropCounts | None = None) -> Solution | None:
    """Converts a row of PRM800K: the path that the labeller took through the steps on offer.

    At each step it is the completion that was chosen; where none was, the step that the labeller
    wrote, which counts as rated 1. In phase 2 labelling stops at the first error, and of the last
    step nothing is chosen: its first completion rated -1 ends the path. A path that breaks off
    elsewhere is kept up to there. Steps have no line break in PRM800K, and get one each.

    `right` is True where labelling ended with a solution and no step is rated -1, False where it
    ended with an error; None where the path breaks off, or a step of a solution is rated -1.

    Source: Lightman et al. 2023 (arXiv 2305.20050); https://github.com/openai/prm800k, README.

    Args:
      row: {"question": {"problem"}, "label": {"steps", "finish_reason"}}, and perhaps
        "is_quality_control_question" and "is_initial_screening_question".
      drops: counts what is left out.

    Returns:
      None for questions that measure the labellers, for bad problems and where the labeller gave
      up.

    Raises:
      ValueError: a field is missing or of another type; names it.
    """
    reason = _left_out(row)
    if reason:
        if drops is not None:
            drops.drop(reason)
        return None
    path = [taken for _, taken in _walk(row)]
    taken = [step for step in path if step is not None]
    labels = tuple(step.rating for step in taken)
    right = None
    if len(taken) == len(path):
        if row["label"]["finish_reason"] == "found_error":
            right = False
        elif NEGATIVE not in labels:
            right = True
    steps = tuple(_broken(step.text) for step in taken)
    return Solution(_before(prm800k_problem(row), steps), steps, labels, right)


def prm800k_alternatives(row: Row) -> list[Solution]:
    """The steps of a row that were rated and not taken, each behind the steps before it.

    They are solutions that end there. The steps before are not rated (None): the path itself has
    their labels, so each label is in one solution only. Behind the first error of the path
    there are none.

    Args:
      row: of PRM800K, one that `from_prm800k` does not leave out.

    Raises:
      ValueError: see `from_prm800k`.
    """
    problem, found = prm800k_problem(row), []
    before: tuple[str, ...] = ()
    for completions, taken in _walk(row):
        for one in completions:
            if one is not taken and one.rating is not None:
                steps = (*before, _broken(one.text))
                labels = (*(None for _ in before), one.rating)
                found.append(Solution(_before(problem, steps), steps, labels))
        if taken is None or taken.rating == NEGATIVE:
            break
        before = (*before, _broken(taken.text))
    return found


def prm800k_problem(row: Row) -> str:
    """The problem of a row of PRM800K, whatever became of its solution.

    Raises:
      ValueError: there is none.
    """
    return _field(_field(row, "question", dict), "problem", str, "question.")


def from_math_shepherd(row: Row, drops: DropCounts | None = None) -> Solution | None:
    """Converts a row of Math-Shepherd: a text with a tag behind each step, + or - in "label".

    A step is rated 1 if some of its continuations reached the right answer (+), else -1; so the
    label of the last step says whether the answer is right. Text behind the last tag is a step
    that is not rated.

    Source: Wang et al. 2024 (arXiv 2312.08935); the data set peiyi9979/Math-Shepherd of the hub.

    Args:
      row: {"input", "label"}: the question, "Step 1: …" and so on, with "ки" behind each step; and
        the same text with + or - in the place of each tag.
      drops: counts rows whose question cannot be told from the first step: a few have a tag within
        the question, or no "Step 1:".

    Returns:
      None for such rows.

    Raises:
      ValueError: a field is missing or of another type, there is no tag, or a tag has no label in
        its place; names the field.
    """
    text = _field(row, "input", str)
    parts = text.split(_TAG)
    labels: list[int | None] = [*_marks(parts, _field(row, "label", str))]
    first = _FIRST.search(parts[0])
    question = parts[0][: first.start()].strip() if first else ""
    if not first or not question:
        if drops is not None:
            drops.drop(NO_QUESTION)
        return None
    texts = [parts[0][first.start() :], *parts[1:]]
    if texts[-1].strip():
        labels.append(None)
    else:
        texts.pop()
    steps = [_broken(step.strip()) for step in texts]
    if not text.endswith("\n"):
        steps[-1] = steps[-1].removesuffix("\n")
    right = None if labels[-1] is None else labels[-1] == POSITIVE
    return Solution(_before(question, steps), tuple(steps), tuple(labels), right)


def from_stepwise(row: Row) -> Solution:
    """Converts a row of stepwise supervision: true and false are 1 and -1.

    Each completion is a step, and gets a line break where it has none at its end.

    Source: TRL, "Dataset formats and types", stepwise supervision; `PRMTrainer`.

    Args:
      row: {"prompt", "completions", "labels"}: a text, texts, and true or false for each of them;
        perhaps "right", whether the final answer is right, which that form does not say.

    Raises:
      ValueError: a field is missing or of another type, or labels are not as many as completions;
        names the field.
    """
    prompt = _field(row, "prompt", str)
    steps = tuple(_broken(step) for step in _texts(row, "completions"))
    marks = _field(row, "labels", list)
    for number, mark in enumerate(marks):
        if not isinstance(mark, bool):
            raise ValueError(f"labels[{number}]={mark!r:.40} must be true or false")
    if len(marks) != len(steps):
        raise ValueError(
            f"labels has {len(marks)} entries for {len(steps)} completions: give one for each"
        )
    labels = tuple(POSITIVE if mark else NEGATIVE for mark in marks)
    return Solution(_before(prompt, steps), steps, labels, _right(row))


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """A step that was on offer; two of the same text are two."""

    text: str
    rating: int | None


def _read(
    path: str | os.PathLike[str],
    convert: Callable[[Row], Iterable[Solution | None]],
    drops: DropCounts | None,
) -> Iterator[Solution]:
    """Solutions that have steps; errors name file and line."""
    drops = DropCounts() if drops is None else drops
    path = Path(path)
    for number, row in numbered_rows(path):
        try:
            found = [solution for solution in convert(row) if solution is not None]
            for solution in found:
                check_characters(_row(solution))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {one_line(error)}") from error
        for solution in found:
            if not solution.steps:
                drops.drop(NO_STEPS)
            elif not all(step.strip() for step in solution.steps):
                drops.drop(EMPTY_STEP)  # Nothing stands there that could be rated.
            else:
                yield solution


def _own(row: Row) -> Solution:
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        prompt = check_messages(_field(row, "prompt", list), "prompt")
    steps, labels = _texts(row, "steps"), _field(row, "labels", list)
    return Solution(prompt, tuple(steps), tuple(labels), _right(row))


def _row(solution: Solution) -> Row:
    return {
        "prompt": solution.prompt,
        "steps": list(solution.steps),
        "labels": list(solution.labels),
        "right": solution.right,
    }


def _left_out(row: Row) -> str:
    """Why a row of PRM800K is left out; empty where it is not."""
    for name, reason in (
        ("is_quality_control_question", QUALITY_CONTROL),
        ("is_initial_screening_question", SCREENING),
    ):
        is_one = row.get(name)
        if is_one is not None and not isinstance(is_one, bool):
            raise ValueError(f"{name}={is_one!r:.40} must be true or false")
        if is_one:
            return reason
    reason = _field(_field(row, "label", dict), "finish_reason", str, "label.")
    if reason not in (*_FINISHED, *_UNFINISHED):
        known = ", ".join((*_FINISHED, *_UNFINISHED))
        raise ValueError(f"label.finish_reason={reason!r:.40} must be one of {known}")
    return _UNFINISHED.get(reason, "")


def _walk(row: Row) -> Iterator[tuple[list[_Step], _Step | None]]:
    """What was on offer at each step of the path, and what was taken; None where it breaks off."""
    for number, step in enumerate(_field(_field(row, "label", dict), "steps", list, "label.")):
        where = f"label.steps[{number}]"
        if not isinstance(step, dict):
            raise ValueError(f"{where} must be an object, not {type(step).__name__}")
        completions = _completions(step, f"{where}.")
        chosen, written = step.get("chosen_completion"), step.get("human_completion")
        ends = False
        if chosen is not None:
            if type(chosen) is not int or not 0 <= chosen < len(completions):
                raise ValueError(
                    f"{where}.chosen_completion={chosen!r:.40} must be the index of one of "
                    f"{len(completions)} completions, or null"
                )
            taken: _Step | None = completions[chosen]
        elif written is not None:
            held = isinstance(written, dict)
            said = written if held else {"text": written}
            taken = _Step(_field(said, "text", str, f"{where}.human_completion."), POSITIVE)
        else:
            taken, ends = next((c for c in completions if c.rating == NEGATIVE), None), True
        yield completions, taken
        if ends:
            return


def _marks(parts: list[str], marked: str) -> Iterator[int]:
    """The rating at each tag: what the marked text has where the text between tags ends."""
    if len(parts) == 1:
        raise ValueError(
            f"input has no {_TAG!r}, the tag behind each step, so its steps cannot be told apart"
        )
    place = 0
    for number, part in enumerate(parts[:-1]):
        place += len(part)
        mark = marked[place : place + 1]
        if mark not in ("+", "-"):
            raise ValueError(
                f"label has {mark!r} in the place of tag {number} of input: it must be the same "
                "text with + or - for each tag"
            )
        yield POSITIVE if mark == "+" else NEGATIVE
        place += 1


def _completions(step: Row, where: str) -> list[_Step]:
    """What a step of PRM800K offers; null, as of some steps, is nothing."""
    if step.get("completions") is None:
        return []
    found = []
    for number, one in enumerate(_field(step, "completions", list, where)):
        name = f"{where}completions[{number}]"
        if not isinstance(one, dict):
            raise ValueError(f"{name} must be an object, not {type(one).__name__}")
        rating = one.get("rating")
        _check_rating(rating, f"{name}.rating")
        found.append(_Step(_field(one, "text", str, f"{name}."), rating))
    return found


def _check_rating(rating: Any, name: str) -> None:
    if rating is not None and (type(rating) is not int or rating not in RATINGS):
        raise ValueError(f"{name}={rating!r:.40} must be -1, 0, 1, or null where it is not rated")


_NAMES: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


def _field(row: Row, name: str, kind: type, where: str = "") -> Any:
    """A field of a row that must be there; what is missing is named with what was found."""
    if name not in row:
        found = ", ".join(sorted(map(str, row))) or "none"
        raise ValueError(f"{where}{name} is missing; found: {found}")
    if not isinstance(row[name], kind):
        raise ValueError(f"{where}{name} must be {_NAMES[kind]}, not {type(row[name]).__name__}")
    return row[name]


def _texts(row: Row, name: str) -> list[str]:
    texts = _field(row, name, list)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{number}] must be text, not {type(text).__name__}")
    return texts


def _right(row: Row) -> bool | None:
    right = row.get("right")
    if right is not None and not isinstance(right, bool):
        raise ValueError(f"right={right!r:.40} must be true, false, or null where it is not known")
    return right


def _broken(step: str) -> str:
    """The step with a line break at its end."""
    return step if step.endswith("\n") else f"{step}\n"


def _before(question: str, steps: Sequence[str]) -> str:
    """The question as a prompt, which is continued as it stands: on a line of its own.

    Where white space is between the two already, nothing is added.
    """
    apart = question[-1:].isspace() or "".join(steps)[:1].isspace()
    return question if apart or not question else f"{question}\n"
