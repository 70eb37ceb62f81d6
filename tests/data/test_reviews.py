"""Made-up files first, then the archive itself."""

import math

import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets import reviews
from rlhf_jax.data.sets.reviews import Review
from rlhf_jax.data.splits import SPLITS, clean_text, normalise, split_of

TEXTS = (
    "\ufeff1\t1.5\tA  ''fine'' film &amp; more\r\n"
    "2\t-2\tDreadful.\r\n3\t0\t  \r\n4\t3\tother votes\r\n"
)
VOTES = "\ufeff1\t1.5\t0.5\t[1, 2]\r\n2\t-2\t0\t[-2, -2]\r\n3\t0\t0\t[0]\r\n4\t2\t0\t[2, 2]\r\n"


def parse(texts=TEXTS, votes=VOTES, drops=None):
    return reviews.parse_reviews(
        "movie", texts.replace("\ufeff", ""), votes.replace("\ufeff", ""), drops=drops
    )


def make(count, domain="movie"):
    return [Review(domain, f"text number {n}", n % 9 - 4.0, 0.5, 20) for n in range(count)]


def test_parse_cleans_joins_and_counts():
    drops = DropCounts()
    assert parse(drops=drops) == [
        Review("movie", 'A "fine" film & more', 1.5, 0.5, 2, (1, 2)),
        Review("movie", "Dreadful.", -2.0, 0.0, 2, (-2, -2)),
    ]
    assert drops == {"empty text": 1, "rated differently in two files": 1}


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_rating_that_is_not_finite_names_the_row(bad):
    with pytest.raises(ValueError, match=f"movie text '2' has rating {bad}"):
        parse(texts=TEXTS.replace("2\t-2\t", f"2\t{bad}\t"))


def test_vote_that_is_not_finite_names_the_row():
    with pytest.raises(ValueError, match="votes on movie text '2' has rating nan"):
        parse(votes=VOTES.replace("[-2, -2]", "[-2, NaN]"))


def test_lines_with_missing_fields_and_texts_without_votes():
    with pytest.raises(ValueError, match="movie texts: line 2 has 2 fields, not 3"):
        parse(texts=TEXTS.replace("2\t-2\tDreadful.", "2\t-2"))
    with pytest.raises(ValueError, match="movie text '4' has no votes"):
        parse(votes=VOTES.replace("4\t2\t0\t[2, 2]\r\n", ""))


def test_normalise_folds_case_punctuation_and_entities():
    assert normalise("It's  GREAT &amp; Caf\u00e9!") == normalise("it s great cafe\u0301") != ""
    assert normalise(":-)") == ":-)" != normalise(":-(")
    assert clean_text(" a\tb &lt;3 ") == "a b <3"


def test_split_is_a_function_of_the_normalised_text():
    assert split_of("Great value!") == split_of("great   VALUE.")
    shares = [split_of(f"text {n}") for n in range(4000)]
    for split, share in SPLITS.items():
        assert abs(shares.count(split) / 4000 - share) < 0.03


def test_select_keeps_the_first_of_equal_texts():
    drops = DropCounts()
    same = [Review("movie", "Great value!", 1.0, 0, 1), Review("amazon", "great value", 2.0, 0, 1)]
    assert reviews.select(same, "all", drops=drops) == same[:1]
    assert drops == {"duplicate text": 1}
    with pytest.raises(ValueError, match="split='dev' must be one of train, validation, test"):
        reviews.select(same, "dev")


def test_preference_rows_have_the_gap_of_the_ratings_as_margin():
    texts = make(30) + make(30, "amazon")[15:]
    ratings = {review.text: review.rating for review in texts}
    rows = reviews.preference_rows(texts, min_gap=2.0, num_pairs=40, seed=0)
    assert len(rows) == 40
    for row in rows:
        assert row["prompt"] == ""
        assert row["margin"] == ratings[row["chosen"]] - ratings[row["rejected"]] >= 2.0
    assert reviews.preference_rows(texts, min_gap=2.0, num_pairs=40, seed=1) != rows


def test_identical_texts_make_no_pair():
    drops = DropCounts()
    same = [Review("movie", "fine", 0.0, 0, 1), Review("movie", "Fine!", 2.0, 0, 1)]
    assert reviews.preference_rows(same, num_pairs=3, seed=0, drops=drops) == []
    assert drops == {"identical chosen and rejected": 1}


def test_preference_rows_refuse_ratings_that_are_not_finite():
    bad = [*make(3), Review("movie", "odd one", math.nan, 0, 1)]
    with pytest.raises(ValueError, match="row 3 has rating nan, not a finite number: 'odd one'"):
        reviews.preference_rows(bad, num_pairs=1, seed=0)


def test_prompts_are_opening_words_each_once():
    texts = ["one two three four", "one two five six", "one two", "seven eight nine ten eleven"]
    drops = DropCounts()
    rows = reviews.prompt_rows(
        [Review("movie", text, 0, 0, 1) for text in texts], words=(2, 2), seed=0, drops=drops
    )
    assert rows == [{"prompt": "one two"}, {"prompt": "seven eight"}]
    assert drops == {"duplicate prompt": 1, "review no longer than its prompt": 1}
    with pytest.raises(ValueError, match=r"words=\(3, 2\)"):
        reviews.prompt_rows([], words=(3, 2), seed=0)


def test_archive_has_the_documented_texts():
    counted = {}
    for domain in reviews.DOMAINS:
        drops = DropCounts()
        loaded = reviews.load_reviews("all", domains=(domain,), drops=drops)
        counted[domain] = (len(loaded), drops.dropped)
    assert counted == {
        "movie": (10_603, 2),
        "amazon": (3_689, 19),
        "nyt": (5_118, 72),
        "tweets": (3_996, 204),
    }


def test_no_text_of_the_archive_is_in_two_splits():
    loaded = {
        split: reviews.load_reviews(split, domains=tuple(reviews.DOMAINS)) for split in SPLITS
    }
    keys = {split: {normalise(review.text) for review in loaded[split]} for split in SPLITS}
    assert all(len(keys[split]) == len(loaded[split]) > 2000 for split in SPLITS)
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


def test_rows_of_every_stage_stay_in_their_split():
    test = reviews.load_reviews("test")
    for row in reviews.preference_rows(test, num_pairs=300, seed=0):
        assert {split_of(row["chosen"]), split_of(row["rejected"])} == {"test"}
        assert row["margin"] >= 1.0 - 1e-6
    texts = {review.text for review in test}
    for row in reviews.prompt_rows(test, seed=0):
        assert any(text.startswith(row["prompt"] + " ") for text in texts)


def test_archive_can_be_loaded_twice_with_the_same_counts():
    first, again = DropCounts(), DropCounts()
    one = reviews.load_reviews("train", domains=("tweets",), drops=first)
    assert reviews.load_reviews("train", domains=("tweets",), drops=again) == one
    assert first == again
    assert first["rated differently in two files"] == 199


def test_unknown_domain_names_the_known_ones():
    with pytest.raises(ValueError, match=r"domains=\['books'\] must be among movie, amazon"):
        reviews.load_reviews("train", domains=("movie", "books"))
