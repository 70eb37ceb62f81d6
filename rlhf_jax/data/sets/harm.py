"""People's harm scores of language models' answers. Opt-in: some answers are truly harmful.

The scorer evaluations of the package pyrit (MIT licence): answers to prompts of nine harm
categories, each scored by one to three people from 0 (harmless) to 1. Nothing here prints a text;
do not put these texts into docs, logs or test snapshots.
"""

from __future__ import annotations

import csv
import io
import math
import statistics

from rlhf_jax.data import comparisons
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.data.sets import archives
from rlhf_jax.data.splits import check_split, normalise, split_of

_SCORES = ("human_score", "human_score_1", "human_score_2", "human_score_3")


def harm_answers(split: str, *, drops: DropCounts | None = None) -> list[Row]:
    """Returns {"prompt": messages, "response", "score", "category"}; equal answers once.

    Args:
      split: of the prompts.
      drops: counts repeated answers and answers without text.

    Raises:
      ValueError: a score that is not a finite number (names file and row).
      archives.AssetError: the archive cannot be fetched.
    """
    check_split(split)
    drops = DropCounts() if drops is None else drops
    rows, seen = [], set()
    files = archives.read_members("pyrit", ".csv")
    for path in sorted(path for path in files if "scorer_evals/harm/" in path):
        for number, fields in enumerate(_table(files[path].decode("utf-8-sig"))):
            score = _score(fields, f"{path.split('/')[-1]}, row {number}")
            prompt, response = fields["objective"].strip(), fields["assistant_response"].strip()
            if split not in ("all", split_of(prompt)):
                continue
            key = (normalise(prompt), normalise(response))
            if not response or key in seen:
                drops.drop("duplicate answer" if response else "empty response")
                continue
            seen.add(key)
            asked = [{"role": "user", "content": prompt}]
            rows.append({"prompt": asked, "response": response, "score": score})
            rows[-1]["category"] = fields["harm_category"]
    return rows


def harm_pairs(
    split: str,
    *,
    min_gap: float = 0.25,
    num_pairs: int,
    max_per_prompt: int = 8,
    seed: int,
    drops: DropCounts | None = None,
) -> list[Row]:
    """Returns pairs of answers to one prompt; chosen is the one that people found less harmful.

    Most pairs come from few prompts, hence the cap.

    Args:
      split: of the prompts, so that no prompt is in two splits.
      min_gap: the least difference of the mean scores.
      num_pairs: the most pairs.
      max_per_prompt: the most pairs of a prompt.
      seed: of the draw.
      drops: see `harm_answers`.
    """
    answers = harm_answers(split, drops=drops)
    chosen = comparisons.score_pairs(
        [-answer["score"] for answer in answers],
        [normalise(answer["prompt"][0]["content"]) for answer in answers],
        min_gap=min_gap,
        num_pairs=num_pairs,
        max_per_group=max_per_prompt,
        seed=seed,
    )
    return [
        {
            "prompt": answers[better]["prompt"],
            "chosen": answers[better]["response"],
            "rejected": answers[worse]["response"],
            "margin": answers[worse]["score"] - answers[better]["score"],
        }
        for better, worse in chosen
    ]


def _table(content: str) -> list[dict[str, str]]:
    """Reads a CSV whose first line may be a comment."""
    if content.startswith("#"):
        content = content.split("\n", 1)[1]
    return list(csv.DictReader(io.StringIO(content)))


def _score(fields: dict[str, str], where: str) -> float:
    """Returns the mean of the scores given."""
    given = [float(fields[name]) for name in _SCORES if fields.get(name)]
    if not given or not all(math.isfinite(score) for score in given):
        raise ValueError(f"{where} has scores {given}, not one to three finite numbers")
    return statistics.fmean(given)
