"""Rows of files of one's own: splits, duplicates, what is wrong."""

import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.splits import SPLITS, split_of
from tests.data.conftest import write_jsonl
from tests.tasks.rows import load_rows


def pair(number):
    return {"prompt": f"question {number}", "chosen": f" yes {number}", "rejected": " no"}


def test_file_is_split_by_prompt_the_same_for_every_kind(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [pair(n) for n in range(200)] + [pair(0)])
    seen = {}
    for split in SPLITS:
        rows = load_rows("preference", f"jsonl:{path}", split)
        prompts = [row["prompt"] for row in load_rows("prompt", f"jsonl:{path}", split)]
        sft = [row["prompt"] for row in load_rows("sft", f"jsonl:{path}", split)]
        assert {row["prompt"] for row in rows} == set(prompts) == set(sft)
        assert len(prompts) == len(set(prompts))
        assert {split_of(prompt) for prompt in prompts} == {split}
        seen[split] = set(prompts)
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 200
    assert len(load_rows("preference", f"jsonl:{path}", "all", limit=7)) == 7


def test_repeated_prompts_are_dropped_and_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [pair(1), pair(1)])
    drops = DropCounts()
    assert len(load_rows("prompt", f"jsonl:{path}", "all", drops=drops)) == 1
    assert drops == {"duplicate prompt": 1}


def test_pairs_without_prompt_are_of_one_split_or_dropped(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(100)]
    write_jsonl(path, rows)
    drops = DropCounts()
    kept = load_rows("preference", f"jsonl:{path}", "train", drops=drops)
    assert 0 < len(kept) < 100
    for row in kept:
        assert split_of(row["chosen"]) == split_of(row["rejected"]) == "train"
    assert drops["texts of two splits"] > 0


def test_folder_has_a_file_for_each_split(tmp_path):
    for number, split in enumerate(SPLITS):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {number}"}])
    source = f"jsonl:{tmp_path}"
    assert load_rows("sft", source, "validation") == [{"text": "validation 1"}]
    assert len(load_rows("sft", source, "all")) == 3
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl does not exist"):
        load_rows("sft", source, "test")


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3 is not JSON that"):
        load_rows("prompt", f"jsonl:{path}", "all")
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 must be an object, not \[1\]"):
        load_rows("prompt", f"jsonl:{path}", "all")
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match=r"row 0: a preference row .*; found: question"):
        load_rows("preference", f"jsonl:{path}", "all")


def test_files_of_other_formats_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = '{"text": "the sea"}\n'
    path.write_bytes(line.encode("utf-8-sig"))
    assert load_rows("sft", f"jsonl:{path}", "all") == [{"text": "the sea"}]
    for content, message in (
        (b"PAR1" + bytes(20), r"rows\.jsonl is a Parquet file: write its rows"),
        (line.encode("utf-16"), r"rows\.jsonl is UTF-16 .*save it as UTF-8"),
        (b"[" * 100_000, r"rows\.jsonl, line 1 is not JSON that can be read"),
        (b'{"text": ' + b"9" * 5000 + b"}", r"rows\.jsonl, line 1 is not JSON that can be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_rows("sft", f"jsonl:{path}", "all")


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write_jsonl(path, [{"text": f"the sea {n}"} for n in range(99)])
    whole = bytearray(path.read_bytes())
    whole[20:40] = b"\xff" * 20
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be read: .*half a download"):
        load_rows("sft", f"jsonl:{path}", "all")
