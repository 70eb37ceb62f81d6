"""Harm scores: made-up ones; of the archive only numbers are looked at, never texts."""

import numpy as np
import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets import archives, harm
from rlhf_jax.tasks import TaskConfig, make_task
from tests.data.conftest import CHATML
from tests.tasks.rows import load_rows

HARM = (
    "# dataset_version=1.0,,\r\nharm_category,objective,assistant_response,human_score_1,"
    "human_score_2\r\ntoy,question,answer one,0,0.5\r\ntoy,question,answer two,1,1\r\n"
    "toy,question,Answer one!,0,0\r\ntoy,other,answer,0.5,\r\n"
)


@pytest.fixture
def harm_file(monkeypatch):
    def serve(content):
        files = {"x/scorer_evals/harm/toy.csv": content.encode(), "x/other.csv": b"a,b\r\n1,2\r\n"}
        monkeypatch.setattr(archives, "read_members", lambda name, suffix: files)

    return serve


def test_harm_scores_become_pairs_with_the_safer_answer_first(harm_file):
    harm_file(HARM)
    drops = DropCounts()
    (row,) = load_rows("preference", "harm", "all", min_gap=0.25, limit=10, drops=drops)
    assert row == {
        "prompt": [{"role": "user", "content": "question"}],
        "chosen": "answer one",
        "rejected": "answer two",
        "margin": 0.75,
    }
    assert drops == {"duplicate answer": 1}


def test_harm_score_that_is_not_finite_names_the_row(harm_file):
    harm_file(HARM.replace("0.5,\r\n", "nan,\r\n"))
    with pytest.raises(ValueError, match=r"toy\.csv, row 3 has scores \[nan\]"):
        harm.harm_answers("all")


def test_harm_pairs_of_a_prompt_are_capped(harm_file):
    answers = "".join(f"toy,question,answer {n},{n / 10}\r\n" for n in range(10))
    harm_file("harm_category,objective,assistant_response,human_score\r\n" + answers)
    pairs = harm.harm_pairs("all", num_pairs=100, max_per_prompt=5, seed=0)
    assert len(pairs) == 5
    assert all(row["margin"] >= 0.25 for row in pairs)


def test_every_prompt_comes_once_and_a_limit_holds(harm_file, with_template):
    harm_file(HARM)
    assert [row["prompt"][0]["content"] for row in load_rows("prompt", "harm", "all")] == [
        "question",
        "other",
    ]
    tokenizer = with_template(CHATML)
    for limit in (0, 1):
        task = make_task(TaskConfig("harm", limit=limit))
        prompts = task.prompts(tokenizer, "all", max_length=50)
        assert len(prompts) == (limit or 2)
        assert "question" in tokenizer.decode(prompts[0])


def test_only_what_nobody_found_harmful_is_for_fine_tuning(harm_file, with_template):
    harm_file(HARM + "toy,other,harmless,0,0\r\ntoy,third,so so,0,0.25\r\n")
    drops = DropCounts()
    (row,) = load_rows("sft", "harm", "all", drops=drops)
    assert row == {"prompt": [{"role": "user", "content": "other"}], "response": "harmless"}
    assert drops == {"duplicate answer": 1, "found harmful": 4}
    task, tokenizer = make_task(TaskConfig("harm")), with_template(CHATML)
    (document,) = task.documents(tokenizer, "all", max_length=99)
    assert "harmless" in tokenizer.decode(document.tokens[document.loss_mask])
    assert "other" not in tokenizer.decode(document.tokens[document.loss_mask])


def test_documents_of_the_archive_are_all_scored_0():
    task = make_task(TaskConfig("harm"))
    scores = {
        (a["prompt"][0]["content"], a["response"]): a["score"] for a in harm.harm_answers("train")
    }
    rows = list(task.rows("sft", "train", DropCounts()))
    assert len(rows) == 156
    assert {scores[row["prompt"][0]["content"], row["response"]] for row in rows} == {0.0}


def test_answers_come_with_peoples_scores_higher_being_better(harm_file):
    harm_file(HARM)
    texts, ratings = make_task(TaskConfig("harm")).rated_texts("all")
    assert texts == ["answer one", "answer two", "answer"]
    np.testing.assert_allclose(ratings, [-0.25, -1, -0.5])


def test_the_archive_has_the_documented_prompts():
    assert len(load_rows("prompt", "harm", "all")) == 390
