"""The paper's figures, one command each: runs what is missing, draws, and tries the claims.

  python -m experiments.figures 4 6 --seeds 0 1 2
  python -m experiments.figures all --dry_run

Each series is an ordinary run with a variant, in a folder of its own: a suite that was stopped goes
on, and a finished run is never run again. Writes `figure_N.png`, `figure_N.json`
(every number that is drawn, with commits, commands, hardware and minutes), `figure_N.md` (tables)
and `claims.md`, which has the verdicts of all figures in the folder.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from experiments import claims, command, figure_tables, reporting
from experiments.drawing import draw
from experiments.paper_figures import FIGURES, ITERATIONS, REWARD_MODEL, SECONDS, Series
from rlhf_jax.evaluation.collapse import find_collapses
from rlhf_jax.evaluation.panels import Panel
from rlhf_jax.evaluation.plots import histogram_edges
from rlhf_jax.runtime.errors import UserError
from rlhf_jax.runtime.files import make_folder, read_json, write_whole
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.runtime.run_info import git_state, to_json
from rlhf_jax.training.record import read_config, read_summary

POINTS = 120  # of a curve in the JSON, at most
SAMPLES, LETTERS = 3, 160  # of a run's answers in the JSON


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a figure."""

    series: Series
    seed: int
    scale: str

    @property
    def argument(self) -> str:
        """Of the config."""
        return self.series.argument(self.scale, self.seed)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.series.folder(self.scale, self.seed))

    @property
    def iterations(self) -> int:
        """Of the run."""
        return self.series.iterations(self.scale)

    @property
    def command(self) -> list[str]:
        """That makes the run."""
        name = self.series.experiment
        return ["-m", f"experiments.{name}", "--config", f"configs/{name}.py:{self.argument}"]

    def finished(self) -> bool:
        """Whether the run has finished."""
        return read_summary(self.folder) is not None


def jobs_of(names: Sequence[str], scale: str, seeds: Sequence[int]) -> list[Job]:
    """Every run of some figures once, seed by seed: a suite that is stopped has whole figures."""
    jobs = {
        job.folder: job
        for seed in seeds
        for name in names
        for job in (Job(series, seed, scale) for series in FIGURES[name].series)
    }
    return list(jobs.values())


def seconds_per_iteration(jobs: Sequence[Job]) -> float:
    """Of the runs that have finished, or a guess."""
    measured = [
        summary["seconds"] / job.iterations
        for job in jobs
        if job.series.experiment != REWARD_MODEL
        and (summary := read_summary(job.folder)) is not None
    ]
    return float(np.mean(measured)) if measured else SECONDS[jobs[0].scale]


def listed(jobs: Sequence[Job]) -> str:
    """What would run, with the time that it will take."""
    each, lines, total = seconds_per_iteration(jobs), [], 0.0
    for job in jobs:
        seconds = 0.0 if job.finished() else each * job.iterations
        total += seconds
        took = "finished" if not seconds else f"about {seconds / 60:.1f} min"
        lines.append(f"{took:>14}  {job.folder}")
    return "\n".join([*lines, f"{len(jobs)} runs, about {total / 60:.0f} minutes one by one"])


def run_all(jobs: Sequence[Job], parallel: int) -> dict[str, str]:
    """Makes the runs that are missing.

    Args:
      jobs: all of them.
      parallel: how many at once; each gets its share of the cores.

    Returns:
      Argument -> the last line of what a run said that failed.
    """
    missing = [job for job in jobs if not job.finished()]
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i::parallel] or cores for i in range(parallel)]
    failed: dict[str, str] = {}

    def work(share: Sequence[int], mine: Sequence[Job]) -> None:
        for job in mine:
            print(f"{time.strftime('%H:%M:%S')}  {job.folder}", flush=True)
            said = _run(job, share)
            if said:
                failed[job.argument] = said
                print(f"failed: {job.folder}: {said}", file=sys.stderr, flush=True)

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        done = [pool.submit(work, shares[i], missing[i::parallel]) for i in range(parallel)]
        for one in done:
            one.result()
    return failed


def _run(job: Job, cores: Sequence[int]) -> str:
    """Runs one process with its log in the run folder; what it said last, if it failed."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        status = process.wait()
    if status == 0:
        return ""
    lines = (job.folder / "log.txt").read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no word"
    if status == 130:
        raise KeyboardInterrupt
    return f"status {status}: {last}"


def thinned(log: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, list]]:
    """Curves for the JSON: at most `POINTS` points, each the mean of its neighbours."""
    curves = {}
    for name in names:
        keep = np.isfinite(log[name])
        steps, values = log["step"][keep], log[name][keep]
        if steps.size:
            parts = np.array_split(np.arange(steps.size), min(POINTS, steps.size))
            curves[name] = {
                "step": [round(float(steps[part].mean()), 1) for part in parts],
                "value": [float(f"{values[part].mean():.4g}") for part in parts],
            }
    return curves


def _wanted(log: Mapping[str, np.ndarray], panels: Sequence[Panel]) -> list[str]:
    patterns = [name for panel in panels for name in panel.metrics]
    return [n for n in log if any(re.fullmatch(p.replace("*", ".*"), n) for p in patterns)]


def collect(name: str, scale: str, seeds: Sequence[int], failed: Mapping[str, str]) -> dict:
    """Everything of a figure, for its JSON: curves, where they are from, and the verdicts."""
    figure = FIGURES[name]
    series: dict[str, Any] = {}
    runs: dict[int, dict[str, claims.Curves]] = {seed: {} for seed in seeds}
    broken: set[int] = set()
    for one in figure.series:
        series[one.label] = {"command": "", "seeds": {}}
        for seed in seeds:
            job = Job(one, seed, scale)
            command_line = " ".join(["python", *job.command])
            series[one.label]["command"] = command_line.replace(f"seed={seed}", "seed=S")
            summary = read_summary(job.folder)
            if summary is None:
                said = failed.get(job.argument, "not run")
                series[one.label]["seeds"][str(seed)] = {"status": said}
                if job.argument in failed:
                    broken.add(seed)
                continue
            log, info = read_metrics(job.folder), read_config(job.folder / "config.json")
            found, pairs = find_collapses(log), differences(job.folder)
            runs[seed][one.label] = claims.Curves(
                log,
                job.iterations,
                [event.step for event in found],
                win_rates=summary.get("win_rates", {}),
                differences=pairs,
                eval_prompts=info["config"].get("eval", {}).get("prompts", 0),
            )
            content = {
                "status": "finished",
                "folder": str(job.folder),
                "minutes": round(summary["seconds"] / 60, 1),
                "commit": info["git"]["commit"],
                "hardware": _hardware(job.folder),
                "curves": thinned(log, _wanted(log, figure.panels)),
            }
            if pairs.size:
                content["differences"] = histogram(pairs)
            else:
                content["collapses"] = [event.text() for event in found]
                content["collapse_steps"] = [event.step for event in found]
                content["win_rates"] = summary["win_rates"]
                content["statistics"] = at_the_end(summary["statistics"])
                content["samples"] = samples(job.folder)
            series[one.label]["seeds"][str(seed)] = content
    kept = {seed: labels for seed, labels in runs.items() if labels}
    return {
        "figure": name,
        "title": figure.title,
        "scale": scale,
        "seeds": list(seeds),
        "commit": git_state(Path(__file__).resolve()),
        "series": series,
        "mixed": _mixed(series),
        "claims": [
            claims.as_dict(claims.judge(claim, kept, failed=sorted(broken)))
            for claim in claims.of_figure(name)
        ],
    }


def at_the_end(statistics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What SFT and the policy wrote to test prompts, by metric: four digits."""
    # A summary names the policy by the run's label; it comes after SFT, which is compared with.
    named = dict(zip(("SFT", "policy"), statistics.values(), strict=False))
    return {
        who: {name: float(f"{value:.4g}") for name, value in numbers.items()}
        for who, numbers in named.items()
    }


def samples(folder: Path) -> list[dict[str, str]]:
    """The first answers to test prompts, each cut at `LETTERS`."""
    with (folder / reporting.RESPONSES).open() as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, SAMPLES)]
    return [
        {"prompt": row["prompt"][:LETTERS]}
        | {who: text[:LETTERS] for who, text in row["responses"].items()}
        for row in rows
    ]


def differences(folder: Path) -> np.ndarray:
    """Preferred minus dispreferred score of held-out pairs, [N]; empty but for a reward model."""
    path = folder / reporting.HELD_OUT
    if not path.exists():
        return np.zeros(0)
    with np.load(path) as arrays:
        return arrays["chosen"] - arrays["rejected"]


def histogram(values: np.ndarray, bins: int = 40) -> dict[str, Any]:
    """For the JSON: edges, of which one is 0, counts, the mean, the share above 0."""
    edges = histogram_edges(values, bins)
    counts, _ = np.histogram(values, edges)
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": counts.tolist(),
        "mean": float(values.mean()),
        "right": float((values > 0).mean()),
    }


def _hardware(folder: Path) -> str:
    """Of a run; a reward model's is in its config."""
    path = folder / "report.json"
    if path.exists():
        return read_json(path, "run it again")["hardware"]
    return read_config(folder / "config.json").get("processor", "not recorded")


def _mixed(series: Mapping[str, Any]) -> list[str]:
    """Where the runs of a figure differ: commit or hardware."""
    done = [s for one in series.values() for s in one["seeds"].values() if "commit" in s]
    return [key for key in ("commit", "hardware") if len({s[key] for s in done}) > 1]


def claims_table(contents: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts of figures, as Markdown."""
    rows = [
        {"figure": content["figure"], **row, "verdict": f"**{row['verdict']}**"}
        for content in contents
        for row in claims_rows(content)
    ]
    return tabulate(rows, "keys", tablefmt="github", disable_numparse=True)


def claims_rows(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """The claims of a figure, each with what it asks, its numbers and its verdict."""
    rows = []
    for claim in content["claims"]:
        values = ", ".join(
            "failed" if isinstance(value, str) else f"{value:.3g}"
            for value in claim["values"].values()
        )
        low, high = claim["interval"]
        interval = "" if isinstance(low, str) else f" [{low:.3g}, {high:.3g}]"
        rows.append(
            {
                "claim": claim["sentence"],
                "metric and threshold": f"{claim['metric']}: {claim['threshold']}",
                "seeds [95% of the mean]": f"{values}{interval}" if values else "no run",
                "verdict": claim["verdict"],
            }
        )
    return rows


def files_in(folder: Path) -> list[Path]:
    """The JSON files of a folder's figures, in the order of their numbers."""
    return sorted(folder.glob("figure_*.json"), key=lambda path: int(path.stem.split("_")[1]))


def estimator_claims_table(content: Mapping[str, Any]) -> str:
    """The verdicts of `experiments.estimators`, as Markdown."""
    rows = [
        {
            "claim": claim["sentence"],
            "metric and threshold": f"{claim['metric']}: {claim['threshold']}",
            "seeds [95% over prompts]": ", ".join(
                "{:.3g} [{:.3g}, {:.3g}]".format(*value) for value in claim["values"].values()
            ),
            "verdict": f"**{claim['verdict']}**",
        }
        for claim in content["claims"]
    ]
    return tabulate(rows, "keys", tablefmt="github", disable_numparse=True)


def _runs_of(contents: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (
        run
        for content in contents
        for series in content["series"].values()
        for run in series["seeds"].values()
        if run["status"] == "finished"
    )


def write_claims(folder: Path) -> Path:
    """Writes `claims.md` from every figure's JSON in a folder, and the estimators' if it is there.

    The claims of the slides on policy gradients are those of `experiments.estimators`.
    """
    contents = [read_json(path, "draw the figure again") for path in files_in(folder)]
    scales = ", ".join(sorted({content["scale"] for content in contents}))
    text = (
        f"# The paper's claims ({scales})\n\n"
        "Thresholds stand in `experiments/claims.py` and were committed before the runs. A number "
        "stands for each seed.\n\n"
    )
    text += claims_table(contents) + "\n"
    if any("collapse_steps" in run for run in _runs_of(contents)):
        text += (
            "\n## The collapse monitor\n\nAlarms over all runs above. A run fell where the "
            "language model's last win rate against SFT has lost a quarter of the best gain, "
            "or ends five points below one half.\n\n" + figure_tables.alarms_table(contents) + "\n"
        )
    path = folder / "estimators.json"
    if path.exists():
        measured = read_json(path, "measure again by experiments.estimators")
        text += "\n## The slides on policy gradients\n\n" + estimator_claims_table(measured) + "\n"
    write_whole(folder / "claims.md", text)
    return folder / "claims.md"


def main(options: argparse.Namespace) -> None:
    """Runs, draws, tries the claims."""
    names = list(FIGURES) if options.figures == ["all"] else options.figures
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ValueError(f"no figure {unknown[0]!r}: choose some of {', '.join(FIGURES)}, or all")
    jobs = jobs_of(names, options.scale, options.seeds)
    print(listed(jobs))
    if options.dry_run:
        return
    folder = Path(options.out or f"runs/figures/{options.scale}")
    make_folder(folder)  # before the work
    failed = run_all(jobs, options.jobs)
    for name in names:
        content = to_json(collect(name, options.scale, options.seeds, failed))
        written = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_whole(folder / f"figure_{name}.json", written)
        write_whole(folder / f"figure_{name}.md", figure_tables.page(content))
        print(draw(content, folder / f"figure_{name}.png"))
    print(write_claims(folder))
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; they count as such")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("figures", nargs="+", metavar="N", help=f"{', '.join(FIGURES)}, or all")
    parser.add_argument("--scale", default="quickstart", choices=tuple(ITERATIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on its cores")
    parser.add_argument("--out", default="", help="folder; runs/figures/SCALE if empty")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and their time")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} must be at least 1")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        sys.exit(130)
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
