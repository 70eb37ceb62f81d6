"""Draws a figure of the paper from its JSON: `experiments.figures` writes both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.paper_figures import BARS, CURVES, DIFFERENCES, FAN, FIGURES, PaperFigure
from rlhf_jax.evaluation.panels import COLORS, draw_panels, new_figure
from rlhf_jax.evaluation.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Bars of a seed: what a judge preferred, and the key of its share.
OUTCOMES = (("RLHF wins", "win"), ("tie", "tie"), ("RLHF loses", "lose"))


def draw(content: Mapping[str, Any], path: Path) -> Path:
    """Draws a figure from its JSON.

    Args:
      content: of `figure_N.json`.
      path: the PNG to write.

    Returns:
      `path`.

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
    figure, done = FIGURES[content["figure"]], finished(content)
    if not done:
        raise ValueError(f"nothing to draw: no run of figure {content['figure']} has finished")
    return DRAWINGS[figure.drawing](figure, done, title_of(content))


def finished(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Legend -> seed -> what its run left; the legend names seeds that failed."""
    shown = {}
    for label, one in content["series"].items():
        done = {n: seed for n, seed in one["seeds"].items() if seed["status"] == "finished"}
        missing = [n for n, seed in one["seeds"].items() if seed["status"].startswith("status ")]
        if done:
            shown[label + (f" (seed {', '.join(missing)} failed)" if missing else "")] = done
    return shown


def draw_curves(figure: PaperFigure, done: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """The paper's panels; seeds as thin lines in a band from the lowest to the highest."""
    logs = {
        label: [as_log(seed["curves"]) for seed in seeds.values()] for label, seeds in done.items()
    }
    return draw_panels(logs, figure.panels, title=title, xlabel="iteration", columns=figure.columns)


def as_log(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, np.ndarray]:
    """Curves of the JSON as `read_metrics` gives a log: `step` [S] and metrics, [S] each."""
    steps = sorted({step for curve in curves.values() for step in curve["step"]})
    places = {step: i for i, step in enumerate(steps)}
    log = {"step": np.array(steps)}
    for name, curve in curves.items():
        log[name] = np.full(len(steps), math.nan)
        log[name][[places[step] for step in curve["step"]]] = curve["value"]
    return log


def _panels_by_seed(
    done: Mapping[str, Mapping[str, Any]], title: str, height: float
) -> tuple[Figure, list[tuple[Axes, Any]]]:
    """Empty axes, a row for each series and a column for each seed, titled with both."""
    columns = max(len(seeds) for seeds in done.values())
    drawn = new_figure(len(done), columns, width=3.6 * columns, height=height * len(done))
    drawn.suptitle(title, fontsize=12, parse_math=False)
    cells = []
    for row, (label, seeds) in enumerate(done.items()):
        for column in range(columns):
            axes = drawn.axes[row * columns + column]
            if column >= len(seeds):
                axes.set_visible(False)
                continue
            name, seed = list(seeds.items())[column]
            axes.set_title(f"{label}, seed {name}", fontsize=10)
            cells.append((axes, seed))
    return drawn, cells


def draw_differences(
    figure: PaperFigure, done: Mapping[str, Mapping[str, Any]], title: str
) -> Figure:
    """Histograms of preferred minus dispreferred score, a line at 0."""
    del figure
    drawn, cells = _panels_by_seed(done, title, height=3.0)
    for axes, seed in cells:
        histogram = seed["differences"]
        edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
        color = [COLORS[0] if low >= 0 else COLORS[1] for low in edges[:-1]]
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=color)
        axes.axvline(0.0, color="black", linewidth=1.2, linestyle="--")
        axes.set_xlabel(f"{histogram['right']:.1%} above 0, mean {histogram['mean']:.2f}")
        axes.set_ylabel("pairs")
    return drawn


def draw_bars(figure: PaperFigure, done: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Shares of wins, ties and losses, a bar for each seed and judge."""
    del figure
    bars = [
        (f"seed {name}, {judge}", rate)
        for seeds in done.values()
        for name, seed in seeds.items()
        for judge, rate in seed["win_rates"].items()
    ]
    return stacked_bars(bars, title, OUTCOMES)


def stacked_bars(
    bars: Sequence[tuple[str, Mapping[str, Any]]],
    title: str,
    outcomes: Sequence[tuple[str, str]],
) -> Figure:
    """Shares of wins, ties and losses as bars of one length.

    Args:
      bars: a name, and the shares.
      title: above.
      outcomes: what each part is called, and its key among the shares; three.
    """
    drawn = new_figure(1, 1, width=8.0, height=1.2 + 0.4 * len(bars))
    (axes,) = drawn.axes
    drawn.suptitle(title, fontsize=12, parse_math=False)
    left = np.zeros(len(bars))
    for (outcome, key), color in zip(outcomes, (COLORS[0], "lightgrey", COLORS[1]), strict=True):
        shares = np.array([100 * rate[key] for _, rate in bars])
        axes.barh(range(len(bars)), shares, left=left, color=color, label=outcome)
        for place, share in enumerate(shares):
            if share >= 4:
                middle = left[place] + share / 2
                axes.text(middle, place, f"{share:.0f}", ha="center", va="center", fontsize=8)
        left += shares
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("% of test prompts")
    drawn.legend(loc="outside lower center", ncols=len(outcomes), frameon=False)
    return drawn


def draw_fan(figure: PaperFigure, done: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Quantiles of a metric over the iterations: the lowest and the highest at the edges."""
    names = [name for panel in figure.panels for name in panel.metrics]
    labels = [label for panel in figure.panels for label in panel.metrics.values()]
    drawn, cells = _panels_by_seed(done, title, height=2.6)
    for axes, seed in cells:
        curves = [seed["curves"][name] for name in names]
        steps, values = curves[0]["step"], [curve["value"] for curve in curves]
        for i in range(len(names) // 2):
            label = f"{labels[i]} to {labels[-1 - i]}"
            axes.fill_between(
                steps,
                values[i],
                values[-1 - i],
                color=COLORS[0],
                alpha=0.25,
                linewidth=0,
                label=label,
            )
        axes.plot(steps, values[len(names) // 2], color=COLORS[0], linewidth=1.4, label="median")
        axes.set_xlabel("iteration", fontsize=9)
        axes.set_ylabel(figure.panels[0].ylabel, fontsize=9)
    cells[0][0].legend(frameon=False, fontsize=7)
    return drawn


DRAWINGS = {
    CURVES: draw_curves,
    DIFFERENCES: draw_differences,
    BARS: draw_bars,
    FAN: draw_fan,
}
