"""Nested mappings to dataclasses: a config file's keys become typed, checked settings.

The library takes dataclasses and keywords, never a config object of the command line. What a
dataclass checks in `__post_init__`, by `check`, is checked once, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# Devices count in int32.
_LARGEST = 2**31 - 1


class OutOfRange(ValueError):
    """A field that `check` refuses, by its own name: `typed` puts the path before it."""


def check(config: Any, /, **rules: str | Collection[str]) -> None:
    """Refuses what makes no sense in a field of a dataclass; for its `__post_init__`.

    An upper end of 1e6 stands for a slip: no weight of a loss, of a reward or of a regulariser is
    as large. What only bounds something may be as large as it likes: the bound is never reached.

    Args:
      config: The dataclass.
      **rules: Field -> an interval such as `[0, inf)` or `(0, 1]`, without NaN and infinity; or
        the names that it may be. A field that is a tuple holds one or more of them.

    Raises:
      OutOfRange: the field, its value and the rule, in one line.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Sampling:
    ...     top_p: float = 1.0
    ...     def __post_init__(self):
    ...         check(self, top_p="(0, 1]")
    >>> Sampling(1.5)
    Traceback (most recent call last):
    rlhf_jax.runtime.settings.OutOfRange: top_p=1.5 must be in (0, 1]
    """
    for name, rule in rules.items():
        value = getattr(config, name)
        several = isinstance(value, tuple)
        values = value if several else (value,)
        if isinstance(rule, str):
            if not values or not all(_within(one, rule) for one in values):
                hold = "hold one or more numbers, each " if several else "be "
                raise OutOfRange(f"{name}={value!r} must {hold}{_words(rule)}")
        elif not values or not set(values) <= set(rule):
            must = "must name one or more of" if several else "is unknown; use one of"
            raise OutOfRange(f"{name}={value!r} {must} {', '.join(rule)}")


def _within(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)


def _words(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    return f"at least {low}" if interval[0] == "[" else f"above {low}"


def typed(kind: type[T], values: Mapping[str, Any], *, path: str = "") -> T:
    """Builds a dataclass from a mapping, fields that are dataclasses from the mappings within.

    Args:
      kind: a dataclass.
      values: field -> value; lists become tuples where a tuple is declared. Fields with a default
        may be left out.
      path: prefix of the keys in messages, such as `ppo.`.

    Raises:
      ValueError: an unknown or missing key, a value of another type, NaN, infinity, a number that
        no device counts to, or what the dataclass refuses.

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
    try:
        return kind(**built)
    except OutOfRange as error:
        raise ValueError(f"{path}{error}") from None


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
        return tuple(_converted(typing.get_args(hint)[0], one, path) for one in value)
    # A bool is an int to Python; as a number it is a mistake.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not abs(value) <= sys.float_info.max:  # NaN is not either
        raise ValueError(f"{path}={value!r} must be a finite number")
    if hint is float and number:
        return float(value)
    if hint is int and number and abs(value) > _LARGEST:
        raise ValueError(f"{path}={value!r} must be below 2**31")
    if hint in (bool, int, str, float) and (
        not isinstance(value, hint) or (hint is int and not number)
    ):
        raise ValueError(f"{path}={value!r} must be of type {hint.__name__}")
    return value
