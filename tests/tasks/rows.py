"""Rows of a source as its task yields them, before they are encoded."""

import itertools

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.tasks import TaskConfig, make_task


def load_rows(kind, source, split, *, limit=0, drops=None, **settings):
    """Returns the rows in a list; `limit` is the most rows, 0 is all of them."""
    task = make_task(TaskConfig(source, **settings))
    rows = task.rows(kind, split, DropCounts() if drops is None else drops, count=limit)
    return list(itertools.islice(rows, limit or None))
