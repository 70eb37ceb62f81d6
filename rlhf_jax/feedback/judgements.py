"""The answers of one or several files about the same items, for export and agreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.feedback.answers import Answer
from rlhf_jax.feedback.items import Item
from rlhf_jax.feedback.ledger import ANSWER, Event
from rlhf_jax.feedback.store import read


@dataclasses.dataclass(frozen=True)
class Judgements:
    """What annotators said of items.

    Attributes:
      mode: of the items.
      bounds: lowest and highest score.
      items: by id.
      events: item -> annotator -> the answer or skip that stands; every item is there.
      notes: sentences about files that were cut.
    """

    mode: str
    bounds: tuple[int, int]
    items: dict[str, Item]
    events: dict[str, dict[str, Event]]
    notes: tuple[str, ...] = ()

    def annotators(self) -> list[str]:
        """Everybody who answered or skipped something, by name."""
        return sorted({name for events in self.events.values() for name in events})

    def answers(self, item: str) -> dict[str, Answer]:
        """Annotator -> answer to an item; skips are left out."""
        found = self.events[item].items()
        return {n: e.answer for n, e in sorted(found) if e.event == ANSWER and e.answer is not None}

    @property
    def count(self) -> int:
        """How many answers there are."""
        return sum(len(self.answers(item)) for item in self.items)


def combine(paths: Sequence[Path]) -> Judgements:
    """Reads files of the same items.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file is damaged, files are of different items or ranges, or two have an answer
        of the same annotator to the same item.
    """
    sheets = [read(path) for path in paths]
    first = sheets[0]
    events: dict[str, dict[str, Event]] = {item.id: {} for item in first.items}
    origin: dict[tuple[str, str], Path] = {}
    for sheet in sheets:
        if (sheet.digest, sheet.mode, sheet.bounds) != (first.digest, first.mode, first.bounds):
            shared = len({item.id for item in sheet.items} & set(events))
            raise ValueError(
                f"{first.path} and {sheet.path} are of different items or ranges: "
                f"{len(first.items)} and {len(sheet.items)} items, {shared} in both; give files "
                "that began with the same source, mode and --range"
            )
        for name in sheet.ledger.annotators():
            for item, event in sheet.ledger.standing(name).items():
                if (item, name) in origin:
                    raise ValueError(
                        f"{origin[item, name]} and {sheet.path} both have {name}'s judgement of "
                        f"item {item}: give one of the files, or rename the annotator in one"
                    )
                origin[item, name], events[item][name] = sheet.path, event
    notes = tuple(sheet.note for sheet in sheets if sheet.note)
    return Judgements(first.mode, first.bounds, first.ledger.items, events, notes)
