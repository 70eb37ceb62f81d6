"""Which samples each rule keeps, what is dropped, and how far what is kept is from the sampler."""

import dataclasses
import math

import numpy as np
import pytest

from rlhf_jax.data.candidates import check_row
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.methods.curation import (
    CurationConfig,
    as_rows,
    held_out_prompts,
    keep,
    moved,
    statistics,
)

CONFIG = CurationConfig(rule="rankings", threshold=1.0, quantiles=2, cut=True, similarity=0.9)


def row(prompt: str, *answers: tuple[str, float, bool], **more) -> dict:
    texts, scores, ended = (list(column) for column in zip(*answers, strict=True))
    tokens = [list(range(1 + len(text.split()))) for text in texts]
    log_probs = [-2.0 * len(ids) for ids in tokens]
    made = {"prompt": prompt, "responses": texts, "scores": scores, "ended": ended}
    return made | {"tokens": tokens, "log_probs": log_probs} | more


ROWS = [
    row("I like", (" ants", 0.5, True), (" big bears", 2.0, True), (" cats", 1.5, False)),
    row("We saw", (" dogs", 1.0, True), (" ", 9.0, True), (" elks", 1.0, True)),
    row("They have", (" foxes", -1.0, True), (" goats", 3.0, True), (" hens", 0.0, True)),
]


def kept(rule: str, rows=ROWS, held_out=(), **changes):
    config, drops = dataclasses.replace(CONFIG, rule=rule, **changes), DropCounts()
    found = keep(config, rows, held_out_prompts(list(held_out)), drops)
    return config, found, drops


def test_best_of_n_is_the_best_of_those_that_may_be_kept():
    config, found, drops = kept("best_of_n", cut=False)
    assert as_rows(config, found) == [
        {"prompt": "I like", "response": " big bears", "score": 2.0},
        {"prompt": "We saw", "response": " dogs", "score": 1.0},
        {"prompt": "They have", "response": " goats", "score": 3.0},
    ]
    assert dict(drops) == {"kept": 3, "was cut": 1, "empty response": 1, "lower score": 4}
    # The best of 2 of 3, of 2 of 3, and of 3: log(3/m) + log m - (m - 1)/m.
    wanted = np.mean([math.log(3) - 1 / 2, math.log(3) - 1 / 2, math.log(3) - 2 / 3])
    assert moved(config, found) == pytest.approx(wanted)


def test_a_threshold_keeps_all_that_reach_it():
    config, found, drops = kept("threshold")
    texts = [one["response"] for one in as_rows(config, found)]
    assert texts == [" big bears", " cats", " dogs", " elks", " goats"]
    assert drops["lower score"] == 3
    # Two of three twice, and one of three.
    assert moved(config, found) == pytest.approx((4 * math.log(3 / 2) + math.log(3)) / 5)
    with pytest.raises(ValueError, match=r"'threshold' keeps no answer: kept 0 of 9") as caught:
        kept("threshold", threshold=10.0)
    assert "\n" not in str(caught.value)


def test_rankings_are_candidates_and_pairs():
    config, found, drops = kept("rankings")
    rows = as_rows(config, found)
    # Of the second prompt both answers are worth the same.
    assert [one["prompt"] for one in rows] == ["I like", "They have"]
    assert drops["nothing to compare with"] == 2
    assert rows[0]["responses"] == [" big bears", " cats", " ants"]
    assert rows[0]["scores"] == [2.0, 1.5, 0.5] and rows[0]["ended"] == [True, False, True]
    assert (rows[0]["chosen"], rows[0]["rejected"], rows[0]["margin"]) == (
        " big bears",
        " ants",
        1.5,
    )
    assert all(check_row(one) for one in rows) and moved(config, found) == 0


def test_quantiles_are_those_of_all_that_is_kept():
    config, found, _ = kept("quantiles")
    rows = as_rows(config, found)
    scores = [score for one in rows for score in one["scores"]]
    classes = [k for one in rows for k in one["quantiles"]]
    assert len(scores) == 8 and sorted(classes) == [0] * 4 + [1] * 4
    low = [s for s, k in zip(scores, classes, strict=True) if k == 0]
    assert max(low) <= min(s for s, k in zip(scores, classes, strict=True) if k == 1)
    assert rows[0]["response"] == " big bears"
    with pytest.raises(ValueError, match="8 responses are fewer than the 9 quantiles"):
        as_rows(dataclasses.replace(config, quantiles=9), found)


def test_held_out_prompts_and_near_duplicates_are_dropped():
    _, found, drops = kept("quantiles", held_out=[{"prompt": "i LIKE!"}, {"prompt": "We"}])
    assert [one.row["prompt"] for one in found] == ["We saw", "They have"]
    assert drops["prompt is held out"] == 3
    words = " one two three four five six seven eight nine ten"
    rows = [
        row("I think", (words, 1.0, True), (words.upper() + "!", 2.0, True)),
        row("I think", (words, 3.0, True), (" else", 0.0, True)),
    ]
    _, found, drops = kept("quantiles", rows)
    # The better one of the first prompt comes first.
    assert [one.places for one in found] == [(1,), (1,)] and drops["near duplicate"] == 2


def test_words_with_which_an_answer_had_begun_belong_to_it():
    asked = [{"role": "system", "content": "Review."}]
    one = row(asked, (" fine", 1.0, True), (" bad", 0.0, True), opening="It is")
    config, found, _ = kept("rankings", [one])
    (made,) = as_rows(config, found)
    assert (made["chosen"], made["rejected"]) == ("It is fine", "It is bad")
    assert made["opening"] == "It is" and made["responses"] == [" fine", " bad"]
    config, found, _ = kept("best_of_n", [one])
    assert as_rows(config, found)[0]["response"] == "It is fine"
    # The same words after another opening are another prompt.
    _, found, _ = kept("rankings", [one], held_out=[{"prompt": asked, "opening": "It was"}])
    assert len(found) == 1


def test_statistics_are_means_over_answers():
    _, found, _ = kept("best_of_n", cut=False)
    numbers = statistics(found)
    assert numbers["curate/answers"] == numbers["curate/prompts"] == 3
    assert numbers["curate/reward"] == pytest.approx(2.0)
    assert numbers["curate/length"] == pytest.approx((3 + 2 + 2) / 3)
    assert numbers["curate/ended"] == 1 and numbers["curate/log_prob"] == pytest.approx(-2.0)
