"""Reviews in a chat: where they are cut, what is trained, which pairs are compared."""

import numpy as np
import pytest

from rlhf_jax.data import review_chats
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.types import DropCounts
from tests.data.conftest import CHATML, HEADERS, stretches

TEXTS = [
    "the film is a warm and funny story",
    "two old friends who meet again and again",
    "the player broke after twelve days of use",
    "what do you think of the sea and of people",
    "I like the sea, it is wide and the people are kind",
    "short one",
]
RATED = [
    Review("movie", text, rating, 0.5, 20)
    for text, rating in zip(TEXTS, (2.0, 0.5, -2.0, 0.2, 1.5, -1.0), strict=True)
]


def test_opening_and_response_make_the_review():
    drops = DropCounts()
    rows = review_chats.response_rows(RATED, "go on", drops=drops)
    assert len(rows) == 5 and drops["review no longer than its prompt"] == 1
    for row, review in zip(rows, RATED, strict=False):
        system, user = row["prompt"]
        assert system == {"role": "system", "content": "go on"} and user["role"] == "user"
        assert f"{user['content']} {row['response']}" == review.text
        assert 2 <= len(user["content"].split()) <= 5
        assert row["rating"] == review.rating


def test_a_review_is_cut_at_one_place_and_reviews_at_several():
    alone = [review_chats.response_rows([review], "go on") for review in RATED[:5]]
    together = review_chats.response_rows(RATED, "go on")
    assert [rows[0] for rows in alone] == together
    many = [Review("movie", f"word {n} a b c d e f", 0.0, 0.0, 20) for n in range(400)]
    lengths = [
        len(row["prompt"][1]["content"].split())
        for row in review_chats.response_rows(many, "go on")
    ]
    counts = np.bincount(lengths, minlength=6)
    # 100 of each are expected; five standard deviations are 43.
    assert counts[:2].sum() == 0 and np.abs(counts[2:] - 100).max() < 43


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_pairs_hold_the_review_and_train_its_end(with_template, template):
    tokenizer = with_template(template)
    pairs, ratings = review_chats.encode_pairs(
        RATED, tokenizer, "go on", min_gap=1.0, num_pairs=100, seed=0, max_length=200
    )
    # Of 2, .5, -2, .2, 1.5: 2 and 1.5 over .5, .2 and -2 (.5 is 1 away), .5 and .2 over -2.
    assert len(pairs) == 8 and ratings.shape == (8, 2)
    rows = review_chats.response_rows(RATED, "go on")
    by_rating = {np.float32(row["rating"]): row for row in rows}
    for pair, rated in zip(pairs, ratings, strict=True):
        assert rated[0] - rated[1] >= 1
        np.testing.assert_allclose(pair.margin, rated[0] - rated[1], rtol=1e-6)
        for side, rating in zip((pair.chosen, pair.rejected), rated, strict=True):
            (said,) = stretches(side, tokenizer)
            assert said.startswith(by_rating[rating]["response"])
            read = tokenizer.decode(side.tokens[~side.loss_mask])
            assert "go on" in read and by_rating[rating]["prompt"][1]["content"] in read


def test_a_rollout_reads_what_the_reward_model_was_trained_on(with_template):
    tokenizer = with_template(CHATML)
    pairs, _ = review_chats.encode_pairs(
        RATED, tokenizer, "go on", min_gap=1.0, num_pairs=1, seed=0, max_length=200
    )
    chosen = pairs[0].chosen
    head = chosen.tokens[: np.flatnonzero(chosen.loss_mask)[0]]
    shown = review_chats.shown_prompt(
        tokenizer.decode(head, skip_special_tokens=True), tokenizer, "go on"
    )
    (row,) = review_chats.asked([{"prompt": shown}], "go on")
    np.testing.assert_array_equal(encode_prompt(row["prompt"], tokenizer, 200), head)


def test_long_reviews_are_left_out_and_counted(with_template):
    tokenizer, drops = with_template(CHATML), DropCounts()
    settings = {"min_gap": 0.1, "num_pairs": 100, "seed": 0}
    pairs, _ = review_chats.encode_pairs(RATED, tokenizer, "go on", max_length=200, **settings)
    longest = max(len(side.tokens) for pair in pairs for side in (pair.chosen, pair.rejected))
    fewer, _ = review_chats.encode_pairs(
        RATED, tokenizer, "go on", max_length=longest - 1, drops=drops, **settings
    )
    assert len(pairs) == 10  # of five texts
    assert drops["review longer than max_length"] >= 1
    assert len(fewer) == drops[DropCounts.KEPT] < 10


def test_several_domains_are_refused(with_template):
    rated = [RATED[0], RATED[1]._replace(domain="amazon")]
    with pytest.raises(ValueError, match=r"several domains \['amazon', 'movie'\]"):
        review_chats.encode_pairs(
            rated, with_template(CHATML), "go on", min_gap=1, num_pairs=1, seed=0, max_length=99
        )
