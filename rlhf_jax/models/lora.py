"""Low-rank adapters: the weights stay frozen, and a product of two matrices trains beside some.

    y = x W + (α / r) (x A) B        A [in, r], B [r, out]

B starts at 0, so that training starts at the frozen model exactly. Nothing is differentiated with
respect to W: of the three products that a matrix costs in a training step (forward, gradient to the
input, gradient to the weight) the third is left out, as are its optimizer state and master copy.

The paper's W is `[out, in]` and its update BA; here inputs are on the left, and the update is AB.

Source: Hu et al. 2021 (LoRA), section 4.1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime.settings import check

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which weights train.

    Attributes:
      rank: r; 0 trains every weight, without adapters.
      alpha: α; the product AB is multiplied by α / r.
      targets: matrices of each layer that get adapters, of `TARGETS`.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        check(self, rank="[0, inf)", alpha="(0, 1e6]", targets=TARGETS)


class LowRank(nnx.Module):
    """A matrix with an adapter beside it, used like the matrix: `x @ LowRank`.

    Args:
      base: W, `[in, out]`, or `[L, in, out]` for stacked layers.
      a: A, `[..., in, r]` float32.
      b: B, `[..., r, out]` float32.
      scale: α / r.
    """

    def __init__(self, base: nnx.Param, a: nnx.Param, b: nnx.Param, scale: float):
        self.base, self.a, self.b, self.scale = base, a, b, scale

    def __getitem__(self, index: Any) -> LowRank:
        if index is not Ellipsis:
            raise TypeError("a low-rank weight is used whole: index it by [...] only")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W."""
        return self.base[...].shape

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        update = (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype)
        return x @ self.base[...] + self.scale * update

    def merged(self) -> jax.Array:
        """W + (α / r) A B, added in float32, in the type of W."""
        base = self.base[...]
        update = self.scale * (self.a[...] @ self.b[...])
        return (base.astype(jnp.float32) + update).astype(base.dtype)


class Pair(nnx.Module):
    """The adapters of one kind of matrix in all layers: A `[L, in, r]` and B `[L, r, out]`."""

    def __init__(self, a: Any, b: Any):
        self.a, self.b = nnx.Param(a), nnx.Param(b)


class Adapters(nnx.Module):
    """The adapters of a model: what trains, in float32 whatever the type of the frozen weights.

    Args:
      pairs: name of the matrix, one of `TARGETS` -> its adapters.
      scale: α / r.
    """

    def __init__(self, pairs: Mapping[str, Pair], scale: float):
        self.targets = tuple(pairs)
        self.scale = scale
        for name, pair in pairs.items():
            setattr(self, name, pair)

    @property
    def rank(self) -> int:
        """r."""
        return getattr(self, self.targets[0]).a[...].shape[-1]


def new_adapters(trunk: Transformer, config: LoRAConfig, key: jax.Array) -> Adapters:
    """Adapters that change nothing yet: A is drawn from N(0, 1 / in), B is 0.

    Args:
      trunk: the model that they adapt; its shapes are read.
      config: rank, α and targets.
      key: random key.
    """
    pairs = {}
    for number, name in enumerate(config.targets):
        layers, inputs, outputs = matrix_of(trunk, name).shape
        a_key = jax.random.fold_in(key, number)
        a = jax.random.normal(a_key, (layers, inputs, config.rank), jnp.float32) / inputs**0.5
        pairs[name] = Pair(a, jnp.zeros((layers, config.rank, outputs), jnp.float32))
    return Adapters(pairs, config.alpha / config.rank)


def matrix_of(trunk: Transformer, name: str) -> jax.Array:
    """The stacked matrix `[L, in, out]` called `name`."""
    return getattr(trunk.layers, name)[...]


def attach(trunk: Transformer, trained: Any) -> Any:
    """The model that adapters and trunk make together; no number is computed or copied.

    Gradients with respect to `trained` alone never reach the trunk's weights.

    Args:
      trunk: the frozen weights.
      trained: `Adapters`, or a `ScalarModel` that has them in place of its trunk.

    Returns:
      A `Transformer` or `ScalarModel` whose adapted matrices are `LowRank`.
    """
    if isinstance(trained, ScalarModel):
        return _changed(trained, trunk=attach(trunk, trained.trunk))
    lowered = {}
    for name in trained.targets:
        pair = getattr(trained, name)
        base = getattr(trunk.layers, name)
        lowered[name] = LowRank(base, pair.a, pair.b, trained.scale)
    return _changed(trunk, layers=_changed(trunk.layers, **lowered))


def detach(model: Any) -> tuple[Transformer, Any] | None:
    """Trunk and adapters of a model from `attach`; None for a model without adapters."""
    if isinstance(model, ScalarModel):
        parts = detach(model.trunk)
        return None if parts is None else (parts[0], _changed(model, trunk=parts[1]))
    lowered = _low_rank_weights(model)
    if not lowered:
        return None
    bases = {name: weight.base for name, weight in lowered.items()}
    pairs = {name: Pair(weight.a[...], weight.b[...]) for name, weight in lowered.items()}
    scale = next(iter(lowered.values())).scale
    return _changed(model, layers=_changed(model.layers, **bases)), Adapters(pairs, scale)


def merge(model: Any) -> Any:
    """A model from `attach` with its adapters added into the matrices: an ordinary model.

    The adapted matrices are new arrays, placed as the frozen ones are; all others are shared.
    """
    if isinstance(model, ScalarModel):
        return _changed(model, trunk=merge(model.trunk))
    merged, lowered = make_merge(model)
    weights = {name: nnx.Param(weight) for name, weight in merged(lowered).items()}
    return _changed(model, layers=_changed(model.layers, **weights))


def make_merge(model: Any) -> tuple[Callable[..., dict[str, jax.Array]], dict[str, LowRank]]:
    """The jitted function that `merge` calls, and its argument; the model may be shapes alone."""
    if isinstance(model, ScalarModel):
        return make_merge(model.trunk)
    lowered = _low_rank_weights(model)
    # Shapes cannot be indexed: leaves are taken in place of `weight.base[...]`.
    bases = {name: jax.tree.leaves(weight.base)[0] for name, weight in lowered.items()}
    places = tuple((name, getattr(base, "sharding", None)) for name, base in bases.items())
    return _merging(places), lowered


def _low_rank_weights(model: Transformer) -> dict[str, LowRank]:
    weights = {name: getattr(model.layers, name) for name in TARGETS}
    return {name: weight for name, weight in weights.items() if isinstance(weight, LowRank)}


@functools.cache
def _merging(places: tuple[tuple[str, Any], ...]) -> Callable[..., dict[str, jax.Array]]:
    """Compiled: `LowRank` by name -> merged matrices, placed as said."""

    def merged(lowered: dict[str, LowRank]) -> dict[str, jax.Array]:
        return {name: weight.merged() for name, weight in lowered.items()}

    return jax.jit(merged, out_shardings=dict(places))


def _changed(module: Any, **attributes: Any) -> Any:
    """A copy of a module that shares its arrays, with other attributes."""
    leaves, structure = jax.tree.flatten(module)
    copy = jax.tree.unflatten(structure, leaves)
    for name, value in attributes.items():
        setattr(copy, name, value)
    return copy


class Tuning:
    """Which part of a model trains: every weight, or adapters beside the frozen ones.

    Trainers take `start` and `trunk`; whatever uses the model that results takes `model`,
    `sampling_model` or `merged`. Without adapters these return what they are given.

    Args:
      start: the tree that trains: a model, or adapters (see `attach`).
      trunk: the frozen weights; None when every weight trains. Never copied, donated or changed.
    """

    def __init__(self, start: Any, trunk: Transformer | None = None):
        self.start, self.trunk = start, trunk

    def take(self) -> Any:
        """`start`, which this object then forgets: a state copies it, and one copy is enough."""
        start, self.start = self.start, None
        return start

    def model(self, trained: Any) -> Any:
        """The model that `trained` makes, at no cost."""
        return trained if self.trunk is None else attach(self.trunk, trained)

    def merged(self, trained: Any) -> Any:
        """The same as an ordinary model: a copy of the adapted matrices, placed as they are."""
        return trained if self.trunk is None else merge(self.model(trained))

    def sampling_model(self, trained: Any) -> Any:
        """The model to decode with: merged in float32, where that changes no number.

        In bfloat16 a sum would lose what an adapter adds below 2⁻⁹ of a weight, and so sampler
        and trainer would be two policies: there the adapters stay beside the matrices.
        """
        if self.trunk is not None and self.trunk.config.dtype != "float32":
            return self.model(trained)
        return self.merged(trained)


def make_tuning(model: Any, config: LoRAConfig, key: jax.Array) -> Tuning:
    """Adapters on a `Transformer` or `ScalarModel`, or all of it where the rank is 0.

    A scalar head trains in either case. Adapters that the model already has train further, with
    their own rank and α.
    """
    if not config.rank:
        return Tuning(model)
    parts = detach(model)
    if parts is not None:
        return Tuning(parts[1], parts[0])
    if isinstance(model, ScalarModel):
        adapters = new_adapters(model.trunk, config, key)
        return Tuning(_changed(model, trunk=adapters), model.trunk)
    return Tuning(new_adapters(model, config, key), model)
