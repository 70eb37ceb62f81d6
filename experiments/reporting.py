"""The report at the end of a run: policies side by side on held-out prompts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import harness
from experiments.responses import Responses
from rlhf_jax.evaluation import plots, report
from rlhf_jax.evaluation.comparison import WinRate, win_tie_lose
from rlhf_jax.evaluation.report import Target
from rlhf_jax.runtime import distributed, metrics

# Rows of the table: metric -> how it reads.
ROWS = {
    "reward/mean": "reward (reward model)",
    "judge/mean": "judge score (VADER, -1 to 1)",
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


def hardware() -> str:
    """Devices, cores and memory of this machine in one line."""
    device = jax.devices()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{jax.device_count()} x {device.device_kind}, {cores} CPU cores, {memory:.0f} GiB memory, "
        f"{platform.system()}"
    )


def summary_table(answers: Mapping[str, Responses]) -> dict[str, dict[str, Any]]:
    """Policy -> row -> number."""
    return {
        name: {
            label: answer.statistics[metric]
            for metric, label in ROWS.items()
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


def quickstart_targets(policy: Responses, baseline: Responses, wins: WinRate) -> list[Target]:
    """What the quickstart aims at, and whether it got there."""
    kl = policy.statistics["policy/kl_ref_sequence"]
    share = policy.statistics["response/distinct_2"] / baseline.statistics["response/distinct_2"]
    return [
        Target(
            "win rate by the judge",
            "> 60%, interval excludes 50%",
            f"{wins.win_rate:.1%} [{wins.low:.1%}, {wins.high:.1%}]",
            wins.win_rate > 0.6 and wins.low > 0.5,
        ),
        Target("KL to SFT per sequence", "< 15 nats", f"{kl:.2f}", kl < 15),
        Target("distinct-2 against SFT's", ">= 70%", f"{share:.0%}", share >= 0.7),
    ]


def reward_model_target(config: ConfigDict) -> list[Target]:
    """Held-out pair accuracy of the reward model against the VADER rule's on the same pairs."""
    if "reward_model" not in config.inputs:
        return []
    summary = harness.read_summary(Path(config.inputs.reward_model).parent)
    if summary is None or "vader_accuracy" not in summary:
        return []
    accuracy, rule = summary["accuracy"], summary["vader_accuracy"]
    return [
        Target(
            "reward model's accuracy on held-out pairs",
            f"> {rule:.1%}, the VADER rule's",
            f"{accuracy:.1%} ({100 * (accuracy - rule):+.1f} points)",
            accuracy > rule,
        )
    ]


def figure_4(config: ConfigDict, workdir: Path, answers: Mapping[str, Responses]) -> list[str]:
    """Of a run without KL penalty: whether it shows what the deck's Figure 4 shows of vanilla PPO.

    There the reward climbs, and then something else gives way. Here that is: the judge's win rate
    on held-out prompts ends 5 points or more below its best; perplexity or length of the final
    responses are below half or above twice SFT's; distinct-2 is below 70% of SFT's.

    Returns:
      One line, or none where there is a KL penalty.
    """
    if config.kl.coef:
        return []
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
    wins = log.get("judge/win_rate", np.array([]))
    wins = 100 * wins[np.isfinite(wins)]
    gave_way = []
    if wins.size and wins[-1] <= wins.max() - 5:
        gave_way.append(f"win rate by the judge {wins.max():.0f}% → {wins[-1]:.0f}%")
    for metric, label in (("policy/perplexity", "perplexity"), ("response/length", "length")):
        if not 0.5 <= after[metric] / before[metric] <= 2:
            gave_way.append(shown[label])
    if after["response/distinct_2"] < 0.7 * before["response/distinct_2"]:
        gave_way.append(shown["distinct-2"])
    rose = after["reward/mean"] > before["reward/mean"]
    verdict = "shows it" if rose and gave_way else "**does not show it**"
    found = ", ".join(gave_way) or "nothing"
    return [
        "Vanilla PPO in the deck's Figure 4: the reward climbs, then judge, perplexity, length or "
        f"diversity give way. This run {verdict}: {shown['reward']}; gave way: {found}."
    ]


def win_rates(answers: Mapping[str, Responses]) -> dict[str, WinRate]:
    """Every policy against the baseline, which is first; then the second against the others."""
    names = list(answers)
    pairs = [(name, names[0]) for name in names[1:]] + [(names[1], name) for name in names[2:]]
    return {
        f"{one} against {other}": win_tie_lose(answers[one].judged, answers[other].judged)
        for one, other in pairs
    }


def write(
    config: ConfigDict,
    run: harness.Run,
    answers: Mapping[str, Responses],
    *,
    plot: Any = plots.plot_ppo,
    notes: tuple[str, ...] = (),
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Writes report.md, figures and summary.json, and prints the summary.

    Args:
      config: Of the run.
      run: Its folder.
      answers: The baseline first, then the policy of the run, then others.
      plot: Draws the training curves.
      notes: More lines for the report.
      summary: More entries of summary.json.
    """
    if not distributed.is_main():
        run.finish({})
        return
    names = list(answers)
    title = f"{names[1]} against {names[0]} ({config.scale}, seed {config.seed})"
    baseline, policy = answers[names[0]], answers[names[1]]
    wins = win_rates(answers)
    first_wins = next(iter(wins.values()))
    targets = []
    if config.scale == "quickstart":
        targets = quickstart_targets(policy, baseline, first_wins) + reward_model_target(config)
    table = summary_table(answers)
    figure = plot(run.workdir, run.workdir / "training.png", title=config.workdir)
    seconds = stage_seconds(config) | {"this run": run.seconds}
    report.write_report(
        run.workdir,
        title=title,
        command=run.command(),
        hardware=hardware(),
        summary_table=table,
        win_rates=wins,
        samples=side_by_side(answers, config.eval.samples),
        figures={"Training curves; dots are held-out prompts": figure},
        targets=targets,
        notes=(
            f"{len(policy.prompts)} held-out prompts, sampled at temperature "
            f"{config.sampling.temperature}; the samples are the first prompts, not chosen.",
            "The judge is a rule for sentiment: it does not see grammar, truth or relevance.",
            *notes,
        ),
        seeds=(config.seed,),
        wall_seconds=seconds,
    )
    report.print_summary(table, wins, title=title, targets=targets)
    run.finish(
        {
            "win_rate": first_wins._asdict(),
            "statistics": {name: answer.statistics for name, answer in answers.items()},
            **(summary or {}),
        }
    )
    print(f"report: {run.workdir / 'report.md'}")


def stage_seconds(config: ConfigDict) -> dict[str, float]:
    """Wall time of the stages before, from their summaries."""
    seconds = {}
    for stage, key in (("SFT", "reference"), ("reward model", "reward_model")):
        if key in config.inputs:
            summary = harness.read_summary(Path(config.inputs[key]).parent)
            if summary:
                seconds[stage] = summary["seconds"]
    return seconds
