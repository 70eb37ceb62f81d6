"""The review task as a chat: the user gives the opening words of a review, the assistant goes on.

For models that were tuned to follow instructions: the instruction is the system's message, so that
the template's own system message, if it has one, does not stand there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import pairs, reviews
from rlhf_jax.data.rows import encode_response
from rlhf_jax.data.splits import fraction_of
from rlhf_jax.data.templates import open_text
from rlhf_jax.data.types import DropCounts, Encoded, EncodedPair, Message, Row

WORDS = (2, 5)


def ask(instruction: str, opening: str) -> list[Message]:
    """Returns the messages that ask to go on from the opening words."""
    return [
        {"role": "system", "content": instruction},
        {"role": "user", "content": opening},
    ]


def asked(rows: Iterable[Row], instruction: str) -> list[Row]:
    """Returns rows {"prompt"} with each prompt, some opening words, asked as a chat."""
    return [{**row, "prompt": ask(instruction, row["prompt"])} for row in rows]


def response_rows(
    rated: Iterable[reviews.Review],
    instruction: str,
    *,
    words: tuple[int, int] = WORDS,
    drops: DropCounts | None = None,
) -> list[Row]:
    """Returns {"prompt": messages, "response", "rating"}: each review cut behind its opening.

    How many words open a review is a hash of its text, uniform between `words`: a review is cut at
    the same place in every stage.

    Args:
        rated: their order is kept.
        instruction: the system's message.
        words: the least and the most words of an opening.
        drops: counts reviews that have no word left behind the opening.
    """
    low, high = words
    drops = DropCounts() if drops is None else drops
    rows = []
    for review in rated:
        parts = review.text.split(" ")
        # Another hash than that of the split: within a split that one covers a part of [0, 1).
        count = low + int(fraction_of(f"opening of {review.text}") * (high - low + 1))
        if len(parts) <= count:
            drops.drop("review no longer than its prompt")
            continue
        opening, rest = " ".join(parts[:count]), " ".join(parts[count:])
        row = {"prompt": ask(instruction, opening), "response": rest, "rating": review.rating}
        rows.append(row)
    return rows


def encode_pairs(
    rated: Sequence[reviews.Review],
    tokenizer: Any,
    instruction: str,
    *,
    min_gap: float,
    num_pairs: int,
    seed: int,
    max_length: int,
    drops: DropCounts | None = None,
) -> tuple[list[EncodedPair], np.ndarray]:
    """Pairs of reviews, each side behind its own opening words, and how people rated both.

    The sides answer different prompts: a reward model learns to compare across prompts, and for
    DPO the normalisers Z(x) of its derivation no longer cancel.

    Args:
        rated: reviews of one domain.
        tokenizer: with a chat template.
        instruction: the system's message.
        min_gap: the least difference of mean ratings.
        num_pairs: how many; fewer come back where fewer exist.
        seed: of the draw.
        max_length: the most tokens of a side; longer reviews are left out.
        drops: counts reviews that are left out, and pairs.

    Returns:
        The pairs, and float32 [n, 2], the ratings of chosen and rejected.

    Raises:
        ValueError: see `pairs.score_pairs`; or reviews of several domains.
    """
    domains = {review.domain for review in rated}
    if len(domains) > 1:
        raise ValueError(f"reviews of several domains {sorted(domains)} cannot be asked as one")
    drops = DropCounts() if drops is None else drops
    sides: list[tuple[Encoded, float]] = []
    for row in response_rows(rated, instruction, drops=drops):
        # Without a limit: it would cut opening words off, and a rating is of the whole review.
        encoded = encode_response(row["prompt"], row["response"], tokenizer, sys.maxsize)
        if encoded is None or len(encoded.tokens) > max_length:
            drops.drop("review longer than max_length")
        else:
            sides.append((encoded, row["rating"]))
    ratings = np.array([rating for _, rating in sides], dtype=np.float32)
    drawn = pairs.score_pairs(
        ratings.tolist(), [""] * len(sides), min_gap=min_gap, num_pairs=num_pairs, seed=seed
    )
    drops.keep(len(drawn))
    encoded_pairs = [
        EncodedPair(sides[better][0], sides[worse][0], float(ratings[better] - ratings[worse]))
        for better, worse in drawn
    ]
    return encoded_pairs, ratings[drawn]


def shown_prompt(text: str, tokenizer: Any, instruction: str) -> str:
    """The opening words out of a prompt that was decoded without special tokens."""
    probe = "zq7w"
    ids = tokenizer.encode(open_text(ask(instruction, probe), tokenizer), add_special_tokens=False)
    before, behind = tokenizer.decode(ids, skip_special_tokens=True).split(probe)
    return text.removeprefix(before).removesuffix(behind)
