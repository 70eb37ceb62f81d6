"""Searches in a small world: every option moves the result, and each finds what it should."""

import itertools

import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.methods.search import (
    AGGREGATIONS,
    Partial,
    Step,
    aggregate,
    best_of_n,
    majority,
    pass_at_k,
    step_search,
    weighted_vote,
)


class World:
    """Solutions are digits; the score of a step is given by the text so far."""

    def __init__(self, scores, *, length=2, choices="012"):
        self.scores, self.length, self.choices = scores, length, choices
        self.asked = []

    def propose(self, partials, count):
        self.asked.append((len(partials), count))
        return [
            [
                Step(digit, tokens=1, ends=len(partial.steps) + 1 == self.length)
                for digit in itertools.islice(itertools.cycle(self.choices), count)
            ]
            for partial in partials
        ]

    def score(self, partials):
        return [
            [self.scores.get(p.text[: i + 1], 0.5) for i in range(len(p.steps))] for p in partials
        ]

    def search(self, problems=1, **settings):
        settings = {"beams": 1, "width": 3, "max_steps": 4} | settings
        return step_search(problems, self.propose, self.score, **settings)


# The best first step leads nowhere; the second best goes on well.
TRAP = {"0": 0.9, "1": 0.8, "2": 0.1, "00": 0.2, "01": 0.3, "02": 0.1, "10": 0.9, "20": 0.99}


def texts(found):
    return [solution.text for solution in found.solutions]


def test_greedy_falls_into_the_trap_and_a_beam_does_not():
    assert texts(World(TRAP).search()[0]) == ["01"]
    assert texts(World(TRAP).search(beams=2)[0]) == ["10", "11"]


def test_diverse_beams_are_trees_of_their_own():
    # Beams crowd on the prefix "0"; trees that each draw one step start from different ones.
    scores = {"0": 0.9, "1": 0.85, "00": 0.9, "01": 0.89, "10": 0.2}
    world = World(scores, choices="01")
    assert texts(world.search(beams=2, width=2)[0]) == ["00", "01"]
    draws = iter(["0", "1", "0", "1"])
    world.propose = lambda partials, count: [
        [Step(next(draws), 1, ends=len(partial.steps) == 1)] for partial in partials
    ]
    assert texts(world.search(beams=2, width=1, diverse=True)[0]) == ["00", "11"]


@pytest.mark.parametrize(
    ("aggregation", "best"), [("product", "10"), ("min", "00"), ("last", "20")]
)
def test_aggregation_moves_the_result(aggregation, best):
    scores = {"0": 0.6, "00": 0.6, "1": 1.0, "10": 0.5, "2": 0.1, "20": 0.99}
    world = World(scores | {a + b: 0.0 for a in "012" for b in "12"})
    assert texts(world.search(beams=3, aggregation=aggregation)[0])[0] == best


def test_tokens_are_all_that_were_sampled():
    # 2 x 3 first steps, then 3 of each of 2 beams.
    assert World(TRAP).search(beams=2)[0].tokens == 6 + 6
    assert World(TRAP).search(beams=1)[0].tokens == 3 + 3
    # Trees: 3 first steps each.
    assert World(TRAP).search(beams=2, diverse=True)[0].tokens == 6 + 6


def test_problems_are_continued_in_one_call():
    world = World(TRAP)
    found = world.search(problems=5, beams=2)
    assert world.asked == [(5, 6), (10, 3)]
    assert [texts(one) for one in found] == [["10", "11"]] * 5


def test_a_solution_that_has_ended_keeps_its_place_until_a_better_one_comes():
    class Uneven(World):
        def propose(self, partials, count):
            steps = [[Step("a", 1, ends=True), Step("b", 1)], [Step("c", 1, ends=True)] * 2]
            return [steps[min(len(p.steps), 1)][:count] for p in partials]

    poor = Uneven({"a": 0.5, "b": 0.9, "bc": 0.1}).search(beams=2, width=1)[0]
    assert texts(poor) == ["a", "bc"]
    better = Uneven({"a": 0.5, "b": 0.9, "bc": 0.9}).search(beams=2, width=1)[0]
    assert texts(better)[0] == "bc"


def test_what_does_not_end_is_given_up():
    found = World(TRAP, length=9).search(max_steps=3)[0]
    assert found.solutions == () and found.tokens == 9


@pytest.mark.parametrize("name", ["beams", "width", "max_steps"])
def test_a_budget_of_zero(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        World(TRAP).search(**{name: 0})


def test_unknown_aggregation_before_anything_is_sampled():
    world = World(TRAP)
    with pytest.raises(ValueError, match="'mean' must be one of product, min, last"):
        world.search(aggregation="mean")
    assert world.asked == []


def test_callables_that_give_another_number():
    world = World(TRAP)
    world.score = lambda partials: [[0.5]] * (len(partials) - 1)
    with pytest.raises(ValueError, match="score gave 2 results instead of 3"):
        world.search()
    world.score = lambda partials: [[0.5, 0.5]] * len(partials)
    with pytest.raises(ValueError, match="score gave 2 results instead of 1"):
        world.search()
    world.propose = lambda partials, count: [[]]
    with pytest.raises(ValueError, match="propose gave 0 results instead of 3"):
        world.search()


@pytest.mark.parametrize("method", ["product", "min"])
def test_aggregations_are_those_of_the_losses(method):
    scores = np.array([0.9, 0.4, 0.8], np.float32)
    library = losses.aggregate_step_scores(scores, method=method, where=np.ones(3, bool))
    assert aggregate(scores.tolist(), method) == pytest.approx(float(library))


def test_aggregate_edges():
    assert [aggregate((), method) for method in AGGREGATIONS] == [1.0] * 3
    assert aggregate((0.9, 0.1, 0.5), "last") == 0.5
    with pytest.raises(ValueError, match="probabilities"):
        aggregate((1.5,), "min")
    with pytest.raises(ValueError, match="probabilities"):
        aggregate((float("nan"),), "min")


def test_votes():
    answers = ["a", "b", "b", None, None, None]
    assert majority(answers) == "b"
    assert weighted_vote(answers, [1.0, 0.3, 0.3, 9, 9, 9]) == "a"
    assert majority(["y", "x", "x", "y"]) == "y", "the first of equals"
    assert majority([None]) is None and majority([]) is None
    with pytest.raises(ValueError, match="2 answers and 1 weights"):
        weighted_vote(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="negative"):
        weighted_vote(["a"], [float("nan")])


def test_best_of_n():
    assert best_of_n([0.1, 0.7, 0.7]) == 1
    for wrong in ([], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="best of N"):
            best_of_n(wrong)


def test_pass_at_k_is_the_share_of_subsets():
    right = [True, True, False, False, False]
    for k in range(1, 6):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(2, 5, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for wrong in ((3, 2, 1), (1, 2, 3), (1, 2, 0)):
        with pytest.raises(ValueError, match="needs c <= n"):
            pass_at_k(*wrong)


def test_partials():
    partial = Partial(0, (Step("a ", 2), Step("b", 3, ends=True)))
    assert (partial.text, partial.tokens, partial.ended) == ("a b", 5, True)
    assert not Partial(0).ended
