"""Files that appear whole or not at all, and errors that say which file they are about."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file. A kill, a crash or a full disk leaves what was there before.

    Raises:
      OSError: it cannot be written; names `path`.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
            put(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder, with those above it, unless it is there; either way a file can be put there.

    Raises:
      OSError: a file is in the way, or nothing can be written there; names `path`.
    """
    path = Path(path)
    with naming(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, "a file is there, and no folder") from None
        # Permissions do not say whether a disk is read-only, or whether a server agrees.
        with tempfile.TemporaryFile(dir=path):
            pass


def put(scratch: Path, path: Path) -> None:
    """Gives a file or folder that was written beside `path` its name, once the disk has it all."""
    sync(scratch)
    os.replace(scratch, path)
    _sync_one(path.parent)


def sync(path: Path) -> None:
    """Waits until the disk has a file, or a folder and all that is in it."""
    for within in path.rglob("*") if path.is_dir() else ():
        _sync_one(within)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    """A file, or the names in a folder, where the file system can do that."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(opened)


def read_json(path: str | os.PathLike[str], advice: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: The file.
      advice: What to do where it is none, for the message.

    Raises:
      ValueError: it is torn, or no JSON object; names `path`.
    """
    with naming(path):
        content = Path(path).read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        state = "is torn or no JSON" if content.strip() else "is empty"
        reason = f" ({error})" if content.strip() else ""
        raise ValueError(f"{path} {state}{reason}: {advice}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: {advice}")
    return value


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes errors of the system within be about `path`.

    A write to an open file fails without naming it, and the name of a scratch file says little.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
