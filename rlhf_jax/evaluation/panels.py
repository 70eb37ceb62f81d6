"""Curves of logged metrics, panel by panel: which ones a picture of a run shows, and drawing them.

Figures are made without pyplot: no window opens and no global state of matplotlib changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = Mapping[str, np.ndarray]  # columns as from `read_metrics`

# Okabe & Ito 2008: told apart by people with any common colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
# Runs that can be told apart: each colour in each style of line.
MAX_RUNS = len(COLORS) * len(_LINE_STYLES)
_SMOOTH_FROM = 100  # points


class Panel(NamedTuple):
    """One set of axes: title, unit of the y axis, metrics drawn there, a level to compare with.

    A metric `group/*` stands for every metric of the group that was logged, each on axes of its
    own: judges score on different scales.
    """

    title: str
    ylabel: str
    metrics: Mapping[str, str]  # metric name -> label within the panel, "" if it is alone
    baseline: float | None = None


# Three columns: what was wanted, what shows a collapse (twice), and the optimisation.
PPO_PANELS = (
    Panel("Reward", "reward model score", {"reward/mean": ""}),
    Panel("Win rate against SFT", "share of prompts", {"win_rate/*": ""}, baseline=0.5),
    Panel("Judge", "judge score", {"judge/*": ""}),
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

# Of these the curves of sampled responses, which show what any training does to a policy.
_SAMPLED = {"win_rate/*", "policy/kl_ref_sequence", "policy/perplexity", "response/distinct_2"}
ANSWER_PANELS = tuple(panel for panel in PPO_PANELS if _SAMPLED & set(panel.metrics))

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

SUPERVISED_PANELS = (
    Panel("Loss", "as the method has it", {"loss/supervised": ""}),
    Panel("Its two terms", "weighted", {"loss/sft": "imitation", "loss/aux": "auxiliary"}),
    Panel("Ranked rightly", "share of prompts", {"rank/accuracy": ""}, baseline=0.5),
    Panel(
        "Log-probability of the candidates",
        "nats per token",
        {"rank/best_log_prob": "best", "rank/worst_log_prob": "worst"},
    ),
    Panel("Quark", "nats per token", {"quark/kl": "KL", "quark/entropy": "entropy"}),
)

REWARD_MODEL_PANELS = (
    Panel(
        "Pair accuracy",
        "share of pairs",
        {"reward/accuracy": "train", "eval/accuracy": "held out"},
        baseline=0.5,
    ),
    Panel("Bradley-Terry loss", "nats per pair", {"loss/bradley_terry": ""}),
    Panel("Loss of rankings", "nats a prompt", {"loss/ranked": ""}),
    Panel("Margin", "chosen − rejected score", {"reward/margin": ""}),
    Panel("LM loss", "nats per token", {"loss/lm": ""}),
    Panel("Gradient norm", "norm", {"optim/grad_norm": ""}),
)

SFT_PANELS = (
    Panel("LM loss", "nats per token", {"loss/lm": ""}),
    Panel("Held-out perplexity", "perplexity", {"eval/perplexity": ""}),
    Panel("Gradient norm", "norm", {"optim/grad_norm": ""}),
)

PROCESS_REWARD_PANELS = (
    Panel("Label loss", "nats per label", {"loss/step_labels": ""}),
    Panel("Step accuracy", "share of steps", {"eval/step_accuracy": ""}),
    Panel("First-error F1", "F1", {"eval/first_error_f1": ""}),
    Panel("Outcome accuracy", "share of solutions", {"eval/outcome_accuracy": ""}),
    Panel("Calibration error", "probability", {"eval/calibration_error": ""}),
    Panel("LM loss", "nats per token", {"loss/lm": ""}),
)

SEARCH_PANELS = (Panel("Problems solved", "share, by seed of sampling", {"search/*": ""}),)

EXPERT_ITERATION_PANELS = (
    Panel("Solved in one attempt", "share of attempts", {"solve/pass_at_1": ""}),
    Panel("Solved by the majority", "share of problems", {"solve/majority": ""}),
    Panel("Right answer, wrong step", "share of right answers", {"solve/trace_error": ""}),
    Panel("KL to SFT", "nats per solution", {"policy/kl_ref_sequence": ""}),
    Panel("Different solutions", "share of attempts", {"solve/distinct": ""}),
    Panel("Pool", "solutions", {"improve/pool": ""}),
)


def draw_panels(
    runs: Mapping[str, Sequence[Log]],
    panels: Sequence[Panel],
    *,
    title: str = "",
    xlabel: str = "step",
    columns: int = 3,
) -> Figure:
    """Makes a figure with one set of axes for each panel that any run has data for.

    Colours tell runs apart, and dashes the metrics within a panel. Of more runs than there are
    colours the next ones are dashed, and each metric has axes of its own.

    Args:
      runs: label -> the logs of one setting, one per seed, each as from `read_metrics`.
      panels: what to draw.
      title: heading above the panels.
      xlabel: label of every x axis.
      columns: panels side by side.

    Returns:
      The figure, not yet saved.

    Raises:
      ValueError: nothing to draw, or more than `MAX_RUNS` runs.
    """
    if len(runs) > MAX_RUNS:
        raise ValueError(f"at most {MAX_RUNS} runs can be told apart, got {len(runs)}")
    panels = [one for panel in panels for one in _each_of_group(panel, runs)]
    if len(runs) > len(COLORS):
        panels = [one for panel in panels for one in _each_metric(panel)]
    shown = [panel for panel in panels if _has_data(panel, runs)]
    if not shown:
        wanted = sorted({name for panel in panels for name in panel.metrics})
        raise ValueError(f"nothing to draw: none of {wanted} was logged by {list(runs)}")
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(rows, columns, width=3.4 * columns, height=2.5 * rows)
    for axes, panel in zip(figure.axes, shown, strict=False):
        _draw_panel(axes, panel, runs, xlabel)
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    if title:
        # A run folder may hold a dollar sign, which is no mathematics.
        figure.suptitle(title, fontsize=12, parse_math=False)
    if len(runs) > 1:
        _add_run_legend(figure, list(runs))
    return figure


def _each_of_group(panel: Panel, runs: Mapping[str, Sequence[Log]]) -> list[Panel]:
    """The panel, or one for each logged metric of the group that it stands for."""
    (name, *_), group = panel.metrics, next(iter(panel.metrics)).removesuffix("*")
    if not name.endswith("/*"):
        return [panel]
    logged = {n: None for logs in runs.values() for log in logs for n in log if n.startswith(group)}
    return [
        panel._replace(title=f"{panel.title}: {n.removeprefix(group)}", metrics={n: ""})
        for n in logged
    ]


def _each_metric(panel: Panel) -> list[Panel]:
    """A panel for each metric of a panel that has several."""
    if len(panel.metrics) == 1:
        return [panel]
    return [
        panel._replace(title=f"{panel.title}: {label or name}", metrics={name: ""})
        for name, label in panel.metrics.items()
    ]


def _draw_panel(axes: Axes, panel: Panel, runs: Mapping[str, Sequence[Log]], xlabel: str) -> None:
    for run, logs in enumerate(runs.values()):
        for index, (name, label) in enumerate(panel.metrics.items()):
            # One run: colours tell metrics apart. Several: colours tell runs, dashes metrics.
            color = COLORS[(run if len(runs) > 1 else index) % len(COLORS)]
            dashes = index + run // len(COLORS) if len(runs) > 1 else 0
            style = _LINE_STYLES[dashes % len(_LINE_STYLES)]
            _draw_metric(axes, logs, name, label, color, style)
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylabel(panel.ylabel, fontsize=9)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_xlim(*_step_limits(runs))
    if panel.baseline is not None:
        axes.axhline(panel.baseline, color="grey", linewidth=1.0, linestyle=":")
    # Several runs draw the same metrics: each label once.
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    if first:
        axes.legend(list(first.values())[::-1], list(first)[::-1], frameon=False, fontsize=8)
    without_math(axes)


def _draw_metric(
    axes: Axes, logs: Sequence[Log], name: str, label: str, color: str, style: str
) -> None:
    steps, seeds = _across_seeds(logs, name)
    if steps.size:
        draw_curve(axes, steps, seeds.mean(axis=0), label, color, style)
        _draw_band(axes, steps, seeds, color)
    steps, seeds = _across_seeds(logs, f"eval/{name}")
    if steps.size:
        held_out = f"{label}, held out" if label else "held out"
        mean = seeds.mean(axis=0)
        axes.plot(steps, mean, style, color=color, marker="o", markersize=3, label=held_out)
        _draw_band(axes, steps, seeds, color)


def _across_seeds(logs: Sequence[Log], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps [S] at which every log has a finite value, and these values [seeds, S]."""
    curves = [_finite(log["step"], log[name]) for log in logs if name in log]
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    steps = curves[0][0]
    for others, _ in curves[1:]:
        steps = np.intersect1d(steps, others)
    return steps, np.stack([values[np.isin(own, steps)] for own, values in curves])


def _draw_band(axes: Axes, steps: np.ndarray, seeds: np.ndarray, color: str) -> None:
    """Shades from the lowest to the highest of several seeds, each of them a thin line."""
    if len(seeds) > 1:
        low, high = seeds.min(axis=0), seeds.max(axis=0)
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        for values in seeds:
            axes.plot(steps, values, color=color, alpha=0.4, linewidth=0.5)


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


def _step_limits(runs: Mapping[str, Sequence[Log]]) -> tuple[float, float]:
    """The same x axis for every panel, however seldom its metric was logged."""
    steps = np.concatenate([log["step"] for logs in runs.values() for log in logs])
    margin = 0.03 * max(float(np.ptp(steps)), 1.0)
    return float(steps.min()) - margin, float(steps.max()) + margin


def _has_data(panel: Panel, runs: Mapping[str, Sequence[Log]]) -> bool:
    names = [prefix + name for name in panel.metrics for prefix in ("", "eval/")]
    return any(_across_seeds(logs, name)[0].size for logs in runs.values() for name in names)


def _add_run_legend(figure: Figure, labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=COLORS[i % len(COLORS)],
            linestyle=_LINE_STYLES[i // len(COLORS)],
            linewidth=2,
        )
        for i in range(len(labels))
    ]
    columns = min(len(labels), 4)
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def without_math(axes: Axes) -> None:
    """Shows titles and labels as they are: a name may hold dollar signs, which are no mathematics.

    Matplotlib refuses `$x_$` when the figure is written, after the whole run.
    """
    legend = axes.get_legend()
    labels = legend.get_texts() if legend else []
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *labels):
        text.set_parse_math(False)


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
