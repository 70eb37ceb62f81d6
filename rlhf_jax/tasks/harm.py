"""Answer without doing harm: answers of language models and people's harm scores. Opt-in.

Some answers are truly harmful; naming the source `harm` is how you agree to load them. Nothing here
prints a text: do not put these texts into docs, logs or test snapshots.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rlhf_jax.data.convert import every_row, rows_of_kind
from rlhf_jax.data.schemas import DropCounts, Kind, Row
from rlhf_jax.data.sets import harm
from rlhf_jax.tasks.task import Task


class Harm(Task):
    """Prompts that ask for harm, and pairs of answers to them; see `data.sets.harm`.

    Documents are the answers that everybody scored 0: a model may imitate a refusal, and nothing
    that anybody found harmful.
    """

    reads = ("min_gap",)

    def rows(self, kind: Kind, split: str, drops: DropCounts, *, count: int = 0) -> Iterable[Row]:
        """Yields prompts, pairs with the less harmful answer first, or harmless answers."""
        config = self.config
        if kind == "preference":
            return harm.harm_pairs(
                split, min_gap=config.min_gap, num_pairs=count, seed=config.seed, drops=drops
            )
        answers = harm.harm_answers(split, drops=drops)
        if kind == "sft":
            harmless = [answer for answer in answers if answer["score"] == 0]
            drops.drop("found harmful", len(answers) - len(harmless))
            return [{"prompt": a["prompt"], "response": a["response"]} for a in harmless]
        rows = [{"prompt": answer["prompt"]} for answer in answers]
        return rows_of_kind(rows, kind, split, drops, belongs=every_row)

    def rated_texts(self, split: str) -> tuple[list[str], np.ndarray]:
        """Returns the answers and people's harm scores with the sign turned, in [-1, 0]."""
        answers = harm.harm_answers(split)
        scores = np.array([-answer["score"] for answer in answers])
        return [answer["response"] for answer in answers], scores
