"""What is read off the paper's figures, to lay beside the same quantities here.

Models, data and reward models differ: a LLaMA of 7B parameters on HH-RLHF there. So numbers are not
to agree; whether a curve rises, falls or jumps may. The paper's 'perplexity' is exp(NLL / length),
with the prompt in the NLL, and falls by itself as responses grow; here it is that of the response.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import drawing
from experiments.claims import Curves
from rlhf_jax.evaluation.report import over_seeds

# Points at either end of a curve over which it is averaged.
ENDS = 3
REWARD, LENGTH, KL = "reward/mean", "response/length", "policy/kl_ref"
PERPLEXITY, WINS = "policy/perplexity", "win_rate/*"
POLICY_LOSS, VALUE_LOSS = "loss/policy", "loss/value"


@dataclasses.dataclass(frozen=True)
class Reading:
    """One curve of a figure of the paper.

    Attributes:
      figure: its number.
      series: the curve's label in `paper_figures.FIGURES`.
      metric: what is logged for it here.
      start: at the first step; NaN where it cannot be read.
      end: at the last step.
      said: how it gets there.
    """

    figure: str
    series: str
    metric: str
    start: float
    end: float
    said: str = ""


def _at_the_end(figure: str, rows: Mapping[str, tuple[float, ...]]) -> tuple[Reading, ...]:
    """Series -> reward, response length, KL and perplexity at the last step."""
    metrics = (REWARD, LENGTH, KL, PERPLEXITY)
    return tuple(
        Reading(figure, series, metric, math.nan, value)
        for series, values in rows.items()
        for metric, value in zip(metrics, values, strict=True)
    )


READINGS = (
    Reading("4", "vanilla", REWARD, 3.0, 15.0, "jumps at steps 400 to 450 of 1,000"),
    Reading("4", "vanilla", WINS, 0.50, 0.23, "0.63 at step 300"),
    Reading("4", "vanilla", POLICY_LOSS, -0.3, 0.0, "by step 150"),
    Reading("4", "vanilla", VALUE_LOSS, 16.0, 0.3, "by step 200"),
    Reading("4", "vanilla", KL, 0.0, 0.17, "0.10 at step 450"),
    Reading("4", "vanilla", PERPLEXITY, 1.0195, 1.0015),
    Reading("4", "vanilla", LENGTH, 110.0, 512.0, "the cap, at step 450"),
    *_at_the_end(
        "6",
        {
            "reward_scale": (13.5, 512, 0.13, 1.0017),
            "reward_norm_0.3": (4.8, 240, 0.025, 1.0053),
            "reward_norm_0.8": (11.3, 512, 0.125, 1.0018),
            "adv_norm_0.5": (13.5, 512, 0.26, 1.0016),
            "adv_norm_0.12": (5.9, 243, 0.085, 1.0052),
        },
    ),
    *_at_the_end(
        "7",
        {
            "kl": (3.85, 120, -0.005, 1.014),
            "entropy": (4.2, 120, 0.010, 1.0142),
            "importance_sample": (4.9, 148, 0.072, 1.010),
            "kl_importance_sample": (3.3, 110, -0.003, 1.0162),
        },
    ),
    Reading("9", "PPO-max, long", REWARD, 0.8, 2.1, "flat from step 4,000 of 10,000"),
    Reading("9", "PPO-max, long", LENGTH, 155.0, 228.0, "from step 2,200"),
    Reading("9", "PPO-max, long", KL, 0.0, 0.043, "0.058 at step 500"),
    Reading("9", "PPO-max, long", PERPLEXITY, 1.0185, 1.009),
)


def beside(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """The readings of a figure with the same quantity here, over the seeds that have finished.

    Args:
      content: figure_N.json of `experiments.figures`.

    Returns:
      A row for each reading: series, metric, "paper" and "here", each as start → end. Here these
      are means over `ENDS` points of the drawn curve, then mean [lowest, highest] over seeds. A
      metric of a group (win rates) has a row for each of the group.
    """
    rows = []
    for reading in READINGS:
        series = content["series"].get(reading.series)
        if reading.figure != content["figure"] or series is None:
            continue
        done = [seed["curves"] for seed in series["seeds"].values() if "curves" in seed]
        for metric in _metrics(reading.metric, done):
            logs = [Curves(drawing.as_log(curves), 0, ()) for curves in done]
            starts = [log.first(metric, ENDS) for log in logs]
            ends = [log.last(metric, ENDS) for log in logs]
            paper = f"{_start(reading.start)}{reading.end:g}"
            rows.append(
                {
                    "series": reading.series,
                    "metric": metric,
                    "paper": f"{paper} ({reading.said})" if reading.said else paper,
                    "here": f"{_rounded(starts)} → {_rounded(ends)}",
                }
            )
    return rows


def _metrics(name: str, done: list[Mapping[str, Any]]) -> list[str]:
    """The metric, or those of the group that it stands for."""
    group = name.removesuffix("*")
    logged = dict.fromkeys(metric for curves in done for metric in curves)
    if name == group:
        return [name] if name in logged else []
    return [metric for metric in logged if metric.startswith(group)]


def _start(value: float) -> str:
    return "" if math.isnan(value) else f"{value:g} → "


def _rounded(values: list[float]) -> str:
    return over_seeds([float(f"{value:.3g}") for value in np.asarray(values)])
