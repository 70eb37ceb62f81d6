"""Nested mappings to dataclasses: a config file's keys become typed, checked settings.

The library takes dataclasses and keywords, never a config object of the command line. What a
dataclass checks in `__post_init__` is checked here, once, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def typed(kind: type[T], values: Mapping[str, Any], *, path: str = "") -> T:
    """Builds a dataclass from a mapping, fields that are dataclasses from the mappings within.

    Args:
      kind: a dataclass.
      values: field -> value; lists become tuples where a tuple is declared. Fields with a default
        may be left out.
      path: prefix of the keys in messages, such as `ppo.`.

    Raises:
      ValueError: an unknown or missing key, a value of another type, or what the dataclass refuses.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Sampling:
    ...     temperature: float = 1.0
    >>> typed(Sampling, {"temperature": 2})
    Sampling(temperature=2.0)
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"unknown config key {path + unknown[0]!r}; there are: {', '.join(sorted(fields))}"
        )
    hints = typing.get_type_hints(kind)
    built = {name: _converted(hints[name], value, path + name) for name, value in values.items()}
    missing = [name for name in fields if name not in built and _is_required(fields[name])]
    if missing:
        raise ValueError(f"config key {path + missing[0]!r} is missing")
    return kind(**built)


def _is_required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _converted(hint: Any, value: Any, path: str) -> Any:
    """The value in the type of its field."""
    if dataclasses.is_dataclass(hint):
        return typed(hint, value, path=f"{path}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"{path}={value!r} must be a tuple, such as ({value!r},)")
        return tuple(value)
    # A bool is an int to Python; as a number it is a mistake.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint in (bool, int, str, float) and (
        not isinstance(value, hint) or (hint is int and not number)
    ):
        raise ValueError(f"{path}={value!r} must be of type {hint.__name__}")
    return value
