"""Experiments from a notebook: run one, watch it, read what came out, compare.

  from experiments import notebook

  result = notebook.run("ppo_max", "tiny,kl", {"ppo.clip_eps": 0.1}, root="ablations")
  result.curves["reward/mean"], result.samples[0], result.pictures["training"]

Works from any folder and in any thread. A run lies below `root`, in the folder that the command
would give it, and either goes on with what the other began. One that has finished is not run again:
its results come back at once. Other settings go to another folder, or are refused with the first
difference where `workdir` names the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import html
import importlib
import json
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import common
from experiments import command, compare, drawing, figures, paper
from experiments.display import LiveCurves, Picture, Table, titled
from experiments.reporting import RESPONSES
from rlhf_jax.evaluation.panels import draw_panels
from rlhf_jax.runtime import lock
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler
from rlhf_jax.runtime.files import read_json
from rlhf_jax.runtime.metrics import read_metrics, read_rows
from rlhf_jax.runtime.run_info import noted_as
from rlhf_jax.training.record import read_config, read_summary
from rlhf_jax.training.run import OnStep

__all__ = [
    "Comparison",
    "LiveCurves",
    "Picture",
    "Result",
    "SavedFigure",
    "Table",
    "compare_runs",
    "make_config",
    "open_figures",
    "open_run",
    "run",
]

LOG_FILE = "log.txt"
# Runs of one process take turns: they share stages before, devices and the handlers of signals.
_turn = threading.RLock()


def make_config(
    experiment: str, argument: str = "quickstart", settings: Mapping[str, Any] | None = None
) -> ConfigDict:
    """The config of an experiment, to be looked at and changed before it is run.

    Args:
      experiment: its name, such as "sft", "ppo_max" or "search".
      argument: scale, variants and assignments, as after the colon of `--config FILE:`.
      settings: key -> value, such as {"ppo.clip_eps": 0.1}.

    Raises:
      ValueError: an unknown experiment, scale, variant or key, or a value of another type.
    """
    if experiment not in compare.PANELS:
        raise ValueError(f"no experiment {experiment!r}: choose one of {', '.join(compare.PANELS)}")
    config = importlib.import_module(f"configs.{experiment}").get_config(argument)
    for key, value in (settings or {}).items():
        common.set_key(config, key, value)
    return config


def run(
    experiment: str | ConfigDict,
    argument: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
    quiet: bool = False,
) -> Result:
    """Runs an experiment with the stages before it, or opens its finished run.

    An interrupted kernel saves after the step that it is in, and the same call resumes. In a thread
    that is not the main one Python delivers no signals: there a run goes on to its end, or to what
    `on_step` raises.

    Args:
      experiment: its name, such as "sft" or "search"; or a config of `make_config`, which
        stays as it is.
      argument: scale, variants and assignments, as after the colon of `--config FILE:`; the
        quickstart where None.
      settings: key -> value, such as {"ppo.clip_eps": 0.1, "seed": 1}.
      root: folder that runs/ is in; the current one where None.
      on_step: called with each step of this run and its metrics, a dict of floats. Also with those
        that an earlier call made: whoever listens has seen every step.
      quiet: what the run prints goes to `log.txt` of the run folder.

    Raises:
      ValueError: settings that make no sense, or a folder with a run of other settings; names the
        first that differs.
      Stopped: the kernel was interrupted, and the run has saved.
    """
    if isinstance(experiment, str):
        config = make_config(experiment, argument or "quickstart", settings)
    elif argument is not None:
        raise ValueError(f"argument={argument!r} is part of a config already: give settings")
    else:
        config = experiment.copy_and_resolve_references()
        for key, value in (settings or {}).items():
            common.set_key(config, key, value)
    config.root = os.path.abspath(root if root is not None else config.root or os.curdir)
    resolved = common.resolve(config)
    folder = Path(resolved.workdir)
    prints, told = _Prints(folder / LOG_FILE if quiet else None), []

    def tell(step: int, metrics: dict[str, float]) -> None:
        told.append(step)
        if on_step is not None:
            with prints.paused():
                on_step(step, metrics)

    with _turn:
        _prepare(resolved.root)
        with prints, lock.released_after(), noted_as(shlex.join(common.command_of(config))):
            importlib.import_module(f"experiments.{resolved.experiment}").main(config, tell)
            if not told:  # it had finished already
                for row in read_rows(folder):
                    tell(*row)
        gc.collect()  # the models, before those of the next run
    return open_run(folder)


def _prepare(root: str) -> None:
    """What a command does before its first program, as far as a kernel that is running allows."""
    guard_cpu_compiler()
    if (
        not jax.config.values["jax_compilation_cache_dir"]
        or "JAX_COMPILATION_CACHE_DIR" in os.environ
    ):
        command.enable_compilation_cache(root)


class _Prints:
    """Sends what this thread prints to a file; what others print goes where it went.

    Args:
      path: the file, which is made by the first line; None leaves everything as it is.
    """

    def __init__(self, path: Path | None):
        self._path, self._thread, self._paused = path, threading.get_ident(), False
        self._before: dict[str, Any] = {}
        self._file: Any = None

    def __enter__(self) -> _Prints:
        if self._path is not None:
            for name in ("stdout", "stderr"):
                self._before[name] = getattr(sys, name)
                setattr(sys, name, _Stream(self, self._before[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, before in self._before.items():
            if isinstance(getattr(sys, name), _Stream):
                setattr(sys, name, before)
        if self._file is not None:
            self._file.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, this thread prints where it did before."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def takes(self) -> bool:
        """Whether what is printed now belongs to the run."""
        return threading.get_ident() == self._thread and not self._paused

    def write(self, text: str) -> int:
        """Appends to the file."""
        if self._file is None:
            assert self._path is not None
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", errors="replace")
        return self._file.write(text)

    def flush(self) -> None:
        """Writes what the file holds back."""
        if self._file is not None:
            self._file.flush()


class _Stream:
    """Standard output or error while a quiet run goes on; no terminal, so no progress bar."""

    def __init__(self, prints: _Prints, before: Any):
        self._prints, self._before = prints, before

    def write(self, text: str) -> int:
        return (self._prints if self._prints.takes() else self._before).write(text)

    def flush(self) -> None:
        (self._prints if self._prints.takes() else self._before).flush()

    def isatty(self) -> bool:
        return not self._prints.takes() and self._before.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._before, name)


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A finished run.

    Attributes:
      folder: of the run: model/, report.md, metrics.jsonl and the rest.
      settings: every key of its config, such as "ppo.clip_eps" -> 0.2.
      numbers: what came out, by name: win rates, reward, perplexity, accuracy, ...
      summary: summary.json: seconds, memory, win rates with their intervals, statistics of each
        policy.
      curves: "step" int64 [S], and each metric float64 [S], NaN at steps that did not log it.
      samples: a row for each held-out prompt with every policy's response and what the judges said;
        empty for a stage that writes none.
      pictures: the figures that the run has drawn, by the names of their files.
    """

    folder: Path
    settings: dict[str, Any]
    numbers: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, np.ndarray]
    samples: Table
    pictures: dict[str, Picture]

    def plot(self, *names: str) -> Picture:
        """Curves of the run; names as in `compare_runs`."""
        return compare_runs({self.folder.name: self}, names).picture

    def _repr_html_(self) -> str:
        rows = Table({"": name, "value": value} for name, value in self.numbers.items())
        return titled(
            [
                (f"{self.settings['experiment']}: {self.folder}", rows.html()),
                ("Curves", self.plot().html()),
                ("Samples", self.samples.html(5) if self.samples else ""),
            ]
        )

    def __repr__(self) -> str:
        steps = len(self.curves["step"])
        return f"Result({self.settings['experiment']}, {steps} steps, {str(self.folder)!r})"


def open_run(folder: str | os.PathLike[str]) -> Result:
    """What a finished run has left in its folder.

    Raises:
      ValueError: it is not the folder of a finished run; says what it lacks.
    """
    folder = compare.check_run(os.fspath(folder))
    responses = folder / RESPONSES
    rows = responses.read_text(encoding="utf-8").splitlines() if responses.exists() else ()
    return Result(
        folder=folder,
        settings=common.flat(read_config(folder / "config.json")["config"]),
        numbers=compare.numbers(folder),
        summary=read_summary(folder) or {},
        curves=read_metrics(folder),
        samples=Table(_sample(json.loads(row)) for row in rows),
        pictures={path.stem: Picture(path.read_bytes()) for path in sorted(folder.glob("*.png"))},
    )


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with its responses, and `policy, judge` for each score."""
    scores = {
        f"{policy}, {judge}": score
        for judge, judged in row["judged"].items()
        for policy, score in judged.items()
    }
    return {"prompt": row["prompt"], **row["responses"], **scores}


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Several runs beside one another.

    Attributes:
      picture: their curves, the seeds of a setting as a band.
      table: a row for each setting: mean [lowest, highest] over its seeds.
    """

    picture: Picture
    table: Table

    def _repr_html_(self) -> str:
        return self.picture.html() + self.table.html()


Seeds = Sequence["Result | str | os.PathLike[str]"]


def compare_runs(
    runs: Mapping[str, Result | str | os.PathLike[str] | Seeds], panels: Sequence[str] = ()
) -> Comparison:
    """Curves and numbers of finished runs of any stage.

    Args:
      runs: label -> a result or a run folder, or a list of them, one per seed.
      panels: titles of panels, or metrics as they are logged, `group/*` for each of a group; the
        panels of the runs' experiments where empty.

    Raises:
      ValueError: no finished run, a name that is no panel, or too many runs.
    """
    folders = {label: [_folder(one) for one in _seeds(given)] for label, given in runs.items()}
    chosen = compare.choose_panels(folders, panels)
    logs = {label: [read_metrics(one) for one in seeds] for label, seeds in folders.items()}
    return Comparison(Picture.of(draw_panels(logs, chosen)), Table(compare.table(folders)))


def _seeds(given: Any) -> Sequence[Any]:
    return [given] if isinstance(given, Result | str | os.PathLike) else given


def _folder(given: Result | str | os.PathLike[str]) -> Path:
    return compare.check_run(given.folder if isinstance(given, Result) else os.fspath(given))


@dataclasses.dataclass(frozen=True, repr=False)
class SavedFigure:
    """A figure of `experiments.figures`.

    Attributes:
      title: what it shows, at which scale.
      content: figure_N.json: every number drawn, commit, command, hardware and minutes.
      picture: drawn from these.
      claims: a row for each claim of the paper with its verdict.
      readings: what is read off the paper's figure, beside the same quantity here.
    """

    title: str
    content: dict[str, Any]
    picture: Picture
    claims: Table
    readings: Table

    def _repr_html_(self) -> str:
        return titled(
            [
                (self.title, self.picture.html()),
                ("Claims", self.claims.html() if self.claims else ""),
                ("Beside the paper", self.readings.html() if self.readings else ""),
            ]
        )

    def __repr__(self) -> str:
        return f"SavedFigure({html.unescape(self.title)!r})"


def open_figures(folder: str | os.PathLike[str]) -> dict[str, SavedFigure]:
    """The figures that `python -m experiments.figures` has written to a folder, by their numbers.

    Raises:
      ValueError: there is none, or a file is damaged.
    """
    files = figures.files_in(Path(folder))
    if not files:
        raise ValueError(
            f"{folder} holds no figure_N.json: `python -m experiments.figures 4` writes one to "
            "runs/figures/quickstart"
        )
    opened = {}
    for path in files:
        content = read_json(path, "draw the figure again")
        opened[content["figure"]] = SavedFigure(
            title=drawing.title_of(content),
            content=content,
            picture=Picture.of(drawing.drawn(content)),
            claims=Table(figures.claims_rows(content)),
            readings=Table(paper.beside(content)),
        )
    return opened
