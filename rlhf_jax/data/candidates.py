"""Several responses to one prompt, with what they are worth: rows, documents, batches.

A row is {"prompt", "responses": [texts], "scores": [numbers]}, perhaps with an "opening" (words
with which the assistant has begun), and "ended": [bools], False for a response that was cut: such
a response is not taught to end. Higher scores are better. `experiments.curate` writes such rows.
Samples of a run also have "tokens", as they were drawn, which are read in place of the texts: half
a character has no text of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.batches import PairBatches
from rlhf_jax.data.encode import IDENTICAL_TOKENS, TOO_LONG, encode_prompt
from rlhf_jax.data.endless import Shape
from rlhf_jax.data.packing import Arrays, lay_out
from rlhf_jax.data.schemas import (
    DropCounts,
    Encoded,
    EncodedPair,
    Row,
    check_characters,
    one_line,
)
from rlhf_jax.data.templates import ChatTokenizer

FIELDS = ("prompt", "responses", "scores")


class Candidates(NamedTuple):
    """Responses to one prompt, the best first.

    Attributes:
      documents: K, each the prompt and a response; `loss_mask` is True on the response.
      scores: K numbers, falling.
    """

    documents: tuple[Encoded, ...]
    scores: tuple[float, ...]


def check_row(row: Any) -> Row:
    """Returns a row of candidates that makes sense.

    Raises:
      ValueError: no dict, a field is missing or of another type, or as many scores as responses
        are not there.
    """
    if not isinstance(row, dict):
        raise ValueError(f"candidates must be a dict of columns, not {type(row).__name__}")
    missing = [field for field in FIELDS if field not in row]
    if missing:
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(
            f"candidates need {', '.join(FIELDS)}; missing: {missing}; found: {found}: the variant "
            "rankings of experiments.curate makes such rows"
        )
    check_characters(row)
    responses, scores = row["responses"], row["scores"]
    several = len(responses) if isinstance(responses, list) else 0
    ended = row.get("ended", [True] * several)
    fields: tuple[tuple[str, Any, Any], ...] = (
        ("responses", responses, str),
        ("scores", scores, (int, float)),
        ("ended", ended, bool),
        ("tokens", row.get("tokens", [[]] * several), list),
    )
    for name, values, kinds in fields:
        if not isinstance(values, list) or not all(isinstance(one, kinds) for one in values):
            raise ValueError(f"{name} must be a list, of {_WORDS[name]}")
    if not responses or len({len(values) for _, values, _ in fields}) > 1:
        raise ValueError(
            f"{len(responses)} responses have {len(scores)} scores and {len(ended)} flags whether "
            "they ended: each response needs one"
        )
    if not all(math.isfinite(score) for score in scores):
        raise ValueError("a score is not finite")
    return row


_WORDS = {
    "responses": "texts",
    "scores": "numbers",
    "ended": "true and false",
    "tokens": "lists of ids",
}


def encode_candidates(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int,
    longest_prompt: int = 0,
    drops: DropCounts | None = None,
) -> list[Candidates]:
    """Encodes rows of candidates; those of a prompt come back with the best first.

    Of equal scores the first stays first. What is dropped is counted: a response that does not fit
    or that was given before, and a prompt of which no response is left.

    Args:
      rows: see the module.
      tokenizer: with a chat template.
      max_length: the most tokens of a prompt with a response.
      longest_prompt: the most tokens of a prompt, as the sampler read it; 0 is `max_length`.
      drops: counts responses.

    Raises:
      ValueError: a row is wrong; names the row.
    """
    longest = min(max_length, longest_prompt or max_length)
    chat, drops = ChatTokenizer(tokenizer), DropCounts() if drops is None else drops
    found = []
    for number, row in enumerate(rows):
        try:
            one = _encoded(check_row(row), chat, max_length, longest, drops)
        except ValueError as error:
            raise ValueError(f"row {number}: {one_line(error)}") from error
        if one is not None:
            found.append(one)
    return found


def _encoded(
    row: Row, chat: ChatTokenizer, max_length: int, longest: int, drops: DropCounts
) -> Candidates | None:
    prompt, counted = row["prompt"], DropCounts()
    head = encode_prompt(prompt, chat, longest, counted, opening=row.get("opening", ""))
    if head is None:
        drops.drop(next(iter(counted)), len(row["responses"]))
        return None
    stop = chat.eos_token_id if isinstance(prompt, str) else chat.stop_tokens[0]
    ended = row.get("ended", [True] * len(row["responses"]))
    known: dict[bytes, tuple[Encoded, float]] = {}
    for place in sorted(range(len(ended)), key=lambda i: -row["scores"][i]):
        if "tokens" in row:
            said = row["tokens"][place]
        else:
            said = chat.encode(chat.as_text(row["responses"][place]), first=False)
            said = [*said, *([stop] if ended[place] else [])]
        tokens = np.array([*head, *said], np.int32)
        if not len(head) < len(tokens) <= max_length:
            drops.drop(TOO_LONG if len(tokens) > max_length else "empty response")
        elif tokens.tobytes() in known:
            drops.drop(IDENTICAL_TOKENS)
        else:
            mask = np.arange(len(tokens)) >= len(head)
            known[tokens.tobytes()] = Encoded(tokens, mask), float(row["scores"][place])
            drops.keep()
    if not known:
        return None
    documents, scores = zip(*known.values(), strict=True)
    return Candidates(documents, scores)


def of_pairs(pairs: Iterable[EncodedPair]) -> list[Candidates]:
    """Pairs as candidates: the chosen response scores its margin, or 1 without one, the other 0."""
    return [
        Candidates((pair.chosen, pair.rejected), (abs(pair.margin) or 1.0, 0.0)) for pair in pairs
    ]


def extremes(groups: Iterable[Candidates]) -> list[Candidates]:
    """The best and the worst response to each prompt; none where all are worth the same."""
    return [
        Candidates((one.documents[0], one.documents[-1]), (one.scores[0], one.scores[-1]))
        for one in groups
        if one.scores[0] > one.scores[-1]
    ]


class CandidateBatches(PairBatches):
    """Token-balanced batches of candidates; `data.batches.PairBatches` with K sides.

    Each batch is {"tokens" [B, K, T] int32, "segments" [B, K, T] int32, "loss_mask" [B, K, T] bool,
    "scores" [B, K] float32, "valid" [B] bool, "index" [B] int32}, padded on the right. K is that of
    the prompt with the most; where there are fewer, the last rows are padding with score 0.

    Args:
      groups: the candidates of each prompt.
      **batching: keywords of `PairBatches`; where they say pairs they mean prompts.
    """

    def __init__(self, groups: Sequence[Candidates], **batching: Any):
        self._sides = max((len(one.documents) for one in groups), default=1)
        super().__init__(groups, **batching)  # type: ignore[arg-type]  # what is a pair there

    def _measured(self, pairs: Sequence[Any]) -> tuple[np.ndarray, int]:
        lengths = [[len(document.tokens) for document in one.documents] for one in pairs]
        return np.array([max(some) for some in lengths], np.int64), sum(map(sum, lengths))

    def _padded(self, pairs: Sequence[Any], shape: Shape) -> Arrays:
        return pad_candidates(pairs, shape, self._sides, self._pad_id)


def pad_candidates(
    groups: Sequence[Candidates], shape: Shape, sides: int, pad_id: int = 0
) -> Arrays:
    """Pads the candidates of up to `shape.rows` prompts; see `CandidateBatches`.

    Args:
      groups: at most B prompts.
      shape: B and T.
      sides: K.
      pad_id: written into padding.
    """
    scores = np.zeros((shape.rows, sides), np.float32)
    rows: list[list[Encoded]] = [[] for _ in range(shape.rows * sides)]
    for number, one in enumerate(groups):
        scores[number, : len(one.scores)] = one.scores
        for side, document in enumerate(one.documents):
            rows[number * sides + side] = [document]
    flat = lay_out(rows, shape.length, pad_id=pad_id)
    batch = {name: array.reshape(shape.rows, sides, -1) for name, array in flat.items()}
    return batch | {"scores": scores, "valid": np.arange(shape.rows) < len(groups)}
