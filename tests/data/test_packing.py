import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.packing import assign_buckets, bucket_lengths, first_fit, lay_out, spread
from rlhf_jax.data.schemas import Encoded

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def documents(sizes):
    """Document n consists of tokens 100 n, 100 n + 1, ..; the odd ones are trained."""
    return [
        Encoded(np.arange(100 * n, 100 * n + size, dtype=np.int32), np.arange(size) % 2 == 1)
        for n, size in enumerate(sizes, 1)
    ]


def pack(encoded, length, *, pad_id=0):
    """Documents in rows, first fit."""
    rows = first_fit([len(document.tokens) for document in encoded], length)
    return lay_out([[encoded[i] for i in row] for row in rows], length, pad_id=pad_id)


def test_first_fit_by_hand():
    # The 3 goes back to the first row, which 5 left with room for it; then both rows are full.
    assert first_fit([5, 4, 4, 3, 1], 8) == [[0, 3], [1, 2], [4]]
    assert first_fit([5, 4, 4, 2, 1], 8) == [[0, 3, 4], [1, 2]]
    assert first_fit([], 8) == []


@settings(max_examples=50, deadline=None)
@given(lengths)
def test_packing_keeps_every_token_once(sizes):
    packed = pack(documents(sizes), 12, pad_id=7)
    tokens, segments, mask = packed["tokens"], packed["segments"], packed["loss_mask"]
    assert tokens.dtype == segments.dtype == np.int32
    assert mask.dtype == bool
    real = segments > 0
    expected = np.concatenate([d.tokens for d in documents(sizes)])
    assert sorted(tokens[real].tolist()) == sorted(expected.tolist())
    assert (tokens[~real] == 7).all()
    assert not mask[~real].any()
    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            inside = np.flatnonzero(segments[row] == segment)
            assert (np.diff(inside) == 1).all()
            document = tokens[row, inside]
            assert (document == document[0] + np.arange(len(document))).all()
            assert document[0] % 100 == 0
            # The mask went along, the first token is never trained.
            assert mask[row, inside].tolist() == (document % 2 == 1).tolist()


def test_first_token_of_a_document_is_never_trained():
    trained = Encoded(np.array([5, 6, 2], np.int32), np.ones(3, bool))
    packed = pack([trained, trained], 8)
    assert packed["segments"].tolist() == [[1, 1, 1, 2, 2, 2, 0, 0]]
    assert packed["loss_mask"].astype(int).tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]


def test_document_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="9 tokens does not fit into rows of length=8: encode"):
        pack(documents([3, 9]), 8)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 4))
def test_buckets_waste_as_little_as_any(sizes, num_buckets):
    def cost(edges):
        return sum(min(edge for edge in edges if edge >= size) for size in sizes)

    found = bucket_lengths(sizes, num_buckets=num_buckets, multiple=3)
    top = -(-max(sizes) // 3) * 3
    below = range(3, top, 3)
    options = [
        (*some, top) for k in range(num_buckets) for some in itertools.combinations(below, k)
    ]
    assert len(found) <= num_buckets
    assert found[-1] == top
    assert all(edge % 3 == 0 for edge in found)
    assert list(found) == sorted(set(found))
    assert cost(found) == min(map(cost, options))


def test_assign_takes_the_smallest_bucket_that_holds():
    assert assign_buckets([1, 8, 9, 16], (8, 16)).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="17 tokens exceeds the largest bucket 16"):
        assign_buckets([17], (8, 16))
    with pytest.raises(ValueError, match=r"buckets=\[16, 8\] must be increasing"):
        assign_buckets([1], (16, 8))


def test_spread_is_even():
    assert spread(list("abcdefg"), 3) == [["a", "b"], ["c", "d"], ["e", "f", "g"]]
    assert spread([], 3) == []


def test_no_lengths():
    with pytest.raises(ValueError, match="0 lengths, num_buckets=2"):
        bucket_lengths([], num_buckets=2)
