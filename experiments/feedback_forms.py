"""Reward models from every form of feedback, side by side.

  python -m experiments.feedback_forms runs/reward_model/quickstart*

Reads finished runs of `experiments.reward_model`, whatever their form (pairs, ratings, rankings,
votes), their budget (`data.pairs`) and their seed, and lays them beside each other at equal
reading: how many texts each was trained on, how many labels of people they came with, accuracy on
held-out pairs, rank correlation with people, calibration and taste for length. Writes
`feedback_forms.json`, `feedback_forms.md` and `feedback_forms.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments import command, compare
from rlhf_jax.evaluation.panels import COLORS, new_figure
from rlhf_jax.evaluation.plots import save_figure
from rlhf_jax.evaluation.report import over_seeds
from rlhf_jax.methods.reward_model import RANKED
from rlhf_jax.runtime.files import make_folder, write_whole
from rlhf_jax.runtime.run_info import to_json
from rlhf_jax.training.record import read_config, read_summary

ACCURACY = "held-out pair accuracy"


def form_of(config: Mapping[str, Any]) -> str:
    """What a run learned from, in words."""
    comparisons = config["loss"]["comparisons"]
    if config["data"]["votes"] and config["loss"]["labels"] == "soft":
        return "pairs, single raters"
    return {"pairs": "pairs", "batch": "all pairs of a batch"}.get(comparisons, comparisons)


def labels_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Texts that a run was given, counted as often as they were given, and labels beside them.

    A pair is two texts and one label, a ranking of K texts is K − 1 choices of the best of the
    rest, and a rated text has a label of its own.
    """
    data, comparisons = config["data"], config["loss"]["comparisons"]
    if comparisons not in RANKED:
        return 2 * data["pairs"], data["pairs"]
    groups = max(1, 2 * data["pairs"] // data["responses"])
    texts = groups * data["responses"]
    return texts, texts if comparisons == "pointwise" else groups * (data["responses"] - 1)


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What the runs found, by form and budget.

    Raises:
      ValueError: a folder holds no finished run of a reward model.
    """
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for folder in folders:
        compare.check_run(folder)
        record, summary = read_config(folder / "config.json"), read_summary(folder) or {}
        config = record["config"]
        if config["experiment"] != "reward_model":
            raise ValueError(f"{folder} is a run of {config['experiment']}: give reward models")
        texts, labels = labels_of(config)
        one = runs.setdefault(
            (form_of(config), texts),
            {"form": form_of(config), "texts": texts, "labels": labels, "seeds": {}},
        )
        one["seeds"][str(config["seed"])] = {
            "folder": str(folder),
            "commit": record["git"]["commit"],
            "processor": record.get("processor", "not recorded"),
            "minutes": round(summary["seconds"] / 60, 1),
            "numbers": {ACCURACY: summary["accuracy"]} | summary.get("numbers", {}),
        }
    return sorted(runs.values(), key=lambda run: (run["texts"], run["form"]))


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row for each form at each budget: mean [lowest, highest] over its seeds."""
    names = dict.fromkeys(
        name for run in runs for seed in run["seeds"].values() for name in seed["numbers"]
    )
    rows = [
        [
            run["form"],
            f"{run['texts']:,}",
            f"{run['labels']:,}",
            ", ".join(run["seeds"]),
            *(
                over_seeds([seed["numbers"].get(name) for seed in run["seeds"].values()])
                for name in names
            ),
        ]
        for run in runs
    ]
    head = ["learned from", "texts", "labels", "seeds", *names]
    return tabulate(rows, head, "github", disable_numparse=True) + "\n"


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Accuracy against texts read and against labels; a point for each seed."""
    figure = new_figure(1, 2, width=10.0, height=4.0)
    forms = list(dict.fromkeys(run["form"] for run in runs))
    for axes, of in zip(figure.axes, ("texts", "labels"), strict=True):
        for number, form in enumerate(forms):
            mine = sorted((run for run in runs if run["form"] == form), key=lambda run: run[of])
            values = [[seed["numbers"][ACCURACY] for seed in run["seeds"].values()] for run in mine]
            x, color = [run[of] for run in mine], COLORS[number % len(COLORS)]
            means = [sum(some) / len(some) for some in values]
            axes.plot(x, means, "o-", color=color, label=form, markersize=4)
            for place, some in zip(x, values, strict=True):
                axes.plot([place] * len(some), some, ".", color=color, alpha=0.5)
        axes.set_xscale("log")
        axes.set_xlabel(f"{of} of the training data")
        axes.set_ylabel(ACCURACY)
    figure.axes[0].legend(fontsize=8)
    return save_figure(figure, path)


def main(options: argparse.Namespace) -> None:
    """Writes the three files, and prints the table."""
    runs = collect([Path(run) for run in options.runs])
    folder = Path(options.out)
    make_folder(folder)
    content = json.dumps(to_json({"runs": runs}), indent=1)
    write_whole(folder / "feedback_forms.json", content + "\n")
    write_whole(folder / "feedback_forms.md", table(runs))
    print(table(runs))
    print(draw(runs, folder / "feedback_forms.png"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of experiments.reward_model")
    parser.add_argument("--out", default="runs/feedback_forms", help="folder of the three files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse())
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
