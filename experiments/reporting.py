"""What a run prints at its start, and its report at the end, with the policies side by side."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.settings import Shared
from rlhf_jax.data.sets import archives
from rlhf_jax.evaluation import plots, report
from rlhf_jax.evaluation.agreement import measured_agreement
from rlhf_jax.evaluation.comparison import Interval, WinRate
from rlhf_jax.evaluation.judges import Judge
from rlhf_jax.evaluation.report import Target
from rlhf_jax.rollouts.respond import Responses, win_rates
from rlhf_jax.runtime import distributed, metrics
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.run_info import processor
from rlhf_jax.tasks import Task
from rlhf_jax.training.record import read_summary
from rlhf_jax.training.run import Run

# What a reward model makes of held-out pairs, in its run folder.
HELD_OUT = "held_out_pairs.npz"
# File of a run with every held-out response.
RESPONSES = "responses.jsonl"

# Rows of the table: metric -> how it reads.
ROWS = {
    "reward/mean": "reward (reward model)",
    "pairs/accuracy": "implicit-reward accuracy on held-out pairs",
    "policy/kl_ref": "KL to SFT per token (nats)",
    "policy/kl_ref_sequence": "KL to SFT per sequence (nats)",
    "policy/perplexity": "response perplexity",
    "policy/perplexity_reference": "perplexity under SFT",
    "policy/entropy": "entropy (nats per token)",
    "response/length": "response length (tokens)",
    "response/eos_rate": "share that ends by itself",
    "response/distinct_2": "distinct-2",
    "response/repetition_4": "repeated 4-grams",
}


def banner(title: str, numbers: Mapping[str, Any]) -> None:
    """Prints every derived number once, before a run starts."""
    print(f"\n{title}")
    width = max(len(name) for name in numbers)
    for name, value in numbers.items():
        print(f"  {name:<{width}}  {value}")


def hardware() -> str:
    """Devices, cores and memory of this machine in one line."""
    device = jax.devices()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{jax.device_count()} x {device.device_kind}, {cores} CPU cores ({processor()}), "
        f"{memory:.0f} GiB memory, {platform.system()}"
    )


def summary_table(
    answers: Mapping[str, Responses], judges: Mapping[str, Judge]
) -> dict[str, dict[str, Any]]:
    """Policy -> row -> number."""
    reward, *others = ROWS.items()
    judged = [(f"judge/{name}", f"judge score ({judge.scale})") for name, judge in judges.items()]
    rows = [reward, *judged, *others]
    return {
        name: {
            label: answer.statistics[metric]
            for metric, label in rows
            if metric in answer.statistics
        }
        for name, answer in answers.items()
    }


def side_by_side(answers: Mapping[str, Responses], count: int) -> list[dict[str, str]]:
    """The first `count` prompts with each policy's response; nothing is picked by hand."""
    first = next(iter(answers.values()))
    return [
        {
            "prompt": first.prompts[i],
            **{name: answer.responses[i] for name, answer in answers.items()},
        }
        for i in range(min(count, len(first.prompts)))
    ]


def quickstart_targets(
    policy: Responses, baseline: Responses, wins: Mapping[str, WinRate]
) -> list[Target]:
    """The quickstart's targets, and whether they were reached."""
    kl = policy.statistics["policy/kl_ref_sequence"]
    share = policy.statistics["response/distinct_2"] / baseline.statistics["response/distinct_2"]
    targets = [
        Target(
            f"win rate by {name}",
            "> 60%, interval excludes 50%",
            f"{rate.win_rate:.1%} [{rate.low:.1%}, {rate.high:.1%}]",
            rate.win_rate > 0.6 and rate.low > 0.5,
        )
        for name, rate in wins.items()
    ]
    return [
        *targets,
        Target("KL to SFT per sequence", "< 15 nats", f"{kl:.2f}", kl < 15),
        Target("distinct-2 against SFT's", ">= 70%", f"{share:.0%}", share >= 0.7),
    ]


def reward_model_targets(settings: Any) -> list[Target]:
    """Held-out pair accuracy of the reward model against each judge's on the same pairs."""
    folder = getattr(settings.inputs, "reward_model", "")
    summary = read_summary(Path(folder).parent) if folder else None
    if summary is None:
        return []
    accuracy = summary["accuracy"]
    return [
        Target(
            "reward model's accuracy on held-out pairs",
            f"> {share:.1%}, that of {name}",
            f"{accuracy:.1%} ({100 * (accuracy - share):+.1f} points)",
            accuracy > share,
        )
        for name, share in summary.get("judges_accuracy", {}).items()
    ]


def write_responses(path: Path, answers: Mapping[str, Responses]) -> None:
    """Writes every held-out prompt with each policy's response and what the judges said of it.

    One JSON object a line: `prompt`; `responses`, policy -> text; `judged`, judge -> policy ->
    score.
    """
    first = next(iter(answers.values()))
    lines = [
        json.dumps(
            {
                "prompt": prompt,
                "responses": {name: answer.responses[i] for name, answer in answers.items()},
                "judged": {
                    judge: {name: float(a.judged[judge][i]) for name, a in answers.items()}
                    for judge in first.judged
                },
            }
        )
        for i, prompt in enumerate(first.prompts)
    ]
    write_whole(path, "".join(f"{line}\n" for line in lines))


def figure_4(workdir: Path, answers: Mapping[str, Responses]) -> tuple[str, ...]:
    """Whether a run without KL penalty shows what the paper's Figure 4 shows of vanilla PPO.

    There the reward climbs, and then something else gives way. Here that is: a judge's win rate
    on held-out prompts ends 5 points or more below its best; perplexity or length of the final
    responses are below half or above twice SFT's; distinct-2 is below 70% of SFT's.

    Returns:
      One line.
    """
    baseline, policy = list(answers.values())[:2]
    before, after = baseline.statistics, policy.statistics
    shown = {
        label: f"{label} {before[metric]:.3g} → {after[metric]:.3g}"
        for metric, label in (
            ("reward/mean", "reward"),
            ("policy/perplexity", "perplexity"),
            ("response/length", "length"),
            ("response/distinct_2", "distinct-2"),
        )
    }
    log = metrics.read_metrics(workdir)
    gave_way = []
    for name in log:
        wins = 100 * metrics.logged(log, name)
        if name.startswith("win_rate/") and wins.size and wins[-1] <= wins.max() - 5:
            judge = name.removeprefix("win_rate/")
            gave_way.append(f"win rate by {judge} {wins.max():.0f}% → {wins[-1]:.0f}%")
    for metric, label in (("policy/perplexity", "perplexity"), ("response/length", "length")):
        if not 0.5 <= after[metric] / before[metric] <= 2:
            gave_way.append(shown[label])
    if after["response/distinct_2"] < 0.7 * before["response/distinct_2"]:
        gave_way.append(shown["distinct-2"])
    rose = after["reward/mean"] > before["reward/mean"]
    verdict = "shows it" if rose and gave_way else "**does not show it**"
    found = ", ".join(gave_way) or "nothing"
    return (
        "Vanilla PPO in the paper's Figure 4: the reward climbs, then judge, perplexity, length or "
        f"diversity give way. This run {verdict}: {shown['reward']}; gave way: {found}.",
    )


def all_win_rates(answers: Mapping[str, Responses]) -> dict[str, WinRate]:
    """Every policy against the baseline, which is first; then the second against the others.

    Returns:
      "PPO-max against SFT, vader" -> its win rate.
    """
    names = list(answers)
    pairs = [(name, names[0]) for name in names[1:]] + [(names[1], name) for name in names[2:]]
    return {
        f"{one} against {other}, {judge}": rate
        for one, other in pairs
        for judge, rate in win_rates(answers[one], answers[other]).items()
    }


def judges_notes(judges: Mapping[str, Judge], task: Task) -> tuple[str, ...]:
    """Notes on what the judges are, what they do not see, and how often they agree with people."""
    if not judges:
        return (
            "No independent judge was given: none is known for this task, and none was named in "
            "`config.judges`. The reward model scores what was optimised.",
        )
    rated = task.rated_texts("test")
    lines = []
    for judge in judges.values():
        line = judge.describe()
        if rated is None:
            line += " How often it agrees with people is not known: nobody rated these texts."
        else:
            texts, ratings = rated
            measured = measured_agreement(
                judge,
                f"texts of {task.config.source}",
                texts,
                ratings.tolist(),
                archives.cache_dir() / "judges",
            )
            line += f" {measured.line()}."
        lines.append(line)
    return tuple(lines)


def accuracy_line(accuracy: Mapping[str, Interval], count: int) -> str:
    """How often each scorer finds the response that people preferred, for the report."""
    parts = [f"{name} {a.value:.1%} [{a.low:.1%}, {a.high:.1%}]" for name, a in accuracy.items()]
    return f"Which of two responses people preferred, on {count:,} held-out pairs: " + ", ".join(
        parts
    )


def write(
    settings: Any,
    run: Run,
    answers: Mapping[str, Responses],
    judges: Mapping[str, Judge],
    *,
    plot: Any = plots.plot_ppo,
    notes: tuple[str, ...] = (),
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Writes report.md, figures, every response and summary.json, and prints the summary.

    Args:
      settings: the settings of the run.
      run: the run and its folder.
      answers: the baseline first, then the policy of the run, then others.
      judges: who scored them, by name.
      plot: draws the training curves.
      notes: more lines for the report.
      summary: more entries of summary.json.
    """
    if not distributed.is_main():
        run.finish({})
        return
    names = list(answers)
    title = f"{names[1]} against {names[0]} ({settings.scale}, seed {settings.seed})"
    baseline, policy = answers[names[0]], answers[names[1]]
    wins, first_wins = all_win_rates(answers), win_rates(policy, baseline)
    targets = []
    if settings.scale == "quickstart":
        targets = quickstart_targets(policy, baseline, first_wins) + reward_model_targets(settings)
    table, sampling = summary_table(answers, judges), settings.eval.sampling.of(settings.sampling)
    figure = plot(run.workdir, run.workdir / "training.png", title=settings.workdir)
    report.write_report(
        run.workdir,
        title=title,
        command=run.command(),
        hardware=hardware(),
        summary_table=table,
        win_rates=wins,
        samples=side_by_side(answers, settings.eval.samples),
        figures={"Training curves; dots are held-out prompts": figure},
        targets=targets,
        notes=(
            f"{len(policy.prompts)} held-out prompts, sampled at temperature "
            f"{sampling.temperature}; the samples are the first prompts, not chosen.",
            *judges_notes(judges, settings.prompt_task()),
            *notes,
        ),
        seeds=(settings.seed,),
        wall_seconds=stage_seconds(settings) | {"this run": run.seconds},
    )
    write_responses(run.workdir / RESPONSES, answers)
    report.print_summary(table, wins, title=title, targets=targets)
    run.finish(
        {
            "win_rates": {name: rate._asdict() for name, rate in first_wins.items()},
            "statistics": {name: answer.statistics for name, answer in answers.items()},
            **(summary or {}),
        }
    )
    print(f"report: {run.workdir / 'report.md'}")


def stage_seconds(settings: Shared) -> dict[str, float]:
    """Wall time of the stages before, from their summaries."""
    inputs, seconds = getattr(settings, "inputs", None), {}
    folders = {
        "SFT": getattr(inputs, "reference", "") or getattr(inputs, "model", ""),
        "reward model": getattr(inputs, "reward_model", ""),
    }
    for stage, folder in folders.items():
        summary = read_summary(Path(folder).parent) if folder else None
        if summary:
            seconds[stage] = summary["seconds"]
    return seconds
