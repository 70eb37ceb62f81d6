"""The file of annotations: items, then a line for each event, on the disk before it counts.

JSON lines. The first is {"annotations": 1, "mode", "range", "items", "digest"}; as many lines with
items follow, then events. The beginning appears whole or not at all; each event is one write, and
the disk has it before anybody is told that it counts. A file that a crash or a full disk cut
within its last line is that of all lines before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from rlhf_jax.data.schemas import one_line
from rlhf_jax.feedback import items, ledger
from rlhf_jax.feedback.answers import MODES, SCORE, check
from rlhf_jax.feedback.items import Item
from rlhf_jax.feedback.ledger import Event, Ledger
from rlhf_jax.runtime.errors import UserError
from rlhf_jax.runtime.files import make_folder, naming, write_whole

VERSION = 1
# Most values of a range: each has a digit as its key.
MOST_VALUES = 10


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A file as it was read.

    Attributes:
      path: of the file.
      mode: of its items.
      bounds: lowest and highest score.
      items: in the order of the file.
      digest: equal for equal items in whatever order.
      ledger: all that was judged.
      whole: bytes up to the end of the last whole line.
      note: a sentence where the last line was cut; empty otherwise.
    """

    path: Path
    mode: str
    bounds: tuple[int, int]
    items: list[Item]
    digest: str
    ledger: Ledger
    whole: int
    note: str


def check_bounds(bounds: Sequence[int]) -> tuple[int, int]:
    """Checks a range of scores.

    Raises:
      ValueError: it is not of 2 to 10 whole numbers.
    """
    low, high = bounds
    if not (type(low) is int and type(high) is int and 1 <= high - low < MOST_VALUES):
        raise ValueError(
            f"range {low} {high} must be two whole numbers, the lower first, with 2 to "
            f"{MOST_VALUES} values, so that each has a key"
        )
    return low, high


def create(path: Path, found: Sequence[Item], bounds: Sequence[int]) -> None:
    """Writes a file without events: the whole of its beginning or nothing.

    Raises:
      OSError: it cannot be written, or is there already; names it.
      ValueError: items of several modes, two that are the same, or a gold score out of the range.
    """
    bounds, modes = check_bounds(bounds), {item.mode for item in found}
    if len(modes) != 1 or len({item.id for item in found}) != len(found):
        raise ValueError(f"items must be of one mode and differ, got {len(found)} of {modes}")
    (mode,) = modes
    for item in found:
        if mode == SCORE and item.gold is not None:
            check(mode, item.gold, 1, bounds)
    make_folder(path.parent)
    if path.exists():
        raise FileExistsError(17, "is there already", str(path))
    head = {
        "annotations": VERSION,
        "mode": mode,
        "range": list(bounds),
        "items": len(found),
        "digest": items.digest(found),
    }
    rows = [head, *(item.row() for item in found)]
    write_whole(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def read(path: Path) -> Sheet:
    """Reads a file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no such file, or a line before the last is damaged; names the line.
    """
    with naming(path):
        content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    whole, note = len(content) - len(rest), ""
    if _is_object(rest):  # only the line break is missing, as some editors leave it
        lines, whole = [*lines, rest], len(content)
    elif rest.strip():
        note = (
            f"{path}: the last line is cut and left out ({len(rest)} bytes); the {len(lines)} "
            "whole lines before it count"
        )
    try:
        head = _object(lines[0] if lines else b"")
        mode, count = head["mode"], head["items"]
        if head["annotations"] != VERSION or mode not in MODES or type(count) is not int:
            raise ValueError("version, mode or number of items")
        bounds = check_bounds(head["range"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of annotations: its first line has no {one_line(error)}"
        ) from None
    found: list[Item] = []
    sheet: Ledger | None = None
    if len(lines) <= count:
        raise ValueError(f"{path} has {len(lines) - 1} of its {count} items: it was cut, copy it")
    for number, line in enumerate(lines[1:], 2):
        try:
            if number <= count + 1:
                found.append(items.from_row(_object(line)))
                continue
            sheet = sheet or Ledger(found, bounds)
            if line.strip():
                sheet.apply(ledger.from_row(_object(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {one_line(error)}") from error
    digest = items.digest(found)
    if digest != head.get("digest") or {item.mode for item in found} != {mode}:
        raise ValueError(f"{path} was changed: its items are not those of its first line")
    ended = sheet or Ledger(found, bounds)
    return Sheet(path, mode, bounds, found, digest, ended, whole, note)


class FileInUse(UserError):
    """Another process adds to a file of annotations."""


class Store:
    """A file that is open for more events; one process at a time.

    Args:
      path: of a file that `create` wrote.

    Attributes:
      sheet: what was read at the start; its ledger takes in every event.

    Raises:
      FileInUse: another process has it open.
      ValueError: see `read`.
    """

    def __init__(self, path: Path):
        with naming(path):
            self._file = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            self._lock(path)
            self.sheet = read(path)
            # What was cut was never acknowledged, and the next line must not be glued to it.
            os.ftruncate(self._file, self.sheet.whole)
            self._size = self.sheet.whole
            with naming(path):
                if os.pread(self._file, 1, self._size - 1) != b"\n":
                    self._write(b"\n")
        except BaseException:
            os.close(self._file)
            raise
        self._one_at_a_time = threading.Lock()

    def append(self, event: Event) -> None:
        """Adds an event; it counts once the disk has it.

        Raises:
          ValueError: see `Ledger.apply`; nothing was written.
          OSError: the disk is full or failing; the file is as it was before.
        """
        with self._one_at_a_time, naming(self.sheet.path):
            self.sheet.ledger.check(event)
            self._write(json.dumps(event.row(), ensure_ascii=False).encode() + b"\n")
            self.sheet.ledger.apply(event)

    def close(self) -> None:
        """Lets others have the file."""
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def _lock(self, path: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileInUse(
                f"{path} is in use by another server: stop it, or give another --out"
            ) from None
        except OSError as reason:
            print(f"note: {path} cannot be locked ({reason}): start one server at a time for it")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"JSON object, but {value!r:.40}")
    return value
