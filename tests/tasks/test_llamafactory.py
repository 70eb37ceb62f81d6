"""Which file of the archive each kind of row comes from; made-up rows."""

import json

import pytest

from rlhf_jax.data.sets import archives
from tests.tasks.rows import load_rows

MADE_UP = {
    "alpaca": [{"instruction": "add", "input": "1 2", "output": "3"}],
    "dpo": [
        {
            "conversations": [{"from": "human", "value": "hello"}],
            "chosen": {"from": "gpt", "value": "hi"},
            "rejected": {"from": "gpt", "value": "go"},
        }
    ],
}


@pytest.fixture
def asked(monkeypatch):
    found = []

    def read_member(package, member):
        found.append((package, member))
        return json.dumps(MADE_UP[member.split("/")[1].split("_")[0]]).encode()

    monkeypatch.setattr(archives, "read_member", read_member)
    return found


def test_instructions_are_documents_and_pairs_are_the_rest(asked):
    (document,) = load_rows("sft", "llamafactory:en", "all")
    assert [message["content"] for message in document["messages"]] == ["add\n1 2", "3"]
    (pair,) = load_rows("preference", "llamafactory:zh", "all")
    assert (pair["chosen"], pair["rejected"]) == ("hi", "go")
    (prompt,) = load_rows("prompt", "llamafactory:en", "all")
    assert prompt["prompt"] == [{"role": "user", "content": "hello"}]
    assert asked == [
        ("llamafactory", "data/alpaca_en_demo.json"),
        ("llamafactory", "data/dpo_zh_demo.json"),
        ("llamafactory", "data/dpo_en_demo.json"),
    ]
