"""`index` of a batch of pairs leads back to the list of pairs that the batches were made of."""

import numpy as np

from rlhf_jax.data.batches import PairBatches
from rlhf_jax.data.schemas import Encoded, EncodedPair


def document(rng: np.random.Generator) -> Encoded:
    tokens = rng.integers(2, 1000, rng.integers(2, 40)).astype(np.int32)
    return Encoded(tokens, np.arange(len(tokens)) > 0)


def make_pairs(count: int) -> list[EncodedPair]:
    rng = np.random.default_rng(0)
    return [EncodedPair(document(rng), document(rng), 0.0) for _ in range(count)]


def test_index_names_the_pair_of_each_row():
    pairs = make_pairs(83)
    batches = PairBatches(
        pairs, max_tokens=640, min_pairs=4, max_pairs=16, seed=0, num_buckets=2, multiple_of=4
    )
    seen = []
    for batch in batches.once():
        assert batch["index"].dtype == np.int32
        for row, index in enumerate(batch["index"]):
            if not batch["valid"][row]:
                assert index == 0
                continue
            seen.append(int(index))
            for side, wanted in enumerate((pairs[index].chosen, pairs[index].rejected)):
                real = batch["segments"][row, side] > 0
                np.testing.assert_array_equal(batch["tokens"][row, side][real], wanted.tokens)
    assert sorted(seen) == list(range(83))


def test_filler_is_not_a_pair():
    batches = PairBatches(make_pairs(5), max_tokens=640, min_pairs=4, max_pairs=4, seed=0)
    rows = [(b["index"][r], b["valid"][r]) for b in batches.once() for r in range(4)]
    assert sorted(i for i, valid in rows if valid) == [0, 1, 2, 3, 4]
    assert [i for i, valid in rows if not valid] == [0, 0, 0]


def test_parts_of_a_batch_do_not_change_what_is_in_it():
    """What four microbatches do not divide is filled up; the pairs and their order stay."""
    settings = {"max_tokens": 640, "min_pairs": 2, "max_pairs": 10, "seed": 0, "num_buckets": 1}
    pairs = make_pairs(83)
    whole, parts = PairBatches(pairs, **settings), PairBatches(pairs, parts=4, **settings)
    for _ in range(2 * whole.steps_per_epoch):
        one, other = next(whole), next(parts)
        assert len(other["valid"]) % 4 == 0
        rows = len(one["valid"])
        assert not other["valid"][rows:].any()
        for name in ("index", "valid", "tokens"):
            assert (one[name] == other[name][:rows]).all(), name
    assert any(shape.rows % 4 for shape in whole.shapes)
