"""Pictures of a run, in the layout of the figures of Zheng et al. 2023 (arXiv 2307.04964).

The `plot_*` functions write a PNG and return its path; the `draw_*` functions draw on given axes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.evaluation.comparison import pair_accuracy
from rlhf_jax.evaluation.panels import (
    COLORS,
    DPO_PANELS,
    PPO_PANELS,
    Panel,
    draw_curve,
    draw_panels,
    new_figure,
    without_math,
)
from rlhf_jax.runtime.files import naming
from rlhf_jax.runtime.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]


def plot_ppo(
    workdir: PathLike, path: PathLike, *, title: str = "", panels: Sequence[Panel] = PPO_PANELS
) -> Path:
    """Draws the training curves of one PPO run (Figure 4 of the paper).

    Args:
      workdir: the run folder, or its `metrics.jsonl`.
      path: the PNG to write.
      title: heading above the panels.
      panels: what to draw; panels without data are left out.

    Returns:
      `path`.

    Raises:
      ValueError: no metric of any panel was logged.
    """
    return compare_runs({"": workdir}, path, title=title, panels=panels)


def plot_dpo(
    workdir: PathLike, path: PathLike, *, title: str = "", panels: Sequence[Panel] = DPO_PANELS
) -> Path:
    """Draws the training curves of one DPO run; arguments as in `plot_ppo`."""
    return compare_runs({"": workdir}, path, title=title, panels=panels)


def compare_runs(
    runs: Mapping[str, PathLike | Sequence[PathLike]],
    path: PathLike,
    *,
    title: str = "",
    panels: Sequence[Panel] = PPO_PANELS,
    xlabel: str = "step",
) -> Path:
    """Draws the curves of several runs over one another (Figures 6, 7 and 8 of the paper).

    Held-out values of a metric, logged as `eval/<metric>`, are drawn with dots. More than 100
    points are drawn pale, with a running mean over them. Several seeds of a run are drawn as their
    mean, shaded from the lowest to the highest, over the steps that all of them logged.

    Args:
      runs: legend label -> run folder or `metrics.jsonl`, or a list of them, one per seed.
      path: the PNG to write.
      title: heading above the panels.
      panels: what to draw; panels that no run has data for are left out.
      xlabel: label of every x axis.

    Returns:
      `path`.

    Raises:
      ValueError: no run, or no metric of any panel was logged.
    """
    logs = {label: [read_metrics(path) for path in _as_list(run)] for label, run in runs.items()}
    return save_figure(draw_panels(logs, panels, title=title, xlabel=xlabel), path)


def plot_reward_histogram(
    chosen_scores: Any, rejected_scores: Any, path: PathLike, *, title: str = "Reward model"
) -> Path:
    """Histogram of chosen minus rejected scores (Figure 2 of the paper); see the `draw_` twin.

    Returns:
      `path`, the PNG.
    """
    figure = new_figure(1, 1, width=5.2, height=3.4)
    draw_reward_histogram(figure.axes[0], chosen_scores, rejected_scores, title=title)
    return save_figure(figure, path)


def plot_accuracy(
    curves: Mapping[str, tuple[Any, Any]], path: PathLike, *, title: str = "Reward model accuracy"
) -> Path:
    """Accuracy against steps, one curve per set (Figure 3 of the paper).

    Args:
      curves: label ("train", "eval") -> (steps [S], accuracies [S] in [0, 1]).
      path: the PNG to write.
      title: heading above the axes.

    Returns:
      `path`.
    """
    figure = new_figure(1, 1, width=5.2, height=3.4)
    draw_accuracy(figure.axes[0], curves, title=title)
    return save_figure(figure, path)


def draw_reward_histogram(
    axes: Axes, chosen_scores: Any, rejected_scores: Any, *, title: str = "", bins: int = 40
) -> None:
    """Draws the differences, a line at 0, and puts the accuracy (ties one half) in the title.

    Args:
      axes: where to draw.
      chosen_scores: float [N].
      rejected_scores: float [N].
      title: text before the accuracy.
      bins: about how many bars; 0 is always an edge, so no bar mixes the two sides.

    Raises:
      ValueError: shapes differ, no pair, or a score is not finite.
    """
    accuracy = pair_accuracy(chosen_scores, rejected_scores)
    difference = np.asarray(chosen_scores, float) - np.asarray(rejected_scores, float)
    if not np.isfinite(difference).all():
        raise ValueError("scores must be finite to be drawn")
    edges = histogram_edges(difference, bins).tolist()
    sides = {
        "rejected scores higher": (difference < 0, COLORS[1]),
        "tie": (difference == 0, "grey"),
        "chosen scores higher": (difference > 0, COLORS[0]),
    }
    shown = {label: side for label, side in sides.items() if side[0].any()}
    axes.hist(
        [difference[keep] for keep, _ in shown.values()],
        edges,
        stacked=True,
        color=[color for _, color in shown.values()],
        label=list(shown),
    )
    axes.axvline(0.0, color="black", linewidth=1.2, linestyle="--")
    axes.set_xlabel("chosen − rejected score")
    axes.set_ylabel("pairs")
    heading = f"accuracy {accuracy:.1%} on {difference.size:,} pairs"
    axes.set_title(f"{title}: {heading}" if title else heading, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    without_math(axes)


def histogram_edges(values: np.ndarray, bins: int = 40) -> np.ndarray:
    """Edges of bars of one width that hold all values; one edge is 0, so no bar mixes two signs.

    Args:
      values: finite, float [N].
      bins: about how many bars lie between the lowest value, the highest, and 0.

    Returns:
      [M + 1], rising. A value of 0 is in the bar on the right of 0.

    >>> histogram_edges(np.array([-1.0, 0.5]), bins=3)
    array([-1. , -0.5,  0. ,  0.5,  1. ])
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    width = max(high - low, 1e-6) / bins
    edges = width * np.arange(np.floor(low / width), np.floor(high / width) + 2)
    # Rounding may put the extremes outside.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges


def draw_accuracy(axes: Axes, curves: Mapping[str, tuple[Any, Any]], *, title: str = "") -> None:
    """Draws accuracy curves and a line at one half, the accuracy of a coin.

    Args:
      axes: where to draw.
      curves: label -> (steps [S], accuracies [S] in [0, 1]), NaN is left out.
      title: heading above the axes.
    """
    for index, (label, (steps, values)) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        draw_curve(axes, np.asarray(steps), np.asarray(values, float), label, color, "-")
    axes.axhline(0.5, color="grey", linewidth=1.0, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("pair accuracy")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    without_math(axes)


def _as_list(run: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [run] if isinstance(run, str | os.PathLike) else list(run)


def save_figure(figure: Figure, path: PathLike) -> Path:
    """Writes a PNG, and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        figure.savefig(path, dpi=150)
    return path
