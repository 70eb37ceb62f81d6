"""Items, files of annotations and made-up people for the tests of `rlhf_jax.feedback`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rlhf_jax.feedback import store
from rlhf_jax.feedback.answers import PAIR, RANKING, SCORE, STEPS
from rlhf_jax.feedback.items import Item
from rlhf_jax.feedback.ledger import ANSWER, Event

TEXTS = {SCORE: 1, PAIR: 2, RANKING: 4, STEPS: 3}


def make_items(mode: str, count: int, gold: Any = None) -> list[Item]:
    """Items whose texts say which they are; the first has the gold answer."""
    names = () if mode == STEPS else tuple(f"policy{i}" for i in range(TEXTS[mode]))
    return [
        Item(
            mode,
            f"prompt {n}",
            tuple(f"{n}: text {i}" for i in range(TEXTS[mode])),
            names,
            gold if n == 0 else None,
        )
        for n in range(count)
    ]


def make_file(path: Path, items: list[Item], bounds: tuple[int, int] = (1, 5)) -> store.Store:
    """A file of items, open for events."""
    store.create(path, items, bounds)
    return store.Store(path)


def event(item: Item, annotator: str, answer: Any, **others: Any) -> Event:
    """An answer with the texts in their own order."""
    fields: dict[str, Any] = {
        "key": f"{annotator}/{item.id}",
        "time": "2026-11-27T00:00:00+00:00",
        "seconds": 2.0,
        "order": tuple(range(len(item.texts))),
    }
    return Event(ANSWER, item.id, annotator, answer=answer, **(fields | others))


def draw(mode: str, count: int, generator: random.Random) -> Any:
    """An answer by places, for `count` texts."""
    if mode == SCORE:
        return generator.randint(1, 5)
    if mode == PAIR:
        return generator.choice([0, 1, "tie"])
    if mode == STEPS:
        return [1, *(generator.choice([-1, 0, 1, None]) for _ in range(count - 1))]
    ranked = generator.sample(range(count), generator.randint(1, count))
    return [ranked.index(place) + 1 if place in ranked else None for place in range(count)]


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
