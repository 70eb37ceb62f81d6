"""TRPO on a minibatch: parts make the step of the whole, and the float32 master is what moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.methods import ppo, trpo
from rlhf_jax.methods.ppo import PPOConfig
from rlhf_jax.methods.trpo import TRPOConfig
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training.step import create_state
from tests import bigram, tiny

CONFIG = PPOConfig(objective="trpo", normalize_advantages=True)


def state_of(dtype=jnp.float32):
    model = jax.tree.map(lambda x: x.astype(dtype), bigram.policy())
    return create_state(model, optax.identity(), Sharding(make_mesh(1)))


def step(state, *, microbatches: int = 1, max_kl: float = 0.01, steps: int = 1):
    """Some steps on the same eight rows."""
    make = trpo.make_trust_region_step(
        CONFIG,
        TRPOConfig(max_kl=max_kl),
        Sharding(make_mesh(1)),
        temperature=0.8,
        microbatches=microbatches,
    )
    for _ in range(steps):
        state, metrics = make(state, (bigram.experience(), None), jnp.float32(0))
    return state, metrics


@pytest.mark.parametrize("microbatches", [2, 4])
def test_parts_make_the_step_of_the_whole(microbatches):
    whole, wanted = step(state_of())
    parts, metrics = step(state_of(), microbatches=microbatches)
    assert wanted["policy/accepted"] and wanted["policy/kl"] > 0.002
    tiny.close(parts.model.table, whole.model.table, 1e-4)
    for name in wanted.keys() - {"optim/cg_residual"}:
        tiny.close(metrics[name], wanted[name], 1e-4)


def test_every_token_counts_once_in_parts():
    """Rows differ in length: a mean of the parts' means would be another number."""
    batch = ppo.prepare((bigram.experience(), None), config=CONFIG)
    value = trpo.surrogate(bigram.policy(), batch, 0.8)
    parts = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]).swapaxes(0, 1), batch)
    each = [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(2)]
    tiny.close(sum(trpo.surrogate(bigram.policy(), part, 0.8) for part in each), value)


def test_the_policy_in_half_precision_follows_its_master():
    state, metrics = step(state_of(jnp.bfloat16), steps=2)
    assert metrics["policy/accepted"]
    start = np.asarray(state_of(jnp.bfloat16).master.table)
    assert np.abs(np.asarray(state.master.table) - start).max() > 1e-2
    assert state.model.table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.master.table.astype(jnp.bfloat16), state.model.table)
    # Steps in the master are those in full precision, but for the rounding of the policy.
    full, _ = step(state_of(), steps=2)
    tiny.close(state.master.table, full.model.table, 0.05)


@pytest.mark.parametrize("changes", [{"ptx_coef": 0.1}, {"entropy_coef": 0.1}])
def test_what_the_problem_has_no_place_for_is_refused(changes):
    with pytest.raises(ValueError, match=r"objective='trpo' has no place .* must be 0"):
        PPOConfig(objective="trpo", **changes)
