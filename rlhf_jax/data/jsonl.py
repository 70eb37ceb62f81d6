"""JSON lines, gzipped or not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.data.schemas import Row


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSON-lines file, one by one.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is no JSON object; names the file and the line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(existing(path), "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parsed(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error} (half a download, or a pointer of Git LFS: fetch the "
            "file again)"
        ) from error


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, not {row!r:.40}")
    return row


def stamps(paths: Iterable[Path]) -> list[Any]:
    """Returns path, size and time of files: equal where nothing was changed."""
    found = [(path.resolve(), path.stat()) for path in paths]
    return [[str(path), info.st_size, info.st_mtime_ns] for path, info in found]


def existing(path: Path) -> Path:
    """Returns the path.

    Raises:
      FileNotFoundError: it is no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file of JSON lines, one row each")
    return path
