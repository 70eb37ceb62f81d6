"""The file of annotations: whole lines count, whatever cut the last one; one process at a time."""

import json
import os
import subprocess
import sys

import pytest

from rlhf_jax.feedback import store
from rlhf_jax.feedback.judgements import combine
from rlhf_jax.feedback.ledger import SKIP, UNDO, Event
from tests.annotations import event, make_file, make_items, rows


@pytest.fixture
def kept(tmp_path):
    """Path and items of a file with three answers of anna."""
    items = make_items("pair", 5)
    opened = make_file(tmp_path / "a.jsonl", items)
    for item, answer in zip(items, (0, 1, "tie"), strict=False):
        opened.append(event(item, "anna", answer))
    opened.close()
    return tmp_path / "a.jsonl", items


def answers(path):
    found = store.read(path).ledger.answers()
    return [(item.id, said.annotator, said.answer) for item, said in found]


def test_what_was_kept_is_read(kept):
    path, items = kept
    assert answers(path) == [(items[n].id, "anna", a) for n, a in enumerate((0, 1, "tie"))]
    first = rows(path)[0]
    assert first["annotations"] == 1 and first["mode"] == "pair" and first["items"] == 5


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_file_cut_in_its_last_line_keeps_the_whole_ones(kept, cut):
    path, items = kept
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    sheet = store.read(path)
    # Without its line break alone the last line is whole.
    left = 3 if cut == 1 else 2
    assert len(answers(path)) == left
    assert bool(sheet.note) == (cut > 1)
    if cut > 1:
        assert "the last line is cut and left out" in sheet.note
        assert "the 8 whole lines before it count" in sheet.note
    opened = store.Store(path)
    opened.append(event(items[3], "anna", 1))
    opened.close()
    assert len(answers(path)) == left + 1 and not store.read(path).note


def test_a_damaged_line_elsewhere_is_named(kept):
    path, _ = kept
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:6], lines[6][:20], *lines[7:]]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 7: JSON that can be read"):
        store.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "line 7: choice 2 must be 0, 1 or 'tie'"),
        ({"order": [0, 0]}, "line 7: order [0, 0] must have each of 2 texts"),
        ({"item": "x"}, "line 7: item 'x' is not among the 5 here"),
        ({"seconds": -1}, "line 7: seconds=-1 must be finite"),
        ({"annotator": " "}, "line 7: annotator ' ' must be a name"),
        ({"event": "guess"}, "line 7: event 'guess' must be one of"),
        ({"more": 1}, "unknown=['more']"),
    ],
)
def test_events_of_another_form_are_refused_by_line(kept, change, message):
    path, _ = kept
    lines = path.read_text().splitlines()
    lines[6] = json.dumps({**json.loads(lines[6]), **change})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError) as error:
        store.read(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path, kept):
    path, _ = kept
    other = tmp_path / "b.jsonl"
    with pytest.raises(FileNotFoundError):
        store.read(other)
    for content in (b"", b"\x00\x00", b'{"prompt": "Hi"}\n', b"[1]\n"):
        other.write_bytes(content)
        with pytest.raises(ValueError, match="is no file of annotations"):
            store.read(other)
    other.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]))
    with pytest.raises(ValueError, match="has 2 of its 5 items"):
        store.read(other)
    changed = path.read_text().replace("3: text 0", "3: text 9")
    other.write_text(changed)
    with pytest.raises(ValueError, match="was changed: its id is of other texts"):
        store.read(other)


def test_the_disk_has_an_event_before_it_counts(kept, monkeypatch):
    path, items = kept
    opened, synced = store.Store(path), []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.read_bytes()))
    opened.append(event(items[3], "anna", 0))
    assert synced[-1].endswith(b"\n") and json.loads(synced[-1].splitlines()[-1])["answer"] == 0
    opened.close()


def test_a_full_disk_leaves_the_file_as_it_was(kept, monkeypatch):
    path, items = kept
    opened, before = store.Store(path), path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*a\.jsonl"):
        opened.append(event(items[3], "anna", 0))
    monkeypatch.undo()
    assert path.read_bytes() == before
    opened.append(event(items[3], "anna", 1))
    opened.close()
    assert answers(path)[-1][2] == 1


def test_one_process_at_a_time(kept):
    path, _ = kept
    opened = store.Store(path)
    code = "import pathlib, sys; from rlhf_jax.feedback import store; "
    code += "store.Store(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "a.jsonl is in use by another server: stop it, or give another --out" in done.stderr
    opened.close()


def test_undo_takes_back_the_last_that_stands(kept):
    path, items = kept
    opened, mine = store.Store(path), {"annotator": "anna", "time": "now"}
    with pytest.raises(ValueError, match="was judged by anna already"):
        opened.append(event(items[2], "anna", 0))
    with pytest.raises(ValueError, match="is not anna's last"):
        opened.append(Event(UNDO, items[1].id, key="k", **mine))
    for n in (2, 1):
        opened.append(Event(UNDO, items[n].id, key=f"u{n}", **mine))
    opened.append(event(items[1], "anna", 0))
    places = {"order": (1, 0), "reason": "unclear"}
    opened.append(Event(SKIP, items[4].id, key="s", **mine, **places))
    opened.close()
    ledger = store.read(path).ledger
    assert answers(path) == [(items[n].id, "anna", 0) for n in (0, 1)]
    assert ledger.turn("anna") == 7 and ledger.judges(items[4].id) == set()
    assert ledger.standing("anna")[items[4].id].reason == "unclear"


def test_files_of_several_people(tmp_path):
    items = make_items("score", 3)
    for name in ("anna", "bob"):
        opened = make_file(tmp_path / f"{name}.jsonl", items)
        opened.append(event(items[0], name, 4))
        opened.close()
    both = combine([tmp_path / "anna.jsonl", tmp_path / "bob.jsonl"])
    assert both.answers(items[0].id) == {"anna": 4, "bob": 4} and both.count == 2
    with pytest.raises(ValueError, match="both have anna's judgement"):
        combine([tmp_path / "anna.jsonl", tmp_path / "anna.jsonl"])
    make_file(tmp_path / "c.jsonl", make_items("score", 4)).close()
    with pytest.raises(ValueError, match="different items or ranges: 3 and 4 items, 3 in both"):
        combine([tmp_path / "anna.jsonl", tmp_path / "c.jsonl"])


@pytest.mark.parametrize("bounds", [(5, 1), (1, 11), (1, 1), (1, 2.5)])
def test_ranges_without_a_key_for_each_value_are_refused(tmp_path, bounds):
    with pytest.raises(ValueError, match="must be two whole numbers, the lower first"):
        store.create(tmp_path / "a.jsonl", make_items("score", 1), bounds)


def test_a_gold_score_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="score 9 must be a number from 1 to 5"):
        store.create(tmp_path / "a.jsonl", make_items("score", 2, gold=9), (1, 5))
