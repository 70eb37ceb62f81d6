"""What each device holds: bytes by tree, and which weights stay whole on every device, and why.

Reads shapes and shardings only, so it works on `jax.eval_shape` results and on arrays alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Holding:
    """One tree of arrays on the mesh.

    Attributes:
      name: such as `policy/moments`.
      total: bytes of the tree, each number counted once.
      per_device: bytes of it that one device holds.
      whole: path and bytes of each leaf that no axis of the mesh splits, largest first.
      reason: why they are whole; empty where there are none.
    """

    name: str
    total: int
    per_device: int
    whole: tuple[tuple[str, int], ...]
    reason: str


def holding(name: str, tree: Any, shardings: Any, *, reason: str = "") -> Holding:
    """Measures a tree under shardings of the same structure.

    Args:
      name: what to call it.
      tree: arrays, or their shapes and types.
      shardings: a tree of `NamedSharding`.
      reason: why leaves are whole, if the mode decides it; by default because no axis divides.
    """
    total, per_device, whole = 0, 0, []
    devices = 1
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = jnp.dtype(leaf.dtype).itemsize
        held = math.prod(sharding.shard_shape(leaf.shape)) * size
        total += math.prod(leaf.shape) * size
        per_device += held
        devices = sharding.mesh.size
        if devices > 1 and sharding.is_fully_replicated:
            shown = jax.tree_util.keystr(path, simple=True, separator=".")
            whole.append((shown.removesuffix(".value"), held))
    whole.sort(key=lambda pair: -pair[1])
    if whole and not reason:
        reason = f"no axis divides by the {devices} devices"
    return Holding(name, total, per_device, tuple(whole), reason if whole else "")


def state_holdings(
    name: str, state: TrainState, sharding: Sharding, *, accumulated: bool = False
) -> list[Holding]:
    """Parameters, gradients, master weights and moments of a train state.

    Gradients live only within a step.

    Args:
      name: the model's name, such as `policy`.
      state: the state or its shapes.
      sharding: mesh and mode.
      accumulated: gradients are summed over microbatches, in float32.
    """
    dtype = jnp.float32 if accumulated else None
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), state.model)
    parts = [
        ("parameters", state.model, sharding.params, "parameters"),
        ("gradients", grads, sharding.gradients, "gradients"),
        ("master", state.master, sharding.optimizer, "optimizer"),
        ("moments", state.opt_state, sharding.optimizer, "optimizer"),
    ]
    return [
        holding(
            f"{name}/{part}",
            tree,
            shardings(tree),
            reason="" if sharding.spreads(kind) else f"mode {sharding.mode} keeps {part} whole",
        )
        for part, tree, shardings, kind in parts
        if tree is not None
    ]


def frozen_holding(name: str, model: Any, sharding: Sharding) -> Holding:
    """A model that does not train."""
    return holding(name, model, sharding.frozen(model))


def describe(holdings: Iterable[Holding], *, most: int = 3) -> dict[str, str]:
    """Lines for a start-up banner: name -> bytes per device and what stayed whole.

    Args:
      holdings: the trees.
      most: how many leaves to name.
    """
    lines = {}
    for item in holdings:
        line = f"{show(item.per_device)} a device of {show(item.total)}"
        if item.whole:
            names = ", ".join(path for path, _ in item.whole[:most])
            more = f" and {len(item.whole) - most} more" if len(item.whole) > most else ""
            line += f"; whole: {names}{more} ({item.reason})"
        lines[item.name] = line
    return lines


def show(count: float) -> str:
    """Bytes in a readable unit: `12.55 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
