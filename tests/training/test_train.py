"""The train step: accumulation, donation, precision, metrics, determinism, compilations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.methods import ppo
from rlhf_jax.methods.ppo import PPOConfig
from rlhf_jax.methods.reductions import REDUCTIONS
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training import step as train
from rlhf_jax.training.step import create_state, make_train_step
from tests import bigram, tiny
from tests.programs import compiled_programs

# Every term of the loss, advantages normalised over the whole batch, and plain gradient descent:
# a difference of the states is a difference of the gradients.
SETTINGS = {
    "clip_eps": 0.1,
    "entropy_coef": 0.1,
    "ptx_coef": 0.5,
    "normalize_advantages": True,
    "advantage_clip": 1.5,
}
DESCENT = optax.sgd(1.0)


@functools.cache
def one_device() -> Sharding:
    return Sharding(make_mesh(1), "zero0")


@functools.cache
def loss_of(kind: str):
    """`(model, batch) -> loss, metrics`; the reduction is in the weights of the batch."""
    config = PPOConfig(**SETTINGS)
    if kind == "critic":
        return functools.partial(ppo.critic_loss, config=config)

    def policy_loss(model, batch):
        return ppo.policy_loss(model, batch, jnp.float32(0.0), config=config, temperature=0.8)

    return policy_loss


@functools.cache
def gradient_of(kind: str):
    return tiny.jit(jax.value_and_grad(loss_of(kind), has_aux=True))


def ragged_32(kind: str):
    """Model, and a batch of 32 responses of 1 to 5 tokens with 16 ragged rows for ptx."""
    if kind == "critic":
        return bigram.critic(), (bigram.experience(32), None)
    return bigram.policy(), (bigram.experience(32), bigram.language_batch(16))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_gradients_of_four_parts_add_up_to_that_of_the_whole(kind, reduction):
    model, batch = ragged_32(kind)
    ready = ppo.prepare(batch, config=PPOConfig(**SETTINGS, reduction=reduction))
    (whole, _), gradient = gradient_of(kind)(model, ready)
    parts = jax.tree.map(lambda x: train.split(x, 4), ready)
    runs = [gradient_of(kind)(model, jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(4)]
    tiny.close(sum(float(loss) for (loss, _), _ in runs), whole, 1e-6)
    tiny.close(jax.tree.map(lambda *parts: sum(parts), *(g for _, g in runs)), gradient, 1e-6)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-2
    if reduction != "token_mean":
        return
    # Not vacuous: the mean of the parts' own means is another number.
    own = [
        ppo.prepare((part.experience, part.ptx), config=PPOConfig(reduction=reduction))
        for part in (jax.tree.map(lambda x, i=i: x[i], parts) for i in range(4))
    ]
    naive = np.mean([float(gradient_of(kind)(model, part)[0][0]) for part in own])
    assert abs(naive - float(whole)) > 1e-4


@functools.cache
def step_of(kind: str, microbatches: int):
    prepare = functools.partial(ppo.prepare, config=PPOConfig(**SETTINGS))
    return make_train_step(
        loss_of(kind), DESCENT, one_device(), microbatches=microbatches, prepare=prepare
    )


def train_on_32(kind: str, microbatches: int, steps: int = 1):
    model, batch = ragged_32(kind)
    state = create_state(model, DESCENT, one_device())
    for _ in range(steps):
        state, metrics = step_of(kind, microbatches)(state, batch)
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_a_step_in_four_microbatches_equals_one_of_thirty_two(kind):
    """Advantages are normalised, and losses weighted, over all 32."""
    (whole, whole_metrics), (parts, parts_metrics) = (train_on_32(kind, n) for n in (1, 4))
    tiny.close(parts.model, whole.model, 1e-6)
    tiny.close(parts_metrics, whole_metrics, 1e-5)
    assert tiny.largest_difference(whole.model, ragged_32(kind)[0]) > 1e-2


def toy_loss(model, batch):
    loss = jnp.sum(batch["x"] * model["w"])
    return loss, {"sum": loss, "part_max": batch["x"].max(), "part_min": batch["x"].min()}


def toy_step(microbatches: int = 1, optimizer=DESCENT, **options):
    return make_train_step(toy_loss, optimizer, one_device(), microbatches=microbatches, **options)


def toy_state(optimizer=DESCENT, dtype=jnp.float32, value: float = 1.0):
    return create_state({"w": jnp.full((), value, dtype)}, optimizer, one_device())


def test_metrics_add_up_unless_their_name_says_max_or_min():
    batch = {"x": np.array([[3.0], [-5.0], [7.0], [1.0], [2.0], [-4.0]], np.float32)}
    state, metrics = toy_step(3)(toy_state(), batch)
    wanted = {"sum": 4.0, "part_max": 7.0, "part_min": -5.0, "optim/grad_norm": 4.0}
    tiny.close(metrics, wanted, 1e-6)
    tiny.close(state.model["w"], 1.0 - 4.0, 1e-6)
    assert int(state.step) == 1


def test_rows_are_dealt_out_to_microbatches():
    """Each of two parts takes every second row: rows that a device holds stay with it."""
    parts = train.split(jnp.arange(6), 2)
    assert parts.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_batch_must_divide_by_the_microbatches():
    with pytest.raises(ValueError, match="a batch of 5 must be divisible by 2 microbatches"):
        toy_step(2)(toy_state(), {"x": np.ones((5, 1), np.float32)})


def test_prepare_sees_the_whole_batch():
    def centred(batch):
        return {"x": batch["x"] - batch["x"].mean()}

    batch = {"x": np.array([[1.0], [2.0], [3.0], [6.0]], np.float32)}
    _, metrics = toy_step(2, prepare=centred)(toy_state(), batch)
    tiny.close({"max": metrics["part_max"], "min": metrics["part_min"]}, {"max": 3.0, "min": -2.0})


def test_gradient_norm_is_measured_before_clipping():
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    state, metrics = toy_step(optimizer=clipped)(
        toy_state(clipped), {"x": np.array([[8.0]], np.float32)}
    )
    tiny.close(metrics["optim/grad_norm"], 8.0, 1e-6)
    tiny.close(state.model["w"], 0.5, 1e-6)


def test_the_state_is_donated_and_the_model_it_came_from_is_not():
    model = {"w": jnp.ones(())}
    state = create_state(model, optax.adam(0.1), one_device())
    step, batch = toy_step(optimizer=optax.adam(0.1)), {"x": np.ones((2, 1), np.float32)}
    after, _ = step(state, batch)
    donated = [leaf.is_deleted() for leaf in jax.tree.leaves((state.model, state.opt_state))]
    assert all(donated)
    # The caller may go on with its model: it is PPO's reference, which must not train.
    assert not model["w"].is_deleted() and float(model["w"]) == 1.0
    assert float(after.model["w"]) != 1.0


def test_two_states_of_one_model_do_not_share_buffers():
    model = {"w": jnp.ones(())}
    one, other = (create_state(model, DESCENT, one_device()) for _ in range(2))
    step, batch = toy_step(), {"x": np.ones((2, 1), np.float32)}
    step(one, batch)
    assert float(step(other, batch)[0].model["w"]) == -1.0


def test_small_updates_to_a_bfloat16_model_are_not_lost():
    """100 steps of 1e-4 from 1: each alone is below half a bfloat16 step of 2^-8."""
    slow = optax.sgd(1e-4)
    step, state = toy_step(optimizer=slow), toy_state(slow, jnp.bfloat16)
    assert state.master["w"].dtype == jnp.float32
    for _ in range(100):
        state, _ = step(state, {"x": np.ones((1, 1), np.float32)})
    tiny.close(state.master["w"], 0.99, 1e-5)
    assert state.model["w"].dtype == jnp.bfloat16
    assert state.model["w"] == state.master["w"].astype(jnp.bfloat16)
    assert jnp.bfloat16(1.0) - jnp.bfloat16(1e-4) == jnp.bfloat16(1.0)


def test_gradients_of_a_bfloat16_model_are_added_in_float32():
    """256 + 1 + 1 + 1: in bfloat16 the ones vanish one by one, in float32 they add up."""
    batch = {"x": np.array([[256.0], [1.0], [1.0], [1.0]], np.float32)}
    _, metrics = toy_step(4)(toy_state(dtype=jnp.bfloat16), batch)
    tiny.close(metrics["optim/grad_norm"], 259.0, 1e-4)


def test_float32_heads_of_a_bfloat16_model_have_a_master_of_their_own():
    model = {"w": jnp.ones((), jnp.bfloat16), "head": jnp.ones(())}
    state = create_state(model, DESCENT, one_device())

    def loss(model, batch):
        return jnp.sum(batch["x"] * model["w"] * model["head"]), {}

    step = make_train_step(loss, DESCENT, one_device())
    for _ in range(2):
        # One buffer in two places of a donated state is an error on most devices.
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
        state, _ = step(state, {"x": np.full((1, 1), 0.25, np.float32)})
    assert jax.tree.map(lambda m: m.dtype, state.model) == jax.tree.map(lambda m: m.dtype, model)


def test_the_same_run_twice_gives_the_same_bits():
    runs = [train_on_32("policy", 4, steps=3) for _ in range(2)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *runs))
    assert int(runs[0][0].step) == 3


def test_one_program_for_each_shape_of_batch():
    step, state = toy_step(2, optax.adam(0.1)), toy_state(optax.adam(0.1))
    with compiled_programs() as programs:
        for rows in (2, 4, 2, 4, 4, 2):
            state, _ = step(state, {"x": np.ones((rows, 1), np.float32)})
    assert programs["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero0", "zero1", "zero2", "zero3"])
def test_the_model_of_a_real_step_is_one_program_too(mode):
    """The state that comes back must look to jit like the one that went in."""
    sharding = Sharding(make_mesh(1), mode)
    model, optimizer = tiny.language_model(tiny.model_config(num_layers=1)), optax.adam(1e-3)
    state, frozen = create_state(model, optimizer, sharding), jax.tree.map(np.array, model)

    def loss(model, batch):
        hidden = model(batch["tokens"], jnp.ones_like(batch["tokens"]))
        return jnp.sum(jnp.square(model.logits(hidden))), {}

    step = make_train_step(loss, optimizer, sharding)
    with compiled_programs() as programs:
        for _ in range(3):
            state, metrics = step(state, {"tokens": np.ones((2, 4), np.int32)})
    assert programs["step"] == 1
    assert tiny.largest_difference(state.model, frozen) > 1e-4
    assert tiny.largest_difference(model, frozen) == 0.0
    assert metrics["optim/grad_norm"] > 0
