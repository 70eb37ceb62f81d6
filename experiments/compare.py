"""Compares finished runs: a figure of their curves and a table over seeds.

  python -m experiments.compare --out runs/compare \\
    "PPO-max=runs/ppo_max/quickstart,runs/ppo_max/quickstart-seed=1" \\
    "vanilla=runs/ppo_max/quickstart-vanilla"

Each argument is a label and the run folders of its seeds. Writes `curves.png` and `table.md`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments import command
from rlhf_jax.evaluation import plots, report
from rlhf_jax.runtime.files import make_folder, write_whole


def parse_runs(arguments: list[str]) -> dict[str, list[str]]:
    """`label=folder,folder` -> label -> folders.

    Raises:
      ValueError: an argument of another form, or a folder without a finished run.
    """
    runs = {}
    for argument in arguments:
        label, _, folders = argument.partition("=")
        if not label or not folders:
            raise ValueError(f"{argument!r} must read LABEL=FOLDER[,FOLDER...]")
        runs[label] = folders.split(",")
        for folder in runs[label]:
            if not (Path(folder) / "report.json").exists():
                raise ValueError(f"{folder} holds no finished run (no report.json)")
    return runs


def main(arguments: list[str], out: str) -> None:
    """Writes the figure and the table."""
    runs = parse_runs(arguments)
    folder = Path(out)
    make_folder(folder)
    figure = plots.compare_runs(runs, folder / "curves.png")
    tables = [f"### {label}\n\n{report.seeds_table(folders)}" for label, folders in runs.items()]
    write_whole(folder / "table.md", "\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    print(f"\n{figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER[,FOLDER...]")
    parser.add_argument("--out", default="runs/compare", help="folder for curves.png and table.md")
    options = parser.parse_args()
    try:
        main(options.runs, options.out)
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
