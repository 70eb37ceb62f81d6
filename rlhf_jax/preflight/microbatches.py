"""The largest microbatch that fits, by compiling few."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a number of microbatches takes.

    Attributes:
      count: microbatches of an update.
      rows: rows of one, over all devices.
      peak: bytes of a device, in that program of those in microbatches that takes the most.
      missing: bytes of a device that are missing; 0 or less where it fits.
      program: that program's name.
    """

    count: int
    rows: int
    peak: int
    missing: int
    program: str

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.missing <= 0


def search(first: Trial, counts: Sequence[int], attempt: Callable[[int], Trial]) -> list[Trial]:
    """Doubles the microbatch that the config asks for until it no longer fits, or halves it until
    it does.

    Where rows do not halve, the next number of microbatches that divides them is taken.

    Args:
      first: the trial of the config's own number.
      counts: numbers that there may be, rising.
      attempt: makes a trial; each is a compilation.

    Returns:
      All trials, the first one included, in the order in which they were made.
    """
    tried = [first]
    while True:
        now = tried[-1].count
        if first.fits:
            following = [count for count in counts if 2 * count <= now][-1:]
        else:
            following = [count for count in counts if count >= 2 * now][:1]
        if not following:
            return tried
        tried.append(attempt(following[0]))
        if tried[-1].fits != first.fits:
            return tried


def largest(tried: Sequence[Trial]) -> Trial | None:
    """The fitting trial with the largest microbatch; None where none fits."""
    return min((one for one in tried if one.fits), key=lambda one: one.count, default=None)
