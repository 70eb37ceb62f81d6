"""Where arrays live: a mesh, and specs as data.

A mode names which trees of a train state are spread over the `data` axis of the mesh:

  zero0   nothing: every device holds everything
  zero1   optimizer state (moments, float32 master weights)
  zero2   and gradients (the deck's setting)
  zero3   and parameters, gathered layer by layer in the scan over layers

Source: Rajbhandari et al. 2020 (ZeRO), section 5. The partitioner (GSPMD) inserts the collectives.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODES = ("zero0", "zero1", "zero2", "zero3")


def make_mesh(devices: int | None = None) -> Mesh:
    """A one-axis mesh named `data` over the first `devices` devices (all by default)."""
    available = jax.devices()[: devices or None]
    return jax.make_mesh(
        (len(available),), ("data",), axis_types=(AxisType.Auto,), devices=available
    )


def spread_spec(shape: tuple[int, ...], axis_size: int) -> P:
    """Shards the last axis that `axis_size` divides, `P()` when there is none.

    The last axes of stacked layers are those of the matrices, so a layer's slice stays sharded.
    """
    for axis in reversed(range(len(shape))):
        if shape[axis] >= axis_size and shape[axis] % axis_size == 0:
            return P(*([None] * axis), "data")
    return P()


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Shardings of the trees of a train step, for one mesh and one mode.

    Attributes:
      mesh: The devices, with an axis named `data`.
      mode: One of `MODES`.
    """

    mesh: Mesh
    mode: str = "zero2"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"sharding={self.mode!r} is unknown; use one of {MODES}")

    @property
    def replicated(self) -> NamedSharding:
        """On every device."""
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        """First axis over `data`."""
        return NamedSharding(self.mesh, P("data"))

    def _tree(self, tree: Any, spread: bool) -> Any:
        size = self.mesh.shape["data"]
        return jax.tree.map(
            lambda x: NamedSharding(self.mesh, spread_spec(x.shape, size) if spread else P()), tree
        )

    def params(self, tree: Any) -> Any:
        """Shardings of the weights that train."""
        return self._tree(tree, self.mode == "zero3")

    def gradients(self, tree: Any) -> Any:
        """Shardings of gradients."""
        return self._tree(tree, self.mode in ("zero2", "zero3"))

    def optimizer(self, tree: Any) -> Any:
        """Shardings of moments and master weights."""
        return self._tree(tree, self.mode != "zero0")

    def frozen(self, tree: Any) -> Any:
        """Shardings of models that do not train: always spread."""
        return self._tree(tree, True)

    def put_batch(self, batch: Any) -> Any:
        """Places a tree of NumPy arrays with the batch axis over `data`.

        Raises:
          ValueError: the batch does not divide by the number of devices.
        """
        size = self.mesh.shape["data"]
        for leaf in jax.tree.leaves(batch):
            if leaf.shape[0] % size:
                raise ValueError(f"batch of {leaf.shape[0]} must be divisible by {size} devices")
        return jax.device_put(jax.tree.map(np.asarray, batch), self.batch)
