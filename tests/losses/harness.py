"""What a case of the table of losses is, and how its inputs are drawn.

An input is "kind:shape" with the shape in
letters (T tokens, K candidates, V vocabulary, C classes; "" is one number), after the batch axis.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import losses

SIZES = {"T": 5, "K": 4, "V": 6, "C": 3}
BATCH = 3
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Case:
    """One function and one setting of its hyper-parameters.

    Fields:
      name: public name.
      inputs: argument name -> "kind:shape".
      oracle: the slow function of one row (of one element, or of the whole array: see `level`).
      settings: hyper-parameters.
      level: "element", "row" or "whole": what one output depends on.
      differentiated: arguments that carry a gradient; every other float argument must not.
      masks: argument -> the mask that covers it.
      call: the function, if not simply `losses.<name>`.
    """

    name: str
    inputs: Mapping[str, str]
    oracle: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    level: str = "row"
    differentiated: tuple[str, ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    call: Callable[..., Any] | None = None

    def __call__(self, arrays: Mapping[str, Any]) -> jax.Array:
        """Applies the function; a dict of diagnostics becomes one array."""
        out = (self.call or getattr(losses, self.name))(**arrays, **self.settings)
        if not isinstance(out, dict):
            return out
        with jax.numpy_dtype_promotion("standard"):  # an accuracy is float32 whatever the inputs
            return jnp.stack([out[k] for k in sorted(out)], -1)

    def expected(self, arrays: Mapping[str, np.ndarray], lead: int = 1) -> np.ndarray:
        """Applies the oracle, row by row (`lead` axes are rows) or element by element."""
        if self.level == "whole":
            return np.array(self.oracle(**arrays, **self.settings))
        batch = np.shape(next(iter(arrays.values())))[: lead if self.level == "row" else None]
        rows = [
            self.oracle(**{k: v[i] for k, v in arrays.items()}, **self.settings)
            for i in np.ndindex(batch)
        ]
        rows = [[row[k] for k in sorted(row)] if isinstance(row, dict) else row for row in rows]
        return np.array(rows).reshape((*batch, *np.shape(rows[0])))

    def cover(self, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The mask of an argument, in the argument's own shape."""
        mask, shape = arrays[self.masks[name]], arrays[name].shape
        return np.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)), shape)

    def floats(self) -> list[str]:
        """Names of the float arguments."""
        return [k for k, spec in self.inputs.items() if spec.split(":")[0] not in _DISCRETE]


_DISCRETE = {"mask", "flag", "token", "label", "rank"}


def draw(case: Case, seed: int, sizes: Mapping[str, int] = SIZES) -> Arrays:
    """Ordinary inputs: probabilities away from 0 and 1, ragged masks with padding on both sides."""
    rng = np.random.default_rng(seed)
    return {name: _draw(rng, spec, sizes) for name, spec in case.inputs.items()}


def draw_extreme(case: Case, seed: int, sizes: Mapping[str, int] = SIZES) -> Arrays:
    """Inputs at the ends of their range: log-ratios and logit gaps of 80, probabilities 0 and 1."""
    rng = np.random.default_rng(seed)
    arrays = {name: _draw(rng, spec, sizes) for name, spec in case.inputs.items()}
    ends = {"log_prob": (-80, 0), "prob": (0, 1), "positive": (0, 80)}
    for name in case.floats():
        low, high = ends.get(case.inputs[name].split(":")[0], (-40, 40))
        arrays[name] = rng.choice([low, high], size=arrays[name].shape).astype(float)
        if case.inputs[name].startswith("falling"):
            arrays[name] = -np.sort(-arrays[name], axis=-1)
    return arrays


def _draw(rng: np.random.Generator, spec: str, sizes: Mapping[str, int]) -> np.ndarray:
    kind, letters = spec.split(":")
    shape = () if letters == "-" else (BATCH, *(sizes[letter] for letter in letters))
    if kind == "mask":
        return _ragged(rng, shape)
    draws = {
        "log_prob": lambda: -rng.uniform(0.05, 3.0, shape),
        "real": lambda: rng.normal(size=shape),
        "positive": lambda: rng.uniform(0.05, 3.0, shape),
        "prob": lambda: rng.uniform(0.05, 0.95, shape),
        "falling": lambda: -np.sort(-rng.normal(size=shape), axis=-1),
        "token": lambda: rng.integers(0, SIZES["V"], shape, dtype=np.int32),
        "label": lambda: rng.integers(0, SIZES["C"], shape, dtype=np.int32),
        "rank": lambda: rng.integers(0, 3, shape, dtype=np.int32),
        "flag": lambda: rng.random(shape) < 0.5,
    }
    return draws[kind]()


def _ragged(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Real tokens stand together; the first row is full, the last has padding on both sides."""
    where = np.zeros((int(np.prod(shape[:-1])), shape[-1]), bool)
    for i, row in enumerate(where):
        start = 0 if i == 0 else rng.integers(0, shape[-1] // 2 + 1)
        row[start : shape[-1] if i == 0 else rng.integers(start + 1, shape[-1] + 1)] = True
    return where.reshape(shape)


def as_jax(arrays: Mapping[str, np.ndarray], dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """The arrays on the device, floats in `dtype`."""
    return {
        k: jnp.asarray(v, dtype if np.issubdtype(v.dtype, np.floating) else v.dtype)
        for k, v in arrays.items()
    }


def value_and_gradients(
    case: Case, arrays: Mapping[str, jax.Array]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output, and the gradient of a random weighting of it to every float argument.

    Compiled once for each case, shape and dtype: compilation is nearly all that these tests cost.
    """
    out, gradients = _compiled(case)(dict(arrays))
    return np.asarray(out), {k: np.asarray(v) for k, v in gradients.items()}


def weights_like(out: Any) -> np.ndarray:
    """The weighting: fixed numbers, none of them 0."""
    return np.random.default_rng(5).uniform(0.5, 1.5, np.shape(out)) * (-1) ** np.arange(
        np.size(out)
    ).reshape(np.shape(out))


@functools.cache
def _compiled(case: Case) -> Callable[..., Any]:
    def weighted_sum(floats: Any, others: Any) -> tuple[jax.Array, jax.Array]:
        out = case({**floats, **others})
        if not jnp.issubdtype(out.dtype, jnp.floating):
            return jnp.float32(0), out
        return jnp.sum(out * jnp.asarray(weights_like(out), out.dtype)), out

    def evaluate(arrays: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        floats = {k: arrays.pop(k) for k in case.floats()}
        gradients, out = jax.grad(weighted_sum, has_aux=True)(floats, arrays)
        return out, gradients

    return jax.jit(evaluate)
