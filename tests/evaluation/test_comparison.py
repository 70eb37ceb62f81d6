"""Win rates, pair accuracy and bootstrap intervals, against loops and hand-computed numbers."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation.comparison import (
    bootstrap_interval,
    calibration_error,
    pair_accuracy,
    paired_outcomes,
    win_tie_lose,
)


def test_win_tie_lose_by_hand():
    # differences 2, 0, -1, 1: two wins, one tie, one loss; win rate (2 + ½) / 4.
    result = win_tie_lose([3.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0])
    assert (result.win, result.tie, result.lose) == (0.5, 0.25, 0.25)
    assert result.win_rate == 0.625
    assert result.num_prompts == 4
    assert result.low <= result.win_rate <= result.high


def test_tie_tolerance_is_inclusive_and_changes_the_result():
    a, b = np.array([0.5, 0.25, -0.5, 0.0]), np.zeros(4)
    strict, loose = win_tie_lose(a, b), win_tie_lose(a, b, tie_tol=0.25)
    assert (strict.win, strict.tie, strict.lose) == (0.5, 0.25, 0.25)
    # 0.25 is a tie now, ±0.5 are not.
    assert (loose.win, loose.tie, loose.lose) == (0.25, 0.5, 0.25)


def test_win_rate_against_a_loop():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, size=(2, 301)).astype(float)
    win = tie = lose = 0
    for x, y in zip(a, b, strict=True):
        if x > y:
            win += 1
        elif x < y:
            lose += 1
        else:
            tie += 1
    result = win_tie_lose(a, b)
    np.testing.assert_allclose(
        [result.win, result.tie, result.lose], np.array([win, tie, lose]) / 301, atol=1e-12
    )
    assert result.win_rate == pytest.approx((win + tie / 2) / 301)
    swapped = win_tie_lose(b, a)
    assert swapped.win_rate == pytest.approx(1 - result.win_rate)
    assert (swapped.win, swapped.lose) == (result.lose, result.win)


def test_several_samples_a_prompt_are_one_unit_of_the_bootstrap():
    rng = np.random.default_rng(1)
    a = rng.normal(size=100)
    b = rng.normal(size=100)
    once = win_tie_lose(a, b)
    copies = win_tie_lose(np.tile(a[:, None], 4), np.tile(b[:, None], 4))
    # Four copies of every sample bring no information: the interval must not shrink.
    assert copies == once
    as_prompts = win_tie_lose(np.tile(a, 4), np.tile(b, 4))
    assert as_prompts.high - as_prompts.low < 0.7 * (once.high - once.low)


def test_several_samples_by_hand():
    # Outcomes 1, 0 | ½, 1: prompts ½ and ¾, win rate 5/8, shares over all four comparisons.
    result = win_tie_lose([[2.0, 0.0], [1.0, 3.0]], np.ones((2, 2)))
    assert (result.win, result.tie, result.lose, result.win_rate) == (0.5, 0.25, 0.25, 0.625)
    assert (result.low, result.high) == (0.5, 0.75)
    assert result.num_prompts == 2


def test_infinite_scores_compare():
    outcomes = paired_outcomes([math.inf, math.inf, -math.inf], [math.inf, 0.0, 0.0])
    assert outcomes.tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], r"\(2,\) and \(1,\)"),
        ([[1.0]], [1.0], "both"),
        ([], [], "N, S > 0"),
        ([1.0, math.nan], [1.0, 1.0], "scores_a is NaN for prompt 1"),
        ([1.0, 1.0], [math.nan, 1.0], "scores_b is NaN for prompt 0"),
    ],
)
def test_bad_scores(a, b, message):
    with pytest.raises(ValueError, match=message):
        win_tie_lose(a, b)
    with pytest.raises(ValueError, match=message):
        pair_accuracy(a, b)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_bad_tolerance(tolerance):
    with pytest.raises(ValueError, match="tie_tol must be >= 0"):
        win_tie_lose([1.0], [1.0], tie_tol=tolerance)


def test_summary_line():
    result = win_tie_lose([3.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0])
    result = result._replace(low=0.251, high=0.875)
    assert result.summary() == (
        "win 50.0% tie 25.0% lose 25.0%, win rate 62.5% [25.1, 87.5], 4 prompts"
    )


def test_bootstrap_against_a_loop():
    x = np.random.default_rng(2).normal(size=23)
    value, low, high = bootstrap_interval(x, np.median, level=0.8, num_resamples=400, seed=5)
    indices = np.random.default_rng(5).integers(23, size=(400, 23))
    medians = sorted(float(np.median([x[i] for i in row])) for row in indices)
    assert value == np.median(x)
    # Linear interpolation at 0.1 and 0.9 of positions 0 .. 399: 39.9 and 359.1.
    assert low == pytest.approx(0.1 * medians[39] + 0.9 * medians[40])
    assert high == pytest.approx(0.9 * medians[359] + 0.1 * medians[360])


def test_bootstrap_in_chunks_keeps_count_and_width(monkeypatch):
    x = np.random.default_rng(3).normal(size=50)
    whole = bootstrap_interval(x, num_resamples=1001)
    sizes = []

    def mean(values, axis):
        sizes.append(values.shape[0] if values.ndim == 2 else 0)
        return np.mean(values, axis=axis)

    monkeypatch.setattr("rlhf_jax.evaluation.comparison._MAX_BOOTSTRAP_CELLS", 50 * 300)
    chunked = bootstrap_interval(x, mean, num_resamples=1001)
    assert sizes == [0, 300, 300, 300, 101]  # the value itself, then the resamples
    # The stream of random numbers is the same, chunk by chunk.
    np.testing.assert_allclose(chunked, whole)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("x", [[0.1], [0.1] * 7, [0.0, 0.0], [math.inf] * 3])
@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_equal_values_are_certain(x, statistic):
    value, low, high = bootstrap_interval(x, statistic)
    assert value == low == high == pytest.approx(x[0])


def test_a_judge_that_sees_no_difference_is_certain_of_ties():
    rate = win_tie_lose([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (rate.win_rate, rate.low, rate.high, rate.tie) == (0.5, 0.5, 0.5, 1.0)


@pytest.mark.filterwarnings("error")
def test_nan_gives_nan_without_a_warning():
    assert np.isnan(bootstrap_interval([1.0, math.nan])).all()


def test_bootstrap_seed():
    x = np.random.default_rng(4).normal(size=50)
    assert bootstrap_interval(x, seed=1) == bootstrap_interval(x, seed=1)
    assert bootstrap_interval(x, seed=1) != bootstrap_interval(x, seed=2)
    win_rates = [win_tie_lose(x, x[::-1], seed=seed, num_resamples=50) for seed in (1, 1, 2, 3, 4)]
    assert win_rates[0] == win_rates[1]
    assert len(set(win_rates)) > 1


def test_bootstrap_covers_the_truth_95_times_in_100():
    # 400 studies of 200 prompts, true win rate 0.6: the binomial standard error of the coverage is
    # sqrt(.95 * .05 / 400) = 0.011, so it lies within .95 ± .035 unless the interval is wrong.
    rng = np.random.default_rng(6)
    covered = 0
    for study in range(400):
        outcome = rng.random(200)
        a = np.where(outcome < 0.5, 1.0, np.where(outcome < 0.7, 0.0, -1.0))  # 50% win, 20% tie
        result = win_tie_lose(a, np.zeros(200), seed=study, num_resamples=400)
        covered += result.low <= 0.6 <= result.high
    assert 0.915 <= covered / 400 <= 0.985


def test_bootstrap_width_is_that_of_the_normal_interval():
    x = np.random.default_rng(7).normal(size=2000)
    _, low, high = bootstrap_interval(x)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(2000), rel=0.06)
    _, low, high = bootstrap_interval(x, level=0.5)
    assert high - low == pytest.approx(2 * 0.674 * x.std() / math.sqrt(2000), rel=0.08)


@pytest.mark.parametrize(
    ("x", "options"),
    [
        ([], {}),
        ([[1.0]], {}),
        ([1.0], {"level": 1.0}),
        ([1.0], {"level": 0.0}),
        ([1.0], {"num_resamples": 0}),
    ],
)
def test_bad_bootstrap(x, options):
    with pytest.raises(ValueError, match=r"must be|need"):
        bootstrap_interval(x, **options)


def test_pair_accuracy_counts_ties_one_half():
    assert pair_accuracy([1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0]) == 0.5
    # A reward model that gives all the same score knows nothing: one half, not zero.
    assert pair_accuracy(np.zeros(7), np.zeros(7)) == 0.5


def test_calibration_error_by_hand():
    # Gaps ln 3, ln 3, 0, -ln 3: confidences ¾, ¾, ½, ¾, right 1, 1, ½, 0.
    # Two bins of [½, 1]: ½ is in the first (½ - ½ = 0), ¾ in the second: (1 + 1 + 0) - 3 * ¾ = -¼.
    # ECE = (0 + ¼) / 4.
    gaps = np.log(3) * np.array([1.0, 1.0, 0.0, -1.0])
    assert calibration_error(gaps, np.zeros(4), num_bins=2) == pytest.approx(1 / 16)


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(8)
    chosen, rejected = rng.normal(size=(2, 500)) * 3
    bins = [[] for _ in range(7)]
    for c, r in zip(chosen, rejected, strict=True):
        confidence = 1 / (1 + math.exp(-abs(c - r)))
        index = min(int((confidence - 0.5) / 0.5 * 7), 6)
        bins[index].append((1.0 if c > r else 0.0, confidence))
    error = 0.0
    for members in bins:
        if members:
            accuracy, confidence = np.mean(members, axis=0)
            error += len(members) / 500 * abs(accuracy - confidence)
    assert calibration_error(chosen, rejected, num_bins=7) == pytest.approx(error)


def test_bradley_terry_scores_are_calibrated_and_inflated_ones_are_not():
    rng = np.random.default_rng(9)
    gap = rng.normal(size=20_000) * 2
    a_preferred = rng.random(20_000) < 1 / (1 + np.exp(-gap))
    chosen = np.where(a_preferred, gap, 0.0)
    rejected = np.where(a_preferred, 0.0, gap)
    assert calibration_error(chosen, rejected) < 0.02
    assert calibration_error(5 * chosen, 5 * rejected) > 0.1
    with pytest.raises(ValueError, match="num_bins must be >= 1"):
        calibration_error(chosen, rejected, num_bins=0)


def test_certain_pair_belongs_to_the_last_bin():
    assert calibration_error([math.inf, 1e4], [0.0, 0.0], num_bins=3) == 0.0
    # Confidence 1 and wrong, confidence ¾ and right, one bin: |(0 - 1) + (1 - ¾)| / 2.
    error = calibration_error([-1e4, np.log(3)], [0.0, 0.0], num_bins=2)
    assert error == pytest.approx(0.375)
