"""Compares finished runs: a figure of their curves, and tables of their numbers over seeds.

  python -m experiments.compare --out runs/compare \\
    "PPO-max=runs/ppo_max/quickstart,runs/ppo_max/quickstart-seed=1" \\
    "vanilla=runs/ppo_max/quickstart-vanilla"
  python -m experiments.compare runs/reward_model/quickstart runs/reward_model/quickstart-no_lm
  python -m experiments.compare ... --panels Reward 'win_rate/*' policy/entropy

Each argument is a label and the run folders of its seeds, of any experiment; without a label the
folder's name is one. Writes `curves.png` and `table.md`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments import command
from rlhf_jax.evaluation import plots, report
from rlhf_jax.evaluation.panels import (
    DPO_PANELS,
    EXPERT_ITERATION_PANELS,
    PPO_PANELS,
    PROCESS_REWARD_PANELS,
    REWARD_MODEL_PANELS,
    SEARCH_PANELS,
    SFT_PANELS,
    SUPERVISED_PANELS,
    Panel,
)
from rlhf_jax.runtime.files import make_folder, read_json, write_whole
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.training.record import read_config, read_summary

# Experiment -> what its curves are.
PANELS = {
    "sft": SFT_PANELS,
    "reward_model": REWARD_MODEL_PANELS,
    "ppo_max": PPO_PANELS,
    "dpo": DPO_PANELS,
    "process_reward": PROCESS_REWARD_PANELS,
    "search": SEARCH_PANELS,
    "expert_iteration": EXPERT_ITERATION_PANELS,
    "supervised": SUPERVISED_PANELS,
}

# Label -> the run folders of its seeds.
Runs = Mapping[str, Sequence[str | Path]]


def check_run(folder: str | Path) -> Path:
    """The folder of a finished run.

    Raises:
      ValueError: there is no such folder, it is not that of a run, or the run has not finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the folder of a finished run")
    if not (folder / "config.json").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/summary.json"))
        hint = f"; it holds the runs {', '.join(inside[:5])}" if inside else ""
        raise ValueError(f"{folder} is not the folder of a run (no config.json){hint}")
    if experiment_of(folder) not in PANELS:
        raise ValueError(
            f"{folder} is a run of {experiment_of(folder)!r}: give one of {', '.join(PANELS)}"
        )
    if read_summary(folder) is None:
        raise ValueError(
            f"{folder} holds a run that has not finished (no summary.json): start it again"
        )
    return folder


def experiment_of(folder: str | Path) -> str:
    """Which experiment made a run folder; empty where its settings do not say."""
    return str(read_config(Path(folder) / "config.json")["config"].get("experiment", ""))


def parse_runs(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """`label=folder,folder` -> label -> folders.

    Labels and folders may hold commas and equals signs: what exists as a folder is one.

    Raises:
      ValueError: a folder without a finished run, or a label that is given twice.
    """
    runs: dict[str, list[Path]] = {}
    for argument in arguments:
        label, folders = _split(argument)
        if label in runs:
            raise ValueError(
                f"the label {label!r} is given twice: name them apart, as in LABEL=FOLDER"
            )
        runs[label] = [check_run(folder) for folder in folders]
    return runs


def _split(argument: str) -> tuple[str, list[str]]:
    """Label and folders of an argument; where nothing exists, as its first equals sign has it."""
    parts = argument.split("=")
    candidates = [("", argument)]
    candidates += [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(1, len(parts))]
    for label, text in candidates:
        folders = _folders(text.split(","))
        if folders:
            return label or Path(folders[0]).absolute().name, folders
    label, _, text = argument.partition("=")
    if not label or not text:
        label, text = "", argument
    return label or text, text.split(",")


def _folders(parts: Sequence[str]) -> list[str] | None:
    """Neighbours put together again until each is a folder; None where they are not."""
    if not parts:
        return []
    for end in range(1, len(parts) + 1):
        first = ",".join(parts[:end])
        if first and Path(first).is_dir():
            rest = _folders(parts[end:])
            if rest is not None:
                return [first, *rest]
    return None


def choose_panels(runs: Runs, names: Sequence[str] = ()) -> tuple[Panel, ...]:
    """The panels of the experiments that the runs are of, or those that are asked for.

    Args:
      runs: label -> run folders.
      names: titles of panels, or metrics as they are logged; `group/*` is every one of a group.

    Raises:
      ValueError: a name that is neither.
    """
    kinds = {experiment_of(folder) for folders in runs.values() for folder in folders}
    known = tuple(panel for kind in PANELS if kind in kinds for panel in PANELS[kind])
    known = tuple(dict((panel.title, panel) for panel in reversed(known)).values())[::-1]
    if not names:
        return known
    logged = {
        name: None
        for folders in runs.values()
        for folder in folders
        for name in read_metrics(folder)
        if "/" in name
    }
    return tuple(panel_named(name, known, list(logged)) for name in names)


def panel_named(name: str, known: Sequence[Panel], logged: Sequence[str]) -> Panel:
    """A panel by its title, or by a metric of which it is the only one.

    Args:
      name: title of one of `known`, in any case; or a metric, or `group/*`.
      known: panels.
      logged: metrics that there are; empty where nobody knows yet.

    Raises:
      ValueError: a name that is neither; lists those that are.
    """
    for panel in known:
        if name.lower() == panel.title.lower() or [name] == list(panel.metrics):
            return panel
    group = name.removesuffix("*")
    there = [metric for metric in logged if metric.removeprefix("eval/") == name or metric == name]
    if name.endswith("/*"):
        there = [metric for metric in logged if metric.startswith(group)]
    if "/" in name and (there or not logged):
        return Panel(name.removesuffix("/*"), "", {name: ""})
    raise ValueError(
        f"no panel and no metric {name!r}: panels are {', '.join(panel.title for panel in known)}; "
        f"metrics {', '.join(logged)}"
    )


def numbers(folder: str | Path) -> dict[str, Any]:
    """What came out of a finished run: the numbers of its report, or else of its summary.

    Returns:
      Name -> number. Of PPO and DPO the row of the policy that was trained, and its win rates
      against the baseline; of other runs what their summary calls "numbers", if anything.
    """
    folder, summary = check_run(folder), read_summary(folder) or {}
    path = folder / "report.json"
    if not path.exists():
        judged = summary.get("judges_accuracy", {})
        names = {"accuracy": "held-out pair accuracy", "perplexity": "held-out perplexity"}
        found = {said: summary[name] for name, said in names.items() if name in summary}
        found |= summary.get("numbers", {})
        return found | {f"pair accuracy of {judge}": share for judge, share in judged.items()}
    written = read_json(path, "remove the folder's summary.json and run again")
    policies = list(written["summary"])
    wins = {
        f"win rate against {policies[0]} by {judge}": rate["win_rate"]
        for judge, rate in summary.get("win_rates", {}).items()
    }
    return wins | written["summary"][policies[min(1, len(policies) - 1)]]


def table(runs: Runs) -> list[dict[str, str]]:
    """One row a label: mean [lowest, highest] of each number over its seeds.

    Returns:
      Rows with the keys "run", then the numbers in the order of first mention; a dash where a run
      has none.
    """
    found = {label: [numbers(folder) for folder in folders] for label, folders in runs.items()}
    names = dict.fromkeys(name for seeds in found.values() for one in seeds for name in one)
    return [
        {"run": label}
        | {name: report.over_seeds([one.get(name) for one in seeds]) for name in names}
        for label, seeds in found.items()
    ]


def side_by_side(runs: Runs) -> str:
    """`table` as Markdown, a column for each label."""
    rows = table(runs)
    names = [name for name in rows[0] if name != "run"]
    body = [[name, *(row[name] for row in rows)] for name in names]
    labels = [row["run"].replace("|", r"\|") for row in rows]
    return tabulate(body, ["", *labels], "pipe", disable_numparse=True)


def main(arguments: Sequence[str], out: str, panels: Sequence[str] = ()) -> None:
    """Writes the figure and the tables.

    Args:
      arguments: labels and folders, see `parse_runs`.
      out: folder for both files; created where missing.
      panels: names, see `choose_panels`; empty draws what the runs' experiments show.
    """
    runs = parse_runs(arguments)
    chosen = choose_panels(runs, panels)
    folder = Path(out)
    make_folder(folder)
    figure = plots.compare_runs(runs, folder / "curves.png", panels=chosen)
    parts = [side_by_side(runs)]
    for label, folders in runs.items():
        if all((folder / "report.json").exists() for folder in folders):
            parts.append(f"### {label}\n\n{report.seeds_table(folders)}")
    write_whole(folder / "table.md", "\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    print(f"\n{figure}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER[,FOLDER...]")
    parser.add_argument("--out", default="runs/compare", help="folder for curves.png and table.md")
    parser.add_argument(
        "--panels",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what to draw: titles of panels or metrics; all panels of the experiments if empty",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    try:
        main(options.runs, options.out, options.panels)
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
