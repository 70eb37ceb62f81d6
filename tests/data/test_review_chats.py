"""Reviews in a chat: what is trained, which pairs are compared, what prompts leave open."""

import numpy as np
import pytest

from rlhf_jax.data import chat, review_chats
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets import reviews
from rlhf_jax.data.sets.reviews import Review
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


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_pairs_hold_the_review_and_train_its_end(with_template, template):
    tokenizer = with_template(template)
    pairs, ratings = review_chats.encode_pairs(
        RATED, tokenizer, "go on", min_gap=1.0, num_pairs=100, seed=0, max_length=200
    )
    # 2 and 1.5 (.5 is 1 away) over .5, .2, -1, -2; .5 and .2 over -1, -2; -1 over -2.
    assert len(pairs) == 13 and ratings.shape == (13, 2)
    rows = review_chats.response_rows(RATED, "go on")
    by_rating = {np.float32(row["rating"]): row for row in rows}
    for pair, rated in zip(pairs, ratings, strict=True):
        assert rated[0] - rated[1] >= 1
        np.testing.assert_allclose(pair.margin, rated[0] - rated[1], rtol=1e-6)
        for side, rating in zip((pair.chosen, pair.rejected), rated, strict=True):
            (said,) = stretches(side, tokenizer)
            assert said.startswith(by_rating[rating]["response"])
            assert "go on" in tokenizer.decode(side.tokens[~side.loss_mask])


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_a_prompt_begins_as_the_review_does(with_template, template):
    tokenizer = with_template(template)
    rows = reviews.prompt_rows(RATED, seed=0)
    prompts = review_chats.encode_openings(rows, tokenizer, "go on", max_length=200)
    written = chat.encode_sft(review_chats.response_rows(RATED, "go on"), tokenizer, max_length=200)
    assert len(prompts) == 5  # one review is no longer than its prompt
    for row, prompt, document in zip(rows, prompts, written, strict=False):
        np.testing.assert_array_equal(document.tokens[: len(prompt)], prompt)
        assert 0 < document.loss_mask[: len(prompt)].sum() < document.loss_mask.sum()
        shown = review_chats.shown_prompt(
            tokenizer.decode(prompt, skip_special_tokens=True), tokenizer, "go on"
        )
        assert shown == row["prompt"]


def test_long_prompts_are_left_out_and_counted(with_template):
    tokenizer, drops = with_template(CHATML), DropCounts()
    rows = [{"prompt": "the film"}, {"prompt": "the film " * 40}]
    (short,) = review_chats.encode_openings(rows, tokenizer, "go on", max_length=80, drops=drops)
    assert tokenizer.decode(short).endswith("the film")
    assert drops["prompt longer than max_length"] == 1 and drops[DropCounts.KEPT] == 1
    with pytest.raises(ValueError, match="no prompt is left to sample from"):
        review_chats.encode_openings(rows, tokenizer, "go on", max_length=3)


def test_long_reviews_are_left_out_and_counted(with_template):
    tokenizer, drops = with_template(CHATML), DropCounts()
    settings = {"min_gap": 0.1, "num_pairs": 100, "seed": 0}
    pairs, _ = review_chats.encode_pairs(RATED, tokenizer, "go on", max_length=200, **settings)
    longest = max(len(side.tokens) for pair in pairs for side in (pair.chosen, pair.rejected))
    fewer, _ = review_chats.encode_pairs(
        RATED, tokenizer, "go on", max_length=longest - 1, drops=drops, **settings
    )
    assert len(pairs) == 15  # of six texts
    assert drops["review longer than max_length"] >= 1
    assert len(fewer) == drops[DropCounts.KEPT] < 15


def test_several_domains_are_refused(with_template):
    rated = [RATED[0], RATED[1]._replace(domain="amazon")]
    with pytest.raises(ValueError, match=r"several domains \['amazon', 'movie'\]"):
        review_chats.encode_pairs(
            rated, with_template(CHATML), "go on", min_gap=1, num_pairs=1, seed=0, max_length=99
        )
