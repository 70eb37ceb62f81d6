"""Progress of a stage: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Self, TextIO

from rlhf_jax.runtime.metrics import as_float


class Progress:
    """A progress bar on a terminal; elsewhere a line now and then. Made by `progress`."""

    def __init__(
        self,
        total: int | None,
        desc: str,
        initial: int = 0,
        *,
        every_seconds: float = 30.0,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._desc, self._done = total, desc, initial
        self._every = every_seconds
        self._start = time.monotonic()
        self._last_print = -math.inf
        self._unprinted = False
        self._shown: dict[str, str] = {}
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=desc, initial=initial, file=self._stream)

    def update(self, n: int = 1) -> None:
        """Moves on by `n`."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
            return
        self._unprinted = True
        if time.monotonic() - self._last_print >= self._every:
            self._print_line()

    def set_postfix(self, shown: Mapping[str, Any]) -> None:
        """Shows these numbers (or texts) from the next update on."""
        self._shown = {
            name: value if isinstance(value, str) else f"{as_float(name, value):.4g}"
            for name, value in shown.items()
        }
        self._unprinted = True
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def write(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the last state and ends the bar."""
        if self._bar is not None:
            self._bar.close()
        elif self._unprinted:
            self._print_line()

    def _print_line(self) -> None:
        total = "" if self._total is None else f"/{self._total}"
        head = [f"{self._desc}: {self._done}{total}", f"{time.monotonic() - self._start:.0f} s"]
        shown = [f"{name} {text}" for name, text in self._shown.items()]
        print(", ".join(head + shown), file=self._stream, flush=True)
        self._unprinted = False
        self._last_print = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def progress(total: int | None, desc: str, initial: int = 0) -> Progress:
    """A tqdm bar on standard error; where that is no terminal, a line every 30 seconds instead.

    Args:
      total: number of steps, or None when it is unknown.
      desc: what is being counted, e.g. "SFT".
      initial: steps that an earlier, interrupted run has done.
    """
    return Progress(total, desc, initial)
