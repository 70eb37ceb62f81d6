"""One process at a time works in a run folder: a lock that ends when the process does."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.errors import UserError
from rlhf_jax.runtime.files import make_folder, naming

LOCK_FILE = ".lock"
# Folders that this process holds, with the open file that the lock is on.
_held: dict[Path, int] = {}


class FolderInUse(UserError):
    """Another process works in a run folder.

    Attributes:
      folder: The run folder.
    """

    def __init__(self, folder: Path, holder: str):
        super().__init__(
            f"{folder} is in use by {holder}: wait for it, stop it, or choose another "
            "--config.workdir"
        )
        self.folder = folder


def claim(folder: str | Path) -> bool:
    """Locks a run folder for this process, until `release` or its end; makes it where missing.

    Process 0 locks for all processes of a job. A file system that has no locks is told of, and the
    run goes on without.

    Args:
      folder: The run folder.

    Returns:
      Whether this call locked it; False where this process holds it already, or nobody can.

    Raises:
      FolderInUse: another process holds it; the same in all processes of a job.
      OSError: the folder cannot be written to, or is none; names it.
    """
    folder = Path(folder).absolute()
    taken, holder = distributed.from_main(_take(folder) if distributed.is_main() else (False, ""))
    if holder:
        raise FolderInUse(folder, holder)
    return taken


def release(folder: str | Path) -> None:
    """Lets others have a folder; nothing where this process does not hold it."""
    opened = _held.pop(Path(folder).absolute(), None)
    if opened is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_UN)
        os.close(opened)


@contextlib.contextmanager
def released_after() -> Iterator[None]:
    """Lets others have, at its end, every folder that was claimed within and is held still.

    For a process that lives on after a run has failed, such as that of a notebook.
    """
    before = set(_held)
    try:
        yield
    finally:
        for folder in set(_held) - before:
            release(folder)


def holder(folder: str | Path) -> str:
    """Which other process holds a folder; empty where none does or nobody can tell."""
    folder = Path(folder).absolute()
    if _is_ours(folder) or fcntl is None:
        return ""
    try:
        opened = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _name(opened)
    except OSError:
        return ""
    finally:
        os.close(opened)
    return ""


def _take(folder: Path) -> tuple[bool, str]:
    """Whether the lock was taken now, and who holds it in the way."""
    if _is_ours(folder):
        return False, ""
    make_folder(folder)
    if fcntl is None:
        return False, ""
    with naming(folder / LOCK_FILE):
        opened = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(opened):
                return False, _name(opened)
            stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            me = f"process {os.getpid()} on {socket.gethostname()} since {stamp}"
            os.ftruncate(opened, 0)
            os.pwrite(opened, f"{me}\n".encode(), 0)
        except _NoLocks as reason:
            print(f"note: {folder} cannot be locked ({reason}): start one run at a time in it")
            return False, ""
        else:
            if not _held:
                os.register_at_fork(after_in_child=_forget)
            _held[folder], opened = opened, -1
            return True, ""
        finally:
            if opened >= 0:
                os.close(opened)


class _NoLocks(Exception):
    """The file system has none, as NFS without a lock service."""


def _lock(opened: int, attempts: int = 5) -> bool:
    """Whether the file is locked; somebody who only looks who holds it is waited for."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(0.1)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
        except OSError as error:
            raise _NoLocks(error.strerror) from None
    return False


def _is_ours(folder: Path) -> bool:
    """Whether this process holds the folder as it is now: it may have been removed since."""
    opened = _held.get(folder)
    if opened is None:
        return False
    try:
        same = os.path.samestat(os.fstat(opened), os.stat(folder / LOCK_FILE))
    except OSError:
        same = False
    if not same:
        release(folder)
    return same


def _name(opened: int) -> str:
    """What the holder wrote about itself."""
    return os.pread(opened, 200, 0).decode(errors="replace").strip() or "another process"


def _forget() -> None:
    """In a forked child: a child that outlives its parent must not hold the parent's lock."""
    for opened in _held.values():
        os.close(opened)
    _held.clear()
