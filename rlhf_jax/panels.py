"""Curves of logged metrics, panel by panel: which ones a picture of a run shows, and drawing them.

Figures are made without pyplot: no window opens and no global state of matplotlib changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = Mapping[str, np.ndarray]  # columns as from `read_metrics`

# Okabe & Ito 2008: told apart by people with any common colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
_SMOOTH_FROM = 100  # points


class Panel(NamedTuple):
    """One set of axes: title, unit of the y axis, metrics drawn there, a level to compare with."""

    title: str
    ylabel: str
    metrics: Mapping[str, str]  # metric name -> label within the panel, "" if it is alone
    baseline: float | None = None


# Three columns: what was wanted, what shows a collapse (twice), and the optimisation.
PPO_PANELS = (
    Panel("Reward", "reward model score", {"reward/mean": ""}),
    Panel("Win rate against SFT", "share of prompts", {"judge/win_rate": ""}, baseline=0.5),
    Panel("Judge", "judge score", {"judge/mean": ""}),
    Panel("KL to the reference", "nats per response", {"policy/kl_ref_sequence": ""}),
    Panel("Response perplexity", "perplexity", {"policy/perplexity": ""}),
    Panel("Response length", "tokens", {"response/length": ""}),
    Panel("KL per token", "nats per token", {"policy/kl_ref": ""}),
    Panel("The paper's 'perplexity'", "exp(NLL / length)", {"policy/perplexity_moss": ""}),
    Panel("Distinct bigrams", "distinct-2", {"response/distinct_2": ""}),
    Panel("Policy loss", "loss", {"loss/policy": ""}),
    Panel("Value loss", "loss", {"loss/value": ""}),
    Panel("Entropy", "nats per token", {"policy/entropy": ""}),
)

DPO_PANELS = (
    Panel("Loss", "nats", {"loss/dpo": ""}),
    Panel("Implicit accuracy", "share of pairs", {"dpo/accuracy": ""}, baseline=0.5),
    Panel("Implicit reward margin", "nats", {"dpo/margin": ""}),
    Panel(
        "Log-probability of the pair",
        "nats per response",
        {"dpo/chosen_log_prob": "chosen", "dpo/rejected_log_prob": "rejected"},
    ),
    Panel(
        "Implicit rewards",
        "nats",
        {"dpo/chosen_reward": "chosen", "dpo/rejected_reward": "rejected"},
    ),
)


def draw_panels(
    logs: Mapping[str, Log],
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
      ValueError: nothing to draw, or more runs than there are colours.
    """
    if len(logs) > len(COLORS):
        raise ValueError(f"at most {len(COLORS)} runs can be told apart, got {len(logs)}")
    shown = [panel for panel in panels if _has_data(panel, logs)]
    if not shown:
        wanted = sorted({name for panel in panels for name in panel.metrics})
        raise ValueError(f"nothing to draw: none of {wanted} was logged by {list(logs)}")
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(rows, columns, width=3.4 * columns, height=2.5 * rows)
    for axes, panel in zip(figure.axes, shown, strict=False):
        _draw_panel(axes, panel, logs, xlabel)
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    if title:
        figure.suptitle(title, fontsize=12)
    if len(logs) > 1:
        _add_run_legend(figure, list(logs))
    return figure


def _draw_panel(axes: Axes, panel: Panel, logs: Mapping[str, Log], xlabel: str) -> None:
    for run, log in enumerate(logs.values()):
        for index, (name, label) in enumerate(panel.metrics.items()):
            # One run: colours tell metrics apart. Several: colours tell runs, dashes metrics.
            color = COLORS[(run if len(logs) > 1 else index) % len(COLORS)]
            style = _LINE_STYLES[index % len(_LINE_STYLES)] if len(logs) > 1 else "-"
            _draw_metric(axes, log, name, label, color, style)
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylabel(panel.ylabel, fontsize=9)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_xlim(*_step_limits(logs))
    if panel.baseline is not None:
        axes.axhline(panel.baseline, color="grey", linewidth=1.0, linestyle=":")
    # Several runs draw the same metrics: each label once.
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    if first:
        axes.legend(list(first.values())[::-1], list(first)[::-1], frameon=False, fontsize=8)


def _draw_metric(axes: Axes, log: Log, name: str, label: str, color: str, style: str) -> None:
    if name in log:
        draw_curve(axes, log["step"], log[name], label, color, style)
    if f"eval/{name}" in log:
        held_out = f"{label}, held out" if label else "held out"
        steps, values = _finite(log["step"], log[f"eval/{name}"])
        axes.plot(steps, values, style, color=color, marker="o", markersize=3, label=held_out)


def draw_curve(
    axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str, style: str
) -> None:
    """Draws the finite values [S] over steps [S]; above 100 points pale, with a running mean."""
    steps, values = _finite(steps, values)
    smooth = steps.size > _SMOOTH_FROM
    if smooth:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        steps, values = _running_mean(steps, values, max(3, steps.size // 50))
    # A line through one point is invisible.
    marker = "o" if steps.size == 1 else ""
    axes.plot(steps, values, style, color=color, linewidth=1.6, marker=marker, label=label or None)


def _finite(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _running_mean(
    steps: np.ndarray, values: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each `window` neighbours, at the mean of their steps."""
    kernel = np.full(window, 1.0 / window)
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def _step_limits(logs: Mapping[str, Log]) -> tuple[float, float]:
    """The same x axis for every panel, however seldom its metric was logged."""
    steps = np.concatenate([log["step"] for log in logs.values()])
    margin = 0.03 * max(float(np.ptp(steps)), 1.0)
    return float(steps.min()) - margin, float(steps.max()) + margin


def _has_data(panel: Panel, logs: Mapping[str, Log]) -> bool:
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


def new_figure(rows: int, columns: int, *, width: float, height: float) -> Figure:
    """An empty grid of axes on the Agg canvas; width and height in inches."""
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
