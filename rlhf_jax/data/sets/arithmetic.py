"""Arithmetic problems with solutions in steps and a verifier of steps, from reasoning-gym.

  chain_sum      sums of several numbers. A step does the first operation that is left and writes
                 what remains, so that what the next step needs stands near.
  gsm_symbolic   word problems in the manner of GSM8K, with their solution in lines.

A solution ends with the line `#### ANSWER`, as those of GSM8K do. Each line is a step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from rlhf_jax.data.splits import check_split, split_of

CHAIN_SUM, GSM_SYMBOLIC = "chain_sum", "gsm_symbolic"
KINDS = (CHAIN_SUM, GSM_SYMBOLIC)
ANSWER = "#### "
# Seeds of reasoning-gym, one block of problems each.
_BLOCK = 10_000
_EXPRESSION = re.compile(r"-?\d+(?: [+-] -?\d+)*")
_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_EQUATION = re.compile(rf"(?<![\w.])({_NUMBER}(?: ?[-+*/x×÷] ?\(?{_NUMBER}\)?)+) ?= ?({_NUMBER})")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem, and one right solution.

    Attributes:
      kind: one of `KINDS`.
      question: what the policy is asked.
      answer: as text.
      steps: of a right solution, each with its line break; the last one is the answer.
    """

    kind: str
    question: str
    answer: str
    steps: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the verifier says of a solution.

    Attributes:
      steps: of each step, whether it is right given those before; None where nothing in it can be
        checked.
      answer: the final answer as text; None where there is none.
      right: whether the final answer is right.
    """

    steps: tuple[bool | None, ...]
    answer: str | None
    right: bool

    @property
    def first_error(self) -> int:
        """Index of the first wrong step, -1 where none is known to be wrong (ProcessBench)."""
        return next((i for i, right in enumerate(self.steps) if right is False), -1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How hard the sums are.

    Attributes:
      min_terms: the fewest numbers of a sum.
      max_terms: the most.
      max_digits: of a number; those of one problem have as many each.
    """

    min_terms: int = 3
    max_terms: int = 5
    max_digits: int = 1

    def __post_init__(self):
        if not 2 <= self.min_terms <= self.max_terms:
            raise ValueError(
                f"sums of {self.min_terms} to {self.max_terms} numbers: needs 2 <= min <= max"
            )
        if self.max_digits < 1:
            raise ValueError(f"max_digits={self.max_digits} must be at least 1")


def load_problems(kind: str, split: str, count: int, sizes: Sizes = Sizes()) -> list[Problem]:
    """Returns the first `count` problems of a split; no question is in two splits.

    Args:
      kind: one of `KINDS`.
      split: "train", "validation", "test" or "all".
      count: how many, all different.
      sizes: of sums; word problems do not read it.

    Raises:
      ValueError: unknown kind or split, no count, fewer different problems than asked for, or
        reasoning-gym is not installed.
    """
    check_split(split)
    if kind not in KINDS:
        raise ValueError(f"no problems of kind {kind!r}: choose one of {', '.join(KINDS)}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    found: dict[str, Problem] = {}
    tried_since = 0
    for problem in _stream(kind, sizes):
        new = problem.question not in found and split in ("all", split_of(problem.question))
        tried_since = 0 if new else tried_since + 1
        if new:
            found[problem.question] = problem
        if len(found) == count:
            return list(found.values())
        if tried_since > 3 * _BLOCK:
            break
    raise ValueError(
        f"{kind} has only {len(found):,} different problems of split {split!r} "
        f"with {sizes.min_terms} to {sizes.max_terms} numbers of {sizes.max_digits} digits at most"
    )


def _stream(kind: str, sizes: Sizes) -> Iterator[Problem]:
    make = {CHAIN_SUM: _chain_sum, GSM_SYMBOLIC: _word_problem}[kind]
    settings: dict[str, Any] = {}
    if kind == CHAIN_SUM:
        settings = {"min_digits": 1, **dataclasses.asdict(sizes)}
    # The gym draws item i of a dataset with the seed of the dataset plus i.
    for block in itertools.count():
        for entry in _gym().create_dataset(kind, seed=block * _BLOCK, size=_BLOCK, **settings):
            yield make(entry)


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            "arithmetic problems need reasoning-gym: pip install 'rlhf-jax[reasoning]'"
        ) from error
    return reasoning_gym


def _chain_sum(entry: Any) -> Problem:
    problem = sum_problem(entry["metadata"]["expression"])
    if problem is None or problem.answer != entry["answer"]:
        raise ValueError(f"reasoning-gym gives a sum that cannot be read: {entry['question']!r}")
    return problem


def sum_problem(expression: str) -> Problem | None:
    """The problem of a sum such as `4 - 1 + 7`; None where it is none.

    >>> sum_problem("4 - 1").steps
    ('= 3\\n', '#### 3')
    """
    numbers = _terms(expression)
    if not numbers:
        return None
    steps = [f"= {rest}\n" for rest in reductions(expression)]
    answer = str(sum(numbers))
    return Problem(CHAIN_SUM, f"{expression} =", answer, (*steps, f"{ANSWER}{answer}"))


def reductions(expression: str) -> list[str]:
    """What is left of a sum after each of its operations, from the left.

    >>> reductions("4 - 1 + 7")
    ['3 + 7', '10']
    """
    first, *rest = expression.split(" ")
    left, found = int(first), []
    while rest:
        operation, number, *rest = rest
        left += int(number) if operation == "+" else -int(number)
        found.append(" ".join([str(left), *rest]))
    return found


def _word_problem(entry: Any) -> Problem:
    lines = [line.strip() for line in entry["metadata"]["answer_cot"].splitlines() if line.strip()]
    question = entry["question"].removesuffix(
        " Give the result as your final answer. Do not include units."
    )
    steps = [f"{line}\n" for line in lines if not line.startswith(ANSWER)]
    return Problem(GSM_SYMBOLIC, question, entry["answer"], (*steps, f"{ANSWER}{entry['answer']}"))


def split_steps(text: str) -> list[str]:
    """The lines of a solution, each with its break; empty lines belong to the one before.

    >>> split_steps("= 3\\n#### 3")
    ['= 3\\n', '#### 3']
    """
    return re.findall(r"[^\n]+\n*", text.lstrip("\n"))


def final_answer(text: str) -> str | None:
    """The number in a last line `#### ANSWER`, without commas and a full stop behind; or None."""
    match = re.search(rf"^{ANSWER}({_NUMBER})\.?\s*$", text.rstrip("\n").rsplit("\n", 1)[-1])
    return match.group(1).replace(",", "") if match else None


def verify(problem: Problem, text: str) -> Verdict:
    """Checks every step of a solution against those before, and its answer.

    A step of a sum is right if it is a sum of one number less with the value of the line before. A
    step of a word problem is right if each of its equations holds; one without equations cannot be
    checked. The last line, `#### ANSWER`, is right if the line before has this value; in word
    problems, if the answer is right.

    Args:
      problem: what was asked.
      text: the solution, without the question.
    """
    steps, answer = split_steps(text), final_answer(text)
    right = answer is not None and same_number(answer, problem.answer)
    check = _check_sum if problem.kind == CHAIN_SUM else _check_words
    return Verdict(tuple(check(problem, steps, right)), answer, right)


def letters_right(problem: Problem, steps: Sequence[str], index: int) -> int:
    """How many letters of a step are those of the step that should stand there.

    Of sums that is the next reduction from the left; of word problems nobody knows, and 0.

    >>> problem = sum_problem("4 - 1 + 7")
    >>> letters_right(problem, ["= 3 + 8\\n"], 0)
    6
    """
    if problem.kind != CHAIN_SUM:
        return 0
    before = problem.question if index == 0 else steps[index - 1]
    expression = before.strip().removeprefix("=").removesuffix("=").strip()
    if not _terms(expression):
        return 0
    rest = reductions(expression)
    wanted = f"= {rest[0]}\n" if rest else f"{ANSWER}{expression}"
    pairs = zip(steps[index], wanted, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def same_number(one: str, other: str) -> bool:
    """Whether two texts are the same number: 3, 3.0 and 3.00 are."""
    try:
        return Fraction(one.replace(",", "")) == Fraction(other.replace(",", ""))
    except ValueError:
        return False


def _check_sum(problem: Problem, steps: list[str], right: bool) -> Iterator[bool]:
    del right
    before = _terms(problem.question.removesuffix("=").strip())
    for step in steps:
        line = step.strip()
        if line.startswith(ANSWER):
            now = _terms(line.removeprefix(ANSWER))
            yield bool(before and now) and len(before) == 1 and before == now
        else:
            now = _terms(line.removeprefix("= ")) if line.startswith("= ") else ()
            yield (bool(before and now) and len(now) == len(before) - 1 and sum(now) == sum(before))
        before = now


@functools.lru_cache(maxsize=4096)
def _terms(expression: str) -> tuple[int, ...]:
    """The signed numbers of a sum; none where it cannot be read."""
    if not _EXPRESSION.fullmatch(expression):
        return ()
    first, *rest = expression.split(" ")
    signs = [1 if operation == "+" else -1 for operation in rest[::2]]
    return (int(first), *(s * int(n) for s, n in zip(signs, rest[1::2], strict=True)))


def _check_words(problem: Problem, steps: list[str], right: bool) -> Iterator[bool | None]:
    for step in steps:
        if step.startswith(ANSWER):
            yield right
            continue
        known = [holds for holds in map(_holds, _equations(step)) if holds is not None]
        yield all(known) if known else None


def _equations(step: str) -> Iterator[tuple[str, str]]:
    """Left and right sides of the equations of a line that stand there as a whole.

    Of "120 questions x 50/100 = 60" the left side is cut by a unit; of "14/42 = 1/3" and
    "4 / 8 = 50%" the right side is not the number; in "2(70+69) = 278" parentheses are missing.
    """
    for match in _EQUATION.finditer(step):
        before = step[: match.start()].rstrip()[-1:]
        after = step[match.end() :].lstrip()[:1]
        left = match.group(1)
        if (before and before in "x*/+-(÷×") or (after and after in "/%"):
            continue
        if left.count("(") == left.count(")"):
            yield left, match.group(2)


def _holds(equation: tuple[str, str]) -> bool | None:
    """Whether an equation holds, the result rounded up or down included; None if unreadable."""
    left, result = equation
    parts = re.findall(rf"{_NUMBER}|[-+*/x×÷]", left.replace(" ", ""))
    numbers: list[Fraction] = []
    operations: list[str] = []
    for part in parts:
        if re.fullmatch(_NUMBER, part) and len(numbers) == len(operations):
            numbers.append(Fraction(part.replace(",", "")))
        elif re.fullmatch(_NUMBER, part) and part.startswith("-"):
            # "5-3" reads as 5 and -3: the sign is the operation.
            operations.append("+")
            numbers.append(Fraction(part.replace(",", "")))
        else:
            operations.append(part)
    value = _value(numbers, operations) if len(numbers) == len(operations) + 1 else None
    if value is None:
        return None
    said = result.replace(",", "")
    last_digit = Fraction(1, 10 ** min(6, len(said.partition(".")[2])))
    return abs(value - Fraction(said)) < last_digit


def _value(numbers: list[Fraction], operations: list[str]) -> Fraction | None:
    """Of a chain of operations, products before sums; None where it divides by 0."""
    terms = [numbers[0]]
    for operation, number in zip(operations, numbers[1:], strict=True):
        if operation in "*x×":
            terms[-1] *= number
        elif operation in "/÷":
            if not number:
                return None
            terms[-1] /= number
        else:
            terms.append(number if operation == "+" else -number)
    return sum(terms, Fraction(0))
