"""What a run folder says of its run: config.json from the beginning, summary.json at the end.

config.json holds the settings, and digests of what the run reads: rows, weights, chat template.
A run resumes where both are as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.files import read_json, write_whole
from rlhf_jax.runtime.run_info import run_info

# What may change when a run goes on: it does not change the numbers, or says so in the run folder.
FREE = ("log.", "checkpoint.", "sharding.", "collapse.", "root")
# The section of config.json with the digests of what a run reads.
INPUTS = "inputs"


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes config.json, or compares with it: a folder holds one run of one config.

    Process 0 writes, once all processes have looked. Folders below `root`, the settings' folder of
    all runs, are compared as they are seen from there: a run goes on from wherever it is started.

    Raises:
      ValueError: the folder holds a run with other settings, or config.json is damaged.
    """
    there = path.exists()
    distributed.barrier("the run folder has been looked at")
    settings = json.loads(json.dumps(settings, default=str))  # as they come back from disk
    if there:
        before, now = (_from_root(c) for c in (read_config(path)["config"], settings))
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
        write_whole(path, json.dumps(run_info(settings), indent=2, allow_nan=False) + "\n")


def pin_inputs(path: Path, inputs: Mapping[str, Any]) -> None:
    """Adds to config.json what a run reads, or compares with it; after `check_settings`.

    Paths and times may change, what is in the files may not: the rest of the run would be of
    another experiment than its beginning.

    Args:
      path: config.json of the run.
      inputs: digests, perhaps nested; causes before what follows from them, since the first that
        differs is named. Those of process 0 count.

    Raises:
      ValueError: an input is not what the run began with; names it. In all processes.
    """
    problem = distributed.from_main(_pinned(path, inputs) if distributed.is_main() else "")
    if problem:
        raise ValueError(problem)


def _pinned(path: Path, inputs: Mapping[str, Any]) -> str:
    """Writes the inputs where none are noted; says what differs from those that are."""
    record = read_config(path)
    inputs = json.loads(json.dumps(inputs))
    if INPUTS not in record:
        write_whole(path, json.dumps(record | {INPUTS: inputs}, indent=2, allow_nan=False) + "\n")
        return ""
    before, now = _flat(pinned_inputs(path)), _flat(inputs)
    names = [*now, *(name for name in before if name not in now)]
    changed = [name for name in names if before.get(name) != now.get(name)]
    if not changed:
        return ""
    name, others = changed[0], len(changed) - 1
    return (
        f"{path.parent} holds a run that began with other inputs ({name.replace('.', ' of ', 1)} "
        f"was {before.get(name, 'not read')}, now {now.get(name, 'not read')}"
        f"{f'; {others} more differ' if others else ''}): put back what it began with, choose "
        "another --config.workdir, or remove the folder"
    )


def pinned_inputs(path: Path) -> dict[str, Any]:
    """What `pin_inputs` wrote; empty where there is no run, or one that has read nothing yet."""
    found = read_config(path).get(INPUTS, {}) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not that of a run: inputs={found!r} must be an object")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """What `check_settings` wrote."""
    advice = (
        "remove the folder, or only this file if the settings are those that the run began with"
    )
    config = read_json(path, advice)
    if not isinstance(config.get("config"), dict):
        raise ValueError(f"{path} is not that of a run: choose another --config.workdir")
    return config


def _from_root(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their whole names, with folders relative to `root`."""
    flat = _flat(settings)
    within = f"{flat['root']}/" if flat.get("root") else ""
    return {k: v.removeprefix(within) if isinstance(v, str) else v for k, v in flat.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def read_summary(workdir: str | Path) -> dict[str, Any] | None:
    """What a finished run wrote, None when it has not finished.

    Raises:
      ValueError: the file is damaged.
    """
    path = Path(workdir) / "summary.json"
    if not path.exists():
        return None
    return read_json(path, "remove it, and the command that made the run writes it again")
