"""Digests of what a run reads, to tell whether it is what the run began with."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

_PART = 2**26  # Bytes of a file that are digested as one, on a thread of their own.
_SHOWN = 16  # Letters of a digest: 64 bits.


def of_text(*texts: str) -> str:
    """Returns a digest of texts, 16 letters."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:_SHOWN]


def of_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Returns a digest of the bytes of some files in this order, 16 letters; names do not count.

    Files are read in parts, on all cores.

    Raises:
      OSError: one of them cannot be read.
    """
    parts = [
        (Path(path), start)
        for path in paths
        for start in range(0, max(Path(path).stat().st_size, 1), _PART)
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(_of_part, parts)
        return hashlib.sha256(b"".join(digests)).hexdigest()[:_SHOWN]


def _of_part(part: tuple[Path, int]) -> bytes:
    path, start = part
    digest, left = hashlib.sha256(f"{start}:".encode()), _PART
    with path.open("rb") as file:
        file.seek(start)
        while left and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.digest()
