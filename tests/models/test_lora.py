"""Low-rank adapters: the start, the merge, gradients, work saved, and what is never touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models import lora
from rlhf_jax.models.heads import ScalarModel, next_token_log_probs
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.rollout import generate
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training.step import create_state, make_train_step
from tests import tiny

CONFIG = LoRAConfig(rank=3, alpha=6.0)
ADAM = optax.adam(0.05)


def make(config: LoRAConfig = CONFIG, **changes) -> lora.Tuning:
    """Fresh adapters on the tiny language model."""
    model = tiny.language_model(tiny.model_config(**changes))
    return lora.make_tuning(model, config, jax.random.key(0))


def drawn(tuning: lora.Tuning, seed: int = 5):
    """Adapters that change the model: B is not 0."""
    return tiny.draw(tuning.start, seed, 0.3)


@functools.cache
def batch() -> dict:
    """Eight rows of 12 tokens, some padded, so that eight devices take one each."""
    tokens, mask = tiny.left_padded([12, 7, 9, 12, 3, 5, 12, 8], 12)
    return {"tokens": tokens, "segments": mask.astype(np.int32)}


def loss_fn(model: Transformer, batch: dict):
    """Mean negative log-likelihood over rows: a sum over equal shares, as microbatches need."""
    log_probs, _ = next_token_log_probs(model, batch["tokens"], batch["segments"])
    where = batch["segments"][:, :-1] > 0
    loss = -jnp.where(where, log_probs, 0.0).sum() / 60
    return loss, {"loss": loss}


gradient = tiny.jit(jax.grad(lambda model, batch: loss_fn(model, batch)[0]))


@tiny.jit
def adapter_gradient(trained, trunk, batch):
    return jax.grad(lambda t: loss_fn(lora.attach(trunk, t), batch)[0])(trained)


def pointers(tree) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


# What the model computes.


def test_training_starts_at_the_frozen_model_to_the_bit():
    tuning = make()
    base = tiny.forward(tuning.trunk, batch()["tokens"], batch()["segments"])
    start = tiny.forward(tuning.model(tuning.start), batch()["tokens"], batch()["segments"])
    moved = tiny.forward(tuning.model(drawn(tuning)), batch()["tokens"], batch()["segments"])
    np.testing.assert_array_equal(start, base)
    assert tiny.largest_difference(moved, base) > 0.1
    assert tiny.largest_difference(tuning.merged(tuning.start), tuning.trunk) == 0.0


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_embeddings": False}])
def test_merged_and_low_rank_are_one_model(changes):
    tuning = make(**changes)
    trained = drawn(tuning)
    kept, merged = (
        tiny.forward(model, batch()["tokens"], batch()["segments"])
        for model in (tuning.model(trained), tuning.merged(trained))
    )
    tiny.close(kept, merged, 1e-5)


def test_merged_weights_are_those_of_the_paper():
    """W + (α / r) A B with α / r = 2, layer by layer."""
    tuning = make()
    trained = drawn(tuning)
    merged = tuning.merged(trained)
    for name in lora.TARGETS:
        pair = getattr(trained, name)
        w, a, b = (
            np.asarray(x[...], np.float64)
            for x in (getattr(tuning.trunk.layers, name), *pair_of(pair))
        )
        wanted = np.stack([w[i] + 2.0 * a[i] @ b[i] for i in range(len(w))])
        tiny.close(getattr(merged.layers, name)[...], wanted)
        assert np.abs(wanted - w).max() > 0.1


def pair_of(pair: lora.Pair):
    return pair.a, pair.b


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sampling_model", "model"])
def test_sampler_and_trainer_agree_on_every_token(how):
    """Decoded with the merged copy or with the adapters; trained with the adapters."""
    tuning = make()
    trained = drawn(tuning)
    sample = tiny.jit(
        functools.partial(
            generate, config=tiny.SETTINGS["plain"], eos_ids=tiny.EOS_IDS, pad_id=tiny.PAD
        )
    )
    rollout = sample(getattr(tuning, how)(trained), *tiny.prompts(), jax.random.key(5))
    log_probs, _ = tiny.teacher_forced(
        tuning.model(trained), rollout.tokens, rollout.segments, start=rollout.prompt_length
    )
    tiny.close(jnp.where(rollout.response_mask, log_probs, 0.0), rollout.log_probs, 1e-5)


def test_bfloat16_decodes_beside_the_matrices():
    """A small update is lost in a bfloat16 sum, so there the sampler keeps it apart."""
    tuning = make(dtype="bfloat16")
    trained = jax.tree.map(lambda x: x * 1e-2, drawn(tuning))
    assert lora.detach(tuning.sampling_model(trained)) is not None
    assert lora.detach(make().sampling_model(drawn(make()))) is None
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))
    assert tuning.merged(trained).layers.q[...].dtype == jnp.bfloat16
    hidden = tiny.forward(tuning.model(trained), batch()["tokens"], batch()["segments"])
    assert hidden.dtype == jnp.bfloat16


# Gradients.


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_matrix_projected():
    """With G the gradient in W + s A B: dA = s G Bᵀ and dB = s Aᵀ G, for every target."""
    tuning = make()
    trained = drawn(tuning)
    whole = gradient(tuning.merged(trained), batch())
    grads = adapter_gradient(trained, tuning.trunk, batch())
    for name in lora.TARGETS:
        g = np.asarray(getattr(whole.layers, name)[...], np.float64)
        a, b = (np.asarray(x[...], np.float64) for x in pair_of(getattr(trained, name)))
        da, db = (x[...] for x in pair_of(getattr(grads, name)))
        tiny.close(da, 2.0 * g @ b.swapaxes(1, 2))
        tiny.close(db, 2.0 * a.swapaxes(1, 2) @ g)
        assert np.abs(da).max() > 1e-3 and np.abs(db).max() > 1e-3


def test_only_b_moves_first():
    """At B = 0 the gradient to A is 0 and that to B is not (so B must be what starts at 0)."""
    tuning = make()
    grads = adapter_gradient(tuning.start, tuning.trunk, batch())
    for name in lora.TARGETS:
        da, db = pair_of(getattr(grads, name))
        assert np.abs(da[...]).max() == 0.0
        assert np.abs(db[...]).max() > 1e-3


# The train step.


def flops(step, *arguments) -> float:
    return step.lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_a_step_costs_clearly_less_than_that_of_every_weight():
    """No gradient to a frozen weight: of three products with each matrix two are left.

    Adapters that are merged first, and so differentiated through whole matrices, save nothing.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_layers": 2}
    model = jax.eval_shape(lambda: Transformer(tiny.model_config(**sizes), jax.random.key(0)))
    tuning = jax.eval_shape(
        lambda m: lora.make_tuning(m, LoRAConfig(rank=4), jax.random.key(0)).start, model
    )
    rows = {name: jax.ShapeDtypeStruct((8, 64), jnp.int32) for name in ("tokens", "segments")}
    sharding = Sharding(make_mesh(1), "zero0")

    def merged_loss(trained, batch, trunk):
        return loss_fn(lora.merge(lora.attach(trunk, trained)), batch)

    def state(tree):
        return jax.eval_shape(lambda t: create_state(t, ADAM, sharding), tree)

    every = flops(make_train_step(loss_fn, ADAM, sharding), state(model), rows)
    adapters = make_train_step(loss_fn, ADAM, sharding, trunk=model)
    beside = flops(adapters, state(tuning), rows)
    merged = flops(make_train_step(merged_loss, ADAM, sharding), state(tuning), rows, model)
    assert beside < 0.8 * every
    assert merged > 0.95 * every


def step_on(sharding: Sharding, steps: int = 3, microbatches: int = 1):
    """Trunk, state and losses after some steps, with the trunk placed as the mode says."""
    tuning = make()
    trunk = jax.device_put(tuning.trunk, sharding.params(tuning.trunk))
    state = create_state(tuning.start, ADAM, sharding)
    step = make_train_step(loss_fn, ADAM, sharding, trunk=trunk, microbatches=microbatches)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, sharding.put_batch(batch()))
        losses.append(float(metrics["loss"]))
    return trunk, state, losses


@functools.cache
def on_one_device():
    return step_on(Sharding(make_mesh(1), "zero0"))


@pytest.mark.slow
def test_training_moves_the_adapters_and_nothing_else():
    trunk, state, losses = on_one_device()
    assert losses[-1] < losses[0] - 0.1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trunk))
    assert tiny.largest_difference(trunk, tiny.language_model()) == 0.0
    assert tiny.largest_difference(state.model, make().start) > 0.01
    # Neither the state nor the optimizer holds anything of the trunk's size.
    adapters = sum(leaf.size for leaf in jax.tree.leaves(make().start))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3 * adapters + 2
    assert state.master is None


@pytest.mark.slow
def test_microbatches_add_up():
    tiny.close(
        step_on(Sharding(make_mesh(1), "zero0"), microbatches=4)[1].model, on_one_device()[1].model
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero0", "zero2", "zero3", "tensor"])
def test_every_mode_gives_the_numbers_of_one_device(mode):
    tensor = 2 if mode == "tensor" else 1
    sharding = Sharding(make_mesh(8, tensor=tensor), mode)
    _, state, losses = step_on(sharding)
    _, wanted, wanted_losses = on_one_device()
    tiny.close(losses, wanted_losses)
    # Adam divides by the size of the gradient: a rounding error counts for more than elsewhere.
    tiny.close(state.model, wanted.model, 1e-4)
    moments = state.opt_state[0].mu.gate.b[...]
    assert moments.sharding.is_fully_replicated == (mode == "zero0")


# Sharing.


def test_attaching_copies_nothing():
    tuning = make()
    model = tuning.model(tuning.start)
    assert set(pointers(model)) == set(pointers(tuning.trunk)) | set(pointers(tuning.start))
    # Merging makes new adapted matrices and shares the rest.
    merged = tuning.merged(drawn(tuning))
    new = set(pointers(merged)) - set(pointers(tuning.trunk))
    assert len(new) == len(lora.TARGETS)
    assert tuning.trunk.layers.q is not merged.layers.q


def test_detach_undoes_attach():
    tuning = make()
    trained = drawn(tuning)
    trunk, again = lora.detach(tuning.model(trained))
    assert jax.tree.structure(again) == jax.tree.structure(trained)
    assert pointers(trunk) == pointers(tuning.trunk) and pointers(again) == pointers(trained)
    assert lora.detach(tuning.trunk) is None


@pytest.mark.slow
def test_scalar_heads_train_beside_the_adapters():
    model = tiny.scalar_model()
    tuning = lora.make_tuning(model, CONFIG, jax.random.key(0))
    assert isinstance(tuning.start, ScalarModel)
    scores = jax.jit(lambda m: m.scores(batch()["tokens"], batch()["segments"]))
    np.testing.assert_array_equal(scores(tuning.model(tuning.start)), scores(model))
    trained = drawn(tuning)
    tiny.close(scores(tuning.model(trained)), scores(tuning.merged(trained)))
    grads = jax.grad(lambda t: scores(tuning.model(t)).sum())(tuning.start)
    assert float(grads.bias[...]) == 8.0
    # A critic goes on from a reward model's adapters, on the same weights.
    critic = lora.make_tuning(tuning.model(trained), CONFIG, jax.random.key(1))
    assert pointers(critic.trunk) == pointers(model.trunk)
    assert tiny.largest_difference(critic.start, trained) == 0.0


def test_rank_0_trains_every_weight():
    model = tiny.language_model()
    tuning = lora.make_tuning(model, LoRAConfig(), jax.random.key(0))
    assert tuning.start is model and tuning.trunk is None
    for use in (tuning.model, tuning.merged, tuning.sampling_model):
        assert use(model) is model


def test_targets_choose_the_matrices():
    tuning = make(LoRAConfig(rank=2, targets=("q", "v")))
    assert {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(tuning.start)} == {
        "q",
        "v",
    }
    merged = tuning.merged(drawn(tuning))
    changed = {
        name
        for name in lora.TARGETS
        if tiny.largest_difference(getattr(merged.layers, name), getattr(tuning.trunk.layers, name))
    }
    assert changed == {"q", "v"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank=-1 must be at least 0"),
        ({"rank": 2, "targets": ("q", "w")}, "must name one or more of q, k, v, o, gate, up, down"),
        ({"rank": 2, "targets": ()}, "must name one or more"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)
