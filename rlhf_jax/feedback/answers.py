"""Answers in each mode: their form, and the way from the places on the screen to the item's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MODES = SCORE, PAIR, RANKING, STEPS = ("score", "pair", "ranking", "steps")
TIE = "tie"
LABELS = (-1, 0, 1)
# `score`: a number. `pair`: 0 or 1, the better response, or "tie". `ranking`: the rank of each
# response, None without one. `steps`: a label of each step, None where it is not marked.
Answer = float | int | str | list[int | None]


def check(
    mode: str, answer: Any, count: int, bounds: Sequence[float] = (-math.inf, math.inf)
) -> Answer:
    """Checks the form of an answer.

    Args:
      mode: of `MODES`.
      answer: what was given.
      count: how many texts the item has.
      bounds: lowest and highest score.

    Returns:
      The answer.

    Raises:
      ValueError: it is no answer in this mode; says what would be.

    >>> check("ranking", [2, 1, None], 3)
    [2, 1, None]
    >>> check("ranking", [2, 2, None], 3)
    Traceback (most recent call last):
    ValueError: ranking [2, 2, None] gives rank 2 twice: ranks are 1, 2, ... with each once
    """
    if mode == SCORE:
        low, high = bounds
        if not _is_number(answer) or not low <= answer <= high:
            declared = f"a number from {low:g} to {high:g}, the declared range"
            raise ValueError(f"score {answer!r:.40} must be {declared}")
        return answer
    if mode == PAIR:
        if answer != TIE and (type(answer) is not int or answer not in (0, 1)):
            raise ValueError(f"choice {answer!r:.40} must be 0, 1 or 'tie'")
        return answer
    if not isinstance(answer, list) or len(answer) != count:
        raise ValueError(f"{mode} {answer!r:.60} must be a list of {count} entries, one for each")
    if mode == STEPS:
        for number, label in enumerate(answer):
            if label is not None and (type(label) is not int or label not in LABELS):
                raise ValueError(f"label {number} is {label!r:.40}, must be -1, 0, 1 or null")
        if all(label is None for label in answer):
            raise ValueError("no step is marked: mark one, or skip the solution")
        return answer
    return _ranking(answer)


def from_shown(mode: str, answer: Answer, order: Sequence[int]) -> Answer:
    """An answer by places on the screen, as one by the item's own order of texts.

    Args:
      mode: of `MODES`.
      answer: of places: that of a pair says which place is better, a ranking has a rank a place.
      order: the text that was shown at each place.

    >>> from_shown("ranking", [1, 2, None], [2, 0, 1])
    [2, None, 1]
    """
    if mode == PAIR and answer != TIE:
        return order[int(answer)]  # type: ignore[arg-type]
    if isinstance(answer, list):
        own: list[int | None] = [None] * len(answer)
        for place, text in enumerate(order):
            own[text] = answer[place]
        return own
    return answer


def to_shown(mode: str, answer: Answer, order: Sequence[int]) -> Answer:
    """The inverse of `from_shown`.

    >>> to_shown("pair", from_shown("pair", 0, [1, 0]), [1, 0])
    0
    """
    if mode == PAIR and answer != TIE:
        return list(order).index(int(answer))  # type: ignore[arg-type]
    if isinstance(answer, list):
        return [answer[text] for text in order]
    return answer


def outcome(mode: str, answer: Answer, one: int, other: int) -> int | None:
    """Which of two texts an answer to a pair or a ranking prefers.

    Args:
      mode: "pair" or "ranking".
      answer: in the item's own order of texts.
      one: index of a text.
      other: index of another.

    Returns:
      1 for `one`, -1 for `other`, 0 for a tie; None where the answer does not say, as of two
      responses without a rank.

    >>> outcome("ranking", [2, 1, None, None], 0, 3), outcome("ranking", [2, 1, None, None], 2, 3)
    (1, None)
    """
    if mode == PAIR:
        return 0 if answer == TIE else 1 if answer == one else -1
    assert isinstance(answer, list)
    ranks = [rank if (rank := answer[text]) is not None else math.inf for text in (one, other)]
    return None if ranks[0] == ranks[1] else 1 if ranks[0] < ranks[1] else -1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ranking(answer: list[Any]) -> Answer:
    ranks = [rank for rank in answer if rank is not None]
    if not ranks:
        raise ValueError("no response has a rank: rank one, or skip the prompt")
    for rank in ranks:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank {rank!r:.40} must be a whole number from 1 on, or null")
    for rank in ranks:
        if ranks.count(rank) > 1:
            raise ValueError(
                f"ranking {answer} gives rank {rank} twice: ranks are 1, 2, ... with each once"
            )
    for rank in range(1, len(ranks) + 1):
        if rank not in ranks:
            raise ValueError(
                f"ranking {answer} has no rank {rank}: ranks are 1, 2, ... without a gap"
            )
    return answer
