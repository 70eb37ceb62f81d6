"""Metrics of a run: one JSON line per step, mirrored to TensorBoard and, on request, to W&B.

Names are `group/name` (`policy/approx_kl`, `reward/mean`, `loss/value`); metrics of held-out data
carry the prefix `eval/`. JSON has no NaN or infinity, so these are written as the strings "NaN",
"Infinity" and "-Infinity"; `read_metrics` turns them back into floats.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rlhf_jax.runtime.errors import MissingPackageError
from rlhf_jax.runtime.files import naming, write_whole

METRICS_FILE = "metrics.jsonl"
_logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A metric is NaN or infinite: the run stops and keeps its last good checkpoint."""


def check_finite(metrics: Mapping[str, Any], step: int) -> None:
    """Raises `NonFiniteError` that names every NaN or infinite metric, its value and the step."""
    values = {name: as_float(name, value) for name, value in metrics.items()}
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"{', '.join(bad)} at step {step}: metrics must be finite. Lower the learning rate or "
            "look at the data of this step; the last good checkpoint is kept."
        )


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl` and mirrors them; a context manager.

    A line reads `{"step": 3, "time": 1700000000.0, "policy/approx_kl": 0.002}` and is flushed at
    once. A run that was killed may have logged steps beyond its checkpoint: on opening, lines
    with `step >= resume_step` are dropped, and so is a last line that was cut short, so the file
    of a resumed run equals that of an uninterrupted one except for `time`.

    Args:
      workdir: folder of the run; created where missing.
      resume_step: the first step that this run will write; 0 starts the log afresh.
      tensorboard: also write event files to `workdir/tensorboard`.
      wandb: also log to Weights & Biases; needs `pip install 'rlhf_jax[wandb]'`.
      wandb_project: the W&B project.
      config: the run's configuration, shown by W&B.

    Raises:
      MissingPackageError: a mirror was asked for and its package is missing.
      ValueError: the existing file holds a line that is not a metrics line.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int = 0,
        tensorboard: bool = True,
        wandb: bool = False,
        wandb_project: str = "rlhf_jax",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(workdir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mirrors: list[_TensorBoard | _Wandb] = []
        # Mirrors first: a missing package must be reported before the old log is trimmed.
        if tensorboard:
            self._mirrors.append(_TensorBoard(self.path.parent, resume_step))
        if wandb:
            self._mirrors.append(_Wandb(self.path.parent, wandb_project, config))
        _trim(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs scalars (numbers, or NumPy or JAX arrays of one element) under a step.

        Raises:
          ValueError: a value is not a scalar, or a metric is called "step" or "time".
          OSError: a file cannot be written; names it.
        """
        reserved = {"step", "time"} & metrics.keys()
        if reserved:
            raise ValueError(f"metric names must not be 'step' or 'time', got {sorted(reserved)}")
        scalars = {name: as_float(name, value) for name, value in metrics.items()}
        numbers = {name: finite_or_name(value) for name, value in scalars.items()}
        line = {"step": int(step), "time": round(time.time(), 3), **numbers}
        with naming(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        for mirror in self._mirrors:
            mirror.write(int(step), scalars)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for mirror in self._mirrors:
                stack.callback(mirror.close)
            with naming(self.path):  # it writes what an earlier write could not
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads `metrics.jsonl` (or the run folder that holds it) into columns.

    Returns:
      `"step"`: int64 [S], the distinct steps in ascending order; `"time"` and every metric:
      float64 [S], NaN at steps that did not log it. Lines of one step are merged; where two give
      the same metric, the later line counts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not a metrics line (a last line that was cut short is skipped).
    """
    rows = _by_step(path)
    steps = sorted(rows)
    names = dict.fromkeys(name for step in steps for name in rows[step] if name != "step")
    columns: dict[str, np.ndarray] = {"step": np.array(steps, dtype=np.int64)}
    for name in names:
        values = [float(rows[step].get(name, math.nan)) for step in steps]
        columns[name] = np.array(values, dtype=np.float64)
    return columns


def read_rows(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, float]]]:
    """Reads the same file step by step: each with what it logged, `time` left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not a metrics line (a last line that was cut short is skipped).
    """
    aside = ("step", "time")
    return [
        (step, {name: float(value) for name, value in row.items() if name not in aside})
        for step, row in sorted(_by_step(path).items())
    ]


def _by_step(path: str | os.PathLike[str]) -> dict[int, dict[str, Any]]:
    """Step -> its lines, merged."""
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    rows: dict[int, dict[str, Any]] = {}
    for _, row in _parse_lines(path):
        rows.setdefault(row["step"], {}).update(row)
    return rows


def logged(log: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The finite values of a metric, in order.

    Args:
      log: as `read_metrics` gives it: NaN where a step logged none.
      name: of the metric.

    Returns:
      float64 [n], empty where it was never logged.
    """
    values = np.asarray(log.get(name, ()), np.float64)
    return values[np.isfinite(values)]


class _TensorBoard:
    """Mirror to TensorBoard event files; steps from `resume_step` on are hidden as outdated.

    NaN and infinity are left out, the JSON has them. Events are written here and not by the
    `SummaryWriter`: its thread dies of a full disk, and the run would then wait for it for ever.
    """

    _FLUSH_SECONDS = 120.0

    def __init__(self, workdir: Path, resume_step: int) -> None:
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError as error:
            raise MissingPackageError(
                "tensorboard=True needs tensorboardX: pip install tensorboardX"
            ) from error
        self._folder, self._event = workdir / "tensorboard", Event
        self._scalar = summary.scalar
        resumed = self._folder.exists()
        with naming(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._events = event_file_writer.EventsWriter(str(self._folder / "events"))
            if resumed:
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=resume_step, session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        with naming(self._folder):
            for name, value in scalars.items():
                if math.isfinite(value):
                    summary = self._scalar(name, value)
                    event = self._event(step=step, wall_time=time.time(), summary=summary)
                    self._events.write_event(event)
            if time.monotonic() - self._flushed > self._FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with naming(self._folder):
            self._events.close()


class _Wandb:
    """Mirror to Weights & Biases; the run's id is kept in the folder, so a resume continues it."""

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any] | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingPackageError(
                "wandb=True needs wandb: pip install 'rlhf_jax[wandb]'"
            ) from error
        id_file = workdir / "wandb_id.txt"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            dir=str(workdir),
            config=dict(config or {}),
            id=run_id,
            resume="allow",
        )
        write_whole(id_file, f"{self._run.id}\n")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def as_float(name: str, value: Any) -> float:
    """A metric's value as a float; ValueError where it is no scalar."""
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name!r} must be a scalar, got an array of shape {array.shape}")
    return float(array.reshape(()))


def finite_or_name(value: float) -> float | str:
    """A finite number as it is, else "NaN", "Infinity" or "-Infinity", which `float` reads back."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parse_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a log with their contents; a last line without newline may be cut short."""
    parsed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(True), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            parsed.append((line.rstrip("\n") + "\n", row))
        elif line.endswith("\n"):
            raise ValueError(f"{path}:{number} is not a metrics line: {line.strip()[:80]!r}")
    return parsed


def _trim(path: Path, resume_step: int) -> None:
    if not path.exists():
        return
    lines = _parse_lines(path)
    kept = [line for line, row in lines if row["step"] < resume_step]
    if len(kept) < len(lines):
        _logger.info(
            "%s: %d lines from step %d on dropped", path, len(lines) - len(kept), resume_step
        )
    write_whole(path, "".join(kept))
