"""Saving and resuming a run with Orbax: arrays as one tree, everything else as JSON."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


class Checkpointer:
    """Keeps the newest states of a run in `folder`, each step whole or not at all.

    Args:
      folder: created when missing.
      keep: how many steps stay on disk.
    """

    def __init__(self, folder: str | Path, *, keep: int = 1):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        # Named handlers: without them a new process cannot read the shapes of what is on disk.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(), options=options, item_handlers=handlers
        )

    def latest_step(self) -> int | None:
        """The newest step on disk, None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Writes arrays `state` and the JSON-able `position` (data cursors, counters)."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flatten(state)), position=ocp.args.JsonSave(position)
            ),
            force=True,
        )
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]]:
        """Reads the newest step.

        Args:
          like: a state with the shapes, types and shardings to restore to.

        Returns:
          Step, state, position.

        Raises:
          FileNotFoundError: nothing was saved.
          ValueError: the saved tree does not fit, for instance after a change of the config.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
        flat = _flatten(like)
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in flat.items()
        }
        self._check_fits(step, flat)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
            ),
        )
        leaves = [restored["state"][name] for name in flat]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return step, state, restored["position"]

    def _check_fits(self, step: int, flat: dict[str, Any]) -> None:
        saved = self._manager.item_metadata(step)["state"]
        saved = {name: _kind(leaf) for name, leaf in saved.items()}
        wanted = {name: _kind(leaf) for name, leaf in flat.items()}
        if saved != wanted:
            odd = sorted(k for k in saved | wanted if saved.get(k) != wanted.get(k))
            raise ValueError(
                f"the checkpoint in {self._manager.directory} was written by another config: "
                f"{odd[0]} is {saved.get(odd[0])} on disk and {wanted.get(odd[0])} now "
                f"({len(odd)} differ); use another --config.workdir or remove the folder"
            )

    def close(self) -> None:
        """Waits for writes and releases the folder."""
        self._manager.close()


def _kind(leaf: Any) -> str:
    """Type and shape: `float32[2, 3]`. Orbax would convert another type silently."""
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


class GracefulStop:
    """Turns the first SIGINT or SIGTERM into a flag; the second one stops at once.

    Use as a context manager around a training loop that looks at `requested` once per step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Callable | int | None] = {}

    def __enter__(self) -> GracefulStop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once")
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
