"""Krippendorff's alpha: published data, slow loops, and why it may be undefined."""

import itertools

import numpy as np
import pytest

from rlhf_jax.evaluation.agreement import clustered_kappa, cohen_kappa
from rlhf_jax.evaluation.krippendorff import LEVELS, UndefinedError, krippendorff_alpha

X = np.nan
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, X, X, X],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, X, 3],
    [X, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, X],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, X],
]
# The same, section A: two observers of ten binary units; α = 0.095.
BINARY = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
# The same, section B, two observers and five categories: α = 0.692.
NOMINAL = [
    list(map("abcde".index, "aabbdcccedda")),
    list(map("abcde".index, "babbbccceddd")),
]


def slow_alpha(ratings, level):
    """1 − D_o / D_e from all pairs of ratings, one by one."""
    units = [[v for v in column if not np.isnan(v)] for column in np.array(ratings, float).T]
    units = [unit for unit in units if len(unit) >= 2]
    values = [v for unit in units for v in unit]

    def difference(one, other):
        if level == "nominal":
            return float(one != other)
        if level == "interval":
            return (one - other) ** 2
        low, high = min(one, other), max(one, other)
        between = sum(low <= v <= high for v in values)
        return (between - (values.count(low) + values.count(high)) / 2) ** 2

    observed = sum(
        difference(a, b) / (len(unit) - 1)
        for unit in units
        for a, b in itertools.permutations(unit, 2)
    ) / len(values)
    expected = sum(difference(a, b) for a, b in itertools.permutations(values, 2))
    return 1 - observed / (expected / (len(values) * (len(values) - 1)))


@pytest.mark.parametrize(
    ("ratings", "level", "alpha"),
    [
        (PUBLISHED, "nominal", 0.743),
        (PUBLISHED, "ordinal", 0.815),
        (PUBLISHED, "interval", 0.849),
        (BINARY, "nominal", 0.095),
        (NOMINAL, "nominal", 0.692),
    ],
)
def test_published_examples(ratings, level, alpha):
    assert krippendorff_alpha(ratings, level).value == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_against_loops(level, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, 6, 15)
    ratings = np.clip(truth + rng.integers(-1, 2, (4, 15)), 1, 5).astype(float)
    ratings[rng.random(ratings.shape) < 0.3] = np.nan
    found = krippendorff_alpha(ratings, level)
    assert found.value == pytest.approx(slow_alpha(ratings, level), abs=1e-12)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("level", LEVELS)
def test_full_agreement_chance_and_opposition(level):
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2, 400)
    assert krippendorff_alpha([one, one, one], level).value == 1
    drawn = krippendorff_alpha(rng.integers(0, 2, (2, 400)), level)
    assert drawn.low < 0 < drawn.high and abs(drawn.value) < 0.1
    assert krippendorff_alpha([one, 1 - one], level).value < -0.9


def test_raters_and_units_have_no_order():
    rng = np.random.default_rng(1)
    ratings = np.array(PUBLISHED)
    for level in LEVELS:
        value = krippendorff_alpha(ratings, level).value
        mixed = ratings[rng.permutation(4)][:, rng.permutation(12)]
        assert krippendorff_alpha(mixed, level).value == pytest.approx(value)
    # Ordinal looks at the order of values alone.
    squared = krippendorff_alpha(ratings**2, "ordinal").value
    assert squared == pytest.approx(krippendorff_alpha(ratings, "ordinal").value)


def test_units_of_one_cluster_are_drawn_together():
    """Ten copies of each unit as one cluster tell no more than the unit; as units they seem to."""
    rng = np.random.default_rng(2)
    one = rng.integers(0, 3, 40)
    other = np.where(rng.random(40) < 0.7, one, rng.integers(0, 3, 40))
    plain = krippendorff_alpha([one, other], "nominal")
    copies = [np.repeat(one, 10), np.repeat(other, 10)]
    clusters = np.repeat(np.arange(40), 10)
    together = krippendorff_alpha(copies, "nominal", clusters=clusters)
    apart = krippendorff_alpha(copies, "nominal")
    assert together.high - together.low == pytest.approx(plain.high - plain.low, rel=0.05)
    assert apart.high - apart.low < 0.5 * (plain.high - plain.low)


def test_the_interval_covers():
    """Of 60 samples the 95% interval has the value of the whole population in most."""
    rng = np.random.default_rng(3)
    one = rng.integers(0, 3, 20_000)
    other = np.where(rng.random(20_000) < 0.6, one, rng.integers(0, 3, 20_000))
    truth = krippendorff_alpha([one, other], "nominal", clusters=np.zeros(20_000)).value
    inside = 0
    for _ in range(60):
        drawn = rng.integers(0, 20_000, 80)
        found = krippendorff_alpha([one[drawn], other[drawn]], "nominal")
        inside += found.low <= truth <= found.high
    assert inside >= 51


@pytest.mark.parametrize(
    ("ratings", "reason"),
    [
        ([[1, X], [X, 2]], "no unit has ratings of two raters"),
        (np.zeros((0, 3)), "no unit has ratings of two raters"),
        (np.zeros((2, 0)), "no unit has ratings of two raters"),
        ([[1, 2, 3]], "no unit has ratings of two raters"),
        ([[2, 2, 5], [2, 2, X]], "every rating is 2: without variation"),
    ],
)
def test_undefined_says_why(ratings, reason):
    with pytest.raises(UndefinedError, match=f"undefined because {reason}"):
        krippendorff_alpha(ratings, "ordinal")


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"must be \[R, U\]"):
        krippendorff_alpha([1, 2], "nominal")
    with pytest.raises(ValueError, match=r"must be \[R, U\]"):
        krippendorff_alpha([[1, np.inf]], "nominal")
    with pytest.raises(ValueError, match="level 'ratio' must be one of"):
        krippendorff_alpha(PUBLISHED, "ratio")
    with pytest.raises(ValueError, match=r"clusters must be \[12\]"):
        krippendorff_alpha(PUBLISHED, "nominal", clusters=[1])


def slow_kappa(one, other):
    kinds = set(one) | set(other)
    observed = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    chance = sum(list(one).count(k) * list(other).count(k) for k in kinds) / len(one) ** 2
    return (observed - chance) / (1 - chance)


def test_cohens_kappa_of_a_textbook():
    """Grants by two readers: 20 yes yes, 5 yes no, 10 no yes, 15 no no; κ = 0.4."""
    one = [1] * 25 + [0] * 25
    other = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(one, other).value == pytest.approx(0.4)
    assert clustered_kappa(one, other, np.arange(50)).value == pytest.approx(0.4)


def test_kappa_of_clusters():
    rng = np.random.default_rng(4)
    one = rng.integers(-1, 2, 60)
    other = np.where(rng.random(60) < 0.6, one, rng.integers(-1, 2, 60))
    plain = cohen_kappa(one, other)
    assert plain.value == pytest.approx(slow_kappa(one, other))
    # Each item its own cluster: the same draws, the same interval.
    assert clustered_kappa(one, other, np.arange(60)) == pytest.approx(plain)
    copies = [np.repeat(one, 5), np.repeat(other, 5), np.repeat(np.arange(60), 5)]
    assert clustered_kappa(*copies) == pytest.approx(plain)
    with pytest.raises(ValueError, match=r"need \[N\] each"):
        clustered_kappa([1], [1], [1, 2])
