"""What people judge: items made of prompts and responses, in four modes.

score     one response, a number of a declared range
pair      two responses, which is better, or a tie
ranking   2 to 9 responses, ranks from 1 on; those without a rank are below those with one
steps     the steps of a solution: 1 right, 0 neutral, -1 wrong, None not marked
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.jsonl import numbered_rows
from rlhf_jax.data.schemas import (
    DropCounts,
    Message,
    Row,
    check_characters,
    check_messages,
    one_line,
)
from rlhf_jax.feedback.answers import MODES, PAIR, RANKING, SCORE, STEPS, TIE, Answer, check

# Each response of a ranking has a digit as its key.
MOST_RANKED = 9
SAME_TEXT, EARLIER = "identical responses", "seen before"


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to judge.

    Attributes:
      mode: of `MODES`.
      prompt: a text, or a list of messages.
      texts: the responses; for `steps` the steps of one.
      names: who wrote each response, as files name them; never shown. Empty for `steps`.
      gold: the answer that is known; None where none is.
      right: for `steps`, whether the final answer is right; None where nobody knows.

    Raises:
      ValueError: too few or too many responses for the mode, or a gold answer of another form.
    """

    mode: str
    prompt: str | list[Message]
    texts: tuple[str, ...]
    names: tuple[str, ...] = ()
    gold: Answer | None = None
    right: bool | None = None

    def __post_init__(self):
        count, (least, most) = len(self.texts), _COUNTS[self.mode]
        if count < least and self.mode in (PAIR, RANKING):
            raise ValueError(
                f"mode {self.mode} compares responses, and there are {count} that differ: give "
                "two or more in responses, or use mode score"
            )
        if not least <= count <= most:
            raise ValueError(f"mode {self.mode} takes {least} to {most} texts, got {count}")
        if self.gold is not None:
            try:
                check(self.mode, self.gold, count)
            except ValueError as error:
                raise ValueError(f"gold: {error}") from None

    @functools.cached_property
    def id(self) -> str:
        """16 hexadecimal digits that items of the same mode, prompt and texts share."""
        content = json.dumps([self.mode, self.prompt, self.texts], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def row(self) -> Row:
        """As a JSON object, for `from_row`."""
        return {"id": self.id, **dataclasses.asdict(self)}


_COUNTS = {SCORE: (1, 1), PAIR: (2, 2), RANKING: (2, MOST_RANKED), STEPS: (1, 1000)}


def from_row(row: Row) -> Item:
    """The item of a JSON object that `Item.row` gave.

    Raises:
      ValueError: a field is missing or of another form, or the id is not that of the content.
    """
    try:
        texts, names = tuple(row["texts"]), tuple(row["names"])
        item = Item(row["mode"], row["prompt"], texts, names, row["gold"], row["right"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"an item needs {error}") from None
    if item.id != row.get("id"):
        raise ValueError(f"item {row.get('id')!r:.40} was changed: its id is of other texts")
    return item


def digest(items: Sequence[Item]) -> str:
    """16 hexadecimal digits that equal lists of items share, whatever their order.

    >>> one, two = Item("score", "Hi", ("Hello",)), Item("score", "Hi", ("Bye",))
    >>> digest([one, two]) == digest([two, one]) != digest([one])
    True
    """
    content = "".join(sorted(item.id for item in items))
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def read_items(
    paths: Sequence[Path], mode: str, drops: DropCounts, *, limit: int = 0
) -> list[Item]:
    """The items of files of JSON lines, each once.

    A row is {"prompt", "responses"} with a list of texts or an object of name to text (as the
    responses.jsonl of runs), {"prompt", "response"}, {"prompt", "chosen", "rejected"}, or for
    `steps` {"prompt", "steps"}; there a "response" is divided at its line breaks. It may have
    "gold", the answer that is known, and for `steps` "right". Of several files, the responses to
    one prompt are put together. In mode `pair` each two of more than two responses are an item.

    Args:
      paths: of the files, gzipped or not.
      mode: of `MODES`.
      drops: counts responses that are identical to another of their prompt, and items that were
        there before.
      limit: items at most, the first ones; 0 for all.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a row is of another form (names file, line and field), or there is no item.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} must be one of {', '.join(MODES)}")
    found: dict[str, Item] = {}
    rows = _rows(paths) if len(paths) == 1 or mode in (SCORE, STEPS) else _joined(paths)
    for where, row in rows:
        try:
            check_characters(row)
            for item in _items(row, mode, drops):
                if item.id in found:
                    drops.drop(EARLIER)
                else:
                    found[item.id] = item
                    drops.keep()
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}") from error
        if limit and len(found) >= limit:
            break
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))} holds nothing to judge: {drops.summary()}")
    return list(found.values())[: limit or None]


def _rows(paths: Iterable[Path]) -> Iterator[tuple[str, Row]]:
    for path in paths:
        for number, row in numbered_rows(path):
            yield f"{path}, line {number}", row


def _joined(paths: Sequence[Path]) -> Iterator[tuple[str, Row]]:
    """Rows with the responses of all files to their prompt, by the names of file and response."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    prompts: dict[str, str | list[Message]] = {}
    for path in paths:
        for where, row in _rows([path]):
            try:
                prompt = _prompt(row)
                named = {f"{path.parent.name or path.stem}/{k}": v for k, v in _named(row).items()}
            except ValueError as error:
                raise ValueError(f"{where}: {one_line(error)}") from error
            key = json.dumps(prompt, sort_keys=True)
            prompts[key], (_, joined) = prompt, found.setdefault(key, (where, {}))
            if "gold" in row:
                raise ValueError(f"{where}: gold is of one file's responses: give that file alone")
            for name, text in named.items():
                while name in joined:
                    name += "+"
                joined[name] = text
    for key, (where, joined) in found.items():
        yield where, {"prompt": prompts[key], "responses": joined}


def _items(row: Row, mode: str, drops: DropCounts) -> Iterator[Item]:
    prompt, gold = _prompt(row), row.get("gold")
    if mode == STEPS:
        yield Item(mode, prompt, _steps(row), (), gold, _right(row))
        return
    named: dict[str, str] = {}
    for name, text in _named(row).items():
        if text in named.values():
            drops.drop(SAME_TEXT)
        else:
            named[name] = text
    groups: list[tuple[str, ...]]
    if mode == SCORE:
        groups = [(name,) for name in named]
    elif mode == PAIR and len(named) > 2:
        groups = [*itertools.combinations(named, 2)]
    else:
        # Rows whose responses are all the same say nothing; that is no mistake of the file.
        groups = [] if len(named) == 1 < len(_named(row)) else [tuple(named)]
    if gold is not None and len(groups) != 1:
        raise ValueError(f"gold is one answer, and the row makes {len(groups)} items: divide it")
    if isinstance(gold, str) and mode == PAIR and gold != TIE:
        if gold not in named:
            raise ValueError(f"gold={gold!r:.40} must be tie or one of {', '.join(named)}")
        gold = list(named).index(gold)
    for names in groups:
        yield Item(mode, prompt, tuple(named[name] for name in names), names, gold)


def _prompt(row: Row) -> str | list[Message]:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if prompt is None:
        raise ValueError(f"prompt is missing; found: {', '.join(sorted(row)) or 'none'}")
    return [{k: m[k] for k in ("role", "content")} for m in check_messages(prompt, "prompt")]


def _named(row: Row) -> dict[str, str]:
    """Name -> response."""
    given = row.get("responses")
    if given is None and isinstance(row.get("response"), str):
        given = [row["response"]]
    if given is None and {"chosen", "rejected"} <= set(row):
        given = {side: row[side] for side in ("chosen", "rejected")}
    if isinstance(given, list):
        given = {str(number): text for number, text in enumerate(given)}
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            "a row needs responses (texts, or names with texts), response, or chosen and "
            f"rejected; found: {', '.join(sorted(row))}"
        )
    for name, text in given.items():
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"responses: {name!r:.40} must be text, not {kind}")
    return dict(given)


def _steps(row: Row) -> tuple[str, ...]:
    steps: Any = row.get("steps")
    if steps is None and isinstance(row.get("response"), str):
        steps = [line for line in row["response"].splitlines(keepends=True) if line.strip()]
    if not isinstance(steps, list) or not all(isinstance(s, str) and s.strip() for s in steps):
        raise ValueError("mode steps needs steps, a list of texts, or a response with lines")
    if not steps:
        raise ValueError("steps is empty: there is nothing to mark")
    return tuple(steps)


def _right(row: Row) -> bool | None:
    right = row.get("right")
    if right is not None and not isinstance(right, bool):
        raise ValueError(f"right={right!r:.40} must be true, false or null")
    return right
