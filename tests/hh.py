"""A folder in the format of HH-RLHF, made up: two parts, some files gzipped."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np

WORDS = [
    "the",
    "a",
    "sea",
    "film",
    "people",
    "story",
    "friend",
    "kind",
    "wide",
    "old",
    "what",
    "how",
    "why",
    "do",
    "you",
    "like",
    "think",
    "of",
]


def pair(rng: np.random.Generator, turns: int, number: int) -> dict[str, str]:
    """Transcripts of some turns that differ in the last answer; every question has the number."""

    def say(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(2, most)))

    talk = ""
    for turn in range(turns):
        talk += f"\n\nAssistant: {say(8)}" if turn else ""
        talk += f"\n\nHuman: {say(6)} {number}?"
    return {side: f"{talk}\n\nAssistant: {say(8)} {side}" for side in ("chosen", "rejected")}


def write_folder(folder: Path, *, train: int = 60, test: int = 60, seed: int = 0) -> str:
    """Writes helpful-base and harmless-base; returns the source that names the folder."""
    rng, numbers = np.random.default_rng(seed), itertools.count(1000)
    for part in ("helpful-base", "harmless-base"):
        for name, count in (("train", train), ("test", test)):
            rows = [pair(rng, int(rng.integers(1, 4)), next(numbers)) for _ in range(count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / part).mkdir(parents=True, exist_ok=True)
            if name == "train":
                (folder / part / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
            else:
                (folder / part / "test.jsonl").write_text(text)
    return f"hh:{folder}"
