"""The review task as a chat: the system asks for a review, the assistant writes it.

For models that were tuned to follow instructions. A prompt leaves the assistant's turn open behind
the opening words of a review, so that the policy goes on with a text that it has begun; a model of
135 M parameters that is *asked* to continue a text talks about it instead. What the reward model is
trained on, a whole turn, is what a rollout ends as.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import comparisons
from rlhf_jax.data.encode import encode_prompt, encode_response
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair, EncodedPrompt, Message, Row
from rlhf_jax.data.sets import reviews
from rlhf_jax.data.templates import open_text
from rlhf_jax.data.tokenizer import encode_piece


def ask(instruction: str) -> list[Message]:
    """Returns the messages before a review.

    The instruction is the system's message, so that the template's own, if it has one, does not
    stand there: a forward pass over it would cost as much as one over the review.
    """
    return [{"role": "system", "content": instruction}]


def response_rows(rated: Iterable[reviews.Review], instruction: str) -> list[Row]:
    """Returns {"prompt": messages, "response", "rating"} for each review."""
    return [
        {"prompt": ask(instruction), "response": review.text, "rating": review.rating}
        for review in rated
    ]


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
    """Pairs of reviews, the better one first, and how people rated both.

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
        ValueError: see `comparisons.score_pairs`; or reviews of several domains.
    """
    domains = {review.domain for review in rated}
    if len(domains) > 1:
        raise ValueError(f"reviews of several domains {sorted(domains)} cannot be asked as one")
    drops = DropCounts() if drops is None else drops
    sides: list[tuple[Encoded, float]] = []
    for row in response_rows(rated, instruction):
        encoded = encode_response(row["prompt"], row["response"], tokenizer, sys.maxsize)
        if encoded is None or len(encoded.tokens) > max_length:
            drops.drop("review longer than max_length")
        else:
            sides.append((encoded, row["rating"]))
    ratings = np.array([rating for _, rating in sides], dtype=np.float32)
    drawn = comparisons.score_pairs(
        ratings.tolist(), [""] * len(sides), min_gap=min_gap, num_pairs=num_pairs, seed=seed
    )
    drops.keep(len(drawn))
    encoded_pairs = [
        EncodedPair(sides[better][0], sides[worse][0], float(ratings[better] - ratings[worse]))
        for better, worse in drawn
    ]
    return encoded_pairs, ratings[drawn]


def encode_openings(
    rows: Iterable[Row],
    tokenizer: Any,
    instruction: str,
    *,
    max_length: int,
    drops: DropCounts | None = None,
) -> list[EncodedPrompt]:
    """Encodes rows {"prompt"}, opening words, as the beginning of the assistant's turn.

    Args:
        rows: of `reviews.prompt_rows`.
        tokenizer: with a chat template.
        instruction: the system's message.
        max_length: the most tokens; longer prompts are left out.
        drops: counts prompts.

    Raises:
        ValueError: no prompt is left.
    """
    drops = DropCounts() if drops is None else drops
    head = encode_prompt(ask(instruction), tokenizer, sys.maxsize)
    if head is None:
        raise ValueError(f"the instruction {instruction!r} alone does not fit a prompt")
    encoded = []
    for row in rows:
        opening = np.array(encode_piece(tokenizer, row["prompt"], first=False), dtype=np.int32)
        if len(head) + len(opening) > max_length:
            drops.drop("prompt longer than max_length")
            continue
        drops.keep()
        encoded.append(np.concatenate([head, opening]))
    if not encoded:
        raise ValueError(f"no prompt is left to sample from: {drops.summary()}")
    return encoded


def shown_prompt(text: str, tokenizer: Any, instruction: str) -> str:
    """The opening words out of a prompt that was decoded without special tokens."""
    ids = tokenizer.encode(open_text(ask(instruction), tokenizer), add_special_tokens=False)
    return text.removeprefix(tokenizer.decode(ids, skip_special_tokens=True))
