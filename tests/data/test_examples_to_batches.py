"""From examples to batches: what the functions hand on, and all rows once."""

import itertools

import numpy as np
import pytest

from rlhf_jax.data.batches import (
    PackedBatches,
    PairBatches,
    PromptBatches,
    each_repeated,
    fixed_prompts,
    once_packed,
    once_pairs,
    packed_batches,
    pair_batches,
    prompt_batches,
)
from rlhf_jax.data.examples import Examples, StreamedExamples
from rlhf_jax.data.schemas import Encoded, EncodedPair
from rlhf_jax.data.streaming import StreamedBatches

RNG = np.random.default_rng(0)
DOCUMENTS = [
    Encoded(np.full(RNG.integers(2, 30), n, np.int32), RNG.random() < np.arange(1))
    for n in range(40)
]
DOCUMENTS = [Encoded(d.tokens, np.arange(len(d.tokens)) > 0) for d in DOCUMENTS]
PAIRS = [EncodedPair(a, b, 0.0) for a, b in zip(DOCUMENTS[::2], DOCUMENTS[1::2], strict=True)]
PROMPTS = [d.tokens for d in DOCUMENTS]
BALANCE = {"max_tokens": 640, "min_pairs": 2, "max_pairs": 8, "pad_id": 99, "multiple_of": 2}


def streamed(rows):
    return StreamedExamples(
        lambda: [[{"n": n} for n in range(len(rows))]],
        lambda block: [rows[row["n"]] for row in block],
        lambda: Examples(rows),
        name="numbers",
    )


def same(some, others, count=5):
    pairs = zip(itertools.islice(some, count), itertools.islice(others, count), strict=True)
    return all(np.array_equal(a[name], b[name]) for a, b in pairs for name in a)


def test_rows_in_a_list_or_in_examples_make_the_same_batches():
    for rows in (DOCUMENTS, Examples(DOCUMENTS)):
        made = packed_batches(rows, rows=4, length=64, seed=3, pad_id=99)
        assert same(made, PackedBatches(DOCUMENTS, batch_size=4, length=64, seed=3, pad_id=99))
        made = packed_batches(rows, rows=4, length=64, seed=3, pad_id=99, packed=False)
        assert next(made)["segments"].max() == 1
    for rows in (PAIRS, Examples(PAIRS)):
        made = pair_batches(rows, seed=3, longest=64, **BALANCE)
        assert same(made, PairBatches(PAIRS, seed=3, num_buckets=3, **BALANCE))
        assert len(made.shapes) > 1
        assert len(pair_batches(rows, seed=3, num_buckets=1, **BALANCE).shapes) == 1
    for rows in (PROMPTS, Examples(PROMPTS)):
        made = prompt_batches(rows, batch_size=4, buckets=[16, 32], seed=3, pad_id=99)
        again = PromptBatches(PROMPTS, batch_size=4, buckets=(16, 32), seed=3, pad_id=99)
        assert same(made, again)


def test_streamed_pairs_take_a_quarter_a_half_and_the_whole_of_the_longest():
    made = pair_batches(streamed(PAIRS), seed=0, longest=40, **BALANCE)
    assert isinstance(made, StreamedBatches)
    assert [shape.length for shape in made.shapes] == [10, 20, 40]
    with pytest.raises(ValueError, match="give longest=max_length"):
        pair_batches(streamed(PAIRS), seed=0, **BALANCE)


def test_all_documents_and_pairs_come_once():
    expected = sorted(d.tokens.tolist() for d in DOCUMENTS)
    for documents in (DOCUMENTS, Examples(DOCUMENTS), streamed(DOCUMENTS)):
        batches = once_packed(documents, rows=4, length=64, pad_id=99)
        found = [
            tokens[segments == n].tolist()
            for batch in batches
            for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True)
            for n in range(1, segments.max() + 1)
        ]
        assert sorted(found) == expected
    for pairs in (PAIRS, Examples(PAIRS), streamed(PAIRS)):
        batches = once_pairs(pairs, **BALANCE)
        index = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
        assert sorted(index) == list(range(len(PAIRS)))


def test_fixed_prompts_are_whole_batches_in_their_order():
    batches = fixed_prompts(Examples(PROMPTS), 16, 32, 99, "validation")
    assert [batch["tokens"].shape for batch in batches] == [(16, 32)] * 2  # 8 of 40 are left out
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    for row, keep, prompt in zip(tokens, mask, PROMPTS[:32], strict=True):
        assert row[keep].tolist() == prompt.tolist()
        assert keep[-1] and (row[~keep] == 99).all()
    with pytest.raises(ValueError, match=r"test has 40 prompts, fewer than one batch of 64: lower"):
        fixed_prompts(PROMPTS, 64, 32, 99, "test")


def test_rows_are_repeated_side_by_side():
    batch = {"tokens": np.array([[1, 2], [3, 4]]), "mask": np.array([[True, False], [True, True]])}
    repeated = each_repeated(batch, 2)
    assert repeated["tokens"].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert repeated["mask"][:, 1].tolist() == [False, False, True, True]
