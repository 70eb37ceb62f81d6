"""Every sharding mode on eight host devices: the same numbers, and exactly the promised bytes."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax.methods import ppo
from rlhf_jax.rollouts.experience import Evaluation, Experience, evaluate
from rlhf_jax.rollouts.rollout import Rollout
from rlhf_jax.runtime import sharding
from rlhf_jax.runtime.sharding import MODES, Sharding, make_mesh
from rlhf_jax.training import memory
from rlhf_jax.training.step import TrainState, create_state, make_train_step
from tests import tiny

DEVICES, TENSOR = 8, 2
# Every axis of length 8 n splits; 42 words and 20 units do so only over the tensor axis.
CONFIG = tiny.model_config(vocab_size=42, intermediate_size=20, tie_embeddings=False)
# A large epsilon: where a gradient is zero up to rounding, Adam's step would be its sign.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-3))


def make_sharding(mode: str, devices: int = DEVICES) -> Sharding:
    """The mode over `devices` devices, two of them to a layer in mode `tensor`."""
    return Sharding(make_mesh(devices, tensor=TENSOR if mode == "tensor" else 1), mode)


def experience(seed: int = 11) -> Experience:
    """Eight scored rows with responses of different lengths."""
    rng = np.random.default_rng(seed)
    rows, prompt, width = 8, tiny.PROMPT, tiny.RESPONSE
    mask = np.ones((rows, prompt + width), bool)
    for row in range(rows):
        mask[row, : row % 4] = False
        mask[row, prompt + 2 + row % 5 :] = False

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    rollout = Rollout(
        tokens=np.where(mask, rng.integers(2, 42, mask.shape), 0).astype(np.int32),
        mask=mask,
        log_probs=numbers(rows, width) - 3,
        entropies=numbers(rows, width),
        ended=np.ones(rows, bool),
    )
    values = Evaluation(numbers(rows, width) - 3, numbers(rows), numbers(rows, width))
    return Experience(rollout, values, *(numbers(rows, width) for _ in range(3)))


def ptx_batch() -> dict[str, np.ndarray]:
    """Eight documents, longer than the rollouts."""
    tokens = np.random.default_rng(5).integers(2, 42, (8, 17)).astype(np.int32)
    return {"tokens": tokens, "segments": np.ones_like(tokens), "loss_mask": tokens > 6}


class Step(NamedTuple):
    """One policy step with the ptx loss.

    Attributes:
      state: the new state, on its devices.
      metrics: metrics of the step.
      gradients: name of a weight -> spec of its gradient, as the compiled step hands it over.
    """

    state: TrainState
    metrics: dict[str, jax.Array]
    gradients: dict[str, P]


@functools.cache
def policy_step(mode: str, *, devices: int = DEVICES, microbatches: int = 1) -> Step:
    """Makes the step, once for all tests."""
    how, seen = make_sharding(mode, devices), {}
    optimizer = optax.chain(watching(seen), OPTIMIZER)
    config = ppo.PPOConfig(ptx_coef=0.5, entropy_coef=0.01)
    step = make_train_step(
        functools.partial(ppo.policy_loss, config=config, temperature=1.0),
        optimizer,
        how,
        microbatches=microbatches,
        prepare=functools.partial(ppo.prepare, config=config),
    )
    state = create_state(tiny.language_model(CONFIG), optimizer, how)
    batch = how.put_batch((experience(), ptx_batch()))
    return Step(*step(state, batch, jnp.float32(1.0)), seen)


def watching(seen: dict[str, P]) -> optax.GradientTransformation:
    """An optimizer that changes nothing and notes how the gradients lie when they reach it."""

    def note(name: str, placed) -> None:
        seen[name] = placed.spec

    def update(grads, state, params=None):
        del params

        def inspect(path, leaf):
            callback = functools.partial(note, sharding.weight_name(path))
            jax.debug.inspect_array_sharding(leaf, callback=callback)

        jax.tree_util.tree_map_with_path(inspect, grads)
        return grads, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_step_equals_the_unsharded_step(mode):
    """New weights, both moments and every metric."""
    step, wanted = policy_step(mode), policy_step("zero0", devices=1)
    tiny.close(step.state, wanted.state, 1e-5)
    tiny.close(step.metrics, wanted.metrics, 1e-5)
    moved = tiny.largest_difference(step.state.model, tiny.language_model(CONFIG))
    assert moved > 1e-3  # the step changes what is compared


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "tensor"])
def test_accumulated_gradients_are_the_same(mode):
    """Two microbatches, each spread over all devices."""
    step, wanted = policy_step(mode, microbatches=2), policy_step("zero0", devices=1)
    tiny.close(step.state, wanted.state, 1e-5)
    tiny.close(step.metrics, wanted.metrics, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_spread_from_zero2_on(mode):
    """Where zero1 and zero2 differ: what the compiled step hands to the optimizer."""
    spread = {name: "data" in spec for name, spec in policy_step(mode).gradients.items()}
    assert len(spread) == 12
    assert set(spread.values()) == {mode in ("zero2", "zero3", "tensor")}


@pytest.mark.slow
def test_critic_step_equals_the_unsharded_step():
    """The model with a scalar head, and weights that are gathered in the backward pass."""
    config = ppo.PPOConfig()

    def critic_step(how: Sharding):
        loss = functools.partial(ppo.critic_loss, config=config)
        prepare = functools.partial(ppo.prepare, config=config)
        step = make_train_step(loss, OPTIMIZER, how, prepare=prepare)
        state = create_state(tiny.scalar_model(CONFIG), OPTIMIZER, how)
        return jax.device_get(step(state, how.put_batch((experience(), None))))

    tiny.close(critic_step(make_sharding("zero3")), critic_step(make_sharding("zero0", 1)), 1e-5)


def held_bytes(tree) -> int:
    """Bytes that the first device really holds of a tree of arrays."""
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def promised(shapes, *, over: int) -> int:
    """Bytes per device if every leaf with an axis that `over` divides is spread: by hand."""
    return sum(4 * math.prod(s) // (over if any(n % over == 0 for n in s) else 1) for s in shapes)


def weight_shapes() -> list[tuple[int, ...]]:
    """Shapes of all weights of CONFIG, written down."""
    D, F, V, L = 16, 20, 42, 2
    matrices = [(L, D, D), (L, D, 8), (L, D, 8), (L, D, D), (L, D, F), (L, D, F), (L, F, D)]
    return [(V, D), (D, V), *matrices, (L, D), (L, D), (D,)]


# Embedding and LM head; two layers of attention, MLP and norms; the last norm.
PARAMETERS = 2 * 42 * 16 + 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 20 + 2 * 16) + 16


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero0", "zero1", "zero2", "zero3"])
def test_bytes_per_device_are_what_the_mode_promises(mode):
    """Exact, and the report says the same. Two moments; counters are whole."""
    state = policy_step(mode).state
    parts = {
        "parameters": promised(weight_shapes(), over=DEVICES if mode == "zero3" else 1),
        "moments": 2 * promised(weight_shapes(), over=1 if mode == "zero0" else DEVICES) + 4,
    }
    assert held_bytes(state.model) == parts["parameters"]
    assert held_bytes(state.opt_state) == parts["moments"]
    holdings = memory.state_holdings("policy", state, make_sharding(mode))
    report = {item.name: item for item in holdings}
    assert {name: report[f"policy/{name}"].per_device for name in parts} == parts
    # The gate's 20 units do not divide by eight; its other axis does, so nothing stays whole.
    assert parts["parameters"] == (4 * PARAMETERS // 8 if mode == "zero3" else 4 * PARAMETERS)


@pytest.mark.slow
def test_bytes_per_device_over_two_axes():
    """Mode `tensor`: matrices are halved, and their optimizer state is split four more times."""
    state = policy_step("tensor").state
    norms = 4 * (2 * 32 + 16)
    matrices = 4 * PARAMETERS - norms
    assert held_bytes(state.model) == matrices // 2 + norms
    assert held_bytes(state.opt_state) == 2 * (matrices // 8 + norms // 4) + 4


def test_half_precision_has_a_spread_float32_master():
    """bfloat16 weights on every device, their float32 copy and moments spread."""
    how = make_sharding("zero2")
    config = tiny.model_config(dtype="bfloat16")
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.language_model(config))
    state = create_state(model, OPTIMIZER, how)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert held_bytes(state.model) == 2 * count
    assert held_bytes(state.master) == 4 * count // DEVICES
    assert held_bytes(state.opt_state) == 2 * 4 * count // DEVICES + 4


def abstract_state():
    """Shapes of a train state."""
    how = make_sharding("zero0")
    return jax.eval_shape(lambda: create_state(tiny.language_model(CONFIG), OPTIMIZER, how))


def test_every_mode_differs_from_every_other():
    """A switch that changes nothing is a bug: each mode has its own bytes per device."""
    state = abstract_state()
    held = {
        mode: tuple(
            item.per_device for item in memory.state_holdings("m", state, make_sharding(mode))
        )
        for mode in MODES
    }
    assert len(set(held.values())) == len(MODES), held


def test_report_names_what_stays_whole_and_why():
    """Twenty is no multiple of eight; and a mode may keep whole what could be spread."""
    config = tiny.model_config(hidden_size=20, num_heads=2, num_kv_heads=1, vocab_size=40)
    model = jax.eval_shape(lambda: tiny.language_model(config))
    frozen = memory.frozen_holding("reference", model, make_sharding("zero2"))
    # q, k, v, o are 20 x 20 or 20 x 10; the vocabulary and the MLP's 24 units split.
    assert {path for path, _ in frozen.whole} == {
        "final_norm",
        "layers.attention_norm",
        "layers.mlp_norm",
        *(f"layers.{name}" for name in "qkvo"),
    }
    assert frozen.whole[0][1] == 4 * 2 * 20 * 20
    assert frozen.reason == "no axis divides by the 8 devices"
    lines = memory.describe([frozen])
    assert "layers." in lines["reference"]
    assert "and 4 more (no axis divides by the 8 devices)" in lines["reference"]

    state = abstract_state()
    holdings = memory.state_holdings("policy", state, make_sharding("zero2"))
    reasons = {item.name: item.reason for item in holdings}
    assert reasons["policy/parameters"] == "mode zero2 keeps parameters whole"
    assert reasons["policy/gradients"] == ""


def loop_bodies(text: str) -> str:
    """The computations of an HLO module that are bodies of while loops, joined."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    blocks = re.split(r"\n(?=\S)", text)
    return "\n".join(b for b in blocks if re.match(r"%?([\w.\-]+) ", b) and _name(b) in bodies)


def _name(block: str) -> str:
    found = re.match(r"%?([\w.\-]+) ", block)
    return found[1] if found else ""


@pytest.mark.slow
def test_frozen_models_are_gathered_layer_by_layer():
    """The gathers are in the loop over layers, one layer large; whole stacks never appear."""
    how = make_sharding("zero2")
    model, scalar = tiny.language_model(CONFIG), tiny.scalar_model(CONFIG)
    model = jax.device_put(model, how.frozen(model))
    scalar = jax.device_put(scalar, how.frozen(scalar))
    assert held_bytes(model) == promised(weight_shapes(), over=DEVICES)
    score = functools.partial(evaluate, critic=None, temperature=1.0)
    rollout = how.put_batch(experience().rollout)
    compiled = jax.jit(how.bind(score)).lower(rollout, model, scalar).compile()
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather" in line]
    inside = [
        line for line in loop_bodies(compiled.as_text()).splitlines() if " all-gather" in line
    ]
    shapes = {shape for line in inside for shape in re.findall(r"f32\[([\d,]+)\]", line)}
    assert {"16,16", "16,20", "20,16", "16,8"} <= {s.removeprefix("1,") for s in shapes}
    # No gather makes a stack of both layers.
    assert not any(re.search(r"= f32\[2,(16|20),", line) for line in gathers)

    plain = evaluate(
        experience().rollout,
        tiny.language_model(CONFIG),
        tiny.scalar_model(CONFIG),
        None,
        temperature=1.0,
    )
    result = compiled(rollout, model, scalar)
    tiny.close(result, plain, 1e-5)


@pytest.mark.slow
def test_zero3_keeps_no_gathered_weights_for_the_backward_pass():
    """Without rematerialisation too: residuals of a step hold one layer's weights, not all."""
    how = make_sharding("zero3")

    def residual_bytes(config) -> int:
        def loss(model, tokens):
            return jnp.square(model(tokens, jnp.ones_like(tokens))).sum(), {}

        step = make_train_step(loss, OPTIMIZER, how)
        model = tiny.language_model(config)
        state = create_state(model, OPTIMIZER, how)
        tokens = how.put_batch(np.ones((8, 4), np.int32))
        return step.lower(state, tokens).compile().memory_analysis().temp_size_in_bytes

    wide = {"hidden_size": 64, "intermediate_size": 512, "head_dim": 8}
    few, many = (residual_bytes(tiny.model_config(num_layers=n, **wide)) for n in (4, 12))
    layer = 4 * (3 * 64 * 512 + 2 * 64 * 32 + 2 * 64 * 16)
    # Eight more layers: gradients are spread (an eighth each), gathered weights would be whole.
    assert few < many < few + 8 * layer // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "zero4"}, "sharding.mode='zero4' is unknown; use one of"),
        ({"mode": "zero2", "tensor": 2}, "mode 'tensor' needs a tensor axis of at least 2"),
        ({"mode": "tensor", "tensor": 1}, "mode 'tensor' needs a tensor axis of at least 2"),
        ({"mode": "tensor", "tensor": 3}, "sharding.tensor=3 must divide the 8 devices"),
        ({"mode": "zero2", "devices": 9}, "sharding.devices=9 but only 8 are there"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    """One line with the rule and the values."""
    mode, devices = arguments.pop("mode"), arguments.pop("devices", 8)
    with pytest.raises(ValueError, match=re.escape(message)):
        Sharding(make_mesh(devices, **arguments), mode)


def test_specs_by_name():
    """Column, row and vocabulary parallel; what does not divide stays."""
    how = make_sharding("tensor")
    shapes = jax.eval_shape(lambda: tiny.language_model(CONFIG))
    specs = [
        (path, placed.spec)
        for path, placed in jax.tree_util.tree_leaves_with_path(how.params(shapes))
    ]
    by_name = {sharding.weight_name(path): spec for path, spec in specs}
    assert by_name["q"] == by_name["gate"] == P(None, None, "tensor")
    assert by_name["o"] == by_name["down"] == P(None, "tensor")
    assert by_name["embedding"] == P("tensor")
    assert by_name["lm_head"] == P(None, "tensor")
    assert by_name["mlp_norm"] == P()
    assert sharding.tensor_spec("embedding", (41, 16), 2) == P()
    assert sharding.spread_spec((2, 16, 20), 4, P(None, None, "tensor")) == P(
        None, "data", "tensor"
    )
