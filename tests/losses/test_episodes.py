"""Several episodes in one row, with a gap between them."""

import jax.numpy as jnp
import numpy as np

from rlhf_jax import losses


def test_the_bootstrap_belongs_to_the_last_episode():
    zeros, where = jnp.zeros(4), jnp.array([True, True, False, True])
    settings = {"discount": 1.0, "where": where, "bootstrap": jnp.float32(1.0)}
    for found in (
        losses.gae(zeros, zeros, lambda_=1.0, **settings),
        losses.td_errors(zeros, zeros, **settings),
        losses.rewards_to_go(zeros, **settings),
        losses.k_step_returns(zeros, zeros, k=4, **settings),
        losses.k_step_advantages(zeros, zeros, k=4, **settings),
    ):
        np.testing.assert_array_equal(found, [0, 0, 0, 1])
    assert losses.total_return(zeros, **settings) == 1
