"""Win rates at equal lengths: on outcomes whose cause is known."""

import numpy as np
import pytest

from rlhf_jax.evaluation.length_control import length_controlled_win_rate

RNG = np.random.default_rng(0)


def drawn(theta: float, gamma: float, count: int = 4000, mean: float = 20.0):
    """Outcomes of the model itself, of responses of A that are longer on average."""
    longer = RNG.normal(mean, 30.0, count)
    p = 1 / (1 + np.exp(-(theta + gamma * np.tanh(longer / longer.std()))))
    return (RNG.random(count) < p).astype(float), 100 + longer, np.full(count, 100.0)


def test_a_policy_that_wins_by_length_alone_wins_half_at_equal_lengths():
    outcomes, a, b = drawn(theta=0.0, gamma=3.0)
    assert outcomes.mean() > 0.65
    found = length_controlled_win_rate(outcomes, a, b)
    assert found.low < 0.5 < found.high and found.high - found.low < 0.1


def test_the_coefficients_are_those_that_made_the_outcomes():
    outcomes, a, b = drawn(theta=1.0, gamma=-2.0)
    found = length_controlled_win_rate(outcomes, a, b)
    assert abs(found.value - 1 / (1 + np.exp(-1.0))) < 0.04
    assert found.value - outcomes.mean() > 0.1  # the longer ones lose
    swapped = length_controlled_win_rate(1 - outcomes, b, a)
    np.testing.assert_allclose(swapped.value, 1 - found.value, atol=1e-6)


def test_of_equal_lengths_it_is_the_win_rate_with_ties_one_half():
    outcomes = np.array([1, 1, 0.5, 0, 1, 0.5, 1, 1] * 20)
    found = length_controlled_win_rate(outcomes, np.full(160, 7), np.full(160, 7))
    np.testing.assert_allclose(found.value, outcomes.mean(), atol=1e-3)
    assert found.low < found.value < found.high


def test_a_policy_that_always_wins_has_a_finite_fit():
    longer = np.linspace(-5, 9, 50)
    found = length_controlled_win_rate(np.ones(50), longer, np.zeros(50))
    assert 0.99 < found.low <= found.value <= 1
    # And one that is longer by the same every time.
    alike = length_controlled_win_rate(np.ones(50), np.full(50, 9.0), np.zeros(50))
    assert 0.5 < alike.value <= 1


@pytest.mark.parametrize(
    ("outcomes", "lengths", "message"),
    [([], [], "N > 0"), ([1.0], [1, 2], "N > 0"), ([1.5], [1], r"in \[0, 1\]")],
)
def test_what_is_no_outcome_is_refused(outcomes, lengths, message):
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(outcomes, lengths, lengths)
