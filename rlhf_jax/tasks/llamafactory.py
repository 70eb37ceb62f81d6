"""Follow instructions: the small sample sets of LLaMA-Factory, in English or Chinese.

About 1,000 instructions and 300 pairs with a model's labels (Apache-2.0), split by prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from rlhf_jax.data.convert import rows_of_kind
from rlhf_jax.data.schemas import DropCounts, Kind, Row
from rlhf_jax.data.sets import archives
from rlhf_jax.tasks.task import Task, TaskConfig


class LlamaFactory(Task):
    """`llamafactory:en` or `llamafactory:zh`."""

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        if self.where not in ("en", "zh"):
            raise ValueError(f"source={config.source!r} must be llamafactory:en or llamafactory:zh")

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields instructions with answers, pairs or prompts; see `Task.rows`."""
        name = "alpaca" if kind == "sft" else "dpo"
        content = archives.read_member("llamafactory", f"data/{name}_{self.where}_demo.json")
        return rows_of_kind(json.loads(content), kind, split, drops)
