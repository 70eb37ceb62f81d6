"""How far annotators agree with each other, and with answers that are known.

  python -m experiments.agreement runs/annotate/pairs.jsonl
  python -m experiments.agreement anna.jsonl bob.jsonl --show 50

Reads files of experiments.annotate, each mode by itself; files of one mode are of the same items.
Krippendorff's alpha at three levels, Cohen's kappa of each two annotators, accuracy on items with a
known answer, habits of each annotator, and the items on which they differ most. Intervals are 95%
bootstraps over items. A coefficient that is not defined says why. Writes `agreement.json` and
`agreement.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from rlhf_jax.evaluation.agreement import clustered_kappa, cohen_kappa
from rlhf_jax.evaluation.comparison import Interval, bootstrap_interval
from rlhf_jax.evaluation.krippendorff import LEVELS, UndefinedError, krippendorff_alpha
from rlhf_jax.feedback.answers import PAIR, RANKING, SCORE, STEPS, TIE, Answer
from rlhf_jax.feedback.items import Item
from rlhf_jax.feedback.judgements import Judgements, combine
from rlhf_jax.feedback.ledger import ANSWER
from rlhf_jax.feedback.store import read
from rlhf_jax.feedback.units import Units, units_of
from rlhf_jax.runtime.errors import UserError
from rlhf_jax.runtime.files import make_folder, write_whole

# The level that fits what a mode asks.
LEVEL = {SCORE: "interval", PAIR: "nominal", RANKING: "nominal", STEPS: "ordinal"}
# Letters of a prompt in the list of disagreements.
LETTERS = 200
# An interval, or why there is none.
Measured = Interval | str


def alpha(units: Units, level: str, rows: Sequence[int] | None = None) -> Measured:
    """Krippendorff's alpha of some annotators, by default all."""
    values = units.values if rows is None else units.values[list(rows)]
    try:
        return krippendorff_alpha(values, level, clusters=units.clusters)
    except UndefinedError as error:
        return str(error)


def kappa(units: Units, one: int, other: int) -> tuple[Measured, int]:
    """Cohen's kappa of two annotators, and how many units both rated."""
    a, b = units.values[one], units.values[other]
    both = ~np.isnan(a) & ~np.isnan(b)
    a, b, clusters = a[both], b[both], units.clusters[both]
    if not a.size:
        return "undefined because no unit was rated by both", 0
    if (a == a[0]).all() and (b == a[0]).all():
        return f"undefined because both always say {a[0]:g}", len(a)
    if len(np.unique(clusters)) == len(clusters):
        return cohen_kappa(a, b), len(a)
    return clustered_kappa(a, b, clusters), len(a)


def on_gold(units: Units, row: int, judged: set[int]) -> tuple[Measured, int]:
    """Share of known units on which an annotator is right, item by item, and how many items.

    Args:
      units: of all annotators.
      row: the annotator.
      judged: indices of the items that the annotator answered; a known step that was left unmarked
        there is not right.
    """
    shares = []
    for item in sorted(judged):
        known = (units.clusters == item) & ~np.isnan(units.gold)
        if known.any():
            shares.append(float((units.values[row, known] == units.gold[known]).mean()))
    if not shares:
        return "undefined because no item with a known answer was judged", 0
    return bootstrap_interval(shares), len(shares)


def first_side(judgements: Judgements, name: str) -> Measured:
    """Share of an annotator's decided pairs in which the side that was shown first is better."""
    events = [events[name] for events in judgements.events.values() if name in events]
    decided = [e for e in events if e.event == ANSWER and e.answer != TIE]
    if judgements.mode != PAIR or not decided:
        return "undefined because no pair was decided"
    return bootstrap_interval([float(e.answer == e.order[0]) for e in decided])


def annotator(judgements: Judgements, units: Units, row: int) -> dict[str, Any]:
    """What one annotator did."""
    name = units.annotators[row]
    events = [events.get(name) for events in judgements.events.values()]
    judged = {i for i, event in enumerate(events) if event and event.event == ANSWER}
    seconds = [event.seconds for event in events if event and event.event == ANSWER]
    right, known = on_gold(units, row, judged)
    others = [i for i in range(len(units.annotators)) if i != row]
    return {
        "answers": len(judged),
        "skips": sum(event is not None for event in events) - len(judged),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "right_on_gold": right,
        "gold_items": known,
        "first_side": first_side(judgements, name),
        "alpha_without": alpha(units, LEVEL[judgements.mode], others),
    }


def said(item: Item, answer: Answer) -> str:
    """An answer in words, with the names of the responses."""
    names = item.names or [str(number + 1) for number in range(len(item.texts))]
    if item.mode == PAIR:
        return TIE if answer == TIE else names[int(answer)]  # type: ignore[arg-type]
    if item.mode == RANKING and isinstance(answer, list):
        ranked = sorted((rank, name) for rank, name in zip(answer, names, strict=True) if rank)
        return " > ".join(name for _, name in ranked)
    if isinstance(answer, list):
        return " ".join("." if label is None else f"{label:+d}" for label in answer)
    return f"{answer:g}" if isinstance(answer, int | float) else answer


def disagreements(judgements: Judgements, units: Units) -> list[dict[str, Any]]:
    """Items on which annotators differ, the widest first: by the mean range of their units."""
    found = []
    for number, item in enumerate(judgements.items.values()):
        values = units.values[:, units.clusters == number]
        several = values[:, (~np.isnan(values)).sum(0) >= 2]
        width = float(np.mean(np.nanmax(several, 0) - np.nanmin(several, 0))) if several.size else 0
        if width:
            answers = {name: said(item, a) for name, a in judgements.answers(item.id).items()}
            found.append({"item": item.id, "prompt": _start(item), "range": width, "said": answers})
    return sorted(found, key=lambda one: -one["range"])


def _start(item: Item) -> str:
    prompt = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
    text = " ".join(prompt.split())
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} …"


def measure(judgements: Judgements) -> dict[str, Any]:
    """All of one mode."""
    units = units_of(judgements)
    names = units.annotators
    twice = itertools.combinations(range(len(names)), 2)
    several = sum(len(judgements.answers(item)) > 1 for item in judgements.items)
    kappas = []
    for one, other in twice:
        value, count = kappa(units, one, other)
        who = [names[one], names[other]]
        kappas.append({"annotators": who, "kappa": value, "units": count})
    return {
        "mode": judgements.mode,
        "items": len(judgements.items),
        "answers": judgements.count,
        "items_of_several": several,
        "alpha": {level: alpha(units, level) for level in LEVELS},
        "kappa": kappas,
        "annotators": {name: annotator(judgements, units, i) for i, name in enumerate(names)},
        "disagreements": disagreements(judgements, units),
        "notes": list(judgements.notes),
    }


def shown(value: Any, form: str = "{:.3f}") -> str:
    """An interval in a table, or why there is none."""
    if isinstance(value, Interval):
        low, high = form.format(value.low), form.format(value.high)
        return f"{form.format(value.value)} [{low}, {high}]"
    return str(value)


def report(content: Mapping[str, Any], show: int) -> str:
    """The tables of one mode, as Markdown."""

    def table(rows: Sequence[Sequence[Any]], *head: str) -> str:
        return tabulate(rows, head, "github", disable_numparse=True)

    mode, share = content["mode"], "{:.1%}"
    parts = [
        f"## {mode}",
        f"{content['answers']} answers to {content['items']} items, "
        f"{content['items_of_several']} of them judged by several.",
        *(f"Note: {note}." for note in content["notes"]),
        table(
            [[f"{k}{' *' * (k == LEVEL[mode])}", shown(v)] for k, v in content["alpha"].items()],
            "level (* fits the mode)",
            "Krippendorff's alpha",
        ),
    ]
    if content["kappa"]:
        rows = [[*one["annotators"], one["units"], shown(one["kappa"])] for one in content["kappa"]]
        parts.append(table(rows, "annotator", "and", "units of both", "Cohen's kappa"))
    rows = [
        [
            name,
            one["answers"],
            one["skips"],
            "–" if one["median_seconds"] is None else f"{one['median_seconds']:.1f}",
            f"{shown(one['right_on_gold'], share)} of {one['gold_items']}",
            *([shown(one["first_side"], share)] if mode == PAIR else []),
            shown(one["alpha_without"]),
        ]
        for name, one in content["annotators"].items()
    ]
    side = ["chose the first side"] if mode == PAIR else []
    head = ["annotator", "answers", "skips", "median s", "right on known items", *side]
    parts.append(table(rows, *head, f"alpha ({LEVEL[mode]}) without"))
    differ = content["disagreements"]
    if differ:
        rows = [
            [one["item"], one["prompt"], "; ".join(f"{k}: {v}" for k, v in one["said"].items())]
            for one in differ[:show]
        ]
        parts.append(f"Items on which annotators differ: {len(differ)}, the widest first.")
        parts.append(
            table([[c.replace("|", "\\|") for c in row] for row in rows], "item", "prompt", "said")
        )
    return "\n\n".join(parts) + "\n"


def main(options: argparse.Namespace) -> None:
    """Measures each mode, and writes the two files."""
    by_mode: dict[str, list[Path]] = {}
    for path in map(Path, options.files):
        by_mode.setdefault(read(path).mode, []).append(path)
    judged = [combine(paths) for paths in by_mode.values()]
    if not any(one.count for one in judged):
        raise ValueError(
            f"{', '.join(options.files)} has no answer yet: there is nothing to measure"
        )
    content = [measure(one) for one in judged if one.count]
    text = "\n".join(report(one, options.show) for one in content)
    folder = Path(options.out)
    make_folder(folder)
    whole = {"files": options.files, "modes": content}
    write_whole(folder / "agreement.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "agreement.md", text)
    print(text)
    print(folder / "agreement.md")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="files of annotations")
    parser.add_argument("--show", type=int, default=20, help="disagreements in the table")
    parser.add_argument("--out", default="runs/agreement", help="folder of the two files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, UserError) as error:
        from experiments import command

        sys.exit(f"error: {command.told(error)}")
