"""Pictures of a run, in the layout of the figures of Zheng et al. 2023 (arXiv 2307.04964).

Figures are made without pyplot: no window opens and no global state of matplotlib changes. The
`plot_*` functions write a PNG and return its path; the `draw_*` functions draw on axes of yours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.comparison import pair_accuracy
from rlhf_jax.metrics import read_metrics
from rlhf_jax.panels import DPO_PANELS, PPO_PANELS, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]

# Okabe & Ito 2008: told apart by people with any common colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
_SMOOTH_FROM = 100  # points


def plot_ppo(
    workdir: PathLike, path: PathLike, *, title: str = "", panels: Sequence[Panel] = PPO_PANELS
) -> Path:
    """Draws the training curves of one PPO run (Figure 4 of the paper).

    Args:
      workdir: the run folder, or its `metrics.jsonl`.
      path: the PNG to write.
      title: above the panels.
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
    runs: Mapping[str, PathLike],
    path: PathLike,
    *,
    title: str = "",
    panels: Sequence[Panel] = PPO_PANELS,
    xlabel: str = "step",
) -> Path:
    """Lays the curves of several runs over one another (Figures 6, 7 and 8 of the paper).

    Held-out values of a metric, logged as `eval/<metric>`, are drawn with dots. More than 100
    points are drawn pale, with a running mean over them.

    Args:
      runs: legend label -> run folder or `metrics.jsonl`.
      path: the PNG to write.
      title: above the panels.
      panels: what to draw; panels that no run has data for are left out.
      xlabel: of the lowest panels.

    Returns:
      `path`.

    Raises:
      ValueError: no run, or no metric of any panel was logged.
    """
    logs = {label: read_metrics(source) for label, source in runs.items()}
    return _save(draw_panels(logs, panels, title=title, xlabel=xlabel), path)


def plot_reward_histogram(
    chosen_scores: Any, rejected_scores: Any, path: PathLike, *, title: str = "Reward model"
) -> Path:
    """Histogram of chosen minus rejected scores (Figure 2 of the paper); see the `draw_` twin.

    Returns:
      `path`, the PNG.
    """
    figure = _new_figure(1, 1, width=5.2, height=3.4)
    draw_reward_histogram(figure.axes[0], chosen_scores, rejected_scores, title=title)
    return _save(figure, path)


def plot_accuracy(
    curves: Mapping[str, tuple[Any, Any]], path: PathLike, *, title: str = "Reward model accuracy"
) -> Path:
    """Accuracy against steps, one curve a set (Figure 3 of the paper).

    Args:
      curves: label ("train", "eval") -> (steps [S], accuracies [S] in [0, 1]).
      path: the PNG to write.
      title: above the axes.

    Returns:
      `path`.
    """
    figure = _new_figure(1, 1, width=5.2, height=3.4)
    draw_accuracy(figure.axes[0], curves, title=title)
    return _save(figure, path)


def draw_reward_histogram(
    axes: Axes, chosen_scores: Any, rejected_scores: Any, *, title: str = "", bins: int = 40
) -> None:
    """Draws the differences, a line at 0, and puts the accuracy (ties one half) in the title."""
    accuracy = pair_accuracy(chosen_scores, rejected_scores)
    difference = np.asarray(chosen_scores, float) - np.asarray(rejected_scores, float)
    edges = np.histogram_bin_edges(difference, bins).tolist()
    axes.hist(difference[difference >= 0], edges, color=COLORS[0], label="chosen scores higher")
    axes.hist(difference[difference < 0], edges, color=COLORS[1], label="rejected scores higher")
    axes.axvline(0.0, color="black", linewidth=1.2, linestyle="--")
    axes.set_xlabel("chosen − rejected score")
    axes.set_ylabel("pairs")
    heading = f"accuracy {accuracy:.1%} on {difference.size:,} pairs"
    axes.set_title(f"{title}: {heading}" if title else heading, fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def draw_accuracy(axes: Axes, curves: Mapping[str, tuple[Any, Any]], *, title: str = "") -> None:
    """Draws accuracy curves and a line at one half, the accuracy of a coin."""
    for (label, (steps, values)), color in zip(curves.items(), COLORS, strict=False):
        _draw_curve(axes, np.asarray(steps), np.asarray(values, float), label, color, "-")
    axes.axhline(0.5, color="grey", linewidth=1.0, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("pair accuracy")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def draw_panels(
    logs: Mapping[str, Mapping[str, np.ndarray]],
    panels: Sequence[Panel],
    *,
    title: str = "",
    xlabel: str = "step",
    columns: int = 3,
) -> Figure:
    """Makes a figure with one set of axes for each panel that any run has data for.

    Args:
      logs: label -> columns as from `read_metrics`.
      panels: what to draw.
      title: above the panels.
      xlabel: of every panel.
      columns: panels side by side.

    Returns:
      The figure, not yet saved.

    Raises:
      ValueError: nothing to draw.
    """
    shown = [panel for panel in panels if _has_data(panel, logs)]
    if not shown:
        wanted = sorted({name for panel in panels for name in panel.metrics})
        raise ValueError(f"nothing to draw: none of {wanted} was logged by {list(logs)}")
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = _new_figure(rows, columns, width=3.4 * columns, height=2.5 * rows)
    for axes, panel in zip(figure.axes, shown, strict=False):
        _draw_panel(axes, panel, logs, xlabel)
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    if title:
        figure.suptitle(title, fontsize=12)
    if len(logs) > 1:
        _add_run_legend(figure, list(logs))
    return figure


def _draw_panel(
    axes: Axes, panel: Panel, logs: Mapping[str, Mapping[str, np.ndarray]], xlabel: str
) -> None:
    for run, log in enumerate(logs.values()):
        for index, (name, label) in enumerate(panel.metrics.items()):
            # One run: colours tell metrics apart. Several: colours tell runs, dashes metrics.
            color = COLORS[(run if len(logs) > 1 else index) % len(COLORS)]
            style = _LINE_STYLES[index % len(_LINE_STYLES)] if len(logs) > 1 else "-"
            _draw_metric(axes, log, name, label if run == 0 else "", color, style)
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylabel(panel.ylabel, fontsize=9)
    axes.set_xlabel(xlabel, fontsize=9)
    if panel.log:
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)


def _draw_metric(
    axes: Axes, log: Mapping[str, np.ndarray], name: str, label: str, color: str, style: str
) -> None:
    if name in log:
        _draw_curve(axes, log["step"], log[name], label, color, style)
    if f"eval/{name}" in log:
        held_out = f"{label}, held out" if label else "held out"
        steps, values = _finite(log["step"], log[f"eval/{name}"])
        axes.plot(steps, values, style, color=color, marker="o", markersize=3, label=held_out)


def _draw_curve(
    axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str, style: str
) -> None:
    steps, values = _finite(steps, values)
    smooth = steps.size > _SMOOTH_FROM
    if smooth:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        steps, values = _running_mean(steps, values, max(3, steps.size // 50))
    axes.plot(steps, values, style, color=color, linewidth=1.6, label=label or None)


def _finite(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _running_mean(
    steps: np.ndarray, values: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each `window` neighbours, at the mean of their steps."""
    kernel = np.full(window, 1.0 / window)
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def _has_data(panel: Panel, logs: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
    names = [prefix + name for name in panel.metrics for prefix in ("", "eval/")]
    return any(
        np.isfinite(log[name]).any() for log in logs.values() for name in names if name in log
    )


def _add_run_legend(figure: Figure, labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2) for i in range(len(labels))
    ]
    columns = min(len(labels), 4)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _new_figure(rows: int, columns: int, *, width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes in np.ravel(figure.subplots(rows, columns)):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def _save(figure: Figure, path: PathLike) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
