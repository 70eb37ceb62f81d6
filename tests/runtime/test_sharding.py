"""Specs by hand and batches on their devices; test_sharding_modes.py trains in every mode."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax.runtime.sharding import Sharding, make_mesh, spread_spec


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 16, 24), P(None, None, "data")),
        ((2, 16, 20), P(None, "data")),
        ((16, 3), P("data")),
        ((8,), P("data")),
        # Nothing to divide: fewer than eight, or not a multiple.
        ((2, 4, 4), P()),
        ((12,), P()),
        ((), P()),
    ],
)
def test_the_last_axis_that_divides_is_spread(shape, spec):
    assert spread_spec(shape, 8) == spec


def test_a_batch_is_split_by_rows_and_stays_what_it_was():
    how = Sharding(make_mesh(8), "zero2")
    batch = {"tokens": np.arange(32).reshape(16, 2), "valid": np.arange(16) % 2 == 0}
    placed = how.put_batch(batch)
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, batch))
    for leaf in placed.values():
        pieces = sorted(leaf.addressable_shards, key=lambda shard: shard.device.id)
        assert [shard.index[0] for shard in pieces] == [slice(i, i + 2) for i in range(0, 16, 2)]


def test_a_batch_that_does_not_divide_is_one_line():
    with pytest.raises(ValueError, match="batch of 12 must be divisible by 8 devices"):
        Sharding(make_mesh(8), "zero2").put_batch({"x": np.zeros((12, 2))})
    with pytest.raises(ValueError, match=r"sharding.mode='zero4' is unknown; use one of"):
        Sharding(make_mesh(1), "zero4")


def test_a_mesh_may_take_some_of_the_devices():
    assert make_mesh(3).size == 3
    assert make_mesh().size == len(jax.devices())
    with pytest.raises(ValueError, match=r"sharding.devices=99 but only"):
        make_mesh(99)
