"""Tasks give the rows, tokens, masks and counts that are written in golden_rows.json.

A change that is meant to move them says so in its commit and rewrites the file:

  python -m tests.tasks.test_golden_rows
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import pytest

from rlhf_jax.data import batches
from rlhf_jax.tasks import TaskConfig, make_task
from tests import hh
from tests.tasks import golden

SPLITS = ("train", "validation", "test")
CASES = {
    "reviews": {"source": "reviews", "domains": ("movie", "amazon")},
    "reviews, 200 of tweets and nyt, seed 1": {
        "source": "reviews",
        "domains": ("nyt", "tweets"),
        "limit": 200,
        "seed": 1,
    },
    "reviews in a chat": {
        "source": "reviews",
        "domains": ("movie",),
        "instruction": golden.INSTRUCTION,
    },
    "reviews in a chat, 300, seed 2": {
        "source": "reviews",
        "domains": ("amazon",),
        "limit": 300,
        "instruction": golden.INSTRUCTION,
        "seed": 2,
    },
    "harm": {"source": "harm"},
    "hh": {"source": "HH"},
    "hh in a chat, 50": {"source": "HH", "limit": 50},
    "stream:hh": {"source": "stream:HH", "seed": 1},
    "jsonl": {"source": "JSONL"},
    "stream:jsonl": {"source": "stream:JSONL", "limit": 70},
}
IN_A_CHAT = ("reviews in a chat", "reviews in a chat, 300, seed 2", "harm", "hh in a chat, 50")
IN_A_CHAT += ("stream:hh",)


class Case:
    """One task with the settings of its case."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        config = TaskConfig(**CASES[name])
        for word, source in sources(folder).items():
            if config.source.removeprefix("stream:") == word:
                config = TaskConfig(**CASES[name] | {"source": config.source.replace(word, source)})
        self.tokenizer = golden.byte_tokenizer(chat=name in IN_A_CHAT)
        self.task, self.seed = make_task(config), config.seed
        self.max_length, self.count = (3000, 60) if name == "harm" else (200, 300)
        self.references = 20 if name == "harm" else 50
        self.pairs = {"max_tokens": 100_000 if name == "harm" else 8192, "min_pairs": 2}
        self.pairs |= {"max_pairs": 16, "pad_id": self.tokenizer.pad_token_id, "multiple_of": 1}

    def documents(self, split):
        return self.task.documents(self.tokenizer, split, max_length=self.max_length)

    def preferences(self, split):
        limits = {"max_length": self.max_length, "count": self.count}
        return self.task.preferences(self.tokenizer, split, **limits)

    def prompts(self, split):
        return self.task.prompts(self.tokenizer, split, max_length=100)

    def packed_batches(self, packed=True):
        return batches.packed_batches(
            self.documents("train"),
            rows=4,
            length=256,
            seed=self.seed,
            pad_id=self.tokenizer.pad_token_id,
            packed=packed,
        )

    def pair_batches(self):
        pairs, longest = self.preferences("train"), self.max_length
        return batches.pair_batches(pairs, seed=self.seed, longest=longest, **self.pairs)

    def prompt_batches(self):
        return batches.prompt_batches(
            self.prompts("train"),
            batch_size=8,
            buckets=(32, 100),
            seed=self.seed,
            pad_id=self.tokenizer.pad_token_id,
        )

    def what(self, part: str):
        """The values of a part, `documents/train` for instance."""
        part, _, split = part.partition("/")
        limits = {"max_length": self.max_length, "count": self.count}
        pad = self.tokenizer.pad_token_id
        return {
            "texts": lambda: self.task.texts(),
            "documents": lambda: list(self.documents(split).loaded()),
            "preferences": lambda: list(self.preferences(split).loaded()),
            "prompts": lambda: list(self.prompts(split).loaded()),
            "rated": lambda: self.task.rated(self.tokenizer, "train", **limits),
            "references": lambda: self.task.references(
                self.tokenizer, max_length=self.max_length, count=self.references
            ),
            "packed batches": lambda: golden.first(self.packed_batches()),
            "unpacked batches": lambda: golden.first(self.packed_batches(packed=False)),
            "pair batches": lambda: golden.first(self.pair_batches()),
            "prompt batches": lambda: golden.first(self.prompt_batches()),
            "fixed prompts": lambda: batches.fixed_prompts(
                self.prompts("validation"), 8, 100, pad, "validation"
            ),
            "documents once": lambda: batches.once_packed(
                self.documents("validation"), rows=4, length=256, pad_id=pad
            ),
            "pairs once": lambda: batches.once_pairs(self.preferences("validation"), **self.pairs),
            "shown": self.shown,
        }[part]()

    def shown(self):
        show = self.task.shown(self.tokenizer)
        prompts = self.prompts("test")
        return [show(self.tokenizer.decode(p, skip_special_tokens=True)) for p in prompts]

    def numbers(self, part: str) -> list[str]:
        """The hash of a part, and what was printed."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            value = self.what(part)
        hashed = value if isinstance(value, str) else golden.digest(value)
        return [hashed, out.getvalue().replace(str(self.folder), "ROOT")]


def sources(folder: Path) -> dict[str, str]:
    """Writes what the cases read."""
    return {
        "HH": hh.write_folder(folder / "hh"),
        "JSONL": golden.write_jsonl(folder / "rows.jsonl"),
    }


GOLDEN = json.loads(golden.FILE.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_golden_ones(name, tmp_path, monkeypatch):
    case = Case(name, tmp_path)
    wanted = GOLDEN[name]
    assert wanted
    # The archives stay where they are: no store is written at these sizes.
    for part, numbers in wanted.items():
        assert case.numbers(part) == numbers, part


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        written = {}
        for case_name, parts in GOLDEN.items():
            made = Case(case_name, Path(place))
            written[case_name] = {part: made.numbers(part) for part in parts}
    golden.write(written)
