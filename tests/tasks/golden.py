"""Checksums of what tasks give: rows and tokens that no change of code may move.

The tokenizer knows bytes only, so that no version of the trainer of merges decides what comes out.
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from rlhf_jax.data.tokenizer import PLAIN_TEMPLATE, train_bpe

FILE = Path(__file__).with_name("golden_rows.json")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCTION = "Review a film."


def byte_tokenizer(chat: bool = False):
    """Bytes and special tokens; the plain template, or one that marks the turns."""
    tokenizer = train_bpe(["a"], 259)
    tokenizer.chat_template = CHATML if chat else PLAIN_TEMPLATE
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def digest(*values) -> str:
    """One hash of arrays, texts, numbers, named tuples, dicts and lists of them."""
    hashed = hashlib.sha256()

    def feed(value) -> None:
        if isinstance(value, np.ndarray):
            hashed.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, dict):
            for name in sorted(value):
                feed(name)
                feed(value[name])
        elif isinstance(value, str | int | float):
            hashed.update(repr(value).encode())
        else:
            for one in value:
                feed(one)
        hashed.update(b"|")

    feed(values)
    return hashed.hexdigest()[:16]


def first(batches, count: int = 12) -> str:
    """A hash of the first batches."""
    return digest(list(itertools.islice(batches, count)))


def write_jsonl(path: Path) -> str:
    """A made-up file of pairs, some alike, some with an empty answer; returns its source."""
    rows = [
        {
            "prompt": f"question {n % 90}" * (1 + n % 3),
            "chosen": f" yes {n}" * (n % 7),
            "rejected": " no",
        }
        for n in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def write(numbers: dict[str, dict[str, list[str]]]) -> None:
    """Writes the file anew, one line a part."""
    cases = []
    for name, parts in numbers.items():
        lines = [f"  {json.dumps(part)}: {json.dumps(found)}" for part, found in parts.items()]
        cases.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    FILE.write_text("{\n" + ",\n".join(cases) + "\n}\n")
