"""Going back before a collapse: an earlier checkpoint, a lower learning rate, and a note of it.

What was rolled back stands in `collapse.json` of the run folder, so that a run that is killed and
resumed goes on with the learning rate that it had.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_jax.evaluation.collapse import Collapse
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.errors import UserError
from rlhf_jax.runtime.files import read_json, write_whole
from rlhf_jax.runtime.run_info import to_json

FILE = "collapse.json"


class Collapsed(UserError):
    """The policy collapsed and the run was to stop."""


class RolledBack(Exception):
    """The run has to go on from an earlier checkpoint."""


def rollbacks(workdir: str | Path) -> list[dict[str, Any]]:
    """The collapses that a run went back from, in order; the same in all processes.

    Raises:
      ValueError: the file is damaged.
    """
    path = Path(workdir) / FILE
    found = None
    if distributed.is_main() and path.exists():
        found = read_json(path, "remove the run folder to begin anew")["rollbacks"]
    return distributed.from_main(found) or []


def note_rollback(workdir: str | Path, event: Collapse, step: int) -> None:
    """Adds a collapse to the file, and the step from which the run goes on."""
    noted = [*rollbacks(workdir), {"resumed_at": step, "collapse": event.as_dict()}]
    if distributed.is_main():
        text = json.dumps(to_json({"rollbacks": noted}), indent=2, allow_nan=False)
        write_whole(Path(workdir) / FILE, text + "\n")
    distributed.barrier("the rollback is noted")


def retried(main: Callable[..., Any]) -> Callable[..., Any]:
    """An experiment that runs again, and so resumes, each time that it was rolled back."""

    @functools.wraps(main)
    def run(*arguments: Any) -> Any:
        while True:
            try:
                return main(*arguments)
            except RolledBack as event:
                print(event)
            gc.collect()  # the models of the try before

    return run
