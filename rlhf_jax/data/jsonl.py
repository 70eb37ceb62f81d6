"""JSON lines, gzipped or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.data.schemas import Row


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSON-lines file, one by one; see `numbered_rows`."""
    for _, row in numbered_rows(path):
        yield row


def numbered_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a JSON-lines file with the number of their line, from 1.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is no JSON object (names file and line), or the file is damaged, Parquet
        or UTF-16.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        _check_format(existing(path))
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parsed(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read: {error} (half a download, or a pointer of Git LFS: fetch the "
            "file again)"
        ) from error


def _check_format(path: Path) -> None:
    """Names what a file is that is no text in UTF-8; a byte-order mark of UTF-8 is passed over."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        raise ValueError(
            f"{path} is a Parquet file: write its rows as JSON lines, as by "
            "datasets.Dataset.from_parquet(PATH).to_json(FILE)"
        )
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16 (or 32): save it as UTF-8")


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON that can be read: {error}") from error
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
