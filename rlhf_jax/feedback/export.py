"""From people's judgements to the rows that the methods read.

  pairs      {"prompt", "chosen", "rejected"}, of scores with "margin"
  scores     {"prompt", "responses", "scores"}
  rankings   {"prompt", "responses", "ranking"}, a row for each answer
  solutions  {"prompt", "steps", "labels", "right"}

The reward model and DPO read pairs as `jsonl:FILE`, process reward models read solutions as
`solutions:FILE`.

Where several annotators judged an item, scores are averaged, and for pairs and steps the majority
counts; where it is split evenly nothing does, and that is counted.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.comparisons import score_pairs
from rlhf_jax.data.convert import first_text
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.data.solutions import Solution, write_solutions
from rlhf_jax.data.splits import SPLITS, split_of
from rlhf_jax.feedback.answers import RANKING, SCORE, STEPS, outcome
from rlhf_jax.feedback.judgements import Judgements
from rlhf_jax.runtime.files import make_folder, put, write_whole

PAIRS, SCORES, RANKINGS, SOLUTIONS = "pairs", "scores", "rankings", "solutions"
DATASETS = "datasets"
NOT_JUDGED, TIED, SPLIT = "not judged", "tie", "annotators split evenly"


def tables(judgements: Judgements, drops: DropCounts, *, min_gap: float = 1.0) -> dict[str, Any]:
    """Rows by the name of their file.

    Args:
      judgements: of one mode.
      drops: counts pairs that were kept (items, in mode `steps`) and those that were not, by
        reason.
      min_gap: least difference of two mean scores that makes a pair.

    Returns:
      "pairs" and, by mode, "scores", "rankings" or "solutions" -> rows.

    Raises:
      ValueError: `min_gap` is not positive.
    """
    if judgements.mode == SCORE:
        scores = _scores(judgements, drops)
        return {PAIRS: _pairs_of_scores(scores, drops, min_gap), SCORES: scores}
    if judgements.mode == STEPS:
        return {SOLUTIONS: _solutions(judgements, drops)}
    made = {PAIRS: _pairs(judgements, drops)}
    return made | ({RANKINGS: _rankings(judgements)} if judgements.mode == RANKING else {})


def _pairs(judgements: Judgements, drops: DropCounts) -> list[Row]:
    rows = []
    for item in judgements.items.values():
        answers = judgements.answers(item.id).values()
        for one, other in itertools.combinations(range(len(item.texts)), 2):
            said = [outcome(item.mode, answer, one, other) for answer in answers]
            votes = [vote for vote in said if vote is not None]
            total = sum(votes)
            if total:
                better, worse = (one, other) if total > 0 else (other, one)
                rows.append(_pair(item.prompt, item.texts[better], item.texts[worse]))
                drops.keep()
            else:
                drops.drop(NOT_JUDGED if not votes else SPLIT if any(votes) else TIED)
    return rows


def _pair(prompt: Any, chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _scores(judgements: Judgements, drops: DropCounts) -> list[Row]:
    """A row a prompt, with the mean score of each response that was judged."""
    found: dict[str, Row] = {}
    for item in judgements.items.values():
        answers = list(judgements.answers(item.id).values())
        if not answers:
            drops.drop(NOT_JUDGED)
            continue
        key = json.dumps(item.prompt, sort_keys=True)
        row = found.setdefault(key, {"prompt": item.prompt, "responses": [], "scores": []})
        row["responses"].append(item.texts[0])
        row["scores"].append(float(np.mean(np.asarray(answers, np.float64))))
    return list(found.values())


def _pairs_of_scores(rows: Sequence[Row], drops: DropCounts, min_gap: float) -> list[Row]:
    flat = [(n, i) for n, row in enumerate(rows) for i in range(len(row["responses"]))]
    scores = [rows[n]["scores"][i] for n, i in flat]
    groups = [str(n) for n, _ in flat]
    every = sum(len(row["scores"]) * (len(row["scores"]) - 1) // 2 for row in rows)
    found = score_pairs(scores, groups, min_gap=min_gap, num_pairs=every, seed=0)
    made = []
    for better, worse in sorted(found.tolist()):
        (n, i), (_, j) = flat[better], flat[worse]
        pair = _pair(rows[n]["prompt"], rows[n]["responses"][i], rows[n]["responses"][j])
        made.append(pair | {"margin": scores[better] - scores[worse]})
    drops.keep(len(made))
    drops.drop(f"scores less than {min_gap:g} apart", every - len(made))
    return made


def _rankings(judgements: Judgements) -> list[Row]:
    return [
        {"prompt": item.prompt, "responses": list(item.texts), "ranking": answer}
        for item in judgements.items.values()
        for answer in judgements.answers(item.id).values()
    ]


def _solutions(judgements: Judgements, drops: DropCounts) -> list[Row]:
    rows = []
    for item in judgements.items.values():
        answers = [a for a in judgements.answers(item.id).values() if isinstance(a, list)]
        labels = [_majority([answer[n] for answer in answers]) for n in range(len(item.texts))]
        if all(label is None for label in labels):
            drops.drop(SPLIT if answers else NOT_JUDGED)
            continue
        drops.keep()
        steps = list(item.texts)
        rows.append({"prompt": item.prompt, "steps": steps, "labels": labels, "right": item.right})
    return rows


def _majority(labels: Sequence[int | None]) -> int | None:
    """The label that most of those who marked the step gave; None where two share the most."""
    counts = Counter(label for label in labels if label is not None).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return counts[0][0]


def write(folder: Path, made: Mapping[str, list[Row]]) -> list[str]:
    """Writes each table as JSON lines, and all of them as folders for `datasets.load_from_disk`.

    Args:
      folder: gets `NAME.jsonl` and `datasets/NAME`, which has splits by the hash of the prompt that
        `jsonl:FILE` divides by, so that no prompt is in two.
      made: name -> rows; empty tables are left out.

    Returns:
      A sentence for each file.

    Raises:
      OSError: a file cannot be written; names it.
    """
    make_folder(folder)
    lines = []
    for name, rows in made.items():
        if not rows:
            lines.append(f"{name}: no rows, no file")
            continue
        path = folder / f"{name}.jsonl"
        if name == SOLUTIONS:
            write_solutions(path, map(_solution, rows))
        else:
            text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            write_whole(path, text)
        lines.append(f"{path}: {len(rows)} rows")
        if len({isinstance(row["prompt"], str) for row in rows}) > 1:
            lines.append(f"{name}: texts and messages as prompts are no {DATASETS} folder")
            continue
        lines.append(_write_datasets(folder / DATASETS / name, rows))
    return lines


def _solution(row: Row) -> Solution:
    return Solution(row["prompt"], tuple(row["steps"]), tuple(row["labels"]), row["right"])


def _write_datasets(path: Path, rows: Sequence[Row]) -> str:
    import datasets

    splits = dict(_splits(rows))
    features = datasets.Dataset.from_list(list(rows)).features
    made = {k: datasets.Dataset.from_list(v, features=features) for k, v in splits.items()}
    make_folder(path.parent)
    scratch = path.with_name(f".{path.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    datasets.DatasetDict(made).save_to_disk(str(scratch))
    shutil.rmtree(path, ignore_errors=True)
    put(scratch, path)
    return f"{path}: " + ", ".join(f"{len(rows)} {name}" for name, rows in splits.items())


def _splits(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for split in SPLITS:
        found = [row for row in rows if split_of(first_text({"prompt": row["prompt"]})) == split]
        if found:
            yield split, found
