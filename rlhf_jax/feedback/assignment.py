"""Who judges what, and in which order of places: functions of the ledger and of a seed."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence

from rlhf_jax.feedback.answers import SCORE, STEPS
from rlhf_jax.feedback.items import Item
from rlhf_jax.feedback.ledger import ANSWER, Ledger

# Answers of an annotator whose median time is what an item is taken to need.
RECENT = 20


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an annotator is.

    Attributes:
      answered: items.
      skipped: items.
      left: items that the annotator may still judge, as things stand.
      seconds_left: `left` times the median seconds of the last answers; None before the first.
    """

    answered: int
    skipped: int
    left: int
    seconds_left: float | None


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """Items in an order that the seed and their ids decide; gold ones lie anywhere among them."""
    return sorted(items, key=lambda item: random.Random(f"{seed}/{item.id}").random())


def shown_order(item: Item, annotator: str, seed: int) -> list[int]:
    """The text at each place of the screen: for each annotator at random, again the same later.

    Steps, and a response alone, stand as they are.
    """
    order = list(range(len(item.texts)))
    if item.mode not in (SCORE, STEPS):
        random.Random(f"{seed}/{item.id}/{annotator}").shuffle(order)
    return order


def open_items(
    ordered: Sequence[Item],
    ledger: Ledger,
    annotator: str,
    *,
    overlap: int,
    held: Mapping[str, str],
) -> list[Item]:
    """The items that an annotator may judge, the next one first.

    An item is judged by `overlap` annotators, one with a known answer by all of them. Items that
    others have before them count as judged. What the annotator holds comes first.

    Args:
      ordered: all items, see `shuffled`.
      ledger: what was judged.
      annotator: who asks.
      overlap: how many annotators judge an item.
      held: annotator -> item on their screen.
    """
    mine = ledger.standing(annotator)
    found = []
    for item in ordered:
        seeing = {name for name, seen in held.items() if seen == item.id}
        others = (ledger.judges(item.id) | seeing) - {annotator}
        if item.id not in mine and (item.gold is not None or len(others) < overlap):
            found.append(item)
    return sorted(found, key=lambda item: item.id != held.get(annotator))


def progress(ledger: Ledger, annotator: str, left: int) -> Progress:
    """Counts of an annotator; see `Progress`."""
    events = list(ledger.standing(annotator).values())
    answers = [event for event in events if event.event == ANSWER]
    typical = statistics.median(e.seconds for e in answers[-RECENT:]) if answers else None
    seconds = None if typical is None else typical * left
    return Progress(len(answers), len(events) - len(answers), left, seconds)
