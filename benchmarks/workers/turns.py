"""How a worker and the driver take turns. Standard library only: every environment can import it.

The driver writes `go` to the worker's standard input; the worker does its piece of work once and
answers with one JSON line. So two libraries can run alternately, A B A B, each in a process of its
own, while the other waits. Without a driver, `--alone N` does the work N times and prints one line.
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib import metadata


class Turns:
    """The worker's side: `hello`, then `wait` and `done` around each piece of work, then `end`.

    Attributes:
      spec: what to do, a dictionary from the driver or the command line.
      cores: how many CPU cores this process may use.
    """

    def __init__(self, *packages: str):
        parser = argparse.ArgumentParser()
        parser.add_argument("spec", type=json.loads, help="JSON: case, model, batch, lengths")
        parser.add_argument("--cores", type=int, default=2)
        parser.add_argument("--alone", type=int, default=0, help="repeats, without a driver")
        args = parser.parse_args()
        self.spec, self.cores, self._alone = args.spec, args.cores, args.alone
        self._packages = packages
        self._seconds: list[float] = []
        # What libraries print must not come between our lines.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])

    def hello(self, **facts: object) -> None:
        """Says that setting up is over."""
        self._facts = facts | {name: metadata.version(name) for name in self._packages}
        if not self._alone:
            self._say(self._facts)

    def wait(self) -> bool:
        """Waits for the next turn and starts the clock; False when there is none."""
        if self._alone:
            more = len(self._seconds) < self._alone
        else:
            more = sys.stdin.readline().strip() == "go"
        self._start = time.perf_counter()
        return more

    def done(self) -> None:
        """Stops the clock."""
        seconds = time.perf_counter() - self._start
        self._seconds.append(seconds)
        if not self._alone:
            self._say({"seconds": seconds})

    def end(self) -> None:
        """Sends the last message and exits: no library gets to finish what it would do next."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        last: dict[str, object] = {"peak_bytes": peak}
        if self._alone:
            last |= self._facts | {"seconds": self._seconds}
        self._say(last)
        os._exit(0)

    def _say(self, message: dict) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def repeat(turns: Turns, work) -> None:
    """Does `work()` at every turn."""
    while turns.wait():
        work()
        turns.done()
    turns.end()
