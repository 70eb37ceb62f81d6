"""Streams: what comes, in which order, and where a restored one goes on."""

import itertools
import json

import numpy as np
import pytest

from rlhf_jax.data import prepare
from rlhf_jax.data.batches import PackedBatches, PairBatches, PromptBatches
from rlhf_jax.data.schemas import DropCounts, Encoded
from rlhf_jax.data.streaming import StreamedBatches, drawn
from rlhf_jax.tasks import TaskConfig, make_task
from tests import hh
from tests.tasks.rows import load_rows

MAKERS = {
    "sft": (PackedBatches, {"batch_size": 4, "length": 64}),
    "preference": (
        PairBatches,
        {"max_tokens": 1024, "min_pairs": 2, "max_pairs": 8, "buckets": (32, 64)},
    ),
    "prompt": (PromptBatches, {"batch_size": 4, "buckets": (32, 64)}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return "stream:" + hh.write_folder(tmp_path_factory.mktemp("hh"), train=40, test=30)


@pytest.fixture
def stream(source, plain):
    """Makes a stream of a kind in blocks of 32 of the 80 rows."""

    def make(kind="sft", *, seed=0, block_rows=32, name=source, **settings):
        batches, options = MAKERS[kind]
        task = make_task(TaskConfig(source))

        def block(rows, block_seed):
            converted = task.convert_stream(kind, rows, DropCounts())
            found = prepare.encode_rows(kind, converted, plain, max_length=64)
            return batches(found, seed=block_seed, **options) if found else None

        return StreamedBatches(
            task.open_stream,
            block,
            seed=seed,
            name=name,
            block_rows=block_rows,
            **settings,
        )

    return make


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def documents(batches, epoch):
    """The documents of one epoch, as bytes, in the order of the batches."""
    found = []
    while batches.epoch == epoch:
        batch = next(batches)
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            found += [tokens[segments == n].tobytes() for n in range(1, segments.max() + 1)]
    return found


def test_an_epoch_holds_every_document_once_in_an_order_of_its_own(stream, source, plain):
    rows = load_rows("sft", source.removeprefix("stream:"), "train")
    expected = prepare.encode_rows("sft", rows, plain, max_length=64)
    batches = stream()
    # The epoch counts up with the first batch of the next one: that batch is taken with it.
    first = documents(batches, 0)
    whole = {document.tokens.tobytes() for document in expected}
    assert set(first) >= whole
    assert len(whole) == 80
    orders = [documents(stream(seed=seed), 0)[:80] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] == first[:80]
    assert orders[2] != orders[0]
    assert sorted(orders[2]) == sorted(orders[0])


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("steps", [0, 1, 6, 17, 40])
def test_a_restored_stream_goes_on_the_same(stream, kind, steps):
    running = stream(kind)
    take(running, steps)
    saved = json.loads(json.dumps(running.state()))
    expected = take(running, 12)
    resumed = stream(kind)
    next(resumed)
    resumed.restore(saved)
    assert all(same(a, b) for a, b in zip(expected, take(resumed, 12), strict=True))
    assert resumed.state() == running.state()
    assert not steps or saved != stream(kind).state()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_position_holds_for_any_number_of_processes(stream, kind):
    """Two processes, saved after 5 batches, go on as four: the parts make up the whole batches."""

    def part(process, processes):
        return lambda rows: slice(process * rows // processes, (process + 1) * rows // processes)

    whole = stream(kind)
    expected = take(whole, 9)
    two = [stream(kind).share(part(p, 2)) for p in range(2)]
    parts = [take(one, 5) for one in two]
    assert two[0].state() == two[1].state()
    four = [stream(kind).share(part(p, 4)) for p in range(4)]
    for one in four:
        one.restore(two[0].state())
    resumed = [take(one, 4) for one in four]
    for number, batch in enumerate(expected):
        shares = [part[number] for part in parts] if number < 5 else None
        shares = shares or [part[number - 5] for part in resumed]
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), array)


@pytest.mark.parametrize(
    ("setting", "value"), [("seed", 1), ("block_rows", 16), ("name", "another source")]
)
def test_a_position_of_another_stream_is_refused(stream, setting, value):
    with pytest.raises(ValueError, match=r"the saved position has .*: resume with the source"):
        stream(**{setting: value}).restore(stream().state())


@pytest.mark.parametrize("change", ["edited", "reordered", "shortened"])
def test_a_position_among_other_rows_is_refused(change):
    """Rows that were read count, those of the current block included; later ones may change."""

    def stream(rows):
        def make(block, seed):
            found = [Encoded(np.array([row["n"], 2], np.int32), np.ones(2, bool)) for row in block]
            return PackedBatches(found, batch_size=2, length=2, seed=seed)

        return StreamedBatches(lambda: [rows], make, seed=0, name="n", block_rows=10)

    rows = [{"n": n} for n in range(50)]
    running = stream(rows)
    take(running, 12)  # into the third block of five batches
    saved = running.state()
    expected = take(running, 3)
    later = [*rows[:30], {"n": 77}, *rows[31:]]
    resumed = stream(later)
    resumed.restore(saved)
    assert all(same(a, b) for a, b in zip(expected, take(resumed, 3), strict=True))
    for place in (3, 28):
        others = {
            "edited": [*rows[:place], {"n": 77}, *rows[place + 1 :]],
            "reordered": [*rows[:place], rows[place + 1], rows[place], *rows[place + 2 :]],
            "shortened": rows[:place],
        }
        resumed = stream(others[change])
        resumed.restore(saved)
        with pytest.raises(ValueError, match="first 30 rows of the stream are not those that"):
            next(resumed)
    # A position of a version that kept no digest is believed.
    resumed = stream(others[change])
    resumed.restore({k: v for k, v in saved.items() if k not in ("read", "digest")} | {"block": 0})
    next(resumed)


def test_nothing_is_read_ahead_of_the_block():
    read = []

    def rows():
        for number in range(100):
            read.append(number)
            yield {"number": number}

    def make(block, seed):
        tokens = [np.array([row["number"], 2], np.int32) for row in block]
        documents = [Encoded(t, np.ones(2, bool)) for t in tokens]
        return PackedBatches(documents, batch_size=2, length=8, seed=seed)

    batches = StreamedBatches(lambda: [rows()], make, seed=0, name="numbers", block_rows=10)
    assert read == []
    batch = next(batches)
    assert read == list(range(10))
    assert set(batch["tokens"][batch["segments"] > 0]) <= {*range(10)}
    limited = StreamedBatches(
        lambda: [rows()], make, seed=0, name="numbers", block_rows=10, limit=15
    )
    del read[:]
    for _ in range(4):
        next(limited)
    assert max(read) == 14


def test_every_block_of_every_epoch_is_shuffled_anew():
    def orders(seed):
        def make(block, block_seed):
            rows = [Encoded(np.array([r["n"], 2], np.int32), np.ones(2, bool)) for r in block]
            return PackedBatches(rows, batch_size=10, length=2, seed=block_seed)

        rows = [{"n": n % 10} for n in range(20)]
        batches = StreamedBatches(lambda: [rows], make, seed=seed, name="n", block_rows=10)
        return [tuple(batch["tokens"][:, 0].tolist()) for batch in take(batches, 4)]

    assert len(set(orders(0))) == len(set(orders(0) + orders(1))) / 2 == 4


def test_every_epoch_draws_from_the_files_anew():
    def draws(seed):
        found = []

        def make(block, _):
            found.append(tuple(row["n"] for row in block))
            rows = [Encoded(np.array([n, 2], np.int32), np.ones(2, bool)) for n in found[-1]]
            return PackedBatches(rows, batch_size=20, length=2, seed=0)

        files = [[{"n": n} for n in range(start, start + 10)] for start in (0, 10)]
        take(StreamedBatches(lambda: files, make, seed=seed, name="n", block_rows=20), 2)
        return found

    assert draws(0) == draws(0)
    assert len({*draws(0), *draws(1)}) == 4


def test_files_are_drawn_from_side_by_side():
    rows = list(drawn([["a"] * 50, ["b"] * 50, []], order()))
    assert sorted(rows) == ["a"] * 50 + ["b"] * 50
    assert 15 < rows[:50].count("a") < 35


def test_blocks_without_rows_are_passed_over_and_a_stream_without_any_is_an_error():
    def make(block, seed):
        tokens = [np.array([row["n"], 2], np.int32) for row in block if row["n"] >= 8]
        documents = [Encoded(t, np.ones(2, bool)) for t in tokens]
        return PackedBatches(documents, batch_size=1, length=8, seed=seed) if documents else None

    def numbers(count):
        return StreamedBatches(
            lambda: [({"n": n} for n in range(count))], make, seed=0, name="n", block_rows=4
        )

    batches = numbers(10)
    assert set(next(batches)["tokens"][0, :4:2]) == {8, 9}
    assert batches.state()["block"] == 3
    assert set(next(batches)["tokens"][0, :4:2]) == {8, 9}
    assert batches.epoch == 1
    with pytest.raises(ValueError, match="no row of the stream is left to train on"):
        next(numbers(4))


def order():
    return np.random.default_rng(0)
