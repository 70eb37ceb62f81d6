"""Which split a text belongs to: a function of the text alone.

Whatever is loaded, in whatever order and for whatever stage, a text is always in the same split.
Near-duplicates (a word changed) count as different texts.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata

HALVES = ("first", "second")
SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def check_split(split: str) -> None:
    """Raises ValueError for a split that does not exist."""
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)} or all")


def clean_text(text: str) -> str:
    """Returns the text without HTML entities, doubled quotes and runs of white space."""
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = text.replace("''", '"').replace("``", '"')
    return re.sub(r"\s+", " ", text).strip()


def normalise(text: str) -> str:
    """Returns the letters and digits in lower case: equal for texts that count as one."""
    folded = unicodedata.normalize("NFKC", html.unescape(text)).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip() or folded.strip()


def split_of(text: str) -> str:
    """Returns "train", "validation" or "test": 80, 10 and 10% by a hash of the normalised text."""
    position = fraction_of(text)
    for split, share in SPLITS.items():
        if position < share:
            return split
        position -= share
    return "test"


def half_of(text: str) -> str:
    """Returns "first" or "second": one half each by a hash of the normalised text.

    It has nothing to do with the split: of each split one half is in each half.
    """
    return HALVES[_digest(text)[8] % 2]


def fraction_of(text: str) -> float:
    """Returns a number in [0, 1) that is a hash of the normalised text."""
    return int.from_bytes(_digest(text)[:8], "big") / 2**64


def _digest(text: str) -> bytes:
    return hashlib.sha256(normalise(text).encode()).digest()
