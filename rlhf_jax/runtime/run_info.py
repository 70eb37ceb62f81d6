"""What a run ran on: versions, devices and the git commit; and how values are written as JSON."""

from __future__ import annotations

import contextlib
import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import rlhf_jax
from rlhf_jax.runtime.metrics import finite_or_name

# What is noted as the command of a run, where it is not that of the process.
_command: ContextVar[str] = ContextVar("command", default="")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")


def run_info(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gathers what is needed to run a configuration again.

    Args:
      config: the run's configuration (a plain or nested mapping).

    Returns:
      {"time", "command", "platform", "versions": {name: version or None}, "devices": {"kind",
      "platform", "count", "processes"}, "processor", "git": {"commit", "dirty"}, "config"}. The git
      entries are None where this package's source is not tracked by git, as after `pip install`.
    """
    import jax

    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    versions["rlhf_jax"] = rlhf_jax.__version__
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command.get() or shlex.join(["python", *sys.orig_argv[1:]]),
        "platform": platform.platform(),
        "versions": versions,
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "processor": processor(),
        "git": git_state(Path(__file__).resolve()),
        "config": to_json(config),
    }


@contextlib.contextmanager
def noted_as(command: str) -> Iterator[None]:
    """Runs that begin within note this command; for those that no command line has started."""
    token = _command.set(command)
    try:
        yield
    finally:
        _command.reset(token)


def processor() -> str:
    """The processor's name, as it gives it itself: last bits differ between processors."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_state(tracked_file: Path) -> dict[str, str | bool | None]:
    """Commit of the checkout that tracks a file, and whether tracked files have changed in it.

    A file that merely lies inside somebody's checkout (a virtual environment in a project folder)
    is not tracked, so it gives {"commit": None, "dirty": None}.
    """
    folder = tracked_file.parent
    if _git(folder, "ls-files", "--error-unmatch", str(tracked_file)) is None:
        return {"commit": None, "dirty": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": changes != ""}


def to_json(value: Any) -> Any:
    """Copies nested mappings, sequences and arrays into JSON types; the rest becomes its `str`."""
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return finite_or_name(value)
    return str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None when it fails or there is no git."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
