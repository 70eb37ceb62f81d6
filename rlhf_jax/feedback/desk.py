"""One step of an annotator at a time: what is shown next, what is kept, what is taken back."""

from __future__ import annotations

import dataclasses
import datetime
import threading
import time
from collections.abc import Callable
from typing import Any

from rlhf_jax.data.schemas import Row
from rlhf_jax.feedback.answers import Answer, check, from_shown, to_shown
from rlhf_jax.feedback.assignment import open_items, progress, shown_order, shuffled
from rlhf_jax.feedback.items import Item
from rlhf_jax.feedback.ledger import ANSWER, SKIP, UNDO, Event, check_name
from rlhf_jax.feedback.store import Store
from rlhf_jax.runtime.errors import UserError

# Seconds for which nobody else is given the item on somebody's screen.
LEASE = 1800.0


class Behind(UserError):
    """A page does not know the annotator's last step, which another tab made."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Who does something, and after which of their steps.

    Attributes:
      annotator: name.
      turn: as the last view had it.
      key: drawn by the page for this step.
    """

    annotator: str
    turn: int
    key: str


class Desk:
    """Gives items out and takes answers in, from several annotators and tabs at a time.

    Args:
      store: the file.
      overlap: how many annotators judge an item; one with a known answer is judged by all.
      seed: of the order of items, and of places on the screen.
      clock: seconds that only grow.

    Raises:
      ValueError: `overlap` is below 1.
    """

    def __init__(
        self,
        store: Store,
        *,
        overlap: int = 1,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        if overlap < 1:
            raise ValueError(f"overlap {overlap} must be at least 1, the annotators of an item")
        self._store, self._overlap, self._seed, self._clock = store, overlap, seed, clock
        self._items = shuffled(store.sheet.items, seed)
        self._held: dict[str, tuple[str, float]] = {}  # annotator -> item, until when
        self._before: dict[str, tuple[str, Answer | None]] = {}  # what an undo took back
        self._tabs: dict[str, str] = {}
        self._one_at_a_time = threading.Lock()

    def next(self, annotator: str, tab: str) -> Row:
        """What an annotator sees now; the same until it is answered.

        Args:
          annotator: name.
          tab: drawn by each tab of a browser.

        Returns:
          "item": its "id", "mode", "prompt" and "texts" by place, or None at the end; "turn", to be
          given back with an answer; "progress"; "before": the answer, by place, that an undo took
          back, or None; "elsewhere": whether another tab was the last to ask.

        Raises:
          ValueError: the name is none.
        """
        with self._one_at_a_time:
            check_name(annotator)
            elsewhere = self._tabs.setdefault(annotator, tab) != tab
            self._tabs[annotator] = tab
            return self._view(annotator) | {"elsewhere": elsewhere}

    def answer(self, who: Step, item: str, answer: Any, seconds: float) -> Row:
        """Keeps an answer, given by places on the screen; returns what is next.

        Raises:
          Behind: the item was judged, or another tab has gone on; nothing was kept.
          ValueError: an answer of another form, or of an item that is not here.
          OSError: the disk is full or failing; nothing was kept.
        """
        return self._keep(who, ANSWER, item, seconds, answer=answer)

    def skip(self, who: Step, item: str, reason: str, seconds: float) -> Row:
        """Keeps that an annotator leaves an item to others, and why; otherwise as `answer`."""
        return self._keep(who, SKIP, item, seconds, reason=reason)

    def undo(self, who: Step) -> Row:
        """Takes back the annotator's last answer or skip that stands, which is then shown again.

        Raises:
          Behind: another tab has gone on.
          ValueError: there is nothing to take back.
        """
        with self._one_at_a_time:
            ledger = self._store.sheet.ledger
            last = ledger.last(who.annotator)
            if last is not None and last.key == who.key and last.event == UNDO:
                return self._view(who.annotator)  # sent twice
            self._check_turn(who)
            standing = ledger.standing(who.annotator)
            if not standing:
                raise ValueError("there is nothing to take back")
            item, event = standing.popitem()
            self._store.append(Event(UNDO, item, who.annotator, who.key, _now()))
            self._before[who.annotator] = item, event.answer
            self._hold(who.annotator, item)
            return self._view(who.annotator)

    def _keep(self, who: Step, kind: str, item_id: str, seconds: float, **said: Any) -> Row:
        with self._one_at_a_time:
            ledger = self._store.sheet.ledger
            item = ledger.items.get(item_id)
            if item is None:
                raise ValueError(f"item {item_id!r:.40} is not among the {len(ledger.items)} here")
            order = shown_order(item, who.annotator, self._seed)
            if kind == ANSWER:
                bounds, count = ledger.bounds, len(order)
                given = check(item.mode, said["answer"], count, bounds)
                said = {"answer": from_shown(item.mode, given, order)}
            now, places = _now(), tuple(order)
            event = Event(kind, item_id, who.annotator, who.key, now, places, seconds, **said)
            last = ledger.last(who.annotator)
            if last is not None and last.key == who.key and _same(last, event):
                return self._view(who.annotator)  # sent twice: the reply to the first was lost
            self._check_turn(who)
            self._store.append(event)
            self._held.pop(who.annotator, None)
            self._before.pop(who.annotator, None)
            return self._view(who.annotator)

    def _check_turn(self, who: Step) -> None:
        check_name(who.annotator)
        turn = self._store.sheet.ledger.turn(who.annotator)
        if who.turn != turn:
            raise Behind(
                f"{who.annotator} has gone on in another tab: this page knows {who.turn} steps of "
                f"{turn}"
            )

    def _view(self, annotator: str) -> Row:
        ledger, now = self._store.sheet.ledger, self._clock()
        held = {name: item for name, (item, until) in self._held.items() if until > now}
        found = open_items(self._items, ledger, annotator, overlap=self._overlap, held=held)
        shown = None
        if found:
            self._hold(annotator, found[0].id)
            shown = self._shown(found[0], annotator)
        item, answer = self._before.get(annotator, ("", None))
        before = None
        if found and item == found[0].id and answer is not None:
            order = shown_order(found[0], annotator, self._seed)
            before = to_shown(found[0].mode, answer, order)
        return {
            "item": shown,
            "turn": ledger.turn(annotator),
            "progress": dataclasses.asdict(progress(ledger, annotator, len(found))),
            "before": before,
        }

    def _shown(self, item: Item, annotator: str) -> Row:
        """What the page may know: neither names nor the known answer."""
        order = shown_order(item, annotator, self._seed)
        texts = [item.texts[place] for place in order]
        return {"id": item.id, "mode": item.mode, "prompt": item.prompt, "texts": texts}

    def _hold(self, annotator: str, item: str) -> None:
        self._held[annotator] = item, self._clock() + LEASE


def _same(one: Event, other: Event) -> bool:
    fields = ("event", "item", "answer", "reason")
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
