"""Saving and resuming a run with Orbax: arrays as one tree, everything else as JSON.

A step on disk is one folder. Orbax gives it its name once all of it is written; what a disk, a
copy or a hand does to it afterwards shows in the checksums that the step carries.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.checksums import checksums
from rlhf_jax.runtime.errors import UserError

ARRAYS, RECORD = "state", "position"
RECORD_FILE = "metadata"
# Reasons why a step cannot be read that are not the step's.
_NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)


class CheckpointError(UserError):
    """A step could not be written, or no step on disk is whole."""


class _Refused(Exception):
    """A step is not what was saved; the message says how it shows."""


class Checkpointer:
    """Keeps the newest states of a run in `folder`, each step whole or not at all.

    Args:
      folder: created when missing.
      keep: how many steps stay on disk. With two, one that is damaged costs the steps since the
        one before it; with one it costs the run.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        handlers = {
            ARRAYS: ocp.StandardCheckpointHandler(),
            RECORD: ocp.JsonCheckpointHandler(RECORD_FILE),
        }
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        """The newest step on disk, whole or not; None when there is none."""
        return self._manager.latest_step()

    def keep_until(self, step: int) -> int:
        """Removes the states after a step, and returns the newest that is left; 0 where none is."""
        steps = distributed.from_main(sorted(self._manager.all_steps()))
        for later in steps:
            if later > step:
                self._manager.delete(later)
        return max((kept for kept in steps if kept <= step), default=0)

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Writes arrays `state` and the JSON-able `position` (data cursors, counters).

        Raises:
          CheckpointError: it could not be written, as on a full disk; older steps are kept.
        """
        flat = _flatten(state)
        sums = checksums(flat)
        record = {
            "step": step,
            "arrays": {name: [_kind(leaf), sums[name]] for name, leaf in flat.items()},
            "position": position,
        }
        record["digest"] = _digest(record)
        items = ocp.args.Composite(
            **{ARRAYS: ocp.args.StandardSave(flat), RECORD: ocp.args.JsonSave(record)}
        )
        try:
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._not_saved(step, error) from error

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        """The error of a failed write, whose remains would only fill the disk."""
        for remains in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(remains, ignore_errors=True)
        older = [kept for kept in self._manager.all_steps() if kept != step]
        kept = f"step {max(older)} is kept" if older else "there is no older one"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._folder}: "
            f"{_first_line(error)}; {kept}"
        )

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]]:
        """Reads the newest step that is what was saved.

        A step that is not is told, and set aside under another name once an older one is found.
        With several processes process 0 decides; a step that one of them cannot read counts for
        none. Collective.

        Args:
          like: a state with the shapes, types and shardings to restore to.

        Returns:
          Step, state, position.

        Raises:
          FileNotFoundError: nothing was saved.
          CheckpointError: no step on disk is what was saved.
          ValueError: the saved tree does not fit, for instance after a change of the config.
        """
        steps = distributed.from_main(sorted(self._manager.all_steps(), reverse=True))
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self._folder}")
        flat, refused = _flatten(like), {}
        for step in steps:
            try:
                leaves, position = self._read(step, flat)
            except _Refused as reason:
                refused[step] = str(reason)
                continue
            self._set_aside(refused)
            state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flat])
            return step, state, position
        told = "; ".join(f"step {step}: {reason}" for step, reason in refused.items())
        raise CheckpointError(
            f"no checkpoint in {self._folder} is whole ({told}): put a copy of one back, or remove "
            "the run folder to begin anew"
        )

    def _read(self, step: int, flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays and position of a step; raises `_Refused`, in all processes or in none."""
        record, reason = distributed.from_main(
            self._read_record(step) if distributed.is_main() else ({}, "")
        )
        if reason:
            raise _Refused(reason)
        self._check_fits({name: kind for name, (kind, _) in record["arrays"].items()}, flat)
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in flat.items()
        }
        with _no_tracebacks():
            leaves, reason = self._read_arrays(step, abstract)
            if reason:
                gc.collect()  # what was given up, while it is quiet
        if distributed.any_process(bool(reason)):
            raise _Refused(reason or "another process cannot read its arrays")
        sums = checksums(leaves)
        wrong = [name for name in flat if sums[name] != record["arrays"][name][1]]
        if wrong:
            raise _Refused(
                f"{len(wrong)} of its {len(flat)} arrays differ from what was saved, {wrong[0]} "
                "for one"
            )
        return leaves, record["position"]

    def _read_arrays(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The arrays of a step, and why they cannot be read; one of them is empty."""
        # Not through the manager: it ends with a barrier that a process which failed misses.
        reader, folder = ocp.StandardCheckpointHandler(), self._manager.directory / str(step)
        try:
            return reader.restore(folder / ARRAYS, args=ocp.args.StandardRestore(abstract)), ""
        except _NOT_DAMAGE:
            raise
        except Exception as error:  # Orbax and tensorstore raise a dozen types for bad bytes.
            told = _first_line(error)
            if "PERMISSION_DENIED" in told:
                raise PermissionError(f"{folder} cannot be read: {told}") from None
            return {}, f"its arrays cannot be read ({told})"

    def _read_record(self, step: int) -> tuple[dict[str, Any], str]:
        """What a step says of itself, and why it is refused; one of them is empty."""
        path = self._folder / str(step) / RECORD / RECORD_FILE
        try:
            record = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}, f"it has no {RECORD}/{RECORD_FILE}"
        except ValueError:
            return {}, f"{RECORD}/{RECORD_FILE} is torn"
        if not isinstance(record, dict) or "digest" not in record:
            return {}, "it has no checksums, as those of version 0.1"
        if record.pop("digest") != _digest(record):
            return {}, f"{RECORD}/{RECORD_FILE} differs from what was saved"
        if record["step"] != step:
            return {}, f"it is a copy of step {record['step']}"
        return record, ""

    def _check_fits(self, saved: dict[str, str], flat: dict[str, Any]) -> None:
        wanted = {name: _kind(leaf) for name, leaf in flat.items()}
        if saved != wanted:
            odd = sorted(k for k in saved | wanted if saved.get(k) != wanted.get(k))
            raise ValueError(
                f"the checkpoint in {self._folder} was written by another config: "
                f"{odd[0]} is {saved.get(odd[0])} on disk and {wanted.get(odd[0])} now "
                f"({len(odd)} differ); use another --config.workdir or remove the folder"
            )

    def _set_aside(self, refused: dict[int, str]) -> None:
        """Renames refused steps, since the run will come by their numbers again; tells of them."""
        if not refused:
            return
        for step, reason in refused.items():
            aside = self._folder / f"{step}.refused"
            print(f"checkpoint {self._folder / str(step)} is refused, now {aside.name}: {reason}")
            if distributed.is_main():
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / str(step)).rename(aside)
        distributed.barrier("refused checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for writes and releases the folder."""
        self._manager.close()


def _kind(leaf: Any) -> str:
    """Type and shape: `float32[2, 3]`. Orbax would convert another type silently."""
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _digest(record: dict[str, Any]) -> str:
    """Of a record as it comes back from disk, where tuples are lists and keys are text."""
    read = json.loads(json.dumps(record))
    return hashlib.blake2b(json.dumps(read, sort_keys=True).encode(), digest_size=16).hexdigest()


def _first_line(error: BaseException) -> str:
    """What is at the bottom of an error, short enough for one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]} ..."


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """For a read that may fail: the other reads that it gives up would each print a traceback."""
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = before
