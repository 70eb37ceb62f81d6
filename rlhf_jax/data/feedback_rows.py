"""Feedback in every form as scores: rows with scores, rankings, or the votes of single raters.

  {"prompt", "responses": [K texts], "scores": [K numbers]}        higher is better
  {"prompt", "responses": [K texts], "ranking": [K ranks]}         1 is best, equal ranks are ties
  {"prompt", "responses": [K texts], "votes": [K lists of marks]}  of single raters

The slide "反馈数据收集" names scores, comparisons and rankings. Comparisons are the preference rows
of `data.schemas`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.candidates import Candidates
from rlhf_jax.data.encode import encode_response
from rlhf_jax.data.schemas import DropCounts, Encoded, Row, one_line, require
from rlhf_jax.data.templates import ChatTokenizer

FORMS = ("scores", "ranking", "votes")


def scored_row(row: Row) -> Row:
    """A row with `scores`, whichever form its feedback has: ranks turned around, mean votes.

    Raises:
      ValueError: no form or several of them, another number of values than responses, or values
        that make no sense; names the field.
    """
    given = [form for form in FORMS if form in row]
    if len(given) != 1:
        raise ValueError(f"a row has {' and '.join(given) or 'no'} feedback: give one of {FORMS}")
    (form,) = given
    values, responses = row[form], row.get("responses")
    if not isinstance(responses, list) or not isinstance(values, list):
        raise ValueError(f"responses and {form} must be lists")
    if len(values) != len(responses):
        raise ValueError(f"{len(responses)} responses and {len(values)} {form}: each needs one")
    rest = {name: value for name, value in row.items() if name != form}
    if form == "ranking":
        values = [-rank for rank in _ranks(values)]
    elif form == "votes":
        values = [mean_vote(marks) for marks in values]
    return rest | {"scores": [float(_finite(value, form)) for value in values]}


def mean_vote(marks: Sequence[float]) -> float:
    """The mean of single raters' marks.

    Raises:
      ValueError: nobody voted, or a mark is not a finite number.
    """
    if not isinstance(marks, Sequence) or isinstance(marks, str) or not marks:
        raise ValueError(f"votes={marks!r} of a response must be a list of marks, at least one")
    return sum(_finite(mark, "votes") for mark in marks) / len(marks)


def share_preferring(first: Sequence[float], second: Sequence[float]) -> float:
    """The share of pairs of raters, one of each text, who mark the first text higher.

    Equal marks count one half. With the votes of one text each this is the probability that a rater
    drawn for the first is above one drawn for the second (the Mann-Whitney statistic), a soft label
    where mean ratings give a hard one.

    Args:
      first: marks of the raters of one text.
      second: of another one.

    Raises:
      ValueError: nobody voted on one of them.

    >>> share_preferring([1, 2], [2, 0])
    0.625
    """
    if not len(first) or not len(second):
        raise ValueError("nobody voted on one of the texts")
    difference = np.subtract.outer(np.asarray(first, float), np.asarray(second, float))
    return float(np.mean((difference > 0) + (difference == 0) / 2))


def _ranks(values: Sequence[Any]) -> list[int]:
    """Ranks as they must be: from 1, with ties, and none left out.

    Two responses may share a rank; the next rank is then the next number, 1 1 2, or the number that
    counts both, 1 1 3.
    """
    if not all(type(rank) is int for rank in values):
        raise ValueError(f"ranking={list(values)} must hold whole numbers, 1 for the best")
    found = sorted(values)
    dense = sorted(set(values))
    counted = [1 + found.index(rank) for rank in found]
    if dense != list(range(1, len(dense) + 1)) and counted != found:
        missing = next(rank for rank in range(1, len(values) + 1) if rank not in values)
        raise ValueError(f"ranking={list(values)} leaves out rank {missing}")
    return list(values)


def _finite(value: Any, form: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{form}: {value!r:.40} is not a finite number")
    return value


def as_pairs(row: Row) -> list[Row]:
    """Every two responses of a row that differ in worth, as preference rows; others as they are.

    A pair of scored responses has their difference as "margin", one of votes also the share of
    raters who prefer the chosen as "p_chosen".

    Raises:
      ValueError: see `scored_row`.
    """
    if "responses" not in row or "chosen" in row:  # says itself which pair it is
        return [row]
    scored = scored_row(row)
    responses, scores = scored["responses"], scored["scores"]
    found = []
    for first, second in itertools.combinations(range(len(responses)), 2):
        if scores[first] == scores[second]:
            continue
        better, worse = (first, second) if scores[first] > scores[second] else (second, first)
        pair = {"prompt": row.get("prompt", ""), "chosen": responses[better]}
        pair["rejected"] = responses[worse]
        if "ranking" not in row:
            pair["margin"] = round(scores[better] - scores[worse], 6)
        if "votes" in row:
            votes = row["votes"]
            pair["p_chosen"] = share_preferring(votes[better], votes[worse])
        found.append(pair)
    return found


def encode_ranked(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int, drops: DropCounts
) -> list[Candidates]:
    """Encodes rows of feedback; the responses to a prompt come back with the best first.

    Of equal scores the first stays first. A response that does not fit, says nothing or was given
    before is dropped and counted, and so is a prompt of which none is left.

    Args:
      rows: see the module.
      tokenizer: with a chat template.
      max_length: the most tokens of a prompt with a response.
      drops: counts responses.

    Raises:
      ValueError: a row is wrong; names the row.
    """
    chat, found = ChatTokenizer(tokenizer), []
    for number, row in enumerate(rows):
        try:
            scored = scored_row(row)
            require({"prompt": scored.get("prompt")}, ("prompt",), "a row of feedback")
            known: dict[bytes, tuple[Encoded, float]] = {}
            by_score = sorted(
                zip(scored["responses"], scored["scores"], strict=True), key=lambda one: -one[1]
            )
            for response, score in by_score:
                document = encode_response(scored["prompt"], response, chat, max_length, drops)
                if document is not None:
                    known.setdefault(document.tokens.tobytes(), (document, score))
        except ValueError as error:
            raise ValueError(f"row {number}: {one_line(error)}") from error
        if known:
            documents, scores = zip(*known.values(), strict=True)
            found.append(Candidates(documents, scores))
    return found
