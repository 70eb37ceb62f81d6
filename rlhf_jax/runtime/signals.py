"""Signals that ask a run to stop: one line that says what is saved, and status 130, in any phase.

A training loop takes the first as a wish, finishes its step and saves (`GracefulStop`). Elsewhere
there is nothing in memory that the disk does not have or that cannot be made again, so a command
ends where it is (`end_at_signals`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TextIO

# SIGHUP is what a closed terminal sends; Windows has none.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
STATUS = 130
# Of a command that has nobody to print for any more, as if SIGPIPE had ended it.
NO_READER = 141
# Seconds that the main thread has to answer. Python runs handlers between two of its own
# instructions, and a compilation is a single one.
PATIENCE = 2.0


class _Knowledge:
    """What handlers know."""

    saved = "what was saved before is kept"
    loop: GracefulStop | None = None
    handled = 0  # signals that the loops took
    watched = False


def remember(saved: str) -> None:
    """What is on disk now, for the line that a signal ends a command with."""
    _Knowledge.saved = saved


class GracefulStop:
    """Turns the first signal into a flag; the second one does what it would have done without.

    Use as a context manager around a training loop that looks at `requested` once per step. In a
    thread that is not the main one, as in some notebooks, Python allows no handlers: there it does
    nothing. Signals that are ignored, as SIGHUP under nohup, stay so.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Callable | int] = {}

    def __enter__(self) -> GracefulStop:
        for number in _heeded():
            self._previous[number] = signal.signal(number, self._handle) or signal.SIG_DFL
        _Knowledge.loop = self
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        _Knowledge.loop = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        _Knowledge.handled += 1
        for other in self._previous:
            if other == getattr(signal, "SIGHUP", None):
                # A terminal that closes sends it, and its shell sends it once more.
                signal.signal(other, signal.SIG_IGN)
            else:
                signal.signal(other, self._previous[other])
        say(f"\n{_name(number)}: saving after this step; once more to stop at once", sys.stdout)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def end_at_signals() -> None:
    """Makes signals end this process by one line and status 130, whatever it is doing.

    For commands, not for notebooks: the process ends without unwinding, so nothing that a library
    does on the way out can print a traceback over it. Call it again after something that may have
    set handlers of its own.
    """
    for number in _heeded():
        signal.signal(number, lambda number, frame: _end(number))
    if not _Knowledge.watched and _heeded():
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(read,), daemon=True).start()
        _Knowledge.watched = True


def reader_is_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def say(line: str, stream: TextIO) -> None:
    """Prints a line if there is somebody to read it; if not, nothing is printed from here on."""
    try:
        try:
            print(line, file=stream, flush=True)
        except RuntimeError:  # in the middle of a print, which holds the buffer: past it
            os.write(stream.fileno(), f"{line}\n".encode())
        os.write(2, b"")
    except (OSError, ValueError):  # gone, closed
        mute()


def mute() -> None:
    """Sends what is still printed nowhere: a terminal or pipe that is gone raises errors."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _heeded() -> list[int]:
    """The signals to answer: none outside of the main thread, and none that is ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def _watch(read: int) -> None:
    """Ends the process for a main thread that does not get to it, such as one that compiles."""
    arrived = 0
    while number := os.read(read, 1):
        if number[0] not in SIGNALS:
            continue
        arrived += 1
        loop = _Knowledge.loop
        if loop is not None and arrived == _Knowledge.handled + 1 and not loop.requested:
            continue  # the loop takes it after this step, however long that is
        time.sleep(PATIENCE)
        if arrived > _Knowledge.handled:
            _end(number[0])


def _end(number: int) -> None:
    with contextlib.suppress(Exception):  # the handler may have come in the middle of a flush
        sys.stdout.flush()
    say(f"{_name(number)}: stopped; {_Knowledge.saved}; the same command resumes", sys.stderr)
    os._exit(STATUS)


def _name(number: int) -> str:
    return signal.Signals(number).name
