"""What each filter keeps of attempts whose worth is known."""

import numpy as np
import pytest

from rlhf_jax.data.sets.arithmetic import sum_problem
from rlhf_jax.methods.expert_iteration import (
    Example,
    all_right,
    as_rows,
    best,
    final_answer,
    pool,
    random,
)
from rlhf_jax.methods.solving import attempt

PROBLEMS = [sum_problem("4 - 1"), sum_problem("2 + 2")]
PROMPTS = [problem.question for problem in PROBLEMS]
RIGHT, LUCKY, WRONG = "= 3\n#### 3", "= 4\n#### 3", "= 2\n#### 2"


def of(number: int, *texts: str):
    return [attempt(PROBLEMS[number], text, tokens=1, ended=True) for text in texts]


ATTEMPTS = [of(0, WRONG, RIGHT, LUCKY, RIGHT), of(1, RIGHT)]  # 3 is no answer to 2 + 2


def test_the_final_answer_keeps_one_right_attempt_of_each_solved_problem():
    drawn = set()
    for seed in range(30):
        (one,) = final_answer(PROMPTS, ATTEMPTS, np.random.default_rng(seed))
        assert one.prompt == PROMPTS[0]
        drawn.add(one.response)
    # It looks at no step: an answer that is right by luck is kept as well.
    assert drawn == {RIGHT, LUCKY}


def test_all_right_keeps_each_text_once():
    assert all_right(PROMPTS, ATTEMPTS) == [Example(PROMPTS[0], RIGHT), Example(PROMPTS[0], LUCKY)]


def test_the_best_is_what_scores_highest():
    texts = [["a", "b", "c"], ["d"], ["e"]]
    scores = [[0.1, 0.9, 0.9], [0.0], [-np.inf]]
    assert best(["p", "q", "r"], texts, scores) == [Example("p", "b"), Example("q", "d")]
    with pytest.raises(ValueError, match="NaN"):
        best(["p"], [["a"]], [[float("nan")]])
    with pytest.raises(ValueError, match="1 answers and 2 scores"):
        best(["p"], [["a"]], [[0.0, 1.0]])


def test_the_control_takes_as_many_without_looking():
    texts, seen = [["a", "b"], ["c", "d"], ["e"]], set()
    for seed in range(30):
        found = random(["p", "q", "r"], texts, [1, 2, 0], np.random.default_rng(seed))
        assert [one.prompt for one in found] == ["p", "q", "q"]
        assert {one.response for one in found[1:]} == {"c", "d"}
        seen.add(found[0].response)
    assert seen == {"a", "b"}
    with pytest.raises(ValueError, match="2 of 1 answers"):
        random(["p"], [["a"]], [2], np.random.default_rng(0))


def test_the_pool_grows_and_has_nothing_twice():
    one, two = Example("p", "a"), Example("p", "b")
    assert pool([[one], [two, one]]) == [one, two]
    assert as_rows([one]) == [{"prompt": "p", "response": "a"}]
