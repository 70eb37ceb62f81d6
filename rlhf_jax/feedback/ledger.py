"""What has been judged: events in the order in which they came, and where they lead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_jax.data.schemas import Row
from rlhf_jax.feedback.answers import Answer, check
from rlhf_jax.feedback.items import Item

EVENTS = ANSWER, SKIP, UNDO = ("answer", "skip", "undo")
LONGEST_NAME, LONGEST_REASON = 60, 500


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that an annotator did.

    Attributes:
      event: of `EVENTS`; an undo takes back the annotator's last answer or skip that stands.
      item: id of the item.
      annotator: name.
      key: drawn by the page for each submission, so that one that is sent twice counts once.
      time: when it was kept, ISO 8601 with the offset from UTC.
      order: which text was shown at each place; empty for an undo.
      seconds: for which the item was seen.
      answer: of an answer; in the item's own order of texts.
      reason: of a skip.

    Raises:
      ValueError: a field is of another form; names it.
    """

    event: str
    item: str
    annotator: str
    key: str
    time: str
    order: tuple[int, ...] = ()
    seconds: float = 0.0
    answer: Answer | None = None
    reason: str = ""

    def __post_init__(self):
        if self.event not in EVENTS:
            raise ValueError(f"event {self.event!r:.40} must be one of {', '.join(EVENTS)}")
        check_name(self.annotator)
        for field in ("item", "key", "time", "reason"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field} must be text, not {getattr(self, field)!r:.40}")
        seconds = self.seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise ValueError(f"seconds={seconds!r:.40} must be a number")
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"seconds={seconds!r:.40} must be finite, and 0 or more")
        if self.event == SKIP and not 0 < len(self.reason.strip()) <= LONGEST_REASON:
            raise ValueError(f"a skip needs a reason of 1 to {LONGEST_REASON} letters")

    def row(self) -> Row:
        """As a JSON object, without the fields that are empty."""
        row = dataclasses.asdict(self)
        needed = ("event", "item", "annotator", "key", "time")
        return {k: v for k, v in row.items() if k in needed or v not in ((), None, "", 0.0)} | (
            {"answer": self.answer} if self.event == ANSWER else {}
        )


def from_row(row: Row) -> Event:
    """The event of a JSON object.

    Raises:
      ValueError: a field is missing, unknown or of another form.
    """
    known = {field.name for field in dataclasses.fields(Event)}
    needed = ("event", "item", "annotator", "key", "time")
    missing, unknown = [k for k in needed if k not in row], sorted(set(row) - known)
    if missing or unknown:
        raise ValueError(f"an event has {', '.join(sorted(known))}; missing {missing}: {unknown=}")
    order = row.get("order", ())
    if not isinstance(order, list | tuple) or not all(type(place) is int for place in order):
        raise ValueError(f"order={order!r:.40} must be a list of whole numbers")
    return Event(**{**row, "order": tuple(order)})


def check_name(name: Any) -> str:
    """Checks the name of an annotator.

    Raises:
      ValueError: it is no text of 1 to 60 letters on one line, without blanks at its ends.
    """
    good = isinstance(name, str) and name == name.strip() and name.isprintable()
    if not good or not 0 < len(name) <= LONGEST_NAME:
        raise ValueError(
            f"annotator {name!r:.40} must be a name of 1 to {LONGEST_NAME} letters on one line"
        )
    return name


class Ledger:
    """Events of items, of which later ones may take back earlier ones.

    Args:
      items: what is judged.
      bounds: lowest and highest score.
    """

    def __init__(self, items: Sequence[Item], bounds: Sequence[float]):
        self.items = {item.id: item for item in items}
        self.bounds = tuple(bounds)
        self._standing: dict[str, dict[str, Event]] = {}  # annotator -> item -> answer or skip
        self._judged: dict[str, set[str]] = {item: set() for item in self.items}
        self._turns: dict[str, int] = {}
        self._last: dict[str, Event] = {}

    def apply(self, event: Event) -> None:
        """Enters an event.

        Raises:
          ValueError: of an item that is not here or was judged by this annotator already, an
            answer of another form, an order that is none, or an undo of what is not the last.
        """
        self.check(event)
        mine = self._standing.setdefault(event.annotator, {})
        if event.event == UNDO:
            del mine[event.item]
            self._judged[event.item].discard(event.annotator)
        else:
            mine[event.item] = event
            if event.event == ANSWER:
                self._judged[event.item].add(event.annotator)
        self._turns[event.annotator] = self.turn(event.annotator) + 1
        self._last[event.annotator] = event

    def check(self, event: Event) -> None:
        """Raises what `apply` would, and changes nothing."""
        item = self.items.get(event.item)
        if item is None:
            raise ValueError(f"item {event.item!r:.40} is not among the {len(self.items)} here")
        mine = self._standing.get(event.annotator, {})
        if event.event == UNDO:
            if not mine or next(reversed(mine)) != event.item:
                raise ValueError(f"undo of {event.item}, which is not {event.annotator}'s last")
            return
        if event.item in mine:
            raise ValueError(f"item {event.item} was judged by {event.annotator} already")
        if sorted(event.order) != list(range(len(item.texts))):
            raise ValueError(f"order {list(event.order)} must have each of {len(item.texts)} texts")
        if event.event == ANSWER:
            check(item.mode, event.answer, len(item.texts), self.bounds)

    def annotators(self) -> list[str]:
        """Everybody who did something, by name."""
        return sorted(self._turns)

    def turn(self, annotator: str) -> int:
        """How many events of an annotator there are; a page that knows fewer is behind."""
        return self._turns.get(annotator, 0)

    def last(self, annotator: str) -> Event | None:
        """The newest event of an annotator, also an undo."""
        return self._last.get(annotator)

    def standing(self, annotator: str) -> dict[str, Event]:
        """The answers and skips of an annotator that were not taken back, by item, oldest first."""
        return dict(self._standing.get(annotator, {}))

    def judges(self, item: str) -> set[str]:
        """Who answered an item; skips are not among them."""
        return set(self._judged[item])

    def answers(self) -> Iterator[tuple[Item, Event]]:
        """Every answer that stands with its item, by item and then annotator."""
        for item in self.items.values():
            for annotator in sorted(self._judged[item.id]):
                yield item, self._standing[annotator][item.id]
