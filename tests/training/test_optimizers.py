"""Schedules at chosen steps by hand, what decays, clipping and one step of AdamW by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from tests import tiny


def rates(config: OptimizerConfig, total: int, *steps: int) -> list[float]:
    schedule = make_schedule(config, total)
    return [float(schedule(step)) for step in steps]


def test_warmup_rises_linearly_from_a_tenth():
    config = OptimizerConfig(2.0, warmup_fraction=0.1)
    # 10 of 100 steps: 0.2 + 1.8 · step / 10.
    tiny.close(rates(config, 100, 0, 5, 10, 99), [0.2, 1.1, 2.0, 2.0], 1e-6)


def test_no_warmup_starts_at_the_peak():
    tiny.close(rates(OptimizerConfig(2.0, warmup_fraction=0.0), 100, 0, 50), [2.0, 2.0], 1e-6)
    # A tenth of 9 steps is none.
    tiny.close(rates(OptimizerConfig(2.0, warmup_fraction=0.1), 9, 0), [2.0], 1e-6)


def test_linear_falls_to_the_end_fraction():
    config = OptimizerConfig(2.0, "linear", warmup_fraction=0.2, end_fraction=0.1)
    # After 20 warm-up steps: 2 - 1.8 · (step - 20) / 80.
    tiny.close(rates(config, 100, 20, 60, 100, 150), [2.0, 1.1, 0.2, 0.2], 1e-6)


def test_cosine_falls_to_the_end_fraction():
    config = OptimizerConfig(2.0, "cosine", warmup_fraction=0.2, end_fraction=0.1)
    # Half way down, cos(π/2) = 0: (1 + 0.1) / 2 · 2; a quarter of the way, cos(π/4) = 0.7071.
    quarter = 2.0 * (0.1 + 0.9 * (1 + 2**-0.5) / 2)
    tiny.close(rates(config, 100, 20, 40, 60, 100), [2.0, quarter, 1.1, 0.2], 1e-6)


def test_inverse_sqrt_follows_sqrt_of_warmup_over_step():
    config = OptimizerConfig(2.0, "inverse_sqrt", warmup_fraction=0.1)
    # The released code: sqrt(w / step), 0.316 of the peak at step 1000 of 1000 with w = 100.
    tiny.close(rates(config, 1000, 100, 400, 1000), [2.0, 1.0, 2.0 * 0.1**0.5], 1e-6)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule='cosin' is unknown; use one of constant"):
        make_schedule(OptimizerConfig(1.0, "cosin"), 10)


def names_of(tree) -> dict[str, float]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def test_only_matrices_decay():
    """With gradients of zero an update is the decay alone: -learning rate · decay · weight."""
    model = tiny.scalar_model(tiny.model_config(qkv_bias=True, qk_norm=True, tie_embeddings=False))
    optimizer, _ = make_optimizer(OptimizerConfig(0.5, warmup_fraction=0.0, weight_decay=0.1), 10)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = tiny.jit(optimizer.update)(zeros, optimizer.init(model), model)
    before, after = names_of(model), names_of(updates)
    decayed = {name for name, update in after.items() if np.any(update)}
    matrices = {"q", "k", "v", "o", "gate", "up", "down"}
    wanted = {f"trunk.layers.{name}" for name in matrices} | {"trunk.embedding", "trunk.lm_head"}
    assert {name.removesuffix(".value") for name in decayed} == wanted
    for name in decayed:
        tiny.close(after[name], -0.05 * np.asarray(before[name]), 1e-7)


def one_step(config: OptimizerConfig, grads, steps: int = 1):
    optimizer, _ = make_optimizer(config, 10)
    params = jax.tree.map(jnp.zeros_like, grads)
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adam_step_by_hand():
    config = OptimizerConfig(0.1, warmup_fraction=0.0, b1=0.9, b2=0.95, eps=0.5, max_grad_norm=0.0)
    # First step: corrected moments are g and g², so the step is 0.1 · 2 / (2 + 0.5).
    tiny.close(one_step(config, {"w": jnp.array([2.0])})["w"], [-0.08], 1e-7)
    # b1 and b2 matter from the second step on, when gradients differ.
    optimizer, _ = make_optimizer(config, 10)
    params = {"w": jnp.zeros(1)}
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.array([2.0])}, state, params)
    update, _ = optimizer.update({"w": jnp.array([-1.0])}, state, params)
    m = (0.9 * 0.1 * 2 + 0.1 * -1) / (1 - 0.9**2)
    v = (0.95 * 0.05 * 4 + 0.05 * 1) / (1 - 0.95**2)
    tiny.close(update["w"], [-0.1 * m / (v**0.5 + 0.5)], 1e-7)


def test_clipping_is_by_global_norm():
    # Norm of (3, 4) is 5: clipped to 1 they are (0.6, 0.8). Large eps makes Adam linear in g.
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    config = OptimizerConfig(1e3, warmup_fraction=0.0, eps=1e3, max_grad_norm=1.0)
    clipped = one_step(config, grads)
    tiny.close(clipped, {"a": [-0.6], "b": [-0.8]}, 1e-3)
    free = one_step(dataclasses.replace(config, max_grad_norm=0.0), grads)
    tiny.close(free, {"a": [-3.0], "b": [-4.0]}, 2e-2)
    small = {"a": jnp.array([0.3]), "b": jnp.array([0.4])}
    tiny.close(one_step(config, small), {"a": [-0.3], "b": [-0.4]}, 1e-3)


def test_schedule_is_the_one_the_optimizer_uses():
    config = OptimizerConfig(1.0, "linear", warmup_fraction=0.5, eps=1e-12, max_grad_norm=0.0)
    optimizer, schedule = make_optimizer(config, 10)
    params, grads = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    state = optimizer.init(params)
    # With a constant gradient of 1 each step of Adam is the learning rate.
    for step in range(10):
        update, state = optimizer.update(grads, state, params)
        tiny.close(-update["w"], [schedule(step)], 1e-5)
