"""How the C library hands out the memory of arrays on the CPU."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's `mallopt` (man 3 mallopt).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def reuse_freed_memory() -> bool:
    """Tells glibc to keep what is freed for the next array, instead of returning it to the system.

    XLA's CPU programs allocate their buffers anew at every call. Above 32 MiB glibc maps each from
    the system and unmaps it when it is freed, so that every page of it is faulted in and zeroed at
    every step: a fifth of the processor time of a small training run. The process then holds its
    peak until it ends. Call it before jax starts its threads.

    Returns:
      Whether it took effect; False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    settings = (
        (_ARENA_MAX, 1),  # one heap for all threads: others could not grow beyond 64 MiB
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, 2**31 - 1),
        (_TOP_PAD, 64 * 2**20),
    )
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
