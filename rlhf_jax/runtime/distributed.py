"""Several processes that train one model: joining, agreeing, and bringing arrays to the host.

Every process runs the same program on its own devices; the partitioner makes one computation of
it. With one process everything here is the identity.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# Seconds of silence after which a process counts as lost, and the others end.
HEARTBEAT_SECONDS = 30


def initialize() -> None:
    """Joins the processes of a cluster; call it before anything else touches jax.

    Processes other than process 0 print only errors from here on.

    Slurm, Open MPI, Kubernetes (with the package `kubernetes`) and Cloud TPU are detected by
    `jax.distributed.initialize`. Elsewhere set three variables for each process:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ValueError: neither a known cluster nor these variables; says so in one line.
    """
    settings: dict[str, Any] = {}
    for key, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        if variable in os.environ:
            settings[key] = int(os.environ[variable])
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            **settings,
        )
    except ValueError as error:
        raise ValueError(
            "--distributed found no cluster: start it with srun, mpirun or in a JobSet, or set "
            f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID ({error})"
        ) from None
    if not is_main():
        sys.stdout = io.StringIO()


def leave(error: Exception) -> NoReturn:
    """Ends this process at once: a clean exit would wait for processes that may be gone."""
    reason = str(error).strip() or type(error).__name__
    print(
        f"error in process {jax.process_index()} of {jax.process_count()}: {reason}\n"
        "if another process has died, this error only follows from that: start all of them again, "
        "the same command resumes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def require_one(stage: str) -> None:
    """For a stage that does not divide its work among processes.

    Raises:
      ValueError: this is one of several.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"{stage} runs as one process, on all of its devices: leave --distributed out"
        )


def is_main() -> bool:
    """Whether this process writes metrics, reports and models: process 0."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; the same answer everywhere."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_main(value: T) -> T:
    """What process 0 says: anything that JSON can hold. Collective."""
    if jax.process_count() == 1:
        return value
    said = json.dumps(value).encode() if is_main() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(said), np.int32)))
    # Few sizes, so few programs.
    block = np.zeros(-(-size // 4096) * 4096, np.uint8)
    block[: len(said)] = np.frombuffer(said, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(block).tobytes()[:size])


def fetch(tree: Any) -> Any:
    """NumPy copies of whole arrays, in every process. Collective: all processes must call it."""
    return jax.tree.map(_fetch_leaf, tree)


def gathered_on_main(tree: Any) -> Any:
    """The tree with whole arrays in the host memory of process 0, to be saved; None elsewhere.

    Collective. Leaf by leaf, so that a device holds no more than one whole leaf on top.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    whole = []
    for leaf in leaves:
        value = _fetch_leaf(leaf)
        if is_main():
            whole.append(jax.device_put(value, jax.local_devices(backend="cpu")[0]))
    return jax.tree.unflatten(structure, whole) if is_main() else None


def _fetch_leaf(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return jax.device_get(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return multihost_utils.process_allgather(leaf, tiled=True)
