"""Write a review that people would rate highly: short texts with human sentiment ratings.

Plain, a policy goes on with the opening words of a review. With an instruction the task is a chat:
the system asks for a review, the assistant writes it. A prompt then leaves the assistant's turn
open after the opening words, so that the policy goes on with a text that it has begun; a model of
135 M parameters that is *asked* to continue a text talks about it instead. What the reward model is
trained on, a whole turn, is what a rollout ends as.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np

from rlhf_jax.data import comparisons, prepare
from rlhf_jax.data.encode import IDENTICAL_TOKENS
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.feedback_rows import share_preferring
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair, Kind, Message, Row
from rlhf_jax.data.sets import reviews
from rlhf_jax.data.splits import half_of, split_of
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.tasks.task import Task, TaskConfig


class Reviews(Task):
    """Reviews of films and products, editorials and tweets; see `data.sets.reviews`."""

    reads: ClassVar[tuple[str, ...]] = (
        "domains",
        "half",
        "instruction",
        "limit",
        "min_gap",
        "votes",
    )
    judges: tuple[str, ...] = ("vader",)

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        if not set(config.domains) <= set(reviews.DOMAINS):
            raise ValueError(
                f"data.domains={config.domains} must name some of {', '.join(reviews.DOMAINS)}"
            )

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields texts, opening words, or pairs of texts of one domain; see `Task.rows`."""
        config, loaded = self.config, self._reviews(split, drops)
        if kind == "preference":
            return reviews.preference_rows(
                loaded,
                min_gap=config.min_gap,
                num_pairs=count,
                seed=config.seed,
                votes=config.votes,
                drops=drops,
            )
        if kind == "sft":
            rows = reviews.sft_rows(loaded)
            return [self._response_row(row["text"]) for row in rows] if self._asked else rows
        rows = reviews.prompt_rows(loaded, seed=config.seed, drops=drops)
        if self._asked:
            rows = [{"prompt": self._asked, "opening": row["prompt"]} for row in rows]
        return rows

    def feedback(
        self, split: str, drops: DropCounts, *, count: int, responses: int
    ) -> Iterable[Row]:
        """Yields groups of rated texts; see `Task.feedback`."""
        rows = reviews.feedback_rows(
            self._reviews(split, drops), responses=responses, count=count, seed=self.config.seed
        )
        return (row | {"prompt": self._asked or ""} for row in rows)

    def texts(self) -> list[str]:
        """Returns all training texts of all domains: models of every variant share a vocabulary."""
        everything = reviews.load_reviews("train", domains=tuple(reviews.DOMAINS))
        return [review.text for review in everything]

    def preferences(
        self, tokenizer: Any, split: str, *, max_length: int, count: int
    ) -> Examples[EncodedPair]:
        """See `Task.preferences`; in a chat, pairs of reviews that fit, see `rated`."""
        settings = {"max_length": max_length, "count": count}
        if self._asked:
            return Examples(self.rated(tokenizer, split, **settings)[0])
        return super().preferences(tokenizer, split, **settings)

    def rated(
        self, tokenizer: Any, split: str, *, max_length: int, count: int
    ) -> tuple[list[EncodedPair], np.ndarray]:
        """Returns pairs of reviews in a chat and float32 `[n, 2]`, the ratings of both.

        Raises:
          ValueError: there is no instruction, or the reviews are of several domains.
        """
        self.check_ratings()
        drops = DropCounts()
        loaded = self._reviews(split, drops)
        domains = {review.domain for review in loaded}
        if len(domains) > 1:
            raise ValueError(f"reviews of several domains {sorted(domains)} cannot be asked as one")
        rows = [self._response_row(review.text) for review in loaded]
        sides: list[tuple[Encoded, reviews.Review]] = []
        # Encoded before pairs are drawn: a review stands in many pairs.
        encoded = prepare.encoded_rows("sft", rows, tokenizer, max_length=sys.maxsize)
        for review, document in zip(loaded, encoded, strict=True):
            if document is None or len(document.tokens) > max_length:
                drops.drop("review longer than max_length")
            else:
                sides.append((document, review))
        pairs, ratings = self._drawn(sides, count, drops)
        print(f"pairs ({split}): {drops.summary()}")
        self.note("preference", split, pairs)
        return pairs, ratings

    def check_ratings(self) -> None:
        """See `Task.check_ratings`: reviews in a chat are rated as they stand."""
        if not self._asked:
            super().check_ratings()

    def _drawn(
        self, sides: list[tuple[Encoded, reviews.Review]], count: int, drops: DropCounts
    ) -> tuple[list[EncodedPair], np.ndarray]:
        """Draws pairs of encoded reviews, the better one first."""
        ratings = np.array([review.rating for _, review in sides], dtype=np.float32)
        drawn = comparisons.score_pairs(
            ratings.tolist(),
            [""] * len(sides),
            min_gap=self.config.min_gap,
            num_pairs=count,
            seed=self.config.seed,
        )
        pairs = []
        for better, worse in drawn:
            (chosen, high), (rejected, low) = sides[better], sides[worse]
            p_chosen = share_preferring(high.marks, low.marks) if self.config.votes else 1.0
            margin = float(ratings[better] - ratings[worse])
            pairs.append(EncodedPair(chosen, rejected, margin, p_chosen))
        differ = [not np.array_equal(pair.chosen.tokens, pair.rejected.tokens) for pair in pairs]
        drops.keep(sum(differ))
        drops.drop(IDENTICAL_TOKENS, len(pairs) - sum(differ))
        return list(itertools.compress(pairs, differ)), ratings[drawn[differ]]

    def rated_texts(self, split: str) -> tuple[list[str], np.ndarray]:
        """Returns the reviews of a split and the means of people's votes, in [-4, 4]."""
        loaded = self._reviews(split, DropCounts())
        return [review.text for review in loaded], np.array([review.rating for review in loaded])

    def references(self, tokenizer: Any, *, max_length: int, count: int) -> list[Encoded]:
        """Returns the first training texts."""
        rows = list(self.rows("sft", "train", DropCounts()))[:count]
        found = prepare.prepared(
            "sft",
            lambda: rows,
            tokenizer,
            max_length=max_length,
            drops=DropCounts(),
            name="reference reviews",
        )
        return list(found)

    def shown(self, tokenizer: Any) -> Callable[[str], str]:
        """Returns what of a decoded prompt is shown and judged: in a chat, the opening words."""
        if not self._asked:
            return super().shown(tokenizer)
        before = ChatTokenizer(tokenizer).open_text(self._asked)
        ids = tokenizer.encode(before, add_special_tokens=False)
        before = tokenizer.decode(ids, skip_special_tokens=True)
        return functools.partial(_without, before=before)

    @property
    def _asked(self) -> list[Message]:
        """The messages before a review; none without an instruction.

        The instruction is the system's message, so that the template's own, if it has one, is
        left out: a forward pass over it would cost as much as one over the review.
        """
        instruction = self.config.instruction
        return [{"role": "system", "content": instruction}] if instruction else []

    def _response_row(self, text: str) -> Row:
        return {"prompt": self._asked, "response": text}

    def _reviews(self, split: str, drops: DropCounts) -> list[reviews.Review]:
        loaded = self._read(split, drops)
        if self.config.half:
            kept = [review for review in loaded if self._is_of_half(review.text)]
            drops.drop("of the other half", len(loaded) - len(kept))
            loaded = kept
        return loaded[: self.config.limit or None]

    def _read(self, split: str, drops: DropCounts) -> list[reviews.Review]:
        domains = self.config.domains or ("movie", "amazon")
        return reviews.load_reviews(split, domains=domains, drops=drops)

    def _is_of_half(self, text: str) -> bool:
        """Whether a text is of the half that is read; one that is held out is of both."""
        return split_of(text) != "train" or half_of(text) == self.config.half


def _without(text: str, before: str) -> str:
    return text.removeprefix(before)
