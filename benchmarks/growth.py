"""How time and memory grow with batch and length: generation and SFT steps, ours and torch's.

    python -m benchmarks.growth            measures (about eight minutes) and plots
    python -m benchmarks.growth --plot     plots the saved results

Writes results/2-cores/growth.json and docs/images/growth.png. Each point is a pair of processes of
its own, so that the peak of resident memory belongs to it alone; it includes the libraries and, for
ours, what compilation took.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import machine
from benchmarks.cases import growth
from benchmarks.driver import ROOT, measure
from benchmarks.peers import RESULTS, cores_name

FILE = "growth.json"
LINES = {
    ("generate", "ours"): ("generate, rlhf_jax", "C0", "-"),
    ("generate", "torch"): ("generate, transformers", "C0", "--"),
    ("sft", "ours"): ("SFT step, rlhf_jax", "C1", "-"),
    ("sft", "torch"): ("SFT step, TRL", "C1", "--"),
}
TITLES = {"batch": "batch, at 160 (SFT: 128) tokens", "length": "tokens per row, at batch 8"}


def run(cores: int, repeats: int) -> dict:
    """Measures every point."""
    points = []
    for axis, value, case in growth():
        result = measure(case, ["ours", *case.peers], cores=cores, warmup=0, repeats=repeats)
        points.append({"axis": axis, "value": value, **result})
    return {"machine": machine.describe(cores), "points": points}


def plot(points: list[dict], file: Path) -> None:
    """Tokens per second above, peak memory below; batch on the left, length on the right."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col")
    for column, axis in enumerate(TITLES):
        for (kind, library), (label, color, style) in LINES.items():
            chosen = [p for p in points if p["axis"] == axis and p["spec"]["case"] == kind]
            values = [p["value"] for p in chosen]
            found = [p["results"][library] for p in chosen]
            speed = [p["tokens"] / r["median_s"] for p, r in zip(chosen, found, strict=True)]
            memory = [r["peak_bytes"] / 2**30 for r in found]
            for row, numbers in enumerate((speed, memory)):
                grid[row][column].plot(values, numbers, style, color=color, label=label, marker=".")
        for row in range(2):
            grid[row][column].set_xscale("log", base=2)
            grid[row][column].xaxis.set_major_formatter("{x:.0f}")
            grid[row][column].set_ylim(bottom=0)
            grid[row][column].grid(alpha=0.3)
        grid[1][column].set_xlabel(TITLES[axis])
    grid[0][0].set_ylabel("tokens per second")
    grid[1][0].set_ylabel("peak memory, GiB")
    grid[0][0].legend(fontsize="x-small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measures, unless asked only to plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    file = RESULTS / cores_name(args.cores) / FILE
    if not args.plot:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run(args.cores, args.repeats), indent=1) + "\n")
    plot(json.loads(file.read_text())["points"], ROOT / "docs" / "images" / "growth.png")


if __name__ == "__main__":
    main()
