"""Losses on arrays that are spread over devices: the same numbers, with no word about axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax import losses

RNG = np.random.default_rng(3)
REWARDS, VALUES = RNG.normal(size=(2, 8, 6)).astype(np.float32)
WHERE = np.arange(6)[None] < RNG.integers(1, 7, (8, 1))


def advantages(rewards, values, where):
    return losses.gae(rewards, values, discount=0.9, lambda_=0.8, where=where)


def whitened(rewards, values, where):
    return losses.masked_whiten(rewards, where=where)


def spread(rewards, values, where):
    return losses.update_moments(losses.RunningMoments.zeros(), rewards, where=where).std


def loss(rewards, values, where):
    return losses.masked_mean(losses.value_loss(values, rewards), where=where)


@pytest.mark.parametrize("function", [advantages, whitened, spread, loss])
def test_sharded_over_the_batch_equals_unsharded(function):
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays = [jnp.asarray(x) for x in (REWARDS, VALUES, WHERE)]
    sharded = jax.jit(function)(*(jax.device_put(x, rows) for x in arrays))
    np.testing.assert_allclose(sharded, function(*arrays), rtol=1e-5, atol=1e-6)
