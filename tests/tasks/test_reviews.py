"""Reviews, plain and in a chat: what is trained and compared, what prompts leave open."""

import numpy as np
import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets import reviews
from rlhf_jax.data.sets.reviews import Review
from rlhf_jax.data.splits import half_of, normalise
from rlhf_jax.tasks import TaskConfig, make_task
from tests.data.conftest import CHATML, HEADERS, stretches

TEXTS = [
    "the film is a warm and funny story",
    "two old friends who meet again and again",
    "the player broke after twelve days of use",
    "what do you think of the sea and of people",
    "I like the sea, it is wide and the people are kind",
    "short one",
]
RATINGS = dict(zip(TEXTS, (2.0, 0.5, -2.0, 0.2, 1.5, -1.0), strict=True))
RATED = [Review("movie", text, rating, 0.5, 20) for text, rating in RATINGS.items()]


@pytest.fixture
def made_up(monkeypatch):
    """Six reviews in place of the archive; returns the list that is read."""
    rated = list(RATED)
    monkeypatch.setattr(reviews, "load_reviews", lambda split, *, domains, drops=None: rated)
    return rated


def task(**settings):
    """Reviews in a chat, unless the instruction is empty."""
    return make_task(TaskConfig("reviews", **{"instruction": "go on"} | settings))


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_pairs_hold_the_review_and_train_its_end(made_up, with_template, template):
    tokenizer = with_template(template)
    pairs, ratings = task().rated(tokenizer, "train", max_length=200, count=100)
    # 2 and 1.5 (.5 is 1 away) over .5, .2, -1, -2; .5 and .2 over -1, -2; -1 over -2.
    assert len(pairs) == 13 and ratings.shape == (13, 2)
    by_rating = {np.float32(rating): text for text, rating in RATINGS.items()}
    for pair, rated in zip(pairs, ratings, strict=True):
        assert rated[0] - rated[1] >= 1
        np.testing.assert_allclose(pair.margin, rated[0] - rated[1], rtol=1e-6)
        for side, rating in zip((pair.chosen, pair.rejected), rated, strict=True):
            (said,) = stretches(side, tokenizer)
            assert said.startswith(by_rating[rating])
            assert "go on" in tokenizer.decode(side.tokens[~side.loss_mask])
    same = task().preferences(tokenizer, "train", max_length=200, count=100)
    assert [p.margin for p in same] == [p.margin for p in pairs]


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_a_prompt_begins_as_the_review_does(made_up, with_template, template):
    tokenizer = with_template(template)
    prompts = task().prompts(tokenizer, "train", max_length=200)
    written = task().documents(tokenizer, "train", max_length=200)
    openings = [row["prompt"] for row in reviews.prompt_rows(RATED, seed=0)]
    assert len(prompts) == 5  # one review is no longer than its prompt
    show = task().shown(tokenizer)
    for opening, prompt, document in zip(openings, prompts, written, strict=False):
        np.testing.assert_array_equal(document.tokens[: len(prompt)], prompt)
        assert 0 < document.loss_mask[: len(prompt)].sum() < document.loss_mask.sum()
        assert show(tokenizer.decode(prompt, skip_special_tokens=True)) == opening


def test_plain_prompts_are_opening_words_and_shown_whole(made_up, plain):
    plainly = task(instruction="")
    openings = [row["prompt"] for row in reviews.prompt_rows(RATED, seed=0)]
    prompts = plainly.prompts(plain, "train", max_length=40)
    shown = [plainly.shown(plain)(plain.decode(p, skip_special_tokens=True)) for p in prompts]
    assert shown == openings


def test_long_prompts_are_left_out_and_counted(made_up, with_template, capsys):
    made_up[:] = [
        Review("movie", text, 0.0, 0.5, 20) for text in (TEXTS[0], "thefilm" * 80 + TEXTS[1])
    ]
    (short,) = task().prompts(with_template(CHATML), "train", max_length=80)
    assert "\nthe film" in with_template(CHATML).decode(short)
    printed = "prompts (train): kept 1 of 2, dropped 1 (1 prompt longer than max_length)\n"
    assert capsys.readouterr().out == printed
    with pytest.raises(ValueError, match="no row is left"):
        task().prompts(with_template(CHATML), "train", max_length=3)


def test_long_reviews_are_left_out_before_pairs_are_drawn(made_up, with_template, capsys):
    tokenizer, every = with_template(CHATML), task(min_gap=0.1)
    pairs, _ = every.rated(tokenizer, "train", max_length=200, count=100)
    assert len(pairs) == 15  # of six texts
    longest = max(len(side.tokens) for pair in pairs for side in (pair.chosen, pair.rejected))
    capsys.readouterr()
    fewer, _ = every.rated(tokenizer, "train", max_length=longest - 1, count=100)
    assert len(fewer) == 10
    printed = "pairs (train): kept 10 of 11, dropped 1 (1 review longer than max_length)\n"
    assert capsys.readouterr().out == printed


def test_pairs_of_the_same_tokens_are_dropped_with_their_ratings(made_up, folding, capsys):
    texts = {"A fine film": 2.0, "a fine film": -2.0, "a dull film": -3.5}
    made_up[:] = [Review("movie", text, rating, 0.5, 20) for text, rating in texts.items()]
    pairs, ratings = task().rated(folding, "train", max_length=99, count=9)
    # 2 over -3.5 and -2 over -3.5 are left.
    assert sorted(ratings.tolist()) == [[-2.0, -3.5], [2.0, -3.5]]
    assert sorted(pair.margin for pair in pairs) == [1.5, 5.5]
    printed = "pairs (train): kept 2 of 3, dropped 1 (1 identical tokens)\n"
    assert capsys.readouterr().out == printed


def test_several_domains_in_a_chat_are_refused(made_up, with_template):
    made_up[1] = made_up[1]._replace(domain="amazon")
    with pytest.raises(ValueError, match=r"several domains \['amazon', 'movie'\]"):
        task().rated(with_template(CHATML), "train", max_length=99, count=1)


def test_plain_reviews_have_no_ratings_of_pairs(made_up, plain):
    with pytest.raises(ValueError, match=r"needs ratings: data\.source='reviews' has none"):
        task(instruction="").rated(plain, "train", max_length=99, count=1)


def test_references_are_the_first_reviews(made_up, plain):
    found = task(instruction="").references(plain, max_length=99, count=2)
    assert [plain.decode(d.tokens, skip_special_tokens=True) for d in found] == TEXTS[:2]


def test_rated_texts_come_with_the_mean_votes(made_up):
    texts, ratings = task(limit=4).rated_texts("test")
    assert texts == TEXTS[:4]
    assert ratings.tolist() == [2.0, 0.5, -2.0, 0.2]


def test_the_vocabulary_is_that_of_all_domains():
    few, all_of_them = task(domains=("movie",)).texts(), task(domains=("nyt",)).texts()
    assert few == all_of_them
    assert len(few) > 15_000


def texts_of(**settings):
    return [row["text"] for row in reviews_of("train", **settings)]


def reviews_of(split, **settings):
    return task(instruction="", **settings).rows("sft", split, DropCounts())


def test_halves_share_no_text_and_are_all_of_the_training_texts():
    everything, first, second = (texts_of(half=half) for half in ("", "first", "second"))
    assert not {normalise(t) for t in first} & {normalise(t) for t in second}
    assert sorted(first + second) == sorted(everything)
    assert 0.48 < len(first) / len(everything) < 0.52
    # A text is in the same half whatever is read beside it, and the limit counts its half alone.
    movie = texts_of(half="first", domains=("movie",))
    assert len(movie) > 1000 and set(movie) <= set(first)
    assert texts_of(half="second", limit=50) == second[:50]


def test_what_is_held_out_is_in_both_halves():
    for split in ("validation", "test"):
        whole, *halves = (list(reviews_of(split, half=half)) for half in ("", "first", "second"))
        assert halves == [whole, whole]
        # What is held out says nothing of the half that a text is in.
        assert 0.4 < np.mean([half_of(row["text"]) == "first" for row in whole]) < 0.6
    texts, ratings = task(instruction="", half="second").rated_texts("test")
    assert len(texts) == len(ratings) == len(whole)


def test_pairs_prompts_and_references_of_a_half_are_made_of_its_texts(plain, capsys):
    first = task(instruction="", half="first", domains=("movie",))
    own = set(texts_of(half="first", domains=("movie",)))
    for pair in first.preferences(plain, "train", max_length=400, count=50):
        for side in (pair.chosen, pair.rejected):
            assert plain.decode(side.tokens, skip_special_tokens=True) in own
    for document in first.references(plain, max_length=400, count=50):
        assert plain.decode(document.tokens, skip_special_tokens=True) in own
    starts = [
        plain.decode(p, skip_special_tokens=True)
        for p in first.prompts(plain, "train", max_length=99)
    ]
    assert all(any(text.startswith(start) for text in own) for start in starts[:50])
    assert "of the other half" in capsys.readouterr().out


def test_a_half_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"data\.half='third' must be first or second, or empty"):
        task(half="third")
