"""The task of sums: rows, splits, and a verifier that judges."""

import re

import numpy as np
import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.evaluation.judges import make_judge
from rlhf_jax.tasks import TaskConfig, make_task


def rows(kind, split, **settings):
    task = make_task(TaskConfig(**{"source": "arithmetic", "limit": 20} | settings))
    return list(task.rows(kind, split, DropCounts()))


def test_documents_hold_solutions_and_prompts_do_not():
    documents, prompts = rows("sft", "train"), rows("prompt", "train")
    assert len(documents) == len(prompts) == 20
    for document, prompt in zip(documents, prompts, strict=True):
        assert document["prompt"] == prompt["prompt"] and str(prompt).count("####") == 0
        assert "\n#### " in str(document["response"]) or "#### " in str(document["response"])


def test_splits_and_limits():
    splits = {split: {str(row) for row in rows("prompt", split)} for split in ("train", "test")}
    assert len(splits["train"] | splits["test"]) == 40
    assert len(rows("prompt", "validation", limit=0)) == 1000


def test_word_problems_have_no_judge():
    task = make_task(TaskConfig(source="arithmetic:gsm_symbolic", limit=5))
    assert task.judges == () and len(list(task.rows("sft", "train", DropCounts()))) == 5
    assert make_task(TaskConfig(source="arithmetic")).judges == ("verifier",)


@pytest.mark.parametrize(
    ("sizes", "least", "most", "digits"), [("5-8", 5, 8, 1), ("2-2:3", 2, 2, 3), ("", 3, 5, 1)]
)
def test_sums_of_the_size_that_the_source_names(sizes, least, most, digits):
    source = f"arithmetic:chain_sum:{sizes}" if sizes else "arithmetic"
    task = make_task(TaskConfig(source=source, limit=60))
    found = [re.findall(r"\d+", row["prompt"]) for row in task.rows("sft", "train", DropCounts())]
    assert {len(numbers) for numbers in found} == set(range(least, most + 1))
    assert max(len(number) for numbers in found for number in numbers) == digits
    assert task.judges == ("verifier",)
    plain = make_task(TaskConfig(source="arithmetic", limit=60))
    assert (task.fingerprint("train") == plain.fingerprint("train")) == (not sizes)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("arithmetic:chain_sum:many", "'many' must be MIN-MAX or MIN-MAX:DIGITS"),
        ("arithmetic:chain_sum:8-5", "needs 2 <= min <= max"),
        ("arithmetic:chain_sum:5-8:0", "max_digits=0"),
        ("arithmetic:gsm_symbolic:5-8", "sums may have sizes"),
    ],
)
def test_sizes_that_make_no_sense(source, message):
    with pytest.raises(ValueError, match=message) as error:
        make_task(TaskConfig(source=source))
    assert "\n" not in str(error.value)


def test_what_it_has_not():
    with pytest.raises(ValueError, match="has no preferences: its answers are right or wrong"):
        rows("preference", "train")
    with pytest.raises(ValueError, match=r"must be arithmetic or one of arithmetic:chain_sum"):
        make_task(TaskConfig(source="arithmetic:algebra"))


def test_the_verifier_judges_whole_texts():
    judge = make_judge("verifier")
    texts = [
        "4 - 1 =\n= 3\n#### 3",
        "4 - 1 =\n= 2\n#### 2",
        "4 - 1 = = 3\n#### 3",
        "4 - 1 =\n= 3",
        "four =\n#### 4",
        "",
    ]
    np.testing.assert_array_equal(judge(texts), [1, 0, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="not one string"):
        judge(texts[0])
    with pytest.raises(ValueError, match="has no setting 'strict'"):
        make_judge("verifier", strict=True)
    assert judge.fingerprint() == make_judge("verifier").fingerprint()


def test_the_verifier_agrees_with_every_solution_of_the_task():
    documents = rows("sft", "test")
    texts = [
        f"{row['prompt'][0]['content'] if isinstance(row['prompt'], list) else row['prompt']}"
        f"\n{row['response']}"
        for row in documents
    ]
    assert make_judge("verifier")(texts).all()
