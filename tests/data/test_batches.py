import itertools
import json
import time

import numpy as np
import pytest

from rlhf_jax.data import batches
from rlhf_jax.data.batches import (
    PackedBatches,
    PairBatches,
    PromptBatches,
    Shape,
    pad_pairs,
    pad_prompts,
)
from rlhf_jax.data.schemas import Encoded, EncodedPair


def document(rng, number, length):
    """Tokens are `number` throughout, so that it can be found again; the last is the stop token."""
    tokens = np.full(length, number, dtype=np.int32)
    return Encoded(tokens, rng.random(length) < 0.5)


def documents(count=50, longest=30, seed=0):
    rng = np.random.default_rng(seed)
    return [document(rng, n, int(rng.integers(2, longest + 1))) for n in range(1, count + 1)]


def pairs(count=50, longest=60, seed=0):
    sides = documents(2 * count, longest, seed)
    return [
        EncodedPair(a, b, n / 10)
        for n, (a, b) in enumerate(zip(sides[::2], sides[1::2], strict=True))
    ]


def prompts(count=50, longest=20):
    return [d.tokens for d in documents(count, longest)]


def make_packed(**kwargs):
    options = {"batch_size": 4, "length": 64, "seed": 0} | kwargs
    return PackedBatches(documents(), **options)


def make_pairs(**kwargs):
    options = {"max_tokens": 1280, "min_pairs": 4, "max_pairs": 16, "seed": 0} | kwargs
    return PairBatches(pairs(), **options)


def make_prompts(**kwargs):
    return PromptBatches(prompts(), **{"batch_size": 8, "seed": 0} | kwargs)


MAKERS = [make_packed, lambda **k: make_packed(packed=False, **k), make_pairs, make_prompts]


def epoch(batches):
    return list(itertools.islice(batches, batches.steps_per_epoch))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("make", MAKERS)
def test_seed_and_epoch_decide_the_batches(make):
    one, again, other = make(), make(), make(seed=1)
    first = epoch(one)
    assert all(same(a, b) for a, b in zip(first, epoch(again), strict=True))
    assert not all(same(a, b) for a, b in zip(first, epoch(other), strict=False))
    assert one.epoch == 1
    assert not all(same(a, b) for a, b in zip(first, epoch(one), strict=False))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("steps", [0, 1, 7, 23])
def test_restored_batches_go_on_the_same(make, steps):
    running = make()
    for _ in range(steps):
        next(running)
    saved = json.loads(json.dumps(running.state()))
    expected = [next(running) for _ in range(9)]
    resumed = make()
    next(resumed)
    resumed.restore(saved)
    assert all(same(a, next(resumed)) for a in expected)
    assert resumed.state() == running.state()


def test_position_in_other_data_is_refused():
    state = make_packed().state()
    with pytest.raises(ValueError, match="saved position has seed=0, these batches seed=1"):
        make_packed(seed=1).restore(state)
    with pytest.raises(ValueError, match="saved position has size=50, these batches size=3"):
        PackedBatches(documents(3), batch_size=4, length=64, seed=0).restore(state)


@pytest.mark.parametrize("make", MAKERS)
def test_every_batch_has_one_of_the_shapes(make):
    batches = make()
    seen = {batch["tokens"].shape for batch in itertools.islice(batches, 40)}
    assert {(shape[0], shape[-1]) for shape in seen} <= {tuple(s) for s in batches.shapes}
    assert len(seen) <= len(batches.shapes)


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_of_documents_holds_each_once(packed):
    batches = make_packed(packed=packed, pad_id=9999)
    for _ in range(2):
        found = []
        for batch in epoch(batches):
            real = batch["segments"] > 0
            assert (batch["tokens"][~real] == 9999).all()
            for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
                assert packed or segments.max() <= 1
                starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
                found += tokens[starts].tolist()
        assert sorted(found) == list(range(1, 51))


def test_documents_are_packed_some_at_a_time(monkeypatch):
    monkeypatch.setattr(batches, "_FITTED", 7)
    seen = []
    fit = batches.first_fit
    monkeypatch.setattr(
        batches, "first_fit", lambda sizes, room: seen.append(sizes) or fit(sizes, room)
    )
    found = [int(t) for batch in epoch(make_packed()) for t in np.unique(batch["tokens"]) if t]
    assert sorted(found) == list(range(1, 51))
    assert max(map(len, seen)) == 7


def test_rows_are_spread_evenly_over_batches():
    batches = PackedBatches(documents(33, 60), batch_size=32, length=60, seed=0, packed=False)
    filled = [int((batch["segments"] > 0).any(axis=1).sum()) for batch in epoch(batches)]
    assert sorted(filled) == [16, 17]


def test_once_goes_through_all_and_leaves_the_position():
    batches = make_pairs()
    next(batches)
    before = batches.state()
    margins = np.concatenate([batch["margin"][batch["valid"]] for batch in batches.once()])
    assert batches.state() == before
    assert sorted(margins.tolist()) == [float(np.float32(n / 10)) for n in range(50)]


def test_pairs_are_token_balanced_and_flagged():
    batches = make_pairs(num_buckets=3)
    assert 1 < len(batches.shapes) <= 3
    rows = [shape.rows for shape in batches.shapes]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > rows[-1]
    for shape in batches.shapes:
        assert 2 * shape.rows * shape.length <= 1280
        assert 4 <= shape.rows <= 16
        # One more row would break a bound.
        assert shape.rows == 16 or 2 * (shape.rows + 1) * shape.length > 1280
    longest = batches.shapes[-1].length
    for batch in epoch(batches):
        assert batch["valid"].dtype == bool
        assert batch["margin"].dtype == np.float32
        assert batch["valid"].all() or batch["tokens"].shape[2] == longest
        assert not batch["segments"][~batch["valid"]].any()
        assert not batch["loss_mask"][~batch["valid"]].any()
        assert (batch["segments"][batch["valid"]][:, :, 0] == 1).all()


def test_pairs_keep_sides_margin_and_mask_together():
    made = pairs()
    for batch in epoch(make_pairs()):
        for row in np.flatnonzero(batch["valid"]):
            pair = made[round(float(batch["margin"][row]) * 10)]
            for side, expected in enumerate((pair.chosen, pair.rejected)):
                length = len(expected.tokens)
                assert batch["tokens"][row, side, :length].tolist() == expected.tokens.tolist()
                assert batch["segments"][row, side].sum() == length
                mask = batch["loss_mask"][row, side]
                assert mask[1:length].tolist() == expected.loss_mask[1:].tolist()


def test_rows_of_pairs_divide_among_devices_and_microbatches():
    assert [shape.rows % 6 for shape in make_pairs(multiple_of=6, num_buckets=2).shapes] == [0, 0]


def test_bounds_that_cannot_be_met_say_what_to_change():
    with pytest.raises(ValueError, match=r"allow 1 pairs of 2 x 64 .* min_pairs=4.*>=512"):
        make_pairs(max_tokens=200, buckets=(64,))
    with pytest.raises(ValueError, match=r"min_pairs=4, max_pairs=2: need 1 <= min <= max"):
        make_pairs(max_pairs=2)
    with pytest.raises(ValueError, match=r"a multiple of 32\), but min_pairs=4"):
        make_pairs(multiple_of=32)


def test_description_counts_shapes_and_padding():
    batches = make_pairs(buckets=(64,))
    line = batches.describe()
    assert line.startswith("1 shapes (pairs x tokens: 10x64), 5 batches an epoch, ")
    used = sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in pairs())
    assert line.endswith(f"{1 - used / (5 * 2 * 10 * 64):.0%} padding")


def test_prompts_are_padded_on_the_left_and_come_each_once():
    batches = make_prompts(buckets=(8, 24))
    assert batches.shapes == (Shape(8, 8), Shape(8, 24))
    found = []
    for batch in epoch(batches):
        assert batch["mask"].dtype == bool
        assert batch["tokens"].dtype == np.int32
        assert batch["mask"].any(axis=1).all()
        assert batch["mask"][:, -1].all()
        assert (np.diff(batch["mask"].astype(int), axis=1) >= 0).all()
        assert (batch["tokens"][~batch["mask"]] == 0).all()
        found += batch["tokens"][:, -1].tolist()
    # 50 prompts in batches of 8: the last one is filled with six others, never twice in a batch.
    assert set(found) == set(range(1, 51))
    assert len(found) == 56
    assert all(len(set(batch["tokens"][:, -1].tolist())) == 8 for batch in epoch(batches))


def test_fewer_prompts_than_a_batch_are_repeated():
    (batch,) = epoch(PromptBatches(prompts(3), batch_size=8, seed=0))
    assert sorted(np.bincount(batch["tokens"][:, -1])[1:].tolist()) == [2, 3, 3]


def test_padding_by_hand():
    batch = pad_prompts([np.array([5, 6]), np.array([7])], 3, pad_id=9)
    assert batch["tokens"].tolist() == [[9, 5, 6], [9, 9, 7]]
    assert batch["mask"].astype(int).tolist() == [[0, 1, 1], [0, 0, 1]]
    one = Encoded(np.array([1, 5, 2], np.int32), np.array([False, True, True]))
    two = Encoded(np.array([1, 2], np.int32), np.array([False, True]))
    batch = pad_pairs([EncodedPair(one, two, 1.5)], Shape(2, 4), pad_id=9)
    assert batch["tokens"].tolist() == [[[1, 5, 2, 9], [1, 2, 9, 9]], [[9] * 4] * 2]
    assert batch["segments"].tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0]], [[0] * 4] * 2]
    assert batch["loss_mask"].astype(int).tolist() == [[[0, 1, 1, 0], [0, 1, 0, 0]], [[0] * 4] * 2]
    assert batch["margin"].tolist() == [1.5, 0.0]
    assert batch["valid"].tolist() == [True, False]


@pytest.mark.parametrize("make", [make_packed, make_prompts])
def test_batch_size_must_be_positive(make):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        make(batch_size=0)


def test_no_examples():
    with pytest.raises(ValueError, match="no examples to make batches of"):
        PackedBatches([], batch_size=1, length=8, seed=0)


def test_document_longer_than_a_row_is_an_error_at_once():
    with pytest.raises(ValueError, match="does not fit into rows of length=8"):
        make_packed(length=8)


def test_packing_and_batching_400k_tokens_takes_below_two_seconds():
    many = documents(12_000, 66)
    assert sum(len(d.tokens) for d in many) > 400_000
    start = time.process_time()
    batches = PackedBatches(many, batch_size=32, length=128, seed=0)
    assert len(epoch(batches)) > 90
    assert time.process_time() - start < 2
