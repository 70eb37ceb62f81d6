"""Keys that nothing reads where another key has some value: set there, they are refused.

A table `UNREAD` stands in configs/common.py for every experiment, and in each config file for its
own:

  UNREAD = (Unread("trpo.*", unless="ppo.objective", is_=among("trpo")),)

A key counts as set where it differs from what the scale and the variants give it: these may leave a
value in a key that another of them switches off.
"""

import fnmatch
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Condition(NamedTuple):
    """What a value has to be.

    Attributes:
      holds: Whether it is.
      words: Says so, after "is".
    """

    holds: Callable[[Any], bool]
    words: Callable[[], str]


SET = Condition(bool, lambda: "set")
EMPTY = Condition(lambda value: not value, lambda: "empty")


def among(*names: str) -> Condition:
    """One of some names."""
    return Condition(lambda value: value in names, lambda: " or ".join(map(repr, names)))


def no(name: str) -> Condition:
    """Anything but a name."""
    return Condition(lambda value: value != name, lambda: f"not {name!r}")


def rows_by(key: str, *, streams: bool = False) -> Condition:
    """A source whose rows, or pairs, depend on a key of `data`.

    Args:
      key: Its name.
      streams: Whether those of every stream do.
    """

    def readers() -> list[str]:
        tasks = importlib.import_module("rlhf_jax.tasks").TASKS
        return [name for name, task in tasks.items() if key in task.reads]

    def holds(source: str) -> bool:
        streamed, name = source.startswith("stream:"), source.removeprefix("stream:").split(":")[0]
        known = importlib.import_module("rlhf_jax.tasks").TASKS
        # A source that nobody knows is refused for that.
        return name not in known or name in readers() or (streams and streamed)

    return Condition(holds, lambda: " or ".join(readers() + ["a stream"] * streams))


class Unread(NamedTuple):
    """Keys that are read where another key is something, and nowhere else.

    Attributes:
      keys: Their names, or patterns, between spaces.
      unless: The key that decides, or several between spaces: one of them is enough.
      is_: What it has to be.
    """

    keys: str
    unless: str
    is_: Condition

    def deciding(self, config: Mapping[str, Any]) -> list[str]:
        """The keys of a flat config that decide; after the first an empty one does not."""
        there = [key for key in self.unless.split() if key in config]
        return [key for key in there if config[key] or key == there[0]]

    def among(self, config: Mapping[str, Any]) -> list[str]:
        """Keys of a flat config that it leaves unread."""
        deciding = self.deciding(config)
        if not deciding or any(self.is_.holds(config[key]) for key in deciding):
            return []
        return [k for k in config if any(fnmatch.fnmatchcase(k, p) for p in self.keys.split())]


def unread(table: Iterable[Unread], config: Mapping[str, Any]) -> dict[str, Unread]:
    """The keys of a flat config that nothing reads, with what says so."""
    return {key: rule for rule in table for key in rule.among(config)}


def refuse(table: Iterable[Unread], config: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Refuses keys that were set and that nothing reads.

    Args:
      table: Says which.
      config: Flat.
      plain: The same of scale and variants alone.

    Raises:
      ValueError: The first of them, and the key that decides.
    """
    for key, rule in unread(table, config).items():
        if config[key] != plain.get(key):
            deciding = rule.deciding(config)
            raise ValueError(
                f"{key}={config[key]!r} is read where {' or '.join(deciding)} is "
                f"{rule.is_.words()}, and here it is "
                f"{' and '.join(repr(config[k]) for k in deciding)}: leave {key} out"
            )
