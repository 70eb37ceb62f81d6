"""Run folders of experiments: which are whole, which run has finished, whose turn it is."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from pathlib import Path

from experiments.settings import Shared
from rlhf_jax.models.files import hf_files
from rlhf_jax.runtime import distributed, lock
from rlhf_jax.runtime.files import make_folder
from rlhf_jax.training.record import check_settings, pinned_inputs, read_summary

# What a run saves: the model, and beside it the adapters that it trained.
MODEL, ADAPTERS = "model", "adapters"
# The folder of labelled pairs, and the file in it that is written first.
LABELS, FIRST_LABELS = "labels", "train.jsonl"
# Between two looks at a folder that another process works in.
WAIT_SECONDS = 2.0


def is_run(folder: str) -> bool:
    """Whether a model folder lies in the folder of a run, finished or not."""
    return (Path(folder).parent / "config.json").exists()


def is_whole(folder: str) -> bool:
    """Whether a model folder, or one of labels, is there; in a run's once its summary is written.

    A run that is killed while it saves leaves a model without its adapters or its report.
    """
    there = any((Path(folder) / name).exists() for name in ("config.json", FIRST_LABELS))
    return there and (not is_run(folder) or read_summary(Path(folder).parent) is not None)


def date(workdir: str) -> str:
    """The day that chat templates write in a run: that of its first start, as in 2026-01-31."""
    pinned = {}
    if distributed.is_main():
        pinned = pinned_inputs(Path(workdir) / "config.json")
    return distributed.from_main(pinned.get("date", "") or datetime.date.today().isoformat())


def claim(settings: Shared, title: str) -> bool:
    """Makes the run folder this process's, until its run has finished; False where it has already.

    Raises:
      ValueError: it holds a run of other settings, names the first that differs; or a model/ with
        files that no saved model has.
      FolderInUse: another process works in it.
      OSError: it cannot be written to, or a file is in the way of it or of a folder within.
    """
    if not _is_finished(settings, title):
        lock.claim(settings.workdir)
        # Whoever held it may have finished since.
        if not _is_finished(settings, title):
            try:
                _check_places(Path(settings.workdir))
            except BaseException:
                lock.release(settings.workdir)
                raise
            return True
        lock.release(settings.workdir)
    return False


def _check_places(workdir: Path) -> None:
    """Checks that what a run writes, some of it at its end, can be written."""
    if distributed.is_main():
        for name in ("checkpoints", "tensorboard", MODEL, ADAPTERS):
            if os.path.lexists(workdir / name):
                make_folder(workdir / name)
        hf_files.AtomicFolder(workdir / MODEL).check()
    distributed.barrier("the run folder can be written to")


def _is_finished(settings: Shared, title: str) -> bool:
    """Whether the run folder holds a finished run, and says so; its settings are compared."""
    config = Path(settings.workdir) / "config.json"
    finished, begun = distributed.from_main(
        (read_summary(settings.workdir) is not None, config.exists())
    )
    if begun or finished:
        check_settings(config, dataclasses.asdict(settings))
    if finished:
        workdir = settings.workdir
        print(f"{title}: {workdir} has finished already (remove the folder to run it again)")
    return finished


def wait_for_others(workdir: Path) -> None:
    """Waits while another process works in a run folder, and says so once."""
    told = False
    while holder := distributed.from_main(lock.holder(workdir)):
        if not told:
            print(f"{workdir} is being made by {holder}: waiting for it", flush=True)
        told = True
        time.sleep(WAIT_SECONDS)
