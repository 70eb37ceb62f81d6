"""The paper's figures, one command each: runs what is missing, draws, and tries the claims.

  python -m experiments.figures 4 6 --seeds 0 1 2
  python -m experiments.figures all --dry_run

Each series is an ordinary run of PPO-max with a variant, in its usual folder: a suite that was
stopped goes on, and a finished run is never run again. Writes `figure_N.png`, `figure_N.json`
(every number that is drawn, with commits, commands, hardware and minutes) and `claims.md`, which
has the verdicts of all figures in the folder.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

from experiments import claims, command
from rlhf_jax.evaluation.collapse import find_collapses
from rlhf_jax.evaluation.panels import Panel, draw_panels
from rlhf_jax.evaluation.plots import save_figure
from rlhf_jax.runtime.errors import UserError
from rlhf_jax.runtime.files import read_json, write_whole
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.runtime.run_info import git_state, to_json
from rlhf_jax.training.record import read_config, read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Iterations of a figure with 1,000 steps in the paper: twice what vanilla PPO takes to collapse.
ITERATIONS = {"tiny": 8, "quickstart": 200, "smollm2": 60}
# Iterations of the long run of Figure 9.
LONG = {"tiny": 16, "quickstart": 1000, "smollm2": 120}
# A guess, until a run of the scale has finished: seconds of an iteration.
SECONDS = {"tiny": 3.0, "quickstart": 1.7, "smollm2": 30.0}
JUDGES = ("vader", "language_model")
POINTS = 120  # of a curve in the JSON, at most


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve of a figure.

    Attributes:
      label: in the legend, and in the claims.
      variants: of configs/ppo_max.py.
      times: so many times the iterations of a figure; 0 is the long run.
      settings: assignments.
    """

    label: str
    variants: tuple[str, ...] = ()
    times: float = 1.0
    settings: tuple[str, ...] = ()

    def iterations(self, scale: str) -> int:
        """Of its run."""
        return round(self.times * ITERATIONS[scale]) or LONG[scale]

    def folder(self, scale: str, seed: int) -> str:
        """Of its run: what is changed, the seed, the iterations."""
        settings = [part.split(".", 1)[-1] for one in self.settings for part in one.split(",")]
        ends = [f"seed={seed}", f"iterations={self.iterations(scale)}"]
        return "runs/ppo_max/" + "-".join([scale, *self.variants, *settings, *ends])

    def argument(self, scale: str, seed: int) -> str:
        """What follows the colon of `--config configs/ppo_max.py:`."""
        iterations = self.iterations(scale)
        judges = [] if scale == "tiny" else [f"judges={JUDGES}".replace(" ", "")]
        return ",".join(
            [
                scale,
                *self.variants,
                f"seed={seed}",
                f"train.iterations={iterations}",
                f"eval.every={max(1, iterations // 10)}",
                *judges,
                *self.settings,
                f"workdir={self.folder(scale, seed)}",
            ]
        )


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper.

    Attributes:
      title: what it shows.
      series: its curves, in the order of the legend.
      panels: in the paper's order.
      columns: panels side by side.
    """

    title: str
    series: tuple[Series, ...]
    panels: tuple[Panel, ...]
    columns: int = 4


def _of(*variants: str, **settings: Any) -> tuple[Series, ...]:
    return tuple(Series(name, (name,), **settings) for name in variants)


REWARD = Panel("Reward", "reward model score", {"reward/mean": ""})
LENGTH = Panel("Response length", "tokens", {"response/length": ""})
KL = Panel("KL to SFT", "nats per token", {"policy/kl_ref": ""})
PERPLEXITY = Panel("Perplexity", "of the responses", {"policy/perplexity": ""})
WINS = Panel("Win rate against SFT", "share of prompts", {"win_rate/*": ""}, baseline=0.5)
DISTINCT = Panel("Distinct bigrams", "distinct-2", {"response/distinct_2": ""})
POLICY_LOSS = Panel("PG loss", "loss", {"loss/policy": ""})
VALUE_LOSS = Panel("VF loss", "loss", {"loss/value": ""})
ADVANTAGE = Panel("Advantage", "mean", {"critic/advantage": ""})
RETURN = Panel("Return", "mean", {"critic/return": ""})
FOUR = (REWARD, LENGTH, KL, PERPLEXITY)
# Of Figure 14.
_NORMALIZED = "reward.transform=normalize,reward.clip=0.8"
_ADVANTAGES = "ppo.normalize_advantages=True,ppo.advantage_clip=0.8"
_VALUE_CLIP = "ppo.value_clip_eps=0.2"
BESIDE = (WINS, DISTINCT)  # what the paper does not have in these figures

FIGURES = {
    "4": PaperFigure(
        "Vanilla PPO",
        _of("vanilla"),
        (REWARD, WINS, POLICY_LOSS, VALUE_LOSS, KL, PERPLEXITY, LENGTH, DISTINCT),
    ),
    "6": PaperFigure(
        "Score re-parameterisation, on vanilla PPO",
        (
            *_of("vanilla", *claims.REPARAMETERISED),
            Series("reward_norm_0.3, three times as long", ("reward_norm_0.3",), times=3),
        ),
        (*FOUR, *BESIDE),
    ),
    "7": PaperFigure(
        "Policy constraints, on vanilla PPO", _of(*claims.CONSTRAINED, times=0.8), (*FOUR, *BESIDE)
    ),
    "8": PaperFigure(
        "Initialisation",
        (
            Series("PPO-max"),
            *_of("policy_pretrained", "critic_sft", "critic_pretrain"),
            Series("vanilla", ("vanilla",)),
        ),
        (*FOUR, POLICY_LOSS, VALUE_LOSS, ADVANTAGE, RETURN, *BESIDE),
    ),
    "9": PaperFigure(
        "PPO-max, long", (Series("PPO-max, long", times=0),), (*FOUR, *BESIDE), columns=3
    ),
    "14": PaperFigure(
        "Re-parameterised rewards and advantages",
        tuple(
            Series(label, ("vanilla",), settings=settings)
            for label, settings in {
                "reward norm 0.8, advantage norm 0.8": (_NORMALIZED, _ADVANTAGES),
                "reward norm 0.8, advantage norm 0.8, value clip": (
                    _NORMALIZED,
                    _ADVANTAGES,
                    _VALUE_CLIP,
                ),
                "reward norm 0.8, advantage norm, value clip": (
                    _NORMALIZED,
                    "ppo.normalize_advantages=True,ppo.value_clip_eps=0.2",
                ),
                "reward norm 0.8, value clip": (_NORMALIZED, _VALUE_CLIP),
                "reward scaling, advantage norm 0.8, value clip": (
                    "reward.transform=scale",
                    _ADVANTAGES,
                    _VALUE_CLIP,
                ),
            }.items()
        ),
        (*FOUR, *BESIDE),
    ),
    "15": PaperFigure("The KL penalty's weight", _of("kl_0.05", "kl_0.1", "kl_0.2"), FOUR),
    "16": PaperFigure(
        "The entropy bonus, with and without bound", _of("entropy", "entropy_clip"), FOUR
    ),
    "17": PaperFigure(
        "The policy's clip, without KL penalty",
        (
            Series("KL penalty", ("kl",)),
            Series("no clip", ("vanilla",), settings=("ppo.objective=surrogate",)),
            Series("clip 0.5", ("vanilla",), settings=("ppo.clip_eps=0.5",)),
        ),
        FOUR,
    ),
    "18": PaperFigure(
        "Clipping gradients, without KL penalty",
        (
            *(
                Series(
                    f"gradient clip {norm}",
                    ("vanilla",),
                    settings=(
                        f"optimizer.max_grad_norm={norm}",
                        f"critic_optimizer.max_grad_norm={norm}",
                    ),
                )
                for norm in (0.0, 0.5)
            ),
            Series("gradient clip 1.0", ("vanilla",)),
        ),
        (*FOUR, POLICY_LOSS, VALUE_LOSS),
    ),
    "19": PaperFigure(
        "GAE's lambda",
        (
            Series("lambda 0.9", ("vanilla",)),
            Series("lambda 0", ("vanilla",), settings=("advantage.lambda_=0.0",)),
            Series("lambda 1", ("vanilla",), settings=("advantage.lambda_=1.0",)),
        ),
        FOUR,
    ),
}


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
        return ["-m", "experiments.ppo_max", "--config", f"configs/ppo_max.py:{self.argument}"]

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
        if (summary := read_summary(job.folder)) is not None
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
            found = find_collapses(log)
            runs[seed][one.label] = claims.Curves(
                log, job.iterations, [event.step for event in found]
            )
            series[one.label]["seeds"][str(seed)] = {
                "status": "finished",
                "folder": str(job.folder),
                "minutes": round(summary["seconds"] / 60, 1),
                "commit": info["git"]["commit"],
                "hardware": _hardware(job.folder),
                "collapses": [event.text() for event in found],
                "win_rates": summary["win_rates"],
                "curves": thinned(log, _wanted(log, figure.panels)),
            }
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


def _hardware(folder: Path) -> str:
    return read_json(folder / "report.json", "run it again")["hardware"]


def _mixed(series: Mapping[str, Any]) -> list[str]:
    """Where the runs of a figure differ: commit or hardware."""
    done = [s for one in series.values() for s in one["seeds"].values() if "commit" in s]
    return [key for key in ("commit", "hardware") if len({s[key] for s in done}) > 1]


def draw(content: Mapping[str, Any], path: Path) -> Path:
    """Draws a figure from its JSON, and writes it.

    Raises:
      ValueError: no run of it has finished.
    """
    return save_figure(drawn(content), path)


def title_of(content: Mapping[str, Any]) -> str:
    """What a figure shows, at which scale, over how many seeds."""
    count = len(content["seeds"])
    title = f"Figure {content['figure']}: {content['title']} ({content['scale']}, {count} seeds)"
    if content["mixed"]:
        title += f"; runs of more than one {' and '.join(content['mixed'])}"
    return title


def drawn(content: Mapping[str, Any]) -> Figure:
    """A figure from its JSON.

    Raises:
      ValueError: no run of it has finished.
    """
    figure = FIGURES[content["figure"]]
    logs: dict[str, list[dict[str, np.ndarray]]] = {}
    for label, one in content["series"].items():
        done = [seed for seed in one["seeds"].values() if "curves" in seed]
        missing = [n for n, seed in one["seeds"].items() if seed["status"].startswith("status ")]
        if done:
            said = f" (seed {', '.join(missing)} failed)" if missing else ""
            logs[f"{label}{said}"] = [as_log(seed["curves"]) for seed in done]
    return draw_panels(
        logs, figure.panels, title=title_of(content), xlabel="iteration", columns=figure.columns
    )


def as_log(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, np.ndarray]:
    """Curves of the JSON as `read_metrics` gives a log."""
    steps = sorted({step for curve in curves.values() for step in curve["step"]})
    places = {step: i for i, step in enumerate(steps)}
    log = {"step": np.array(steps)}
    for name, curve in curves.items():
        log[name] = np.full(len(steps), math.nan)
        log[name][[places[step] for step in curve["step"]]] = curve["value"]
    return log


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


def write_claims(folder: Path) -> Path:
    """Writes `claims.md` from every figure's JSON in a folder."""
    contents = [read_json(path, "draw the figure again") for path in files_in(folder)]
    scales = ", ".join(sorted({content["scale"] for content in contents}))
    text = (
        f"# The paper's claims ({scales})\n\n"
        "Thresholds stand in `experiments/claims.py` and were committed before the runs. A number "
        "stands for each seed.\n\n"
    )
    write_whole(folder / "claims.md", text + claims_table(contents) + "\n")
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
    failed = run_all(jobs, options.jobs)
    folder = Path(options.out or f"runs/figures/{options.scale}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        content = to_json(collect(name, options.scale, options.seeds, failed))
        write_whole(folder / f"figure_{name}.json", json.dumps(content, indent=1) + "\n")
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
        sys.exit(f"error: {error}")
