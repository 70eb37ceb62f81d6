"""HH-RLHF from a folder, from a saved data set and from the hub."""

import datasets
import numpy as np
import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets import archives
from rlhf_jax.data.sets.hh import PARTS
from rlhf_jax.data.streaming import drawn
from rlhf_jax.tasks import TaskConfig, make_task
from tests.data.conftest import write_jsonl
from tests.tasks.rows import load_rows


def hh(number):
    start = f"\n\nHuman: question {number}\n\nAssistant:"
    return {"chosen": f"{start} yes", "rejected": f"{start} no"}


@pytest.fixture
def hh_folder(tmp_path):
    write_jsonl(tmp_path / "helpful-base" / "train.jsonl.gz", [hh(n) for n in range(30)])
    write_jsonl(tmp_path / "harmless-base" / "train.jsonl", [hh(n) for n in range(30, 50)])
    write_jsonl(tmp_path / "helpful-base" / "test.jsonl", [hh(n) for n in range(1000, 1400)])
    return tmp_path


def test_hh_from_a_local_folder(hh_folder):
    source = f"hh:{hh_folder}"
    train = load_rows("preference", source, "train")
    assert len(train) == 50
    assert {"prompt": [{"role": "user", "content": "question 3"}], "chosen": "yes"}.items() <= (
        train[23].items()
    )
    held_out = {split: load_rows("prompt", source, split) for split in ("validation", "test")}
    texts = {s: {r["prompt"][0]["content"] for r in rows} for s, rows in held_out.items()}
    assert not texts["validation"] & texts["test"]
    assert len(texts["validation"] | texts["test"]) == 400
    assert 25 < len(texts["test"]) < 80
    assert len(load_rows("sft", source, "all")) == 450


def questions(source, split="train"):
    rows = load_rows("preference", source, split)
    return sorted(int(row["prompt"][0]["content"].split()[1]) for row in rows)


def test_hh_parts_of_a_folder(hh_folder):
    assert questions(f"hh:{hh_folder}:helpful-base") == list(range(30))
    assert questions(f"hh:{hh_folder / 'harmless-base'}") == list(range(30, 50))
    both = questions(f"hh:{hh_folder}:helpful-base+harmless-base")
    assert both == questions(f"hh:{hh_folder}:harmless-base,helpful-base") == list(range(50))
    with pytest.raises(ValueError, match="names the part 'helpful': the parts are harmless-base"):
        questions(f"hh:{hh_folder}:helpful+harmless-base")
    with pytest.raises(FileNotFoundError, match=r"no train\.jsonl .* in helpful-online: give"):
        questions(f"hh:{hh_folder}:helpful-base+helpful-online")


def test_hh_file_that_was_unpacked_is_read_once(hh_folder):
    write_jsonl(hh_folder / "helpful-base" / "train.jsonl", [hh(n) for n in range(30)])
    assert questions(f"hh:{hh_folder}") == list(range(50))


def test_hh_as_saved_to_disk(tmp_path):
    tables = {
        "train": datasets.Dataset.from_list([hh(n) for n in range(5)]),
        "test": datasets.Dataset.from_list([hh(n) for n in range(5, 25)]),
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "both")
    source = f"hh:{tmp_path / 'both'}"
    assert questions(source) == list(range(5))
    held_out = [questions(source, split) for split in ("validation", "test")]
    assert sorted(held_out[0] + held_out[1]) == list(range(5, 25))
    with pytest.raises(ValueError, match="a saved data set has no parts"):
        questions(f"{source}:helpful-base")
    tables["train"].save_to_disk(tmp_path / "one")
    assert questions(f"hh:{tmp_path / 'one'}") == list(range(5))
    with pytest.raises(FileNotFoundError, match="one saved table, so it has no test rows"):
        questions(f"hh:{tmp_path / 'one'}", "test")


def test_hh_rows_that_are_no_transcripts_are_counted(hh_folder):
    odd = [{"chosen": "hello", "rejected": hh(1)["rejected"]}, {"chosen": None, "rejected": None}]
    write_jsonl(hh_folder / "helpful-online" / "train.jsonl", odd)
    drops = DropCounts()
    assert len(load_rows("preference", f"hh:{hh_folder}", "train", drops=drops)) == 50
    assert drops == {"no transcript": 2}


def test_half_a_download_is_one_line(tmp_path):
    path = tmp_path / "helpful-base" / "train.jsonl.gz"
    write_jsonl(path, [hh(n) for n in range(30)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz cannot be read: Compressed file ended"):
        questions(f"hh:{tmp_path}")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"Not a gzipped file .*pointer of Git LFS"):
        questions(f"hh:{tmp_path}")


def test_rows_are_read_as_they_are_needed(hh_folder):
    path = hh_folder / "helpful-base" / "train.jsonl"
    write_jsonl(path, [hh(n) for n in range(30)])
    with path.open("a") as file:
        file.write("not json")
    source = f"hh:{hh_folder}:helpful-base"
    assert len(load_rows("preference", source, "train", limit=30)) == 30
    with pytest.raises(ValueError, match="line 31 is not JSON"):
        load_rows("preference", source, "train")


def test_hh_folder_that_is_none_names_the_parts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\.jsonl or train\.jsonl\.gz: .*harmless"):
        load_rows("preference", f"hh:{tmp_path}", "train")


def test_hh_from_the_hub_asks_datasets(monkeypatch):
    asked = []

    def load_dataset(name, *, data_dir, split, streaming):
        assert not streaming
        asked.append((name, data_dir, split))
        return [hh(n) for n in range(3)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("preference", "hh", "train")) == 3
    load_rows("preference", "hh:helpful-base", "test")
    assert asked == [
        ("Anthropic/hh-rlhf", None, "train"),
        ("Anthropic/hh-rlhf", "helpful-base", "test"),
    ]


def test_hh_without_network_and_cache_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(archives.AssetError) as caught:
        load_rows("preference", "hh", "train")
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot load Anthropic/hh-rlhf: " in message
    assert "hh:FOLDER" in message
    assert "HF_DATASETS_OFFLINE=1" in message


def test_the_hub_is_streamed_part_by_part(monkeypatch):
    sides = ("chosen", "rejected")
    texts = [{s: f"\n\nHuman: {n}\n\nAssistant: {s}" for s in sides} for n in range(3)]
    asked = []

    def load_dataset(name, *, data_dir, split, streaming):
        asked.append((name, data_dir, split, streaming))
        return datasets.Dataset.from_list(texts).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = make_task(TaskConfig("stream:hh"))
    opened = task.open_stream()
    assert asked == [("Anthropic/hh-rlhf", part, "train", True) for part in PARTS]
    found = task.convert_stream("prompt", drawn(opened, np.random.default_rng(0)), DropCounts())
    assert len(list(found)) == 3  # of every part the same: duplicates are dropped
    del asked[:]
    assert len(load_rows("preference", "stream:hh:helpful-base", "train")) == 3
    assert asked == [("Anthropic/hh-rlhf", "helpful-base", "train", True)]
