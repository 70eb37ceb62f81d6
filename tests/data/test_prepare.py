"""Encoded rows in memory and on disk."""

import errno
import itertools

import numpy as np
import pytest

from rlhf_jax.data import encode, prepare
from rlhf_jax.data import store as token_store
from rlhf_jax.data.batches import PackedBatches, PairBatches, PromptBatches
from rlhf_jax.data.schemas import DropCounts, Encoded
from rlhf_jax.tasks import TaskConfig, make_task
from tests import hh
from tests.data import conftest as templates
from tests.tasks.rows import load_rows

KINDS = ("sft", "preference", "prompt")


@pytest.fixture
def source(tmp_path):
    return hh.write_folder(tmp_path / "hh", train=40, test=30)


@pytest.fixture
def load(source, plain, tmp_path):
    """Loads rows of the folder; more than ten go to a store."""

    def run(kind="sft", *, split="train", tokenizer=plain, said=None, limit=0, **settings):
        options = {"max_length": 64, "in_memory": 10, "cache": tmp_path / "cache"} | settings
        drops, task = options.pop("drops", DropCounts()), make_task(TaskConfig(source))

        def rows():
            return itertools.islice(task.rows(kind, split, drops), limit or None)

        return prepare.prepared(
            kind,
            rows,
            tokenizer,
            drops=drops,
            name=f"{source} ({split})",
            decides=[task.fingerprint(split), split, limit],
            total=limit,
            say=(said if said is not None else []).append,
            **options,
        )

    return run


def arrays(kind, row):
    if kind == "prompt":
        return [row]
    sides = [row.chosen, row.rejected] if kind == "preference" else [row]
    return [array for side in sides for array in side]


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_holds_what_a_list_holds(load, source, plain, kind, tmp_path):
    expected = prepare.encode_rows(kind, load_rows(kind, source, "train"), plain, max_length=64)
    few, many = load(kind, in_memory=100), load(kind)
    assert isinstance(few, list)
    assert isinstance(many, token_store.TokenStore)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert len(few) == len(many) == len(expected)
    for wanted, *found in zip(expected, few, many, many[:], strict=True):
        for row in found:
            assert type(row) is type(wanted)
            for a, b in zip(arrays(kind, wanted), arrays(kind, row), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
    assert token_store.lengths_of(few).tolist() == token_store.lengths_of(many).tolist()
    if kind != "prompt":
        assert token_store.total_tokens(few) == token_store.total_tokens(many)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sft", lambda rows: PackedBatches(rows, batch_size=4, length=64, seed=0)),
        (
            "preference",
            lambda rows: PairBatches(rows, max_tokens=1024, min_pairs=2, max_pairs=8, seed=0),
        ),
        ("prompt", lambda rows: PromptBatches(rows, batch_size=4, seed=0)),
    ],
)
def test_batches_of_a_store_are_those_of_a_list(load, kind, make):
    few, many = make(load(kind, in_memory=100)), make(load(kind))
    for _ in range(10):
        a, b = next(few), next(many)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_process_reads_its_share_of_a_store_and_no_more(load, monkeypatch):
    read = []
    get = token_store.TokenStore.__getitem__
    monkeypatch.setattr(
        token_store.TokenStore, "__getitem__", lambda self, i: read.append(i) or get(self, i)
    )
    shares = []
    for half in (slice(0, 2), slice(2, 4)):
        batches = PackedBatches(load(), batch_size=4, length=64, seed=0).share(lambda _, h=half: h)
        assert read == []  # the plan needs lengths only
        for _ in range(batches.steps_per_epoch):
            next(batches)
        shares.append(sorted(read))
        read.clear()
    assert sorted(shares[0] + shares[1]) == list(range(80))
    assert all(len(share) > 20 for share in shares)


def test_rows_are_encoded_once(load, monkeypatch):
    said, drops, again = [], DropCounts(), DropCounts()
    first = load(said=said, drops=drops)
    monkeypatch.setattr(prepare, "encoded_rows", None)
    second = load(said=said, drops=again)
    assert drops == again == first.counts
    assert drops["kept"] == len(second) == 80
    assert "written to" in said[0]
    assert "encoded before, read from" in said[1]


def test_whatever_decides_the_rows_makes_another_store(load, source, with_template, tmp_path):
    def stores():
        return len(list((tmp_path / "cache").iterdir()))

    load()
    for number, settings in enumerate(
        [
            {"max_length": 60},
            {"limit": 50},
            {"kind": "prompt"},
            {"split": "validation"},
            {"tokenizer": with_template(templates.CHATML)},
            {"tokenizer": with_template(templates.HEADERS)},
        ]
    ):
        load(**settings)
        load(**settings)
        assert stores() == number + 2
    folder = tmp_path / "hh" / "helpful-base" / "train.jsonl"
    folder.write_text((folder.parent / "test.jsonl").read_text())
    assert load().counts["kept"] == 70
    assert stores() == number + 3


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def rows():
        yield Encoded(np.arange(3, dtype=np.int32), np.ones(3, bool))
        raise KeyboardInterrupt

    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        token_store.write(folder, "sft", rows(), DropCounts())
    assert list(tmp_path.iterdir()) == []
    assert not token_store.exists(folder)


def test_a_full_disk_is_one_line(load, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_store, "write", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left .*set RLHF_JAX_CACHE"):
        load()


def test_rows_of_a_store_cannot_be_changed(load):
    row = load()[0]
    with pytest.raises(ValueError, match="read-only"):
        row.tokens[0] = 1
    with pytest.raises(IndexError):
        load()[80]


def test_masks_are_checked_and_a_row_that_is_wrong_is_named(load, source, monkeypatch, tmp_path):
    wrong = encode.encode_pair

    def broken(*arguments):
        pair = wrong(*arguments)
        pair.chosen.loss_mask[-1] = False
        return pair

    monkeypatch.setattr(encode, "encode_pair", broken)
    with pytest.raises(ValueError, match="end without a stop token"):
        load("preference")
    assert not list((tmp_path / "cache").glob("*"))


def test_nothing_left_says_what_was_dropped(load):
    with pytest.raises(ValueError, match=r"no row is left .*dropped 80 \(80 response longer"):
        load(max_length=2)


def test_a_bar_shows_what_takes_long(load, monkeypatch, capsys):
    load("prompt", limit=30)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(prepare, "_SILENT_SECONDS", -1.0)
    load("sft", limit=30)
    assert "(train): 30/30" in capsys.readouterr().err
