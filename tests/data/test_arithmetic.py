"""Arithmetic problems: their own solutions are right, and the verifier finds what is not."""

import re

import pytest

from rlhf_jax.data.sets import arithmetic
from rlhf_jax.data.sets.arithmetic import (
    CHAIN_SUM,
    GSM_SYMBOLIC,
    Problem,
    Sizes,
    final_answer,
    load_problems,
    reductions,
    split_steps,
    verify,
)

SUM = Problem(CHAIN_SUM, "4 - 1 - 7 + 7 =", "3", ())
RIGHT = "= 3 - 7 + 7\n= -4 + 7\n= 3\n#### 3"
WORDS = Problem(GSM_SYMBOLIC, "How many?", "1,288", ())


@pytest.fixture(scope="module", params=arithmetic.KINDS)
def problems(request):
    return load_problems(request.param, "train", 300)


def test_their_own_solutions_are_right(problems):
    for problem in problems:
        verdict = verify(problem, "".join(problem.steps))
        assert verdict.right and verdict.answer == problem.answer.replace(",", "")
        assert len(verdict.steps) == len(problem.steps) and verdict.steps[-1]
        assert split_steps("".join(problem.steps)) == list(problem.steps)
        if problem.kind == CHAIN_SUM:
            assert all(verdict.steps)


def test_equations_of_word_problems_are_read():
    problems = load_problems(GSM_SYMBOLIC, "test", 1000)
    steps = [right for p in problems for right in verify(p, "".join(p.steps)).steps[:-1]]
    known = [right for right in steps if right is not None]
    # The package's own lines hold; the others have no equation, or one with units inside.
    assert len(known) > 0.5 * len(steps)
    assert sum(known) > 0.99 * len(known)


def test_sums_have_the_size_that_was_asked_for():
    for problem in load_problems(CHAIN_SUM, "validation", 100, Sizes(2, 3, 2)):
        numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
        assert 2 <= len(numbers) <= 3 and max(numbers) < 100
        assert len(problem.steps) == len(numbers)
        assert len({len(str(number)) for number in numbers}) == 1


def test_no_question_is_in_two_splits():
    splits = {
        split: {p.question for p in load_problems(CHAIN_SUM, split, 200)}
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, splits.values())) == 600 == len(set.union(*splits.values()))
    again = load_problems(CHAIN_SUM, "train", 200)
    assert {p.question for p in again} == splits["train"]


def test_reductions():
    assert reductions("4 - 1 - 7 + 7") == ["3 - 7 + 7", "-4 + 7", "3"]


@pytest.mark.parametrize(
    ("text", "steps", "answer", "right"),
    [
        (RIGHT, (True,) * 4, "3", True),
        # Wrong once; what follows is right given the line before.
        ("= 3 - 7 + 7\n= -5 + 7\n= 2\n#### 2", (True, False, True, True), "2", False),
        # Two errors that cancel: a right answer with wrong steps.
        ("= 2 - 7 + 7\n= -5 + 7\n= 3\n#### 3", (False, True, False, True), "3", True),
        # The value of the whole, but two operations at once.
        ("= -4 + 7\n= 3\n#### 3", (False, True, True), "3", True),
        ("= 3 - 7 + 7\n= -4 + 7\n= 3\n#### 4", (True, True, True, False), "4", False),
        ("= 3 - 7 + 7\n#### 3", (True, False), "3", True),
        ("= 3 - 7 + 7\nnonsense\n= 3\n#### 3", (True, False, False, True), "3", True),
        ("= 3 - 7 + 7", (True,), None, False),
        ("", (), None, False),
        ("#### 3", (False,), "3", True),
    ],
)
def test_steps_of_sums(text, steps, answer, right):
    verdict = verify(SUM, text)
    assert (verdict.steps, verdict.answer, verdict.right) == (steps, answer, right)
    assert verdict.first_error == (steps.index(False) if False in steps else -1)


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("35 x 3 = 105 kiwi", True),
        ("so 93 - 38=55", True),
        ("160-48=112 emails and 112*5=561", False),
        ("2 + 3 * 4 = 14", True),
        ("1,000 + 288 = 1,288", True),
        ("7 / 2 = 3.5", True),
        ("7 / 0 = 3", None),
        ("That is all.", None),
        ("48=48 emails", None),
        ("120 questions x 50/100 = 60 questions", None),
        ("or 13/52 = 1/4 kilometers", None),
        ("4 / 8 = 50.0%", None),
        ("perimeter 2(70+69) = 278", None),
        ("28 / 21 = 1 sheets", True),
        ("28 / 21 = 2 sheets", True),
        ("28 / 21 = 3 sheets", False),
        ("28 / 21 = 1.5", False),
        ("28 - 21 = 8", False),
    ],
)
def test_steps_of_word_problems(line, right):
    verdict = verify(WORDS, f"{line}\n#### 1288")
    assert verdict.steps == (right, True) and verdict.right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x\n#### 1,288.", "1288"),
        ("#### -4\n\n", "-4"),
        ("#### 3.50", "3.50"),
        ("#### 3 apples", None),
        ("#### 3\nmore", None),
        ("x #### 3", None),
        ("####3", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_what_cannot_be_had():
    with pytest.raises(ValueError, match="no problems of kind 'algebra'"):
        load_problems("algebra", "train", 1)
    with pytest.raises(ValueError, match="count=0"):
        load_problems(CHAIN_SUM, "train", 0)
    with pytest.raises(ValueError, match="needs 2 <= min <= max"):
        Sizes(5, 4)
    with pytest.raises(ValueError, match=r"only .* different problems of split 'test'"):
        load_problems(CHAIN_SUM, "test", 10_000, Sizes(2, 2, 1))


def test_reasoning_gym_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'rlhf-jax\[reasoning\]'"):
        load_problems(CHAIN_SUM, "train", 1)


@pytest.mark.parametrize(
    ("steps", "index", "letters"),
    [
        (["= 3 + 8\n"], 0, len("= 3 + ")),
        (["= 3 + 7\n", "= 1\n"], 1, len("= 1")),
        (["= 3 + 7\n", "= 10\n", "#### 1"], 2, len("#### 1")),
        (["nonsense\n", "= 10\n"], 1, 0),
        (["= 3 + 7\n"], 0, len("= 3 + 7\n")),
    ],
)
def test_how_far_a_step_is_right(steps, index, letters):
    assert arithmetic.letters_right(arithmetic.sum_problem("4 - 1 + 7"), steps, index) == letters


def test_problems_of_another_block_are_other_problems():
    """The gym's item i of seed s is that of seed s + i: blocks must not overlap."""
    stream = arithmetic._stream(arithmetic.CHAIN_SUM, arithmetic.Sizes(5, 5, 3))
    found = [next(stream).question for _ in range(arithmetic._BLOCK + 50)]
    assert len(set(found)) > 0.999 * len(found)
