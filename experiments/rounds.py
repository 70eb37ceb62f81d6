"""Tables of finished runs of expert iteration, side by side.

  python -m experiments.rounds runs/expert_iteration/quickstart*

Writes `expert_iteration.json` and `expert_iteration.md`: every round on validation problems, and
the best round against SFT on test problems.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from experiments import command
from rlhf_jax.evaluation.comparison import bootstrap_interval
from rlhf_jax.runtime.files import make_folder, write_whole
from rlhf_jax.runtime.run_info import to_json
from rlhf_jax.training.record import read_config, read_summary

# Rows of the table of rounds.
SHOWN = {
    "solve/pass_at_1": "one attempt",
    "solve/majority": "majority",
    "solve/pass_at_k": "any attempt",
    "solve/trace_error": "trace error",
    "solve/distinct": "distinct",
    "solve/entropy": "entropy",
    "policy/kl_ref_sequence": "KL to SFT",
    "improve/pool": "pool",
}


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """What the runs found.

    Raises:
      ValueError: a folder holds no finished run of expert iteration.
    """
    runs = []
    for folder in folders:
        summary = read_summary(folder)
        record = read_config(folder / "config.json") if summary is not None else {}
        if summary is None or record["config"].get("experiment") != "expert_iteration":
            raise ValueError(f"{folder} holds no finished run of experiments.expert_iteration")
        config = record["config"]
        units = [np.array(values) for values in summary["units"].values()]
        runs.append(
            {
                "method": config["improve"]["method"],
                "seed": config["seed"],
                "processor": record.get("processor", "not recorded"),
                "commit": record["git"]["commit"],
                "command": record["command"],
                "minutes": round(summary["seconds"] / 60, 1),
                "best_round": summary["best_round"],
                "gain": list(bootstrap_interval(units[-1] - units[0])),
                "rounds": [
                    {name: float(f"{row[name]:.4g}") for name in SHOWN if name in row}
                    for row in summary["validation"]
                ],
            }
        )
    return {"runs": runs}


def table(content: Mapping[str, Any]) -> str:
    """The rounds of every run, and what the best one gains on test problems."""
    rows = [
        [
            f"{run['method']}, seed {run['seed']}" if number else "SFT",
            number,
            *(_shown(one[name]) if name in one else "" for name in SHOWN),
        ]
        for run in content["runs"]
        for number, one in enumerate(run["rounds"])
        if number or run is content["runs"][0]
    ]
    gains = [
        [
            f"{run['method']}, seed {run['seed']}",
            run["best_round"],
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*run["gain"]),
            run["minutes"],
        ]
        for run in content["runs"]
    ]
    first = tabulate(rows, ["run", "round", *SHOWN.values()], "github", disable_numparse=True)
    head = ["run", "best round", "more test problems than SFT in one attempt", "minutes"]
    return f"{first}\n\n{tabulate(gains, head, 'github', disable_numparse=True)}\n"


def _shown(value: float) -> str:
    """Three digits; counts whole, and rounding errors as the 0 that they are."""
    if abs(value) < 1e-4:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(options: argparse.Namespace) -> None:
    """Writes both files, and prints the tables."""
    content = to_json(collect([Path(run) for run in options.runs]))
    folder = Path(options.out)
    make_folder(folder)
    write_whole(folder / "expert_iteration.json", json.dumps(content, indent=1) + "\n")
    write_whole(folder / "expert_iteration.md", table(content))
    print(table(content))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of experiments.expert_iteration")
    parser.add_argument("--out", default="runs/rounds", help="folder of the tables")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse())
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
