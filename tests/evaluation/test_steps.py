"""First errors and calibration, by numbers worked out by hand."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation.steps import (
    brier_score,
    expected_calibration_error,
    first_error,
    first_error_f1,
)


def test_the_first_step_below_the_threshold_is_the_first_error():
    assert first_error([0.9, 0.4, 0.1]) == 1
    assert first_error([0.9, 0.5]) == -1  # at the threshold it counts as right
    assert first_error([0.9, 0.4], threshold=0.3) == -1
    assert first_error([]) == -1


def test_f1_is_the_harmonic_mean_of_both_shares():
    # With an error: 2 of 3 found, one a step too late. Without: 1 of 2 left alone.
    found = first_error_f1([1, 3, 0, -1, 2], [1, 3, 1, -1, -1])
    assert found.wrong == pytest.approx(2 / 3) and found.right == pytest.approx(1 / 2)
    assert found.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


def test_who_calls_nothing_wrong_gets_zero():
    assert first_error_f1([-1, -1], [1, -1]).f1 == 0.0


def test_without_one_kind_there_is_no_f1():
    assert math.isnan(first_error_f1([-1], [-1]).f1)
    assert math.isnan(first_error_f1([0], [0]).right)


def test_f1_needs_as_many_of_both():
    with pytest.raises(ValueError, match="1 predictions for 2 solutions"):
        first_error_f1([1], [1, 2])


def test_calibration_error_weighs_bins_by_what_is_in_them():
    # Bin [.1, .2): three of .1, one comes: |1/3 - .1|; bin [.9, 1]: .9 and 1.0, both come: .05.
    error = expected_calibration_error([0.1, 0.1, 0.1, 0.9, 1.0], [1, 0, 0, 1, 1])
    assert error == pytest.approx(3 / 5 * (1 / 3 - 0.1) + 2 / 5 * 0.05)
    assert expected_calibration_error([0.0, 1.0], [0, 1]) == 0.0


def test_calibration_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="must be in"):
        expected_calibration_error([1.1], [1])
    with pytest.raises(ValueError, match="1 probabilities for 2 outcomes"):
        expected_calibration_error([0.1], [1, 0])


def test_brier_score():
    assert brier_score([0.5, 1.0], [1, 0]) == pytest.approx((0.25 + 1.0) / 2)
    assert np.isnan(brier_score([], []))
