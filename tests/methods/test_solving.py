"""Attempts at problems, what they are worth, and labels from completions."""

import dataclasses

import pytest

from rlhf_jax.data.sets.arithmetic import sum_problem
from rlhf_jax.methods.monte_carlo import hard_labels, step_values
from rlhf_jax.methods.solving import as_solution, attempt, canonical, statistics
from rlhf_jax.rollouts.answers import Answer

PROBLEM = sum_problem("4 - 1 + 7")
RIGHT, WRONG = "= 3 + 7\n= 10\n#### 10", "= 4 + 7\n= 11\n#### 11"
LUCKY = "= 4 + 7\n= 10\n#### 10"  # two errors that cancel


def of(text: str, *, ended: bool = True, entropy: float = 1.0):
    return attempt(PROBLEM, text, tokens=len(text), ended=ended, entropy=entropy)


def test_an_attempt_is_checked_step_by_step():
    right, wrong, lucky = of(RIGHT), of(WRONG), of(LUCKY)
    assert right.right and right.traced and right.first_error == -1
    assert not wrong.right and wrong.first_error == 0 and wrong.answer == "11"
    assert lucky.right and not lucky.traced and lucky.first_error == 0


def test_an_answer_that_was_cut_off_counts_for_nothing():
    cut = of(RIGHT, ended=False)
    assert not cut.right and cut.answer is None
    solution = as_solution(PROBLEM, cut)
    assert solution.right is None and solution.labels == (1, 1, None)


def test_labels_of_the_verifier_are_ratings():
    solution = as_solution(PROBLEM, of(WRONG))
    assert solution.labels == (-1, 1, 1) and solution.right is False
    assert solution.response == WRONG and solution.prompt == PROBLEM.question


def test_equal_numbers_are_one_vote():
    assert canonical("3.0") == canonical("3") == canonical("3.00") == "3"
    assert canonical("1,200") == "1200" and canonical("30") == "30" and canonical(None) is None


def test_statistics_by_hand():
    other = sum_problem("1 + 1")
    attempts = [
        [of(RIGHT), of(LUCKY), of(WRONG), of(WRONG)],
        [attempt(other, "= 3\n#### 3", tokens=7, ended=True, entropy=3.0)] * 4,
    ]
    found = statistics([PROBLEM, other], attempts)
    assert found["solve/pass_at_1"] == 2 / 8
    assert found["solve/pass_at_k"] == 1 / 2
    # Two votes for 10, two for 11: the first of equals, which is right here.
    assert found["solve/majority"] == 1 / 2
    assert found["solve/trace_error"] == 1 / 2
    assert found["solve/distinct"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found["solve/entropy"] == 2.0
    assert found["solve/tokens"] == pytest.approx(
        (len(RIGHT) + len(LUCKY) + 2 * len(WRONG) + 28) / 8
    )


def test_statistics_need_as_many_attempts_of_each_problem():
    with pytest.raises(ValueError, match="needs as many for each"):
        statistics([PROBLEM, PROBLEM], [[of(RIGHT)], []])


def answer(text: str, *, ended: bool = True) -> Answer:
    return Answer(text, tuple(range(len(text))), 0.0, 0.0, ended)


def test_the_value_of_a_step_is_the_share_of_completions_that_arrive():
    asked = []

    def complete(beginnings):
        asked.extend(beginnings)
        # After a right beginning one of two arrives, after a wrong one none, after two steps both.
        texts = {
            ("= 3 + 7\n",): ["= 10\n#### 10", "= 11\n#### 11"],
            ("= 4 + 7\n",): ["= 11\n#### 11", "= 10\n#### 1"],
        }
        return [
            [answer(text) for text in texts.get(steps, ["#### 10", "#### 10"])]
            for _, steps in beginnings
        ]

    values = step_values([PROBLEM], [[of(RIGHT), of(WRONG), of(RIGHT)]], complete)
    assert values == [[(0.5, 1.0, 1.0), (0.0, 1.0, 0.0), (0.5, 1.0, 1.0)]]
    # Equal beginnings are completed once, and the last step of none.
    assert len(asked) == len(set(asked)) == 4


def test_a_completion_that_was_cut_off_has_not_arrived():
    def complete(beginnings):
        return [[answer("= 10\n#### 10", ended=False)]] * len(beginnings)

    ((values,),) = step_values([PROBLEM], [[of("= 3 + 7\n= 10\n#### 10")]], complete)
    assert values == (0.0, 0.0, 1.0)


def test_hard_labels():
    assert hard_labels([0.0, 0.125, 1.0]) == (-1, 1, 1)
    assert hard_labels([0.0, 0.125, 1.0], above=0.5) == (-1, -1, 1)


def test_attempts_are_plain_data():
    one = of(RIGHT)
    assert type(one)(**dataclasses.asdict(one)) == one
