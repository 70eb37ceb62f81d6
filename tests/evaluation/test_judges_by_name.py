"""Judges by name, and the language model as one: a small model in a folder."""

import dataclasses
import logging

import numpy as np
import pytest

from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation import language_model
from rlhf_jax.evaluation.judges import VaderJudge, make_judge
from rlhf_jax.evaluation.language_model import (
    SENTIMENT,
    LanguageModelJudge,
    Question,
    short_name,
)
from rlhf_jax.evaluation.log_odds import log_odds
from rlhf_jax.models.files.hf_weights import save_model
from tests import tiny

TEXTS = ["a fine film", "dull", "", "a fine film", "no film at all"]
MOOD = Question(
    'Film: "{text}" is', (" positive", " negative"), (("fun", " positive"),), about="fun"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose tokenizer knows both answers as tokens."""
    return save(tmp_path_factory.mktemp("judge") / "critic" / "model", seed=4)


def save(path, seed):
    tokenizer = train_bpe([" positive negative"] * 4 + ["Review: Sentiment:"] * 4, 320)
    config = tiny.model_config(vocab_size=len(tokenizer), max_length=200)
    path.parent.mkdir(exist_ok=True)
    save_model(tiny.language_model(config, seed=seed), path, tokenizer)
    return path


@pytest.fixture(scope="module")
def judge(folder):
    return make_judge(f"language_model:{folder}")


def test_the_prompt_is_laid_out_as_the_template_says():
    assert SENTIMENT.prefix + "TEXT" + SENTIMENT.suffix == (
        'Review: "A moving, funny film with wonderful acting."\nSentiment: positive\n\n'
        'Review: "Dull and far too long; I wanted my money back."\nSentiment: negative\n\n'
        'Review: "TEXT"\nSentiment:'
    )
    assert dataclasses.replace(SENTIMENT, examples=()).prefix == 'Review: "'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "Review:"}, "must hold {text} once, with something after it"),
        ({"template": "{text} {text}:"}, "must hold {text} once"),
        ({"template": "Review: {text}"}, "with something after it"),
        ({"examples": (("fun", "positive"),)}, "the example's answer 'positive' is none of"),
    ],
)
def test_wrong_questions_are_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SENTIMENT, **change)


def test_a_score_is_the_log_odds_rounded_so_that_equal_texts_tie(judge):
    scores = judge(TEXTS)
    question = (SENTIMENT.prefix, TEXTS, SENTIMENT.suffix, SENTIMENT.answers)
    wanted = log_odds(judge.model, judge.tokenizer, *question).values
    assert scores.dtype == np.float64 and scores[0] == scores[3] and np.std(scores) > 0.01
    np.testing.assert_allclose(scores, wanted, atol=6e-5)
    assert np.array_equal(scores, np.round(scores, 4))
    assert [judge([text])[0] for text in TEXTS] == scores.tolist()


def test_it_says_what_it_is(judge):
    assert judge.name == "critic"
    assert judge.scale == "critic, log-odds of 'positive' against 'negative' less repetition"
    described = judge.describe()
    assert "after 2 labelled examples" in described and "does not check truth" in described
    assert "\n" not in described
    vader = make_judge("vader")
    assert isinstance(vader, VaderJudge) and vader.scale == "VADER, -1 to 1"
    assert "does not see grammar" in vader.describe() and "\n" not in vader.describe()
    assert vader.fingerprint().startswith("vaderSentiment 3")


def test_a_user_may_ask_something_else(folder):
    judge = make_judge("language_model", default_model=str(folder), question=MOOD, name="mood")
    prompt = ('Film: "fun" is positive\n\nFilm: "', TEXTS, '" is')
    asked = log_odds(judge.model, judge.tokenizer, *prompt, MOOD.answers)
    np.testing.assert_allclose(judge(TEXTS), asked.values, atol=6e-5)
    assert judge.name == "mood" and "mood judges fun" in judge.describe()


def test_texts_that_are_cut_are_counted_and_said(folder, caplog):
    judge = make_judge(f"language_model:{folder}", question=MOOD, max_length=80)
    long = "word " * 100
    with caplog.at_level(logging.WARNING):
        judge(["dull", long, long + "!"])
        judge(["dull"])
    assert (judge.num_read, judge.num_cut) == (4, 2)
    (record,) = [r for r in caplog.records if "cut" in r.message]
    assert record.message == "critic: 2 of 3 texts were cut, prompts have at most 80 tokens"


def test_the_fingerprint_follows_model_question_and_settings(folder, tmp_path):
    name = f"language_model:{folder}"
    first = make_judge(name).fingerprint()
    assert make_judge(name).fingerprint() == first
    assert make_judge(name, name="another", batch_tokens=64).fingerprint() == first
    copy = save(tmp_path / "copy", seed=4)
    assert make_judge(f"language_model:{copy}").fingerprint() == first
    others = [
        make_judge(name, question=MOOD).fingerprint(),
        make_judge(name, max_length=100).fingerprint(),
        make_judge(name, dtype="bfloat16").fingerprint(),
        make_judge(f"language_model:{save(tmp_path / 'other', seed=5)}").fingerprint(),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Vader", {}, "unknown judge 'Vader'; choose one of vader, verifier, language_mod"),
        ("vader:x", {}, "unknown judge 'vader:x'; choose one of vader"),
        ("", {}, "unknown judge ''; choose one of vader"),
        ("vader", {"dtype": "float32"}, "'vader' has no setting 'dtype'; it has none"),
        ("language_model", {}, "names no model: write language_model:FOLDER_OR_HUB_NAME"),
        ("language_model:", {}, "names no model"),
        ("language_model:x", {"size": 1}, "has no setting 'size'; it has question, name, dtype"),
        ("language_model:/no/such/model", {}, "/no/such/model is not a folder, nor a name on"),
    ],
)
def test_wrong_names_and_settings_are_one_line(name, settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        make_judge(name, **settings)
    assert "\n" not in str(raised.value)


def test_answers_that_begin_alike_are_refused_when_the_judge_is_made(folder):
    alike = dataclasses.replace(SENTIMENT, answers=(" positive", " positively"), examples=())
    with pytest.raises(ValueError, match=r"template 'Review: .*Sentiment:' must differ"):
        LanguageModelJudge(folder, question=alike)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/pretrained/smollm2/model", "smollm2"),
        ("runs/sft/quickstart/model/", "quickstart"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("./model", "./model"),
    ],
)
def test_names_of_folders(path, name):
    assert short_name(path) == name


def test_a_repeated_phrase_costs_its_share_and_nothing_else(folder):
    plain = LanguageModelJudge(folder, repetition_cost=0.0)
    dear = LanguageModelJudge(folder, repetition_cost=3.0)
    texts = ["one two three four five", "one two three four one two three four", "a b", ""]
    # Of the second text's five phrases of four words, 1234 2341 3412 4123 1234, one is old.
    tiny.close(plain(texts) - dear(texts), [0.0, 3.0 / 5, 0.0, 0.0], 1e-4)
    assert "less 3 times the share of repeated phrases" in dear.describe()
    assert "repe" not in plain.describe() and "repe" not in plain.scale
    assert plain.fingerprint() != dear.fingerprint()


def test_equal_texts_are_read_once_and_score_alike(folder, monkeypatch):
    judge, read = LanguageModelJudge(folder), []
    as_ever = language_model.log_odds

    def counted(model, tokenizer, prefix, texts, *rest, **more):
        read.append(list(texts))
        return as_ever(model, tokenizer, prefix, texts, *rest, **more)

    monkeypatch.setattr(language_model, "log_odds", counted)
    scores = judge(["good", "bad", "good", "good"])
    assert read == [["good", "bad"]] and judge.num_read == 4
    assert scores[0] == scores[2] == scores[3] != scores[1]
    with pytest.raises(ValueError, match="texts must be a sequence of strings"):
        judge("good")


@pytest.mark.parametrize("cost", [-1.0, float("inf"), float("nan")])
def test_a_cost_that_makes_no_sense_is_refused(folder, cost):
    with pytest.raises(ValueError, match=r"repetition_cost=.* must be a number of nats"):
        LanguageModelJudge(folder, repetition_cost=cost)
