"""Scores, rankings and votes become scores, pairs and encoded groups."""

import json

import numpy as np
import pytest

from rlhf_jax.data import feedback_rows
from rlhf_jax.data.feedback_rows import as_pairs, encode_ranked, scored_row, share_preferring
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.tasks import TaskConfig, make_task
from tests import scripted

TEXTS = ["good", "bad", "fine"]


def row(**feedback):
    return {"prompt": "how?", "responses": TEXTS, **feedback}


@pytest.mark.parametrize(
    ("feedback", "scores"),
    [
        ({"scores": [2, -1.5, 0]}, [2.0, -1.5, 0.0]),
        ({"ranking": [1, 3, 2]}, [-1.0, -3.0, -2.0]),
        ({"ranking": [1, 2, 1]}, [-1.0, -2.0, -1.0]),
        ({"ranking": [1, 3, 1]}, [-1.0, -3.0, -1.0]),
        ({"votes": [[3, 1], [-1], [0, 1, 2]]}, [2.0, -1.0, 1.0]),
    ],
)
def test_every_form_becomes_scores(feedback, scores):
    found = scored_row(row(**feedback))
    assert found["scores"] == scores and found["responses"] == TEXTS
    assert set(found) == {"prompt", "responses", "scores"}


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        ({}, "no feedback"),
        ({"scores": [1, 2, 3], "ranking": [1, 2, 3]}, "scores and ranking feedback"),
        ({"scores": [1, 2]}, "3 responses and 2 scores"),
        ({"scores": [1, 2, float("nan")]}, "nan is not a finite number"),
        ({"scores": [1, 2, True]}, "True is not a finite number"),
        ({"ranking": [1, 2, 4]}, "leaves out rank 3"),
        ({"ranking": [2, 3, 4]}, "leaves out rank 1"),
        ({"ranking": [1, 2, 2.5]}, "whole numbers"),
        ({"votes": [[1], [], [2]]}, "at least one"),
        ({"votes": [[1], "12", [2]]}, "at least one"),
    ],
)
def test_feedback_that_makes_no_sense(feedback, message):
    with pytest.raises(ValueError, match=message) as error:
        scored_row(row(**feedback))
    assert "\n" not in str(error.value)


def test_pairs_of_scores_have_margins_and_ties_none():
    pairs = as_pairs(row(scores=[2, -1.5, 2]))
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in pairs] == [
        ("good", "bad", 3.5),
        ("fine", "bad", 3.5),
    ]
    assert all("margin" not in pair for pair in as_pairs(row(ranking=[2, 1, 3])))
    assert as_pairs({"prompt": "a", "chosen": "b", "rejected": "c"}) == [
        {"prompt": "a", "chosen": "b", "rejected": "c"}
    ]


def test_a_row_that_names_its_pair_is_that_pair():
    named = row(scores=[2, -1.5, 0]) | {"chosen": "good", "rejected": "bad"}
    assert as_pairs(named) == [named]


def test_votes_give_the_share_of_raters_by_counting():
    votes = [[3, 0], [1, 1, -1], [0]]
    for pair in as_pairs(row(votes=votes)):
        one, other = (votes[TEXTS.index(pair[side])] for side in ("chosen", "rejected"))
        wins = [(a > b) + 0.5 * (a == b) for a in one for b in other]
        assert pair["p_chosen"] == pytest.approx(sum(wins) / len(wins))
        assert pair["margin"] > 0
    with pytest.raises(ValueError, match="nobody voted"):
        share_preferring([], [1])


def test_groups_come_encoded_with_the_best_first():
    tokenizer, drops = scripted.tokenizer(), DropCounts()
    rows = [row(ranking=[2, 3, 1]), {"prompt": "", "responses": ["one", "one"], "scores": [1, 2]}]
    first, second = encode_ranked(rows, tokenizer, max_length=64, drops=drops)
    said = [tokenizer.decode(one.tokens[one.loss_mask]) for one in first.documents]
    assert ["fine" in said[0], "good" in said[1], "bad" in said[2]] == [True] * 3
    assert first.scores == (-1.0, -2.0, -3.0)
    assert len(second.documents) == 1 and second.scores == (2.0,)
    with pytest.raises(ValueError, match=r"row 1: .*no feedback"):
        encode_ranked([rows[0], row()], tokenizer, max_length=64, drops=drops)


def test_a_file_of_groups_serves_as_groups_and_as_pairs(tmp_path):
    path = tmp_path / "feedback.jsonl"
    rows = [row(scores=[n, 0, -n]) | {"prompt": f"question {n}?"} for n in range(1, 40)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    task, drops = make_task(TaskConfig(source=f"jsonl:{path}")), DropCounts()
    parts = {}
    for split in ("train", "validation", "test"):
        groups = list(task.feedback(split, drops, count=100, responses=2))
        pairs = list(task.rows("preference", split, drops))
        assert len(pairs) == 3 * len(groups)
        assert {
            p["prompt"][0]["content"] if isinstance(p["prompt"], list) else p["prompt"]
            for p in pairs
        } == {g["prompt"] for g in groups}
        parts[split] = {g["prompt"] for g in groups}
    assert sum(map(len, parts.values())) == 39 == len(set().union(*parts.values()))
    with pytest.raises(ValueError, match="has no scores or rankings"):
        list(
            make_task(TaskConfig(source="arithmetic")).feedback(
                "train", drops, count=1, responses=2
            )
        )


def test_reviews_are_grouped_within_a_domain_each_once_before_any_twice():
    task, drops = make_task(TaskConfig(source="reviews", limit=50)), DropCounts()
    groups = list(task.feedback("train", drops, count=30, responses=4))
    assert len(groups) == 30
    texts = [text for group in groups[:12] for text in group["responses"]]
    assert len(texts) == len(set(texts)) == 48
    assert all(len(marks) >= 10 for group in groups for marks in group["votes"])
    again = list(task.feedback("train", drops, count=30, responses=4))
    assert again == groups
    with pytest.raises(ValueError, match="no domain has 60 rated texts"):
        list(task.feedback("train", drops, count=1, responses=60))


def test_soft_labels_of_reviews_are_those_of_their_raters():
    made = {
        votes: make_task(TaskConfig(source="reviews", limit=60, votes=votes)) for votes in (0, 1)
    }
    rows = {v: list(t.rows("preference", "train", DropCounts(), count=20)) for v, t in made.items()}
    assert [r["chosen"] for r in rows[0]] == [r["chosen"] for r in rows[1]]
    assert all("p_chosen" not in r for r in rows[0])
    shares = np.array([r["p_chosen"] for r in rows[1]])
    margins = np.array([r["margin"] for r in rows[1]])
    assert (shares > 0.5).all() and shares.max() <= 1 and len(set(shares)) > 5
    assert np.corrcoef(shares, margins)[0, 1] > 0.3


def test_the_forms_are_three():
    assert feedback_rows.FORMS == ("scores", "ranking", "votes")
