"""Short texts with human sentiment ratings: the quickstart task.

Sentences from film reviews, product reviews, editorials and tweets, each rated by about twenty
people from -4 (extremely negative) to 4 (extremely positive): the ground truth of Hutto & Gilbert,
"VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014
(MIT licence; the source archive of the package vaderSentiment). Real human feedback in the form of
scores, and of comparisons once two texts are put side by side; it is not the HH-RLHF data set.

A text goes to train, validation or test by a hash of its letters and digits, so that no text is in
two splits, whatever else is loaded.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.data import comparisons
from rlhf_jax.data.feedback_rows import share_preferring
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.data.sets import archives
from rlhf_jax.data.splits import check_split, clean_text, normalise, split_of

DOMAINS = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}


class Review(NamedTuple):
    """A text and what people said of it.

    Attributes:
      domain: one of DOMAINS.
      text: cleaned; never empty.
      rating: the mean of the votes, in [-4, 4].
      std: the standard deviation of the votes.
      votes: how many people voted.
      marks: their votes, each in [-4, 4]; empty where they are not known.
    """

    domain: str
    text: str
    rating: float
    std: float
    votes: int
    marks: tuple[float, ...] = ()


def load_reviews(
    split: str, *, domains: Sequence[str] = ("movie", "amazon"), drops: DropCounts | None = None
) -> list[Review]:
    """Returns the reviews of a split ("train", "validation", "test", or "all").

    Raises:
      ValueError: an unknown split or domain, or a rating that is not a finite number.
      archives.AssetError: the archive cannot be fetched.
    """
    unknown = [d for d in domains if d not in DOMAINS]
    if unknown:
        raise ValueError(f"domains={unknown} must be among {', '.join(DOMAINS)}")
    archive = str(archives.fetch("vaderSentiment"))
    reviews, dropped = _selected(archive, tuple(domains), split)
    if drops is not None:
        drops.update(dropped)
    return list(reviews)


@functools.lru_cache(maxsize=32)
def _selected(
    archive: str, domains: tuple[str, ...], split: str
) -> tuple[tuple[Review, ...], DropCounts]:
    """The reviews of a split, chosen once in the life of a process: every text is hashed."""
    reviews: list[Review] = []
    drops = DropCounts()
    for domain in domains:
        parsed, dropped = _read_domain(archive, domain)
        reviews += parsed
        drops.update(dropped)
    return tuple(select(reviews, split, drops=drops)), drops


@functools.lru_cache
def _read_domain(archive: str, domain: str) -> tuple[list[Review], DropCounts]:
    """Reads a domain once in the life of a process: every stage wants it again."""
    del archive  # The key of the cache: another folder may hold another archive.
    inner = archives.read_member("vaderSentiment", "hutto_ICWSM_2014.tar.gz")
    files = {path.split("/")[-1]: data for path, data in archives.read_tar(inner, ".txt").items()}
    texts = files[f"{DOMAINS[domain]}_GroundTruth.txt"].decode("utf-8-sig")
    votes = files[f"{DOMAINS[domain]}_anonDataRatings.txt"].decode("utf-8-sig")
    drops = DropCounts()
    return parse_reviews(domain, texts, votes, drops=drops), drops


def parse_reviews(
    domain: str, texts: str, votes: str, *, drops: DropCounts | None = None
) -> list[Review]:
    """Reads the two files of a domain, joined by their first column.

    Args:
      domain: the name that the reviews get.
      texts: lines of id, mean rating, text, separated by tabs.
      votes: lines of id, mean, standard deviation, JSON list of the votes.
      drops: counts texts that the two files rate differently (199 of the tweets).

    Raises:
      ValueError: a rating is NaN or infinite, or a row lacks a field.
    """
    drops = DropCounts() if drops is None else drops
    cast = {fields[0]: fields for fields in _table(votes, 4, f"{domain} votes")}
    reviews = []
    for key, rated, text in _table(texts, 3, f"{domain} texts"):
        if key not in cast:
            raise ValueError(f"{domain} text {key!r} has no votes")
        rating = _finite(rated, f"{domain} text {key!r}")
        marks = json.loads(cast[key][3])
        mean = _finite(sum(marks) / len(marks), f"votes on {domain} text {key!r}")
        cleaned = clean_text(text)
        if not cleaned:
            drops.drop("empty text")
        elif abs(mean - rating) > 1e-3:
            drops.drop("rated differently in two files")
        else:
            std = math.sqrt(sum((mark - mean) ** 2 for mark in marks) / len(marks))
            reviews.append(Review(domain, cleaned, rating, std, len(marks), tuple(marks)))
    return reviews


def select(
    reviews: Iterable[Review], split: str, *, drops: DropCounts | None = None
) -> list[Review]:
    """Returns the reviews of a split, the first of each group of equal normalised texts."""
    check_split(split)
    drops = DropCounts() if drops is None else drops
    seen: set[str] = set()
    kept = []
    for review in reviews:
        key = normalise(review.text)
        if split not in ("all", split_of(review.text)):
            continue
        if key in seen:
            drops.drop("duplicate text")
            continue
        seen.add(key)
        kept.append(review)
    return kept


def sft_rows(reviews: Iterable[Review]) -> list[Row]:
    """Returns one {"text"} row for each review."""
    return [{"text": review.text} for review in reviews]


def prompt_rows(
    reviews: Iterable[Review],
    *,
    words: tuple[int, int] = (2, 5),
    seed: int,
    drops: DropCounts | None = None,
) -> list[Row]:
    """Returns {"prompt"} rows: the opening words of each review, equal prompts once.

    Args:
      reviews: their order is kept.
      words: the least and the most words of a prompt (uniform between them).
      seed: of the number of words.
      drops: counts reviews that have no word left to write, and repeated prompts.
    """
    low, high = words
    if not 1 <= low <= high:
        raise ValueError(f"words={words} must be (low, high) with 1 <= low <= high")
    drops = DropCounts() if drops is None else drops
    generator = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    for review in reviews:
        parts = review.text.split(" ")
        count = int(generator.integers(low, high + 1))
        prompt = " ".join(parts[:count])
        if len(parts) <= count:
            drops.drop("review no longer than its prompt")
        elif prompt in prompts:
            drops.drop("duplicate prompt")
        else:
            prompts[prompt] = None
    return [{"prompt": prompt} for prompt in prompts]


def feedback_rows(
    reviews: Sequence[Review], *, responses: int, count: int, seed: int
) -> Iterator[Row]:
    """Yields groups of rated texts of one domain, each with the votes of its raters.

    Every text is in one group before any is in a second one. A group whose texts are all rated
    alike says nothing, and comes too.

    Args:
      reviews: texts with votes.
      responses: texts of a group.
      count: how many groups.
      seed: of the draw.

    Yields:
      Rows {"prompt": "", "responses", "votes"}; see `data.feedback_rows`.

    Raises:
      ValueError: no domain has so many texts.
    """
    domains: dict[str, list[Review]] = {}
    for review in reviews:
        domains.setdefault(review.domain, []).append(review)
    domains = {name: some for name, some in domains.items() if len(some) >= responses}
    if not domains:
        raise ValueError(f"no domain has {responses} rated texts")
    generator = np.random.default_rng(seed)
    drawn = 0
    while True:
        groups = []
        for some in domains.values():
            order = generator.permutation(len(some))
            whole = len(some) - len(some) % responses
            groups += [[some[i] for i in part] for part in order[:whole].reshape(-1, responses)]
        for place in generator.permutation(len(groups)):
            if drawn == count:
                return
            drawn += 1
            texts, votes = zip(*((one.text, list(one.marks)) for one in groups[place]), strict=True)
            yield {"prompt": "", "responses": list(texts), "votes": list(votes)}


def preference_rows(
    reviews: Sequence[Review],
    *,
    min_gap: float = 1.0,
    num_pairs: int,
    seed: int,
    votes: bool = False,
    drops: DropCounts | None = None,
) -> list[Row]:
    """Returns pairs of texts of one domain whose ratings differ by at least `min_gap`.

    Drawn without repetition by `comparisons.score_pairs`: a domain weighs as much as it has texts.

    Args:
      reviews: texts with finite ratings.
      min_gap: the least difference of mean ratings; must be positive.
      num_pairs: how many; fewer come back where fewer exist.
      seed: of the draw.
      votes: whether a pair has "p_chosen", the share of its raters who prefer the chosen.
      drops: counts pairs of identical texts.

    Returns:
      Rows {"prompt": "", "chosen", "rejected", "margin", "domain"}; margin = rating gap.

    Raises:
      ValueError: a rating is NaN or infinite (names the row), or min_gap <= 0.
    """
    comparisons.check_scores([r.rating for r in reviews], [r.text for r in reviews])
    drops = DropCounts() if drops is None else drops
    ratings, domains = [r.rating for r in reviews], [r.domain for r in reviews]
    chosen_pairs = comparisons.score_pairs(
        ratings, domains, min_gap=min_gap, num_pairs=num_pairs, seed=seed
    )
    rows: list[Row] = []
    for better, worse in chosen_pairs:
        chosen, rejected = reviews[better], reviews[worse]
        if normalise(chosen.text) == normalise(rejected.text):
            drops.drop("identical chosen and rejected")
            continue
        margin = round(chosen.rating - rejected.rating, 6)
        rows.append({"prompt": "", "chosen": chosen.text, "rejected": rejected.text})
        rows[-1] |= {"margin": margin, "domain": chosen.domain}
        if votes:
            rows[-1]["p_chosen"] = share_preferring(chosen.marks, rejected.marks)
    return rows


def _table(content: str, width: int, what: str) -> list[list[str]]:
    """Splits tab-separated lines and checks the number of columns."""
    rows = [line.rstrip("\r").split("\t") for line in content.split("\n") if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise ValueError(f"{what}: line {number} has {len(row)} fields, not {width}")
    return rows


def _finite(value: str | float, what: str) -> float:
    """Returns the number; raises ValueError naming the row if it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} has rating {value}, not a finite number")
    return number
