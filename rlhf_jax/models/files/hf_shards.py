"""Arrays put together on their devices from slices of tensors on file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.models.files.hf_names import Leaf, path_of

# A tree of shardings like the model's, or a function that makes one from the abstract model.
Shardings = Any | Callable[[Any], Any] | None
# `read(name, index)` gives a slice of a tensor on file.
Read = Callable[[str, tuple[slice, ...]], np.ndarray]


def assemble(
    model: Any,
    leaves: Iterable[Leaf],
    read: Read,
    shardings: Shardings,
    drawn: Mapping[str, jax.Array] | None = None,
) -> Any:
    """Fills an abstract model.

    Args:
      model: a `jax.eval_shape` of a model.
      leaves: the leaves that are on file.
      read: reads a slice of a tensor.
      shardings: a tree of `jax.sharding.Sharding` like the model's, a function that makes one from
        `model`, or None for the default device.
      drawn: path -> value of the leaves that are not on file.

    Returns:
      The model with its arrays.
    """
    by_path = {leaf.path: leaf for leaf in leaves}
    if callable(shardings):
        shardings = shardings(model)

    def leaf_value(key_path, abstract, sharding=None):
        path = path_of(key_path)
        if path in by_path:
            return read_leaf(read, by_path[path], abstract.dtype, sharding)
        value = (drawn or {})[path]
        return value if sharding is None else jax.device_put(value, sharding)

    trees = (model,) if shardings is None else (model, shardings)
    return jax.tree_util.tree_map_with_path(leaf_value, *trees)


def read_leaf(
    read: Read,
    leaf: Leaf,
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Assembles one leaf on its devices.

    Args:
      read: reads a slice of a tensor.
      leaf: the leaf.
      dtype: its type in memory.
      sharding: its sharding, or None for the default device, uncommitted.

    Returns:
      The array; the host never holds more than one shard and one slice of one tensor.
    """
    if sharding is None:
        whole = _read_shard(read, leaf, dtype, (slice(None),) * len(leaf.shape))
        return jax.block_until_ready(jax.device_put(whole))
    devices: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        bounds = tuple(s.indices(n) for s, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, owners in devices.items():
        shard = _read_shard(read, leaf, dtype, tuple(slice(*bound) for bound in bounds))
        arrays += jax.block_until_ready([jax.device_put(shard, device) for device in owners])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _read_shard(read: Read, leaf: Leaf, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a leaf, as the model holds it."""
    within = index[1:] if leaf.stacked else index
    names = leaf.names[index[0]] if leaf.stacked else leaf.names
    on_file = (slice(0, 1), *within) if leaf.path == "kernel" else within
    on_file = on_file[::-1] if leaf.transposed else on_file
    shape = tuple(len(range(n)[s]) for s, n in zip(index, leaf.shape, strict=True))
    shard = _aligned(shape, np.dtype(dtype))
    for row, name in zip(shard if leaf.stacked else [shard], names, strict=True):
        part = read(name, on_file)
        if leaf.transposed:
            transpose_into(row, part)
        else:
            row[...] = part.reshape(row.shape)
    return shard


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def transpose_into(out: np.ndarray, matrix: np.ndarray, rows: int = 16) -> None:
    """`out[...] = matrix.T`, cast to the type of `out`, a few rows at a time.

    NumPy walks a whole transposed matrix against its memory order; strips of 16 rows stay in the
    cache and are four times faster.
    """
    for start in range(0, matrix.shape[0], rows):
        strip = matrix[start : start + rows].astype(out.dtype, copy=False)
        out[:, start : start + rows] = strip.T
