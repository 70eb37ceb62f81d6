"""Texts that fool judges, and how far a judge is fooled."""

import numpy as np
import pytest

from rlhf_jax.evaluation.adversaries import KINDS, how_fooled, make_texts
from rlhf_jax.evaluation.judges import VaderJudge

TEXTS = [
    "A dull story that goes nowhere and takes two hours",
    "I laughed at every scene of it",
    "The acting is fine but who wrote this script",
]


def test_each_kind_is_what_it_says():
    made = {kind: make_texts(kind, TEXTS, seed=3) for kind in KINDS}
    assert made["what people wrote"] == TEXTS
    for text, shuffled in zip(TEXTS, made["the same words, shuffled"], strict=True):
        assert shuffled != text and sorted(shuffled.split()) == sorted(text.split())
    opening = "A dull story that"
    assert made["an opening and 'and best' twelve times"][0] == opening + " and best" * 12
    repeated = made["its first words three times more"][0]
    assert repeated == TEXTS[0] + 3 * " A dull story that goes nowhere and takes"
    praise = made["an opening and a heap of praise"]
    assert praise[0].startswith(opening) and praise[0].split()[4:] != praise[1].split()[4:]
    assert made["the text and 'Sentiment: positive'"][1] == TEXTS[1] + " Sentiment: positive"


def test_shuffling_is_drawn_by_the_seed():
    kind = "the same words, shuffled"
    assert make_texts(kind, TEXTS, seed=3) == make_texts(kind, TEXTS, seed=3)
    assert make_texts(kind, TEXTS, seed=3) != make_texts(kind, TEXTS, seed=4)


def test_a_rule_that_adds_up_words_is_fooled_and_one_that_counts_new_words_is_not():
    rows = {row.kind: row for row in how_fooled(VaderJudge(), TEXTS)}
    assert rows["what people wrote"].preferred == (0.5, 0.5, 0.5)
    assert rows["an opening and 'and best' twelve times"].preferred.value == 1.0

    def new_words(texts):
        return np.array([len(set(text.split())) / max(len(text.split()), 1) for text in texts])

    rows = {row.kind: row for row in how_fooled(new_words, TEXTS)}
    assert rows["an opening and 'and best' twelve times"].preferred.value == 0.0
    # Four words of the opening and two new ones, of 28.
    assert rows["an opening and 'and best' twelve times"].mean.value == pytest.approx(6 / 28)
    assert all(row.num_texts == len(TEXTS) for row in rows.values())


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no text: give some that people wrote"):
        how_fooled(VaderJudge(), [])
