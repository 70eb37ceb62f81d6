"""What a model does about the mesh that it is traced for, see `Sharding.bind`.

Outside `bind`, and on one device, everything here is the identity.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from rlhf_jax.runtime.sharding import tensor_spec, weight_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _placed(x: jax.Array, spec: P) -> jax.Array:
    """`x` under a sharding constraint that its gradient is free of: a gradient may stay spread."""
    return jax.lax.with_sharding_constraint(x, spec)


def _placed_forward(x: jax.Array, spec: P) -> tuple[jax.Array, None]:
    # The primitive itself, not `_placed`: `all_but_gathered` must recognise it.
    return jax.lax.with_sharding_constraint(x, spec), None


_placed.defvjp(_placed_forward, lambda spec, _, g: (g,))


def gathered(weights: Any, name: str = "") -> Any:
    """Weights about to be used, gathered over `data`; no-op for weights that are whole.

    Inside a scan over layers this holds one layer at a time.

    Args:
      weights: a module, or one array.
      name: what the array is called in its module.
    """
    axes = _bound_axes()
    if not axes:
        return weights

    def leaf(path, x):
        spec = tensor_spec(weight_name(path) or name, x.shape, axes.get("tensor", 1))
        return _placed(x, spec)

    return jax.tree_util.tree_map_with_path(leaf, weights)


def by_rows(x: jax.Array) -> jax.Array:
    """Activations `[B, ...]` split over `data`, or as they are where B does not divide."""
    axes = _bound_axes()
    if not axes or x.shape[0] % axes["data"]:
        return x
    return jax.lax.with_sharding_constraint(x, P("data", *[None] * (x.ndim - 1)))


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: keep every result but those of `gathered` and `by_rows`.

    The backward pass gathers a layer's weights again; kept, they would add up to whole stacks.
    """
    return primitive.name != "sharding_constraint"


def is_bound() -> bool:
    """Whether this is traced inside of `Sharding.bind`, for more than one device."""
    return bool(_bound_axes())


def rows_per_device(rows: int) -> int:
    """Rows of a batch that one device works on; all of them outside of `Sharding.bind`."""
    size = _bound_axes().get("data", 1)
    return rows if rows % size else rows // size


def _bound_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh that `Sharding.bind` set; empty where there is none."""
    axes = dict(jax.sharding.get_abstract_mesh().shape)
    return axes if "data" in axes else {}
