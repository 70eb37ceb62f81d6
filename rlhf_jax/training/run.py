"""One run in one folder: its settings, its log, its checkpoints, stop and resume."""

from __future__ import annotations

import dataclasses
import io
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.evaluation.collapse import EVENT, ROLLBACK, STOP, WITNESSES, Collapse, CollapseMonitor
from rlhf_jax.runtime import distributed, lock, signals
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.host_memory import release_freed_memory
from rlhf_jax.runtime.metrics import (
    METRICS_FILE,
    MetricsWriter,
    check_finite,
    read_metrics,
    read_rows,
)
from rlhf_jax.runtime.progress import Progress, progress
from rlhf_jax.runtime.run_info import to_json
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.signals import GracefulStop
from rlhf_jax.training.checkpoint import Checkpointer
from rlhf_jax.training.record import check_settings, pin_inputs, read_config
from rlhf_jax.training.rollback import Collapsed, RolledBack, note_rollback, rollbacks


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl.

    Attributes:
      tensorboard: event files in the run folder.
      wandb: weights & Biases; needs its package and an account.
      wandb_project: project there.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "rlhf_jax"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When states are saved.

    Attributes:
      every: steps between two checkpoints; 0 saves at the end and at a stop only.
      keep: how many stay on disk; the newest of them that is whole is resumed.
    """

    every: int = 100
    keep: int = 2

    def __post_init__(self):
        check(self, every="[0, inf)", keep="[1, inf)")


# What is called with a step and its metrics.
OnStep = Callable[[int, dict[str, float]], Any]


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class Run:
    """One run in one folder: resumes where it stopped, logs, saves.

        with Run("runs/sft", total=steps, desc="SFT", show=("loss/lm",)) as run:
            state = run.restore(state, batches)
            for step in run.steps():
                state, metrics = train_step(state, next(batches))
                run.log(step, metrics)
                run.checkpoint(step, state, batches)

    Args:
      workdir: the run folder; created where missing, and locked: another process that opens a run
        there gets an error that names this one.
      total: number of steps.
      desc: title of the progress bar.
      show: metrics that the progress bar shows.
      settings: every setting of the run, as a nested mapping: written to config.json, and compared
        with that file when a run is resumed.
      inputs: digests of what the run reads, treated alike; None compares nothing.
      log: where metrics go besides metrics.jsonl.
      checkpoint: when states are saved.
      monitor: watches the metrics for a collapse of the policy; None where nothing is watched.
      on_step: called with every step and its metrics once these are there, which is while the next
        step computes; in a run that is resumed first with the steps that were logged before. What
        it raises ends the run, which then resumes from its last checkpoint.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        total: int,
        desc: str = "",
        show: tuple[str, ...] = (),
        settings: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        log: LogConfig = LogConfig(),  # frozen
        checkpoint: CheckpointConfig = CheckpointConfig(),  # frozen
        monitor: CollapseMonitor | None = None,
        on_step: OnStep | None = None,
    ):
        self.workdir = Path(workdir)
        self.total = total
        self.started_at = time.time()
        self.first_step_seconds: float | None = None
        self._settings = json.loads(json.dumps(settings or {}, default=str))
        self._inputs = inputs
        self._log, self._checkpoint = log, checkpoint
        self._desc, self._show = desc, show
        self._monitor = monitor
        self._on_step = on_step
        self._collapse: Collapse | None = None
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._shown: dict[str, float] = {}
        self._next = 0

    def __enter__(self) -> Run:
        self._locked = lock.claim(self.workdir)
        try:
            check_settings(self.workdir / "config.json", self._settings)
            if self._inputs is not None:
                pin_inputs(self.workdir / "config.json", self._inputs)
            self._checkpointer = Checkpointer(
                self.workdir / "checkpoints", keep=self._checkpoint.keep
            )
        except BaseException:
            self._unlock()
            raise
        self._stop = GracefulStop()
        self._remember(self._checkpointer.latest_step())
        self._writer: MetricsWriter | None = None
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.__exit__()
        self._checkpointer.close()
        if self._writer is not None:
            self._writer.close()
        self._unlock()
        # A signal after the last look at the flag, at the end of the last step.
        if error[0] is None and distributed.any_process(self._stop.requested):
            raise Stopped(self._stopped_at(self.total))

    def _remember(self, saved: int | None) -> None:
        """What a signal outside of the loop says."""
        name = self._desc or "the run"
        told = f"nothing of {name} is saved yet"
        if saved:
            told = f"{name} is saved at step {saved} of {self.total}"
        signals.remember(f"{told} in {self.workdir}")

    def _stopped_at(self, step: int) -> str:
        return f"stopped at step {step} of {self.total}; the same command resumes"

    def _unlock(self) -> None:
        """Lets others have the folder, unless it was claimed for longer than this `with`."""
        if self._locked:
            lock.release(self.workdir)

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
            self._remember(saved)
            for cursor, where in zip(cursors, position["cursors"], strict=True):
                cursor.restore(where)
            print(f"{self._desc}: resuming at step {self._next} of {self.total}")
            self._watch_again()
        return state

    def _watch_again(self) -> None:
        """Shows the monitor what was logged before, up to where the run resumes.

        Raises:
          Collapsed: the policy had collapsed by then, and the run was to stop.
          RolledBack: it is to go back to before the first collapse: the try is a new one.
        """
        if self._monitor is None:
            return
        read = distributed.is_main() and (self.workdir / METRICS_FILE).exists()
        log = distributed.from_main(read_metrics(self.workdir) if read else None)
        if log is not None:
            before = log["step"] < self._next
            self._monitor.see_log({name: values[before] for name, values in log.items()})
        if self._monitor.events and self._monitor.config.action in (STOP, ROLLBACK):
            self._heed(self._monitor.events[0], save=lambda: None)

    def steps(self) -> Iterator[int]:
        """Step numbers that are left; raises `Stopped` after a signal, once the state is saved."""
        with self._open_logs() as self._bar, self._stop:
            if self._on_step is not None and self._writer is not None:
                for row in read_rows(self.workdir):
                    self._on_step(*row)
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

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last, is due."""
        return (step + 1) % every == 0 or step + 1 == self.total

    def _open_logs(self) -> Progress:
        """Opens the metrics of process 0, and its progress bar."""
        if not distributed.is_main():
            return Progress(self.total, self._desc, self._next, stream=io.StringIO())
        self._writer = MetricsWriter(
            self.workdir,
            resume_step=self._next,
            tensorboard=self._log.tensorboard,
            wandb=self._log.wandb,
            wandb_project=self._log.wandb_project,
            config=self._settings,
        )
        return progress(self.total, self._desc, initial=self._next)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes a step's metrics, which are fetched while the next step computes.

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
        if self._monitor is not None:
            fetched |= self._watched(step, fetched)
        if self._writer is not None:
            self._writer.write(step, fetched)
        check_finite(fetched, step)
        self._shown |= {n.split("/")[-1]: fetched[n] for n in self._show if n in fetched}
        if self._on_step is not None:
            self._on_step(step, fetched)

    def _watched(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """What the monitor makes of a step, as metrics; remembers a collapse for `checkpoint`."""
        assert self._monitor is not None
        event = self._monitor.see(step, metrics)
        if event is not None:
            print(f"\n{self._desc}: {event.text()}", flush=True)
            if self._monitor.config.action in (STOP, ROLLBACK):
                self._collapse = event
        return {WITNESSES: self._monitor.num_witnesses, EVENT: float(event is not None)}

    def _collapsed(self, event: Collapse) -> Collapsed:
        return Collapsed(
            f"{self._desc} in {self.workdir}: {event.text()}. It was to stop; "
            "--config.collapse.action=log goes on"
        )

    def _heed(self, event: Collapse, save: Callable[[], None]) -> None:
        """Stops, or goes back to the last checkpoint before a collapse.

        Raises:
          Collapsed: the run stops here, and has saved.
          RolledBack: the same command goes on from an earlier step.
        """
        assert self._monitor is not None
        config, tried = self._monitor.config, len(rollbacks(self.workdir))
        if config.action == STOP or tried >= config.retries:
            save()
            error = self._collapsed(event)
            told = f"{tried} rollback{'s' if tried > 1 else ''} did not help"
            raise Collapsed(f"{error}; {told}") if tried else error
        step = self._checkpointer.keep_until(event.since)
        note_rollback(self.workdir, event, step)
        raise RolledBack(
            f"{self._desc}: back to step {step} of {self.total}, with 1/{2 ** (tried + 1)} of the "
            f"learning rate (try {tried + 1} of {config.retries})"
        )

    def collapses(self) -> list[str]:
        """Collapses so far, one line each; those that were rolled back come first."""
        if self._monitor is None:
            return []
        back = [
            f"{Collapse.from_dict(noted['collapse']).text()}; "
            f"went back to step {noted['resumed_at']}"
            for noted in rollbacks(self.workdir)
        ]
        return back + [event.text() for event in self._monitor.events]

    def checkpoint(self, step: int, state: Any, *cursors: Any) -> None:
        """Saves every `checkpoint.every` steps, at the end, and when a signal asks to stop.

        Raises:
          Stopped: after saving, when a signal came.
          Collapsed: after saving, when the policy has collapsed and the run was to stop.
          RolledBack: it was to go back.
        """
        done = step + 1
        every = self._checkpoint.every
        due = done == self.total or (every and done % every == 0)
        # A signal may reach one process alone, and all must save the same step.
        stop = distributed.any_process(self._stop.requested)
        if due or stop:
            self.flush()

        def save() -> None:
            position = {"cursors": [cursor.state() for cursor in cursors]}
            self._checkpointer.save(done, state, position)
            self._remember(done)

        if self._collapse is not None:
            self._heed(self._collapse, save)
        if not due and not stop:
            return
        save()
        # It may have come while the state was written. In the last step it is heeded as well: what
        # is left to do, the model and the report, takes its time.
        if stop or distributed.any_process(self._stop.requested):
            raise Stopped(self._stopped_at(done))

    @property
    def seconds(self) -> float:
        """Wall time since the run was opened."""
        return time.time() - self.started_at

    def command(self) -> str:
        """The command line of this run."""
        return read_config(self.workdir / "config.json")["command"]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, which marks the run as done; then all processes go on.

        Others may have the folder from here on.
        """
        usage = {
            "seconds": round(self.seconds, 1),
            "first_step_seconds": round(self.first_step_seconds or 0.0, 1),
            "peak_memory_gib": round(peak_memory_gib(), 2),
        }
        if distributed.is_main():
            text = json.dumps(to_json({**usage, **summary}), indent=2, allow_nan=False)
            write_whole(self.workdir / "summary.json", text + "\n")
        signals.remember(f"{self._desc or 'the run'} in {self.workdir} has finished")
        lock.release(self.workdir)
        distributed.barrier("the run is finished")


def peak_memory_gib() -> float:
    """The largest resident set of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
