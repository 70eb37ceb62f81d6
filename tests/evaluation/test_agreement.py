"""Agreement of a judge with people: against slow loops, its interval, and what is kept."""

import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.evaluation.agreement import Agreement, agreement, measured_agreement
from rlhf_jax.evaluation.judges import VaderJudge


class Noisy:
    """Scores a text, whose content is its number, by a table; counts its calls."""

    name, scale = "noisy", "noisy, any number"

    def __init__(self, scores, version: str = "1"):
        self.scores, self.version = np.asarray(scores, float), version
        self.calls = self.asked = 0

    def describe(self) -> str:
        return "A table of numbers."

    def fingerprint(self) -> str:
        return self.version

    def __call__(self, texts):
        self.calls, self.asked = self.calls + 1, len(texts)
        return self.scores[[int(text) for text in texts]]


def rated(count: int, *, noise: float = 1.5, seed: int = 0):
    """Texts, ratings in steps of a tenth, and a judge whose scores have ties."""
    rng = np.random.default_rng(seed)
    ratings = rng.uniform(-4, 4, count).round(1)
    scores = (ratings + rng.normal(0, noise, count)).round(0)
    return [str(i) for i in range(count)], ratings, Noisy(scores)


@pytest.mark.parametrize("min_gap", [0.5, 1.0, 3.0])
def test_agreement_equals_a_slow_loop(min_gap):
    texts, ratings, judge = rated(60)
    right, outcomes = 0.0, set()
    pairs = 0
    for i in range(60):
        for j in range(60):
            if ratings[i] - ratings[j] >= min_gap - 1e-9:
                high, low = judge([texts[i]])[0], judge([texts[j]])[0]
                outcome = 1.0 if high > low else 0.5 if high == low else 0.0
                outcomes.add(outcome)
                right, pairs = right + outcome, pairs + 1
    judge.calls = 0
    found = agreement(judge, texts, ratings, min_gap=min_gap)
    assert judge.calls == 1 and outcomes == {0.0, 0.5, 1.0}
    np.testing.assert_allclose(found.value, right / pairs, atol=1e-12)
    assert found.low < found.value < found.high


def test_the_interval_equals_a_slow_bootstrap_of_texts():
    texts, ratings, judge = rated(12, noise=5, seed=3)
    scores = judge(texts)
    rng, shares = np.random.default_rng(7), []
    for _ in range(3000):
        some = rng.integers(0, 12, 12)
        gap = ratings[some][:, None] - ratings[some][None, :]
        more = scores[some][:, None] - scores[some][None, :]
        outcomes = (more > 0) + 0.5 * (more == 0)
        shares.append(outcomes[gap >= 1 - 1e-9].mean())
    found = agreement(judge, texts, ratings)
    # Two bootstraps of thousands of resamples each: their ends differ by about a hundredth.
    np.testing.assert_allclose(found[1:], np.quantile(shares, [0.025, 0.975]), atol=0.03)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """100 samples of 60 texts, one truth: the share over pairs of 20,000 texts.

    95% of 100 are 95, with a standard deviation of 2.2. As if pairs were independent it is 47.
    """
    rng = np.random.default_rng(0)

    def sample(count):
        ratings = rng.uniform(-4, 4, count)
        return ratings, ratings + rng.normal(0, 3, count)

    ratings, scores = sample(20_000)
    first, second = rng.integers(0, 20_000, (2, 400_000))
    gap = ratings[first] - ratings[second]
    truth = np.mean((gap * (scores[first] - scores[second]) > 0)[np.abs(gap) >= 1])
    texts, covered, naive = [str(i) for i in range(60)], 0, 0
    for seed in range(100):
        ratings, scores = sample(60)
        found = agreement(Noisy(scores), texts, ratings, seed=seed)
        covered += found.low <= truth <= found.high
        more = (scores[:, None] > scores)[ratings[:, None] - ratings >= 1]
        error = np.std(more) / np.sqrt(more.size)
        naive += abs(more.mean() - truth) <= 1.96 * error
    assert 90 <= covered <= 99
    assert naive < 70


def test_only_the_texts_that_are_drawn_are_judged():
    texts, ratings, _ = rated(50)
    asked = []

    def judge(some):
        asked.append(some)
        return np.arange(len(some), dtype=float)

    for seed in (0, 0, 1):
        agreement(judge, texts, ratings, num_texts=20, seed=seed)
    assert [len(set(some)) for some in asked] == [20, 20, 20]
    assert asked[0] == asked[1] != asked[2]


def test_vader_on_a_small_set():
    """Golden: of the ten pairs a rating apart 8 are right, one is wrong, one a tie: 8.5 / 10.

    VADER: 'good' .4404, chair and table 0 (the tie), 'horrible' -.5423, 'boring' -.3182 (the wrong
    pair: people rated boring lower).
    """
    texts = ["good", "the chair", "the table", "horrible", "boring"]
    ratings = [3.0, 2.0, 0.5, -1.0, -2.0]
    np.testing.assert_allclose(VaderJudge()(texts), [0.4404, 0, 0, -0.5423, -0.3182])
    found = agreement(VaderJudge(), texts, ratings)
    np.testing.assert_allclose(found.value, 0.85)


def test_rounding_does_not_part_a_pair_a_rating_apart():
    judge = Noisy([1, 0])
    assert agreement(judge, ["0", "1"], [1.9, 0.9]).value == 1.0
    with pytest.raises(ValueError, match=r"no two of 2 texts are rated 1.0 apart"):
        agreement(judge, ["0", "1"], [1.9, 0.91])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratings": [1.0]}, "3 texts and 1 ratings"),
        ({"ratings": [1.0, float("nan"), 3.0]}, "row 1 has rating nan"),
        ({"min_gap": 0.0}, "min_gap=0.0 must be positive"),
        ({"num_texts": 1}, "num_texts=1 at least 2"),
        ({"judge": lambda texts: [float("nan")] * 3}, "is NaN"),
    ],
)
def test_wrong_input_is_one_line(change, message):
    arguments = {"judge": Noisy([1, 2, 3]), "texts": ["0", "1", "2"], "ratings": [1.0, 2.0, 3.0]}
    with pytest.raises(ValueError, match=message) as raised:
        agreement(**(arguments | change))
    assert "\n" not in str(raised.value)


def test_a_second_measurement_is_read_and_the_judge_not_called(tmp_path):
    texts, ratings, judge = rated(100)
    first = measured_agreement(judge, "numbers", texts, ratings, tmp_path / "new", num_texts=40)
    assert (judge.calls, first.num_texts, judge.asked) == (1, 40, 40)
    assert 400 < first.num_pairs < 40 * 39 / 2
    again = measured_agreement(judge, "numbers", texts, ratings, tmp_path / "new", num_texts=40)
    assert judge.calls == 1 and again == first
    plain = agreement(judge, texts, ratings, num_texts=40)
    assert (first.value, first.low, first.high) == tuple(plain)


@pytest.mark.parametrize("change", ["version", "name", "text", "rating", "texts", "gap", "seed"])
def test_whatever_the_numbers_depend_on_is_measured_again(tmp_path, change):
    texts, ratings, judge = rated(100)
    drawn = {"num_texts": 30, "min_gap": 1.0, "seed": 0}
    measured_agreement(judge, "numbers", texts, ratings, tmp_path, **drawn)
    if change == "version":
        judge.version = "2"
    elif change == "name":
        judge.name = "another"
    elif change == "text":
        texts = [*texts[:-1], "098"]
    elif change == "rating":
        ratings = np.concatenate([ratings[:-1], [0.123]])
    else:
        key, value = {"texts": ("num_texts", 29), "gap": ("min_gap", 1.5), "seed": ("seed", 1)}[
            change
        ]
        drawn[key] = value
    measured_agreement(judge, "numbers", texts, ratings, tmp_path, **drawn)
    assert judge.calls == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{}", '{"key": 1, "numbers": {}}', "[1]"])
def test_a_broken_file_is_measured_again(tmp_path, content):
    texts, ratings, judge = rated(100)
    first = measured_agreement(judge, "numbers", texts, ratings, tmp_path)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["key"]["judge"] == "noisy"
    file.write_text(content)
    assert measured_agreement(judge, "numbers", texts, ratings, tmp_path) == first
    assert judge.calls == 2


def test_the_line_of_a_report():
    found = Agreement("VADER", "movie reviews", 0.7182, 0.694, 0.751, 600, 93_000, 1.0)
    assert found.line() == (
        "VADER orders 71.8% [69, 75] of the pairs of 600 held-out movie reviews a rating apart as "
        "people do"
    )
    half = dataclasses.replace(found, min_gap=0.5)
    assert "reviews 0.5 ratings apart" in half.line()
