"""Where arrays live: a mesh, and specs as data.

A mode names which trees of a train state are spread over the `data` axis of the mesh:

  zero0   nothing: every device holds everything
  zero1   optimizer state (moments, float32 master weights)
  zero2   and gradients (the paper's setting)
  zero3   and parameters, gathered layer by layer in the scan over layers
  tensor  zero2 over `data`, and matrices split over a second mesh axis, `tensor`: column parallel
          q, k, v, gate, up; row parallel o, down; embedding and LM head by vocabulary

Models that do not train are spread in every mode, and gathered layer by layer.

Sources: Rajbhandari et al. 2020 (ZeRO), section 5; Shoeybi et al. 2019 (Megatron-LM), section 3.
The partitioner (GSPMD) inserts the collectives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODES = ("zero0", "zero1", "zero2", "zero3", "tensor")

# The axis of each weight, counted from the end, that is split over `tensor`: outputs of the first
# matrix of a pair and inputs of the second, so that a pair needs one sum; the vocabulary.
TENSOR_AXES = {
    "q": -1,
    "k": -1,
    "v": -1,
    "q_bias": -1,
    "k_bias": -1,
    "v_bias": -1,
    "gate": -1,
    "up": -1,
    "o": -2,
    "down": -2,
    "embedding": -2,
    "lm_head": -1,
}


def make_mesh(devices: int | None = None, *, tensor: int = 1) -> Mesh:
    """A mesh over the first `devices` devices, see `mesh_of`; None is all.

    Raises:
      ValueError: there are fewer devices, or they do not divide by `tensor`.
    """
    available = jax.devices()
    count = devices or len(available)
    if count > len(available):
        raise ValueError(f"sharding.devices={count} but only {len(available)} are there")
    return mesh_of(available[:count], tensor=tensor)


def mesh_of(devices: Sequence[jax.Device], *, tensor: int = 1) -> Mesh:
    """A mesh with the axes `data` and `tensor`.

    Args:
      devices: real ones, or those of a topology to compile for.
      tensor: size of the `tensor` axis. Neighbours share a layer: keep them on one machine.

    Raises:
      ValueError: the devices do not divide by `tensor`.
    """
    if tensor < 1 or len(devices) % tensor:
        raise ValueError(f"sharding.tensor={tensor} must divide the {len(devices)} devices")
    return jax.make_mesh(
        (len(devices) // tensor, tensor),
        ("data", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )


def spread_spec(shape: tuple[int, ...], axis_size: int, taken: P | None = None) -> P:
    """Shards the last free axis that `axis_size` divides over `data`; `taken` when there is none.

    The last axes of stacked layers are those of the matrices, so a layer's slice stays sharded.
    """
    taken = taken or P()
    # XLA hands back P() for an axis of one device: the next call would not fit the program.
    if axis_size == 1:
        return taken
    axes = [*taken, *[None] * (len(shape) - len(taken))]
    for axis in reversed(range(len(shape))):
        if axes[axis] is None and shape[axis] >= axis_size and shape[axis] % axis_size == 0:
            # Specs are equal only when they are written alike: nothing follows the last axis.
            axes[axis] = "data"
            return _trimmed(axes)
    return taken


def tensor_spec(name: str, shape: tuple[int, ...], axis_size: int) -> P:
    """Splits the weight called `name` over `tensor` by `TENSOR_AXES`; `P()` where it cannot be."""
    axis = TENSOR_AXES.get(name, 0)
    if axis_size == 1 or -axis > len(shape) or not axis or shape[axis] % axis_size:
        return P()
    axes: list[str | None] = [None] * len(shape)
    axes[axis] = "tensor"
    return _trimmed(axes)


def weight_name(path: tuple[Any, ...]) -> str:
    """The name of a weight in the path of a leaf: `q` in `.mu.layers.q.value`.

    The frozen matrix of a low-rank weight has the name of the matrix alone: `q` in `.q.base.value`.
    """
    parts = [str(getattr(part, "name", getattr(part, "key", ""))) for part in path]
    return next((part for part in reversed(parts) if part not in ("value", "base", "")), "")


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Shardings of the trees of a train step, for one mesh and one mode.

    Attributes:
      mesh: the devices, with an axis named `data`, and one named `tensor` for that mode.
      mode: one of `MODES`.
    """

    mesh: Mesh
    mode: str = "zero2"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"sharding.mode={self.mode!r} is unknown; use one of {MODES}")
        if (self.mode == "tensor") != (self.tensor > 1):
            raise ValueError(
                f"sharding.mode={self.mode!r} with sharding.tensor={self.tensor}: mode 'tensor' "
                "needs a tensor axis of at least 2, and the other modes 1"
            )

    @property
    def data(self) -> int:
        """Devices along `data`: the batch divides by it."""
        return self.mesh.shape["data"]

    @property
    def tensor(self) -> int:
        """Devices along `tensor`."""
        return dict(self.mesh.shape).get("tensor", 1)

    @property
    def replicated(self) -> NamedSharding:
        """On every device."""
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        """First axis over `data`."""
        return NamedSharding(self.mesh, P("data"))

    def _tree(self, tree: Any, kind: str) -> Any:
        """Shardings by the name of each leaf over `tensor`, and over `data` if the mode says so."""
        spread = self.spreads(kind)

        def leaf(path, x):
            spec = tensor_spec(weight_name(path), x.shape, self.tensor)
            spec = spread_spec(x.shape, self.data, spec) if spread else spec
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def spreads(self, kind: str) -> bool:
        """Whether the mode spreads parameters, gradients, optimizer or frozen over `data`."""
        stage = 2 if self.mode == "tensor" else int(self.mode[-1])
        return stage >= {"frozen": 0, "optimizer": 1, "gradients": 2, "parameters": 3}[kind]

    def params(self, tree: Any) -> Any:
        """Shardings of the weights that train."""
        return self._tree(tree, "parameters")

    def gradients(self, tree: Any) -> Any:
        """Shardings of gradients."""
        return self._tree(tree, "gradients")

    def optimizer(self, tree: Any) -> Any:
        """Shardings of moments and master weights."""
        return self._tree(tree, "optimizer")

    def frozen(self, tree: Any) -> Any:
        """Shardings of models that do not train: always spread."""
        return self._tree(tree, "frozen")

    def bind(self, function: Callable) -> Callable:
        """Makes the models in `function` aware of this mesh; jit what comes back.

        Inside, models gather the weights of one layer at a time and keep activations split by
        rows, see `models.placement`. Without it the results are the same, but the partitioner
        chooses what travels.
        """
        if self.mesh.size == 1:
            return function

        @functools.wraps(function)
        def bound(*args, **kwargs):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return function(*args, **kwargs)

        return bound

    def put_everywhere(self, tree: Any) -> Any:
        """Places arrays whole on every device."""
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x), self.replicated), tree)

    def put_whole(self, tree: Any) -> Any:
        """Places a batch of which every process holds all rows, not only its share of them."""

        def mine(x):
            return np.asarray(x)[self.local_rows(x.shape[0])]

        return self.put_batch(jax.tree.map(mine, tree))

    def put_batch(self, batch: Any) -> Any:
        """Places a tree of NumPy arrays with the batch axis over `data`.

        With several processes each hands in its own rows, see `local_rows`.

        Raises:
          ValueError: the batch does not divide by the number of devices.
        """
        local = self.data // self.shares
        for leaf in jax.tree.leaves(batch):
            if leaf.shape[0] % local:
                raise ValueError(f"batch of {leaf.shape[0]} must be divisible by {local} devices")

        def put(x):
            shape = (x.shape[0] * self.shares, *x.shape[1:])
            return jax.make_array_from_process_local_data(self.batch, x, shape)

        batch = jax.tree.map(np.asarray, batch)
        return jax.device_put(batch, self.batch) if self.shares == 1 else jax.tree.map(put, batch)

    @property
    def shares(self) -> int:
        """How many parts, of consecutive rows, the processes divide a batch into."""
        return self.data // len(self._local_blocks())

    def local_rows(self, count: int) -> slice:
        """The rows of a batch of `count` that this process reads.

        Raises:
          ValueError: the batch does not divide by the number of devices.
        """
        if count % self.data:
            raise ValueError(f"batch of {count} must be divisible by {self.data} devices")
        blocks, rows = self._local_blocks(), count // self.data
        return slice(blocks[0] * rows, (blocks[-1] + 1) * rows)

    def _local_blocks(self) -> list[int]:
        """Positions along `data` of this process's devices."""
        axis = self.mesh.axis_names.index("data")
        index = self.mesh.local_mesh.devices
        local = {device.id for device in index.flat}
        devices = np.moveaxis(self.mesh.devices, axis, 0).reshape(self.data, -1)
        return [i for i, row in enumerate(devices) if any(d.id in local for d in row)]


def _trimmed(axes: list[str | None]) -> P:
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)
