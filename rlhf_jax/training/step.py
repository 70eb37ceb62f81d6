"""A train state and the one function that makes train steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models.lora import attach
from rlhf_jax.runtime.sharding import Sharding

Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, Metrics]]


class TrainState(flax.struct.PyTreeNode):
    """What a training run updates.

    Attributes:
      step: scalar int32, updates made so far.
      model: the module in its compute type, or the adapters that train beside a frozen one.
      master: float32 copy that the optimizer updates; None when the model is float32 itself.
      opt_state: state of the optax optimizer.
    """

    step: jax.Array
    model: Any
    master: Any
    opt_state: Any


def create_state(
    model: Any, optimizer: optax.GradientTransformation, sharding: Sharding
) -> TrainState:
    """A state whose trees are placed as `sharding` says. The model's buffers are copied."""
    return make_create_state(model, optimizer, sharding)(model)


def make_create_state(
    model: Any, optimizer: optax.GradientTransformation, sharding: Sharding
) -> Callable[[Any], TrainState]:
    """`create_state` as a jitted function of models like this one, given it or its shapes."""

    def create(model):
        half = any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(model))
        model = jax.tree.map(jnp.copy, model)
        master = jax.tree.map(lambda x: x.astype(jnp.float32), model) if half else None
        opt_state = optimizer.init(model if master is None else master)
        return TrainState(jnp.zeros((), jnp.int32), model, master, opt_state)

    shardings = state_shardings(jax.eval_shape(create, model), sharding)
    return jax.jit(create, out_shardings=shardings)


def state_shardings(state: TrainState, sharding: Sharding) -> TrainState:
    """The shardings of a state, given the state or its shapes."""
    return TrainState(
        step=sharding.replicated,  # type: ignore[arg-type]  # shardings in place of arrays
        model=sharding.params(state.model),
        master=sharding.optimizer(state.master),
        opt_state=sharding.optimizer(state.opt_state),
    )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    sharding: Sharding,
    *,
    microbatches: int = 1,
    prepare: Callable[[Any], Any] = lambda batch: batch,
    trunk: Any = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `step(state, batch, *constants) -> (state, metrics)`, jitted, with the state donated.

    Args:
      loss_fn: `(model, batch, *constants) -> (loss, metrics)`. Both must add up over microbatches:
        sums with weights that were made from the whole batch (see `reductions`). A metric whose
        name ends in `_max` or `_min` is merged by that instead.
      optimizer: optax transformation.
      sharding: where the trees live.
      microbatches: gradient accumulation: the number of parts that the batch is split into.
      prepare: runs on the whole batch before it is split: the place for whatever is normalised
        over the batch.
      trunk: frozen weights beside which the state's adapters train: `loss_fn` is given the model
        that they make together (see `models.lora`). None when the state holds a whole model.

    Returns:
      The step. `metrics` also holds `optim/grad_norm` (before clipping).
    """
    if trunk is not None:
        loss_fn = _attaching(loss_fn)

    def compute_gradients(model, batch, constants):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if microbatches == 1:
            (_, metrics), grads = grad_fn(model, batch, *constants)
            return grads, metrics
        parts = jax.tree.map(lambda x: split(x, microbatches), batch)

        def accumulate(total, part):
            (_, metrics), grads = grad_fn(model, part, *constants)
            total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
            return constrain(total, sharding.gradients(total)), metrics

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), model)
        zeros = constrain(zeros, sharding.gradients(zeros))
        grads, metrics = jax.lax.scan(accumulate, zeros, parts)
        return grads, {name: _merge(name, stacked) for name, stacked in metrics.items()}

    def step(state: TrainState, batch, *constants):
        grads, metrics = compute_gradients(state.model, prepare(batch), constants)
        grads = constrain(grads, sharding.gradients(grads))
        weights = state.model if state.master is None else state.master
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, weights)
        metrics["optim/grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, weights)
        weights = optax.apply_updates(weights, updates)
        if state.master is None:
            model, master = weights, None
        else:
            model = jax.tree.map(lambda w, m: w.astype(m.dtype), weights, state.model)
            master = weights
        new = TrainState(state.step + 1, model, master, opt_state)
        return constrain(new, state_shardings(new, sharding)), metrics

    compiled = jax.jit(sharding.bind(step), donate_argnums=0)
    return compiled if trunk is None else OnTrunk(compiled, trunk)


class OnTrunk:
    """A compiled function with frozen weights for its last argument, which it never donates."""

    def __init__(self, compiled: Any, trunk: Any):
        self._compiled, self._trunk = compiled, trunk

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*arguments, self._trunk)

    def lower(self, *arguments: Any) -> Any:
        """Like `jax.jit(...).lower`."""
        return self._compiled.lower(*arguments, self._trunk)


def _attaching(loss_fn: LossFn) -> LossFn:
    """The loss of adapters, whose last argument is the trunk."""

    def loss_of_adapters(trained, batch, *constants):
        *others, trunk = constants
        return loss_fn(attach(trunk, trained), batch, *others)

    return loss_of_adapters


def split(x: jax.Array, parts: int) -> jax.Array:
    """`[B, ...]` -> `[parts, B / parts, ...]`, dealt out so that each device keeps its rows."""
    if x.shape[0] % parts:
        raise ValueError(f"a batch of {x.shape[0]} must be divisible by {parts} microbatches")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _merge(name: str, stacked: jax.Array) -> jax.Array:
    if name.endswith("_max"):
        return stacked.max(axis=0)
    if name.endswith("_min"):
        return stacked.min(axis=0)
    return stacked.sum(axis=0)


def constrain(tree: Any, shardings: Any) -> Any:
    """The tree, whose arrays are to lie as the shardings say; inside of a jitted function."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def divide(name: str, whole: int, part: int) -> int:
    """How many parts make the whole, such as minibatches of a buffer.

    Raises:
      ValueError: there would be a remainder.
    """
    if part < 1 or whole < 1:
        raise ValueError(f"{name}={whole} and what divides it ({part}) must be at least 1")
    if whole % part:
        raise ValueError(f"{name}={whole} must be divisible by {part}")
    return whole // part
