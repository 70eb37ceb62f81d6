import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.comparisons import score_pairs

rows = st.lists(
    st.tuples(st.integers(-16, 16).map(lambda n: n / 4), st.sampled_from("ab")), max_size=14
)


def brute_force(scores, groups, min_gap):
    return {
        (i, j)
        for i, j in itertools.permutations(range(len(scores)), 2)
        if groups[i] == groups[j] and scores[i] - scores[j] >= min_gap
    }


@settings(max_examples=60, deadline=None)
@given(rows, st.sampled_from([0.25, 1.0, 2.5]), st.integers(0, 30))
def test_pairs_are_distinct_members_of_the_brute_force_set(drawn, min_gap, wanted):
    scores, groups = [s for s, _ in drawn], [g for _, g in drawn]
    everything = brute_force(scores, groups, min_gap)
    found = [
        tuple(pair)
        for pair in score_pairs(scores, groups, min_gap=min_gap, num_pairs=wanted, seed=1).tolist()
    ]
    assert len(found) == len(set(found)) == min(wanted, len(everything))
    assert set(found) <= everything


def test_rounding_does_not_lose_pairs_that_are_exactly_the_gap_apart():
    # 1.9 - 0.9 is 0.9999999999999999 in floating point.
    assert 1.9 - 0.9 < 1.0
    assert score_pairs([0.9, 1.9], "aa", min_gap=1.0, num_pairs=5, seed=0).tolist() == [[1, 0]]


def test_a_group_weighs_as_many_pairs_as_it_has_rows():
    rng = np.random.default_rng(0)
    groups = ["large"] * 900 + ["small"] * 100
    scores = rng.uniform(-4, 4, 1000)
    found = score_pairs(scores, groups, min_gap=1.0, num_pairs=4000, seed=0)
    # By pairs the large group would have 81 / 82 of them; a standard error here is 0.005.
    share = np.mean(found[:, 0] < 900)
    assert 0.88 < share < 0.92


def test_seed_decides_and_max_per_group_caps():
    scores, groups = list(range(20)), ["a"] * 15 + ["b"] * 5
    first, again, other = (
        score_pairs(scores, groups, min_gap=1, num_pairs=20, seed=seed).tolist()
        for seed in (0, 0, 1)
    )
    assert first == again != other
    capped = score_pairs(scores, groups, min_gap=1, num_pairs=50, seed=0, max_per_group=4)
    assert sorted(groups[better] for better, _ in capped) == ["a"] * 4 + ["b"] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_score_that_is_not_finite_names_the_row(bad):
    with pytest.raises(ValueError, match=f"row 1 has rating {bad}"):
        score_pairs([0.0, bad], "aa", min_gap=1.0, num_pairs=1, seed=0)


def test_gap_must_be_positive():
    with pytest.raises(ValueError, match=r"min_gap=0\.0 must be positive"):
        score_pairs([0.0, 1.0], "aa", min_gap=0.0, num_pairs=1, seed=0)
