"""The VADER judge."""

import sys

import numpy as np
import pytest

from rlhf_jax.evaluation.judges import Judge, VaderJudge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return VaderJudge()


def test_scores_are_one_float_a_text_in_order(judge):
    scores = judge(["I love it!", "The chair is brown.", "A horrible, boring film."])
    assert scores.shape == (3,)
    assert scores.dtype == np.float64
    assert scores[0] > 0.5
    assert scores[1] == 0.0
    assert scores[2] < -0.5


def test_golden_compound_score(judge):
    # 'good' is rated 1.9 in the lexicon; compound = s / sqrt(s² + 15) = 0.4404.
    np.testing.assert_allclose(judge(["good"]), [round(1.9 / np.sqrt(1.9**2 + 15), 4)])


def test_rules_beyond_the_lexicon(judge):
    plain, negated, boosted = judge(["The film was good.", "It was not good.", "It was very good."])
    assert negated < 0 < plain < boosted


def test_a_text_does_not_depend_on_its_neighbours(judge):
    texts = ["great fun", "", "dull", "great fun"]
    scores = judge(texts)
    assert scores[0] == scores[3]
    np.testing.assert_array_equal(scores, [judge([text])[0] for text in texts])


def test_empty_inputs(judge):
    assert judge([""]).tolist() == [0.0]
    assert judge([]).shape == (0,)
    assert judge([]).dtype == np.float64


def test_one_string_is_refused(judge):
    with pytest.raises(ValueError, match="sequence of strings"):
        judge("good")


def test_judge_has_a_name_for_the_report(judge):
    assert judge.name == "VADER"


def test_missing_package_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        VaderJudge()
