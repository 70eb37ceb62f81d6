"""Best-of-n by formulas: against enumeration, and against simulation."""

import itertools

import numpy as np
import pytest

from rlhf_jax.evaluation.best_of_n import best_of_n_kl, expected_best_of_n


@pytest.mark.parametrize("n", [1, 2, 5])
def test_kl_is_that_of_the_distribution_of_the_best(n):
    """Of many equally likely answers in order: the best of n is the r-th with known chances."""
    count = 20_000
    edges = np.linspace(0, 1, count + 1) ** n
    chances = np.diff(edges)
    exact = float(np.sum(chances * np.log(chances * count, where=chances > 0, out=chances * 0)))
    assert best_of_n_kl(n) == pytest.approx(exact, abs=1e-3)


def test_the_expected_best_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in range(1, 7):
        subsets = list(itertools.combinations(range(6), n))
        wanted = [
            np.mean([v[max(some, key=lambda i: s[i])] for some in subsets])
            for s, v in zip(scores, values, strict=True)
        ]
        np.testing.assert_allclose(expected_best_of_n(scores, values, n), wanted)


def test_one_answer_is_a_draw_and_all_of_them_the_best():
    scores, values = np.array([[1.0, 3.0, 2.0]]), np.array([[10.0, 20.0, 60.0]])
    assert expected_best_of_n(scores, values, 1) == pytest.approx(30)
    assert expected_best_of_n(scores, values, 3) == pytest.approx(20)


@pytest.mark.parametrize(
    ("scores", "n", "message"),
    [
        ([[1.0, 2.0]], 0, "n=0 must be from 1 to N=2"),
        ([[1.0, 2.0]], 3, "n=3 must be from 1 to N=2"),
        ([[1.0, np.nan]], 1, "NaN"),
        ([1.0, 2.0], 1, r"must both be \[P, N\]"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(scores, n, message):
    with pytest.raises(ValueError, match=message):
        expected_best_of_n(np.array(scores), np.array(scores), n)
    with pytest.raises(ValueError, match="n=0"):
        best_of_n_kl(0)
