"""How the C library hands out the memory of arrays on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Parameters of glibc's `mallopt` (man 3 mallopt), and of Linux' `madvise` (man 2 madvise).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_HUGE_PAGES = 14
_HUGE_PAGE = 2 * 2**20
_CGROUPS = Path("/sys/fs/cgroup")


def reuse_freed_memory() -> bool:
    """Tells glibc to keep what is freed for the next array, and to use pages of 2 MiB.

    XLA's CPU programs allocate their buffers again at every call. Above 32 MiB glibc maps each from
    the system and unmaps it when it is freed, so that every page of it is faulted in and zeroed at
    every step: a fifth of the processor time of a small training run. And with pages of 4 KiB the
    weights of even a small model are more pages than a processor keeps track of, which slows down
    sampling by 5 to 10% on one or two cores. The process then holds what it has freed, which is
    more than it ever needed at once where programs of several shapes take turns: see
    `release_freed_memory`.
    Call it before jax starts its threads.

    Returns:
      Whether freed memory is kept; False where the C library is not glibc.
    """
    libc = _glibc()
    if libc is None:
        return False
    settings = (
        (_ARENA_MAX, 1),  # one heap for all threads: others could not grow beyond 64 MiB
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, -1),  # never
        (_TOP_PAD, 64 * 2**20),
    )
    kept = all([libc.mallopt(parameter, value) == 1 for parameter, value in settings])
    if kept:
        # Linux refuses more than it has at once.
        _advise_huge_pages(libc, _memory_of_machine() // 8 * 7)
    return kept


def release_freed_memory(above: float = 0.4) -> bool:
    """Gives what is freed back to the system once the process holds much of the memory it may have.

    The counterpart of `reuse_freed_memory`, for between two steps: blocks of one program that do
    not fit the next one would otherwise add up. In a container, a Slurm job or a service the limit
    of its control group counts, beyond which the kernel kills: see `memory_limit`.

    Args:
      above: share of that memory up to which nothing is done.

    Returns:
      Whether memory was given back.
    """
    libc = _glibc()
    if libc is None:
        return False
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident <= above * memory_limit():
        return False
    return libc.malloc_trim(0) == 1


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process if it is glibc on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def memory_limit(groups: Path = Path("/proc/self/cgroup"), mount: Path = _CGROUPS) -> int:
    """Bytes that this process may have: the least of the machine's memory and its groups' limits.

    A control group of Linux is bound by those above it, too. Of version 2 `memory.max` and
    `memory.high` count, of version 1 `memory.limit_in_bytes`. In a container the path of the group
    may be the one that it has outside; the container's own group is then what is mounted.

    Args:
      groups: the file that says which groups the process is in.
      mount: where control groups are mounted.
    """
    limits = [_memory_of_machine()]
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # no Linux, or none with groups
        return limits[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for root in (mount, mount / "unified"):
                limits += _limits(root, path, ("memory.max", "memory.high"))
        elif "memory" in controllers.split(","):
            limits += _limits(mount / "memory", path, ("memory.limit_in_bytes",))
    return min(limits)


def _limits(root: Path, path: str, files: tuple[str, ...]) -> Iterator[int]:
    """Limits of a group and of those above it; "max", and what cannot be read, is none."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        for name in files:
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / name).read_text())
                if limit > 0:
                    yield limit
        if folder == root:
            return


def _memory_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _advise_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Asks for huge pages in the next `size` bytes of the heap.

    The heap is made to grow by that much address space, and given back to the allocator without
    having been touched: it takes no memory. Where the system does not allow it, nothing changes.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if not block:
        return
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, _HUGE_PAGES)
    libc.free(block)
