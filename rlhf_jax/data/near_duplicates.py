"""Texts that say nearly the same: most runs of words of one are another's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlhf_jax.data.splits import normalise

SHINGLE = 3  # words


def near_duplicates(texts: Sequence[str], similarity: float, *, size: int = SHINGLE) -> list[int]:
    """Which earlier text each text nearly repeats; -1 where none.

    Similarity is the Jaccard index of the runs of `size` words of two texts, letter case and
    punctuation aside: runs that both have, over different runs of either. A text that is shorter is
    one run. A text is compared with those before it that repeat none themselves.

    Args:
      texts: in their order.
      similarity: above 0 and up to 1, which is the same words.
      size: words of a run.

    Returns:
      For each text the first of the most similar ones before it, or -1.

    Raises:
      ValueError: similarity is outside (0, 1].

    >>> near_duplicates(["a very good film", "Nothing else.", "A very good film!"], 1.0)
    [-1, -1, 0]
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity={similarity} must be in (0, 1]")
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes: dict[int, int] = {}
    found = []
    for number, text in enumerate(texts):
        runs = _runs(text, size)
        shared = Counter(other for run in runs for other in holders.get(run, ()))
        alike = {other: both / (len(runs) + sizes[other] - both) for other, both in shared.items()}
        best = max(alike, key=lambda other: (alike[other], -other), default=-1)
        if best >= 0 and alike[best] >= similarity:
            found.append(best)
            continue
        found.append(-1)
        sizes[number] = len(runs)
        for run in runs:
            holders.setdefault(run, []).append(number)
    return found


def _runs(text: str, size: int) -> set[tuple[str, ...]]:
    """All runs of some words of a text, or the text itself."""
    words = normalise(text).split()
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}
