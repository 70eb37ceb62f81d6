"""A run's folder holds one run of one config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.run_info import run_info

# What may change when a run goes on: it does not change the numbers.
FREE = ("log.", "checkpoint.", "sharding.")


def check_settings(path: Path, config: ConfigDict) -> None:
    """Writes config.json, or compares with it: a folder holds one run of one config.

    Process 0 writes, once all processes have looked.

    Raises:
      ValueError: the folder holds a run with other settings.
    """
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    there = path.exists()
    distributed.barrier("the run folder has been looked at")
    if there:
        before, now = (_flat(c) for c in (json.loads(path.read_text())["config"], settings))
        changed = sorted(
            k for k in before | now if before.get(k) != now.get(k) and not k.startswith(FREE)
        )
        if changed:
            key = changed[0]
            raise ValueError(
                f"{path.parent} holds a run with other settings ({key} was {before.get(key)!r}, "
                f"now {now.get(key)!r}; {len(changed)} differ): choose another --config.workdir or "
                "remove the folder"
            )
        return
    if distributed.is_main():
        path.write_text(json.dumps(run_info(settings), indent=2, default=str) + "\n")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
