"""A run as shapes, to compile elsewhere: what those of all stages have in common."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer, first_layers
from rlhf_jax.preflight.programs import Program, placed
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training import memory
from rlhf_jax.training.step import create_state, make_create_state, state_shardings


class RunShapes(abc.ABC):
    """The trees of a run, where they lie, and its programs. No array is made.

    A subclass is one stage. Its programs are made by the functions that the run itself calls.

    Args:
      sizes: the sizes of its models.
      sharding: mesh of abstract devices, and mode.

    Attributes:
      unit: what the least time is of: an "update", or an "iteration" of several.
      samples: what is counted in a unit: "responses", "rows" or "pairs".
      rows: how many of them.
    """

    unit = "update"
    samples = "rows"
    rows: int

    def __init__(self, sizes: ModelConfig, sharding: Sharding):
        self.sizes, self.sharding = sizes, sharding

    @abc.abstractmethod
    def holdings(self) -> list[memory.Holding]:
        """Trees that stay on the devices from one program to the next."""

    @abc.abstractmethod
    def programs(self) -> Iterator[Program]:
        """All programs, in the order in which the run needs them."""

    @property
    @abc.abstractmethod
    def microbatch_counts(self) -> tuple[int, ...]:
        """Numbers of microbatches that give every device whole rows of each, rising."""

    @property
    @abc.abstractmethod
    def updated_rows(self) -> int:
        """Rows of one update, over all devices and microbatches."""

    def notes(self) -> list[str]:
        """What a reader of the report should know of the shapes that were compiled."""
        return []

    def trained(self, model: Any) -> Any:
        """A model that is loaded to be trained, where the loaders put it."""
        return placed(model, self.sharding.params(model))

    def frozen(self, model: Any) -> Any:
        """A model that does not train, spread as the loaders do."""
        return placed(model, self.sharding.frozen(model))

    def state(self, model: Any, optimizer: Any) -> Any:
        """The train state of a model."""
        state = jax.eval_shape(lambda m: create_state(m, optimizer, self.sharding), model)
        return placed(state, state_shardings(state, self.sharding))

    def create(self, name: str, loaded: Any, optimizer: Any) -> Program:
        """Makes a state from a loaded model, which is then freed; all else is there."""
        create = make_create_state(loaded, optimizer, self.sharding)
        return Program(f"create {name}", create, (loaded,), calls=0, creates=True)

    def array(self, shape: tuple[int, ...], dtype: Any, *, whole: bool = False) -> Any:
        """An array whose rows are split over `data`, or one that is whole on every device.

        Raises:
          ValueError: the rows do not divide by the number of devices.
        """
        if whole:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding.replicated)
        if shape[0] % self.sharding.data:
            raise ValueError(
                f"batch of {shape[0]} must be divisible by {self.sharding.data} devices"
            )
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding.batch)

    def batch(self, tree: Any) -> Any:
        """A tree of NumPy arrays or shapes as `Sharding.put_batch` places it."""
        return jax.tree.map(lambda x: self.array(x.shape, x.dtype), tree)

    def with_rows(self, tree: Any, rows: int) -> Any:
        """The tree with another number of rows, split over `data`."""
        return jax.tree.map(lambda x: self.array((rows, *x.shape[1:]), x.dtype), tree)

    def whole(self, tree: Any) -> Any:
        """The tree, whole on every device."""
        return jax.tree.map(lambda x: self.array(x.shape, x.dtype, whole=True), tree)

    def prompts(self, rows: int, length: int) -> tuple[Any, ...]:
        """What `generate` takes after the model: tokens and mask `[rows, length]`, and a key."""
        key = self.whole(jax.eval_shape(lambda: jax.random.key(0)))
        return self.array((rows, length), jnp.int32), self.array((rows, length), jnp.bool_), key

    def sampled_traffic(self, model: Any, rows: int, prompt_length: int, tokens: int) -> float:
        """Bytes that a device reads to sample: all its weights for each token, and its cache.

        Args:
          model: the policy.
          rows: prompts, over all devices.
          prompt_length: tokens of each.
          tokens: that are sampled.
        """
        sizes = self.sizes
        weights = tree_bytes(model) / self.sharding.tensor
        size = jnp.dtype(sizes.dtype).itemsize / self.sharding.tensor
        per_token = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * size
        seen = prompt_length + tokens / 2
        return tokens * (weights + rows / self.sharding.data * seen * per_token)

    def lasting(self, name: str, state: Any) -> list[memory.Holding]:
        """What a train state holds between two steps: all but the gradients."""
        held = memory.state_holdings(name, state, self.sharding)
        return [item for item in held if not item.name.endswith("/gradients")]


def language_shapes(sizes: ModelConfig) -> Transformer:
    """A language model, as shapes that lie nowhere."""
    return jax.eval_shape(lambda: Transformer(sizes, jax.random.key(0)))


def scalar_shapes(sizes: ModelConfig, layers: int = 0) -> ScalarModel:
    """A scalar model on the first layers of a language model (0 is all), lying nowhere."""

    def make() -> ScalarModel:
        trunk = Transformer(sizes, jax.random.key(0))
        return ScalarModel(first_layers(trunk, layers) if layers else trunk, jax.random.key(0))

    return jax.eval_shape(make)


def whole_row_counts(rows: int, devices: int) -> tuple[int, ...]:
    """Numbers of microbatches that divide a batch so that each device has whole rows of each.

    >>> whole_row_counts(168, 8)
    (1, 3, 7, 21)
    """
    each = rows // devices
    return tuple(count for count in range(1, each + 1) if each % count == 0)


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, each number counted once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
