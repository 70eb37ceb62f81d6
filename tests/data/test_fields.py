"""Rows with values of the wrong kind: one line that names the row of the file and the field."""

import json

import pytest

from rlhf_jax.data import prepare
from tests.tasks.rows import load_rows

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def load(tmp_path, kind, bad):
    """Loads a file whose row 7 is bad, whatever split it belongs to."""
    path = tmp_path / "rows.jsonl"
    rows = [GOOD | {"prompt": f"question {n}"} for n in range(7)]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, bad]))
    return load_rows(kind, f"jsonl:{path}", "all")


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        ("preference", GOOD | {"chosen": None}, "chosen must be text or a list .*not NoneType"),
        ("preference", GOOD | {"rejected": 5}, "rejected must be text or a list .*not int"),
        ("preference", GOOD | {"prompt": {"a": 1}}, "prompt must be text or a list .*not dict"),
        ("preference", GOOD | {"margin": float("nan")}, "margin=nan must be a finite number"),
        ("preference", GOOD | {"margin": float("inf")}, "margin=inf must be a finite number"),
        ("preference", GOOD | {"margin": None}, "margin=None must be a finite number"),
        ("preference", GOOD | {"margin": "high"}, "margin=high must be a finite number"),
        ("sft", {"text": None}, "text must be text, not NoneType"),
        ("sft", {"prompt": "p", "response": 1.5}, "response must be text, not float"),
        ("sft", {"messages": [{"role": "user"}]}, "messages: "),
        ("sft", {"foo": 1, "bar": 2}, "needs messages, or prompt .*found: bar, foo"),
        ("prompt", {"prompt": None}, "prompt must be text or a list .*not NoneType"),
        ("prompt", {"foo": 1}, "found: foo"),
    ],
)
def test_the_row_of_the_file_and_the_field_are_named(tmp_path, kind, bad, message):
    with pytest.raises(ValueError, match=f"^row 7: .*{message}") as caught:
        load(tmp_path, kind, bad)
    assert "\n" not in str(caught.value)


def test_rows_from_elsewhere_are_checked_when_they_are_encoded(plain):
    with pytest.raises(ValueError, match=r"row 1: margin=nan must be a finite number"):
        prepare.encode_rows(
            "preference", [GOOD, GOOD | {"margin": float("nan")}], plain, max_length=32
        )
    with pytest.raises(ValueError, match=r"row 0: text must be text, not int"):
        prepare.encode_rows("sft", [{"text": 3}], plain, max_length=32)
