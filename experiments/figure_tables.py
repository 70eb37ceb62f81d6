"""The numbers of a figure as Markdown, from its JSON: `experiments.figures` writes both.

docs/results.md includes these tables, so that no number in them is typed by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from experiments import claims
from experiments.drawing import finished

# Column -> group of a run's summary and name within it.
STATISTICS = {
    "reward": "reward/mean",
    "KL, nats a response": "policy/kl_ref_sequence",
    "perplexity": "policy/perplexity",
    "distinct-2": "response/distinct_2",
    "length": "response/length",
    "ends by itself": "response/eos_rate",
}
NONE = "–"
# Label -> seed -> what its run left, as `finished` gives it.
Done = Mapping[str, Mapping[str, Any]]


def spread(values: Sequence[float]) -> str:
    """`mean [lowest, highest]`, or the number alone of one seed."""
    if not values:
        return NONE
    mean = sum(values) / len(values)
    # A KL of rounding errors is 0.
    shown = [f"{round(value, 6) + 0.0:.3g}" for value in (mean, min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def steps(seed: Mapping[str, Any]) -> str:
    """The iteration of a run's first collapse, from 1."""
    return str(seed["collapse_steps"][0] + 1) if seed["collapse_steps"] else "none"


def policy_table(content: Mapping[str, Any]) -> str:
    """A row for SFT and for each series: the monitor, the judges, what was measured at the end.

    Args:
      content: of the JSON of a figure whose runs are of PPO.
    """
    done = finished(content)
    judges = _judges(done)
    when = {
        label: ", ".join(steps(seed) for seed in seeds.values()) for label, seeds in done.items()
    }
    rows = [(label, when.get(label, NONE), *cells) for label, cells in _cells(done).items()]
    headers = ("", "collapses at iteration", *judges.values(), *STATISTICS)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def overview(*contents: Mapping[str, Any]) -> str:
    """The policies of several figures side by side, each once, SFT first; a row for each metric.

    Args:
      *contents: JSON of figures whose runs are of PPO, over the same seeds.
    """
    done = {label: seeds for content in contents for label, seeds in finished(content).items()}
    columns = _cells(done)
    names = (*_judges(done).values(), *STATISTICS)
    rows = zip(names, *columns.values(), strict=True)
    return tabulate(rows, ("", *columns), tablefmt="github", disable_numparse=True)


def _judges(done: Done) -> dict[str, str]:
    """Judge -> what its column is called."""
    seeds = (seed for one in done.values() for seed in one.values())
    return {
        judge: f"wins against SFT by `{judge}`, %" for seed in seeds for judge in seed["win_rates"]
    }


def _cells(done: Done) -> dict[str, tuple[str, ...]]:
    """SFT and each series -> win rates against SFT, then `STATISTICS`, over seeds."""
    judges = _judges(done)
    starts = {name: seed for seeds in done.values() for name, seed in seeds.items()}
    cells = {"SFT": (*[NONE] * len(judges), *_measured(list(starts.values()), "SFT"))}
    for label, seeds in done.items():
        wins = (
            spread([100 * seed["win_rates"][judge]["win_rate"] for seed in seeds.values()])
            for judge in judges
        )
        cells[label] = (*wins, *_measured(list(seeds.values()), "policy"))
    return cells


def _measured(seeds: Sequence[Mapping[str, Any]], which: str) -> list[str]:
    """Columns of `STATISTICS` over seeds."""
    return [
        spread(
            [seed["statistics"][which][name] for seed in seeds if name in seed["statistics"][which]]
        )
        for name in STATISTICS.values()
    ]


def reward_model_table(content: Mapping[str, Any]) -> str:
    """A row for each seed: accuracies in percent, and the differences of held-out pairs."""
    rows = []
    for label, seeds in finished(content).items():
        for name, seed in seeds.items():
            curves, differences = seed["curves"], seed["differences"]
            rows.append(
                (
                    f"{label}, seed {name}",
                    f"{100 * _late(curves['reward/accuracy']['value']):.1f}",
                    f"{100 * curves['eval/accuracy']['value'][-1]:.1f}",
                    f"{100 * differences['right']:.1f}",
                    f"{differences['mean']:.2f}",
                )
            )
    headers = (
        "",
        "train accuracy, last sixth of the steps, %",
        "held-out accuracy, %",
        "test pairs above 0, %",
        "mean difference",
    )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _late(values: Sequence[float]) -> float:
    """Mean of the last sixth: a batch has few pairs."""
    late = values[-max(1, len(values) // 6) :]
    return sum(late) / len(late)


def lost_of_peak(
    seed: Mapping[str, Any], judge: str = claims.WIN_RATE
) -> tuple[int, float, float] | None:
    """What the judge had lost when the monitor spoke.

    Args:
      seed: of a figure's JSON.
      judge: metric of the win rate against SFT.

    Returns:
      Iteration of the last measurement before the collapse was reported (from 1), the best win
      rate until then, and the share of the best gain over one half that was lost by then; NaN
      where nothing was gained. None where there was no collapse, or none of these before it.
    """
    curve = seed["curves"].get(judge)
    if not seed["collapse_steps"] or curve is None:
        return None
    step = seed["collapse_steps"][0]
    before = [(s, v) for s, v in zip(curve["step"], curve["value"], strict=True) if s <= step]
    if not before:
        return None
    best = max(value for _, value in before)
    gain, last = best - 0.5, before[-1]
    return int(last[0]) + 1, best, (best - last[1]) / gain if gain > 0 else math.nan


def monitor_table(content: Mapping[str, Any], label: str = "vanilla") -> str:
    """When the monitor speaks, beside the judge's win rates before and after."""
    rows = []
    for name, seed in content["series"][label]["seeds"].items():
        if seed["status"] != "finished":
            continue
        curve = seed["curves"].get(claims.WIN_RATE)
        if curve is None or not seed["collapse_steps"]:
            continue
        step = seed["collapse_steps"][0]
        lost = lost_of_peak(seed)
        after = [(s, v) for s, v in zip(curve["step"], curve["value"], strict=True) if s > step]
        rows.append(
            (
                name,
                step + 1,
                NONE if lost is None else f"{100 * lost[1]:.0f}%",
                NONE
                if lost is None or math.isnan(lost[2])
                else f"{100 * lost[2]:.0f}% at {lost[0]}",
                f"{100 * after[0][1]:.0f}% at {int(after[0][0]) + 1}" if after else NONE,
                f"{100 * curve['value'][-1]:.0f}%",
            )
        )
    headers = (
        "seed",
        "reported at",
        "best win rate before",
        "of its gain lost before",
        "next win rate",
        "last win rate",
    )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def alarms_table(contents: Sequence[Mapping[str, Any]], judge: str = claims.WIN_RATE) -> str:
    """How often the monitor spoke in all runs of some figures, and how often it should have.

    A run counts as fallen where the judge's last win rate has lost at least a quarter of the best
    gain over one half, or never gained anything and ends below one half by five points.

    Args:
      contents: of the JSON of figures; a run that several of them show counts once.
      judge: metric of the win rate against SFT; runs that did not log it are left out.
    """
    runs = {
        seed["folder"]: (label, seed)
        for content in contents
        for label, series in content["series"].items()
        for seed in series["seeds"].values()
        if seed["status"] == "finished" and judge in seed["curves"]
    }
    counts: dict[str, list[int]] = {}
    for label, seed in runs.values():
        spoke, fell = bool(seed["collapse_steps"]), _fell(seed["curves"][judge]["value"])
        row = counts.setdefault(label, [0] * 5)
        for place, holds in enumerate(
            (True, spoke and fell, spoke and not fell, fell and not spoke, not spoke and not fell)
        ):
            row[place] += holds
    rows = [(label, *row) for label, row in counts.items()]
    rows.append(("all", *(sum(column) for column in zip(*counts.values(), strict=True))))
    headers = ("", "runs", "fell, alarm", "held, false alarm", "fell, no alarm", "held, no alarm")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _fell(wins: Sequence[float]) -> bool:
    """Whether a policy's win rates end a quarter of the best gain lower, or below one half."""
    gain = max(wins) - 0.5
    return max(wins) - wins[-1] >= gain / 4 if gain > 0 else wins[-1] < 0.45


def page(content: Mapping[str, Any]) -> str:
    """The tables of a figure, with the command, the hardware and the minutes.

    Args:
      content: of `figure_N.json`.
    """
    done = finished(content)
    seeds = [seed for one in done.values() for seed in one.values()]
    if not seeds:
        return "No run has finished.\n"
    parts = []
    if "differences" in seeds[0]:
        parts.append(reward_model_table(content))
    else:
        parts.append(policy_table(content))
        if content["figure"] == "4":
            parts.append(monitor_table(content))
    count = sum(len(one) for one in done.values())
    numbers = " ".join(str(seed) for seed in content["seeds"])
    parts.append(
        f"`python -m experiments.figures {content['figure']} --scale {content['scale']} --seeds "
        f"{numbers}`: {count} runs, {sum(seed['minutes'] for seed in seeds):.0f} minutes in all; "
        f"{'; '.join(sorted({seed['hardware'] for seed in seeds}))}; mean [lowest, highest seed]."
    )
    return "\n\n".join(parts) + "\n"
