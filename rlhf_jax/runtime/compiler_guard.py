"""Keeps XLA's CPU compiler from fusing products with the operations around them.

Since jax 0.10.2 the CPU compiler hands groups of operations to a library, YNNPACK, where it handed
over single products before. Some groups come back as wrong numbers, without an error.
`jnp.sum((x @ jnp.full_like(x, 0.37)) * x, -1)` of `[5, 60, 60]` does in every version up to
0.12.0.1: any number comes out, up to 1e38 and NaN. `jnp.sum((matrix @ row) ** 2)` mapped over
32,769 rows of three has the last row wrong in 0.10.2 (jax issue 39103, fixed in 0.11).

With `FLAG` the library gets single products only, and both are right in all these versions.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import warnings
from pathlib import Path

import jax
from jax._src import xla_bridge  # nothing public says whether a backend has started

NAME = "xla_cpu_experimental_ynn_fusion_type"
FLAG = f"--{NAME}=individual_dot"


def guard_cpu_compiler() -> bool:
    """Adds `FLAG` to XLA_FLAGS, where a CPU may compute and the user has not set this flag.

    XLA reads the variable once, when the first backend starts, so call it before any use of a
    device; importing jax is not one. Later it can only warn. A second call does nothing.

    Returns:
      Whether the flag was added.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    names_a_file = bool(flags) and not flags.startswith("-")
    given = _read(flags) if names_a_file else flags
    if NAME in given or not _may_use_cpu() or not _is_known(NAME):
        return False
    # XLA has read its flags once a backend has started.
    if xla_bridge.backends_are_initialized():
        _warn("jax had started before XLA_FLAGS could be set")
        return False
    if names_a_file:
        _warn(f"XLA_FLAGS names the file {flags}, which is left unchanged")
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
    return True


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}: compiled programs may compute wrong numbers on the CPU; set "
        f"XLA_FLAGS={FLAG} before Python starts",
        RuntimeWarning,
        stacklevel=3,
    )


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def _may_use_cpu() -> bool:
    """Whether a CPU is among the platforms; jax starts it beside others by default."""
    platforms = jax.config.values["jax_platforms"]
    return not platforms or "cpu" in platforms.split(",")


def _is_known(name: str) -> bool:
    """Whether jaxlib has a flag of this name; XLA ends the process over one that it does not know.

    Looks for the name in the library itself, which takes 30 ms: right in versions to come too.
    """
    spec = importlib.util.find_spec("jaxlib")
    folders = (spec and spec.submodule_search_locations) or ()
    libraries = [
        path
        for folder in folders
        for path in Path(folder).iterdir()
        if path.suffix in (".so", ".dylib", ".pyd", ".dll") and path.stat().st_size
    ]
    return any(_holds(path, b"\0" + name.encode() + b"\0") for path in libraries)


def _holds(path: Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0
