"""Checks of arguments, each with the name of what it refuses.

Shapes and types are known even under `jit`; a traced value passes `require` unseen.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require(condition: Any, message: str) -> None:
    """Raises ValueError(message) if the condition is known to be false.

    Args:
      condition: a Python bool, a concrete scalar array, or a tracer (which is let through).
      message: one line: the rule, the value, the fix.

    Raises:
      ValueError: the condition is concrete and false.
    """
    if not isinstance(condition, jax.core.Tracer) and not condition:
        raise ValueError(message)


def floats(**arrays: Any) -> Mapping[str, Any]:
    """Lets float arrays pass, and returns them by name for `same_shape`.

    Args:
      **arrays: by the name that the caller knows them by.

    Raises:
      AssertionError: one is no array, or not float.
    """
    return _of_kind(arrays, jnp.floating, "must be float: cast it, {}.astype(jnp.float32)")


def integers(**arrays: Any) -> Mapping[str, Any]:
    """Lets integer arrays pass, and returns them by name.

    Args:
      **arrays: by the name that the caller knows them by.

    Raises:
      AssertionError: one is no array, or not integer.
    """
    return _of_kind(arrays, jnp.integer, "must be integer: cast it, {}.astype(jnp.int32)")


def masks(**arrays: Any) -> Mapping[str, Any]:
    """Lets boolean arrays pass, and returns them by name. A mask of 0 and 1 is refused.

    Args:
      **arrays: by the name that the caller knows them by.

    Raises:
      AssertionError: one is no array, or not bool.
    """
    return _of_kind(arrays, jnp.bool_, "must be boolean: cast to bool, {}.astype(bool)")


def numbers(**arrays: Any) -> Mapping[str, Any]:
    """Lets arrays of any real type pass, and returns them by name.

    Args:
      **arrays: by the name that the caller knows them by.

    Raises:
      AssertionError: one is no array.
    """
    for name, x in arrays.items():
        if not _is_array(x):
            fix = f"jnp.asarray({name})"
            raise AssertionError(f"{name} is {describe(x)}, but must be an array: {fix}")
    return arrays


def same_shape(*groups: Mapping[str, Any]) -> None:
    """A mismatch is an error, never a broadcast.

    Args:
      *groups: arrays by name, as `floats` and its like return them.

    Raises:
      AssertionError: shapes differ.
    """
    arrays = {name: x for group in groups for name, x in group.items()}
    if len({x.shape for x in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
        raise AssertionError(f"shapes differ, but must be equal: {shapes}")


def fits(other: str, shape: tuple[int, ...], arrays: Mapping[str, Any]) -> None:
    """For an array whose shape follows from that of another, such as one number a row.

    Args:
      other: the name of the other array.
      shape: what follows from it.
      arrays: by name, as `floats` and its like return them.

    Raises:
      AssertionError: a shape is another.
    """
    for name, x in arrays.items():
        if x.shape != shape:
            rule = f"must have the shape {list(shape)} to fit {other}"
            raise AssertionError(f"{name} is {describe(x)}, but {rule}")


def scalars(**values: Any) -> None:
    """Lets hyper-parameters pass: Python numbers, and arrays of shape [], traced or not.

    Args:
      **values: by the name that the caller knows them by.

    Raises:
      AssertionError: one is not a single number.
    """
    for name, x in values.items():
        if not is_scalar(x):
            fix = "jax.vmap over it for several"
            raise AssertionError(f"{name} is {describe(x)}, but must be a single number: {fix}")


def is_scalar(x: Any) -> bool:
    """Whether it is a Python number or an array of shape [].

    Args:
      x: what was passed.
    """
    return isinstance(x, int | float) or (_is_array(x) and x.shape == ())


def static(**values: Any) -> None:
    """Refuses arrays that `jit` traces where the value decides the program.

    Args:
      **values: by the name that the caller knows them by.

    Raises:
      AssertionError: one is traced.
    """
    for name, x in values.items():
        if isinstance(x, jax.core.Tracer):
            fix = f"jax.jit(..., static_argnames={name!r})"
            raise AssertionError(f"{name} is traced, but must be static under jit: {fix}")


def integer(**values: Any) -> None:
    """Lets integers pass that are known when `jit` traces.

    Args:
      **values: by the name that the caller knows them by.

    Raises:
      AssertionError: one is traced, or not an integer.
    """
    static(**values)
    for name, x in values.items():
        one = isinstance(x, int | np.integer) or (_is_array(x) and x.shape == ())
        if not one or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            raise AssertionError(f"{name} is {describe(x)}, but must be an integer")


def describe(x: Any) -> str:
    """float32[3, 4], or the type of what is no array, with the length of a list.

    Args:
      x: what was passed.
    """
    if _is_array(x):
        return f"{x.dtype}{list(x.shape)}"
    length = f" of {len(x)}" if isinstance(x, list | tuple) else ""
    return "None" if x is None else f"a {type(x).__name__}{length}"


def _of_kind(arrays: Mapping[str, Any], kind: Any, rule: str) -> Mapping[str, Any]:
    for name, x in numbers(**arrays).items():
        if not jnp.issubdtype(x.dtype, kind):
            raise AssertionError(f"{name} is {describe(x)}, but {rule.format(name)}")
    return arrays


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic) or hasattr(x, "__jax_array__")
