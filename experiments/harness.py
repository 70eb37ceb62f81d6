"""What every experiment does around its loop: command line, run folder, logging, stop, resume."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import run_folder
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.host_memory import release_freed_memory, reuse_freed_memory
from rlhf_jax.runtime.metrics import MetricsWriter, NonFiniteError, check_finite
from rlhf_jax.runtime.progress import Progress, progress
from rlhf_jax.training.checkpoint import Checkpointer, GracefulStop

# transformers advises to install PyTorch at import; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Without a network each retry is told in two lines; the error at the end says all of it.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")

# Wrong input: these end with one line. Everything else is a defect and shows its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, NonFiniteError, ImportError, RuntimeError)
CACHE_FOLDER = os.environ.get("JAX_COMPILATION_CACHE_DIR", "runs/.compilation_cache")


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


def cli(main: Callable[[ConfigDict], Any], default: str) -> None:
    """Runs `main(config)` with the flag `--config FILE[:VARIANTS]` and `--config.key=value`.

    With `--distributed` this is one of several processes: only process 0 prints and writes.
    """
    config = config_flags.DEFINE_config_file("config", default)
    debug = flags.DEFINE_bool("debug", False, "show the traceback of errors in the input")
    several = flags.DEFINE_bool("distributed", False, "join the other processes of this job")

    def run(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}: settings start with --config.")
        reuse_freed_memory()
        enable_compilation_cache()
        # Orbax tells of every file that it writes.
        logging.set_verbosity(logging.DEBUG if debug.value else logging.WARNING)
        if not isinstance(config.value, ConfigDict):  # a stand-in that fails when it is used
            sys.exit(f"error: no config file {flags.FLAGS['config'].config_filename!r}")
        try:
            if several.value:
                distributed.initialize()
            main(config.value)
        except Stopped as stopped:
            print(stopped)
            sys.exit(130)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
            sys.exit(130)
        except USER_ERRORS as error:
            if several.value and jax.distributed.is_initialized():
                distributed.leave(error)
            if debug.value:
                raise
            sys.exit(f"error: {str(error).strip() or type(error).__name__}")

    app.run(run, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    """Like absl's parser, with every error of the command line or the config file on one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        if "--debug" in argv:
            raise
        sys.exit(f"error: {_one_line(error, argv)}")


def _one_line(error: Exception, argv: list[str]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError | AttributeError):
        # ml_collections names the last part of the key only.
        name = lines[0].strip("\"'") if lines else ""
        given = [part for part in argv if part.startswith("--config.") and name in part]
        return f"unknown config key {(given or [name])[0]!r}"
    # An error inside the config file arrives with its traceback: its last line is the message.
    return lines[-1].removeprefix("ValueError: ")


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, small ones too."""
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(CACHE_FOLDER))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


class Run:
    """One run in one folder: resumes where it stopped, logs, saves.

        with Run(config, total=steps, desc="SFT", show=("loss/lm",)) as run:
            state = run.restore(state, batches)
            for step in run.steps():
                state, metrics = train_step(state, next(batches))
                run.log(step, metrics)
                run.checkpoint(step, state, batches)

    Args:
      config: Needs `workdir`, `log`, `checkpoint`.
      total: Number of steps.
      desc: Title of the progress bar.
      show: Metrics that the progress bar shows.
    """

    def __init__(self, config: ConfigDict, *, total: int, desc: str, show: tuple[str, ...]):
        self.workdir = Path(config.workdir)
        self.total = total
        self.started_at = time.time()
        self.first_step_seconds: float | None = None
        self._config = config
        self._desc, self._show = desc, show
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._shown: dict[str, float] = {}
        self._next = 0

    def __enter__(self) -> Run:
        self.workdir.mkdir(parents=True, exist_ok=True)
        run_folder.check_settings(self.workdir / "config.json", self._config)
        self._checkpointer = Checkpointer(
            self.workdir / "checkpoints", keep=self._config.checkpoint.keep
        )
        self._stop = GracefulStop()
        self._stop.__enter__()
        self._writer: MetricsWriter | None = None
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.__exit__(*error)
        self._checkpointer.close()
        if self._writer is not None:
            self._writer.close()

    def restore(self, state: Any, *cursors: Any) -> Any:
        """The newest saved state, with the cursors (objects with `restore`) moved there.

        Where there is one, the arrays of `state` are freed first: a device has no room for both.
        """
        if self._checkpointer.latest_step() is not None:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
            )
            jax.tree.map(lambda x: x.delete(), state)
            saved, state, position = self._checkpointer.restore(like)
            self._next = saved
            for cursor, where in zip(cursors, position["cursors"], strict=True):
                cursor.restore(where)
            print(f"{self._desc}: resuming at step {self._next} of {self.total}")
        return state

    def steps(self) -> Iterator[int]:
        """Step numbers that are left; raises `Stopped` after a signal, once the state is saved."""
        with self._open_logs() as self._bar:
            begun = time.time()
            for step in range(self._next, self.total):
                yield step
                if self.first_step_seconds is None:
                    self.flush()  # waits for the step, so compilation is in the time
                    self.first_step_seconds = time.time() - begun
                self._bar.set_postfix(self._shown)
                self._bar.update(1)
                release_freed_memory()
            self.flush()

    def _open_logs(self) -> Progress:
        """Opens the metrics of process 0, and its progress bar."""
        if not distributed.is_main():
            return Progress(self.total, self._desc, self._next, stream=io.StringIO())
        log = self._config.log
        self._writer = MetricsWriter(
            self.workdir,
            resume_step=self._next,
            tensorboard=log.tensorboard,
            wandb=log.wandb,
            wandb_project=log.wandb_project,
            config=self._config.to_dict(),
        )
        return progress(self.total, self._desc, initial=self._next)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hands in a step's metrics; they are fetched while the next step computes.

        Raises:
          NonFiniteError: the previous step's metrics were not finite.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Writes what `log` holds back."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        fetched = {name: float(value) for name, value in metrics.items()}
        if self._writer is not None:
            self._writer.write(step, fetched)
        check_finite(fetched, step)
        self._shown |= {n.split("/")[-1]: fetched[n] for n in self._show if n in fetched}

    def checkpoint(self, step: int, state: Any, *cursors: Any) -> None:
        """Saves every `checkpoint.every` steps, at the end, and when a signal asks to stop.

        Raises:
          Stopped: after saving, when a signal came.
        """
        done = step + 1
        every = self._config.checkpoint.every
        due = done == self.total or (every and done % every == 0)
        # A signal may reach one process alone, and all must save the same step.
        stop = distributed.any_process(self._stop.requested)
        if not due and not stop:
            return
        self.flush()
        position = {"cursors": [cursor.state() for cursor in cursors]}
        self._checkpointer.save(done, state, position)
        if stop and done < self.total:
            raise Stopped(f"stopped at step {done} of {self.total}; the same command resumes")

    @property
    def seconds(self) -> float:
        """Wall time since the run was opened."""
        return time.time() - self.started_at

    def command(self) -> str:
        """The command that makes this run."""
        return json.loads((self.workdir / "config.json").read_text())["command"]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, which marks the run as done; then all processes go on."""
        usage = {
            "seconds": round(self.seconds, 1),
            "first_step_seconds": round(self.first_step_seconds or 0.0, 1),
            "peak_memory_gib": round(peak_memory_gib(), 2),
        }
        if distributed.is_main():
            text = json.dumps({**usage, **summary}, indent=2)
            (self.workdir / "summary.json").write_text(text + "\n")
        distributed.barrier("the run is finished")


def peak_memory_gib() -> float:
    """The largest resident set of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_summary(workdir: str | Path) -> dict[str, Any] | None:
    """What a finished run wrote, None when it has not finished."""
    path = Path(workdir) / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def divide(name: str, whole: int, part: int) -> int:
    """How many parts make the whole.

    Raises:
      ValueError: there would be a rest.
    """
    if part < 1 or whole < 1:
        raise ValueError(f"{name}={whole} and what divides it ({part}) must be at least 1")
    if whole % part:
        raise ValueError(f"{name}={whole} must be divisible by {part}")
    return whole // part


def positive(name: str, value: int) -> None:
    """Refuses a setting below 1.

    Raises:
      ValueError: names it.
    """
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def count_parameters(model: Any) -> int:
    """Numbers in all leaves of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def banner(title: str, numbers: Mapping[str, Any]) -> None:
    """Prints every derived number once, before a run starts."""
    print(f"\n{title}")
    width = max(len(name) for name in numbers)
    for name, value in numbers.items():
        print(f"  {name:<{width}}  {value}")
