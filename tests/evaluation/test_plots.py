"""Pictures: the right curves on the right axes, written as PNG, without pyplot."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.evaluation.panels import (
    COLORS,
    DPO_PANELS,
    MAX_RUNS,
    PPO_PANELS,
    REWARD_MODEL_PANELS,
    Panel,
    draw_panels,
    new_figure,
)
from rlhf_jax.evaluation.plots import (
    compare_runs,
    draw_accuracy,
    draw_reward_histogram,
    histogram_edges,
    plot_accuracy,
    plot_dpo,
    plot_ppo,
    plot_reward_histogram,
    save_figure,
)
from rlhf_jax.runtime.metrics import MetricsWriter


def _log(num_steps, *names, offset=0.0):
    """Columns as from read_metrics: metric k has the value step + k + offset."""
    steps = np.arange(num_steps)
    return {"step": steps} | {name: steps + k + offset for k, name in enumerate(names)}


def _names(panels):
    return [name for panel in panels for name in panel.metrics]


def _write(workdir, num_steps, names):
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step in range(num_steps):
            writer.write(step, dict.fromkeys(names, float(step)))


def _curves(axes):
    """Label, x and y of the lines, without horizontal levels."""
    lines = [line for line in axes.lines if line.get_linestyle() != ":"]
    return [(line.get_label(), *map(list, line.get_data())) for line in lines]


def _assert_png(path, min_pixels=400):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") >= min_pixels
    assert len(data) > 5000


def _size(path):
    header = path.read_bytes()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")


def test_one_set_of_axes_a_panel_with_its_title_unit_and_curve():
    figure = draw_panels({"": [_log(5, *_names(PPO_PANELS))]}, PPO_PANELS, title="PPO-max")
    assert len(figure.axes) == len(PPO_PANELS) == 12
    assert figure.get_suptitle() == "PPO-max"
    for index, (axes, panel) in enumerate(zip(figure.axes, PPO_PANELS, strict=True)):
        # A panel for each metric of a group says which.
        several = [name.split("/")[1] for name in panel.metrics if name.endswith("/*")]
        assert axes.get_title() == ": ".join([panel.title, *several])
        assert axes.get_ylabel() == panel.ylabel
        assert axes.get_xlabel() == "step"
        ((_, steps, values),) = _curves(axes)
        assert steps == [0, 1, 2, 3, 4]
        assert values == [step + index for step in steps]
    assert not figure.legends


def test_a_dollar_sign_in_a_folder_is_no_mathematics():
    logs = {name: [_log(3, "reward/mean")] for name in ("runs/$x_$", "runs/y")}
    draw_panels(logs, PPO_PANELS, title="runs/$x_$ and runs/y").canvas.draw()


def test_panels_without_data_are_left_out():
    log = _log(5, "reward/mean", "loss/value") | {"policy/entropy": np.full(5, np.nan)}
    figure = draw_panels({"": [log]}, PPO_PANELS)
    assert [axes.get_title() for axes in figure.axes] == ["Reward", "Value loss"]


def test_unfilled_places_of_the_grid_are_empty():
    names = _names(PPO_PANELS)[:4]
    assert len(draw_panels({"": [_log(5, *names)]}, PPO_PANELS).axes) == 4


def test_nothing_to_draw_names_the_metrics():
    with pytest.raises(ValueError, match=r"none of \['reward/mean'\] was logged by \['run'\]"):
        draw_panels({"run": [_log(3, "loss/lm")]}, PPO_PANELS[:1])
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_panels({}, PPO_PANELS)


def test_more_runs_than_colours():
    logs = {str(i): [_log(3, "reward/mean")] for i in range(MAX_RUNS + 1)}
    with pytest.raises(ValueError, match=f"at most {MAX_RUNS} runs .* got {len(logs)}"):
        draw_panels(logs, PPO_PANELS)


def test_more_runs_than_colours_differ_in_dashes_and_metrics_have_their_own_axes():
    names = ("reward/accuracy", "eval/accuracy", "loss/bradley_terry")
    logs = {str(i): [_log(3, *names)] for i in range(MAX_RUNS)}
    figure = draw_panels(logs, REWARD_MODEL_PANELS)
    titles = ["Pair accuracy: train", "Pair accuracy: held out", "Bradley-Terry loss"]
    assert [axes.get_title() for axes in figure.axes] == titles
    for axes in figure.axes:
        curves = [line for line in axes.lines if line.get_color() != "grey"]
        looks = [(line.get_color(), line.get_linestyle()) for line in curves]
        assert len(set(looks)) == MAX_RUNS == len(looks)
    (legend,) = figure.legends
    assert [(h.get_color(), h.get_linestyle()) for h in legend.get_lines()] == looks


def test_runs_share_axes_and_have_colours_and_a_legend():
    logs = {
        "PPO-max": [_log(9, "reward/mean")],
        "vanilla": [_log(5, "reward/mean", "win_rate/vader", offset=10.0)],
    }
    figure = draw_panels(logs, PPO_PANELS)
    reward, win_rate = figure.axes
    assert [line.get_color() for line in reward.lines] == list(COLORS[:2])
    assert [len(line.get_xdata()) for line in reward.lines] == [9, 5]
    # The run without win rates draws no curve there; the other one keeps its colour.
    assert [line.get_color() for line in win_rate.lines] == [COLORS[1], "grey"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["PPO-max", "vanilla"]
    assert [line.get_color() for line in legend.get_lines()] == list(COLORS[:2])
    assert reward.get_xlim() == win_rate.get_xlim()
    assert win_rate.get_xlim()[1] >= 8


def test_level_of_chance_is_drawn():
    figure = draw_panels({"": [_log(3, "reward/mean", "win_rate/vader")]}, PPO_PANELS)
    reward, win_rate = figure.axes
    assert len(reward.lines) == 1
    assert list(win_rate.lines[1].get_ydata()) == [0.5, 0.5]


def test_held_out_values_have_points_where_they_were_logged():
    log = _log(10, "reward/mean")
    log["eval/reward/mean"] = np.where(log["step"] % 4 == 0, 7.0, np.nan)
    (axes,) = draw_panels({"": [log]}, PPO_PANELS).axes
    label, steps, values = _curves(axes)[1]
    assert (label, steps, values) == ("held out", [0, 4, 8], [7.0, 7.0, 7.0])
    assert axes.lines[1].get_marker() == "o"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["held out"]


def test_panel_of_held_out_values_alone():
    log = {"step": np.arange(3), "eval/dpo/accuracy": np.array([0.5, np.nan, 0.7])}
    (axes,) = draw_panels({"": [log]}, DPO_PANELS).axes
    assert axes.get_title() == "Implicit accuracy"


def test_two_metrics_of_one_run_differ_in_colour_and_of_two_runs_in_dashes():
    pair = [Panel("Pair", "nats", {"a": "chosen", "b": "rejected"})]
    (axes,) = draw_panels({"": [_log(3, "a", "b")]}, pair).axes
    assert [line.get_color() for line in axes.lines] == list(COLORS[:2])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chosen", "rejected"]
    (axes,) = draw_panels({"x": [_log(3, "a", "b")], "y": [_log(3, "a", "b")]}, pair).axes
    assert [line.get_color() for line in axes.lines] == [COLORS[0]] * 2 + [COLORS[1]] * 2
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"] * 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chosen", "rejected"]


def test_long_curves_are_pale_with_a_running_mean():
    (short,) = draw_panels({"": [_log(100, "reward/mean")]}, PPO_PANELS).axes
    assert len(short.lines) == 1
    log = _log(400, "reward/mean")
    log["reward/mean"] = np.random.default_rng(0).normal(size=400)
    (axes,) = draw_panels({"": [log]}, PPO_PANELS).axes
    raw, smooth = axes.lines
    assert raw.get_alpha() < 0.5
    assert len(raw.get_xdata()) == 400
    # Windows of 400 // 50 = 8: the first mean is that of steps 0 .. 7, at step 3.5.
    assert smooth.get_xdata()[0] == pytest.approx(3.5)
    assert smooth.get_ydata()[0] == pytest.approx(log["reward/mean"][:8].mean())
    assert smooth.get_ydata()[-1] == pytest.approx(log["reward/mean"][-8:].mean())


def test_seeds_are_drawn_as_their_mean_and_range():
    seeds = [_log(6, "reward/mean", offset=offset) for offset in (0.0, 1.0, 5.0)]
    seeds[1]["reward/mean"][0] = np.nan  # step 0 is missing in one seed
    seeds[2] = {name: values[:5] for name, values in seeds[2].items()}  # and step 5 in another
    (axes,) = draw_panels({"": seeds}, PPO_PANELS).axes
    (_, steps, values), *thin = _curves(axes)
    assert steps == [1, 2, 3, 4]
    assert values == [step + 2.0 for step in steps]  # (0 + 1 + 5) / 3
    assert [seed for *_, seed in thin] == [
        [step + offset for step in steps] for offset in (0.0, 1.0, 5.0)
    ]
    assert all(line.get_linewidth() < 1 for line in axes.lines[1:])
    (band,) = axes.collections
    outline = band.get_paths()[0].vertices
    for step in steps:
        heights = outline[outline[:, 0] == step, 1]
        assert (heights.min(), heights.max()) == (step, step + 5.0)


def test_one_seed_has_no_band():
    (axes,) = draw_panels({"": [_log(6, "reward/mean")]}, PPO_PANELS).axes
    assert not axes.collections


def test_names_with_dollar_signs_are_no_mathematics_anywhere(tmp_path):
    """A figure is written at the end of a run, which `$x_$` would lose: matplotlib refuses it."""
    name = "runs/$x_$/model"
    judge = f"judge/{name}"
    panels = [
        Panel("Judges", "score", {"judge/*": ""}),
        Panel(name, name, {"reward/mean": name}),
    ]
    runs = {name: [_log(3, "reward/mean", judge)], "other": [_log(3, "reward/mean", judge)]}
    for shown in (runs, {name: runs[name]}):
        figure = draw_panels(shown, panels, title=name, xlabel=name)
        assert [axes.get_title() for axes in figure.axes] == [f"Judges: {name}", name]
        save_figure(figure, tmp_path / "panels.png")
    assert plot_accuracy({name: ([0, 1], [0.5, 0.6])}, tmp_path / "a.png", title=name).exists()
    assert plot_reward_histogram([1.0], [0.0], tmp_path / "r.png", title=name).exists()


def test_held_out_values_of_seeds():
    seeds = [{"step": np.arange(3), "eval/reward/mean": np.arange(3) + k} for k in (0.0, 4.0)]
    (axes,) = draw_panels({"": seeds}, PPO_PANELS).axes
    mean, *thin = _curves(axes)
    assert mean == ("held out", [0, 1, 2], [2.0, 3.0, 4.0])
    assert [seed for *_, seed in thin] == [[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]]
    assert len(axes.collections) == 1


def test_single_point_is_visible():
    (axes,) = draw_panels({"": [_log(1, "reward/mean")]}, PPO_PANELS).axes
    assert axes.lines[0].get_marker() == "o"


def test_histogram_shows_every_pair_on_its_side_of_zero():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(1, 2, size=900), rng.normal(0, 2, size=900)
    chosen[:50] = rejected[:50]
    axes = new_figure(1, 1, width=4, height=3).axes[0]
    draw_reward_histogram(axes, chosen, rejected, title="HH")
    counts = {"left": 0, "right": 0}
    for container in axes.containers:
        for bar in container:
            middle = bar.get_x() + bar.get_width() / 2
            counts["left" if middle < 0 else "right"] += round(bar.get_height())
        # Bars of one side touch: the sides are stacked, not put next to each other.
        for bar, following in itertools.pairwise(container):
            assert bar.get_x() + bar.get_width() == pytest.approx(following.get_x(), abs=1e-9)
    difference = chosen - rejected
    assert counts == {"left": (difference < 0).sum(), "right": (difference >= 0).sum()}
    accuracy = ((difference > 0).sum() + 25) / 900
    assert axes.get_title() == f"HH: accuracy {accuracy:.1%} on 900 pairs"
    assert list(axes.lines[0].get_xdata()) == [0, 0]
    assert axes.get_xlabel() == "chosen − rejected score"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["chosen scores higher", "rejected scores higher", "tie"]


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-9, 0.1 + 0.2, 1e12, -1e12])
def test_histogram_of_equal_differences(value):
    axes = new_figure(1, 1, width=4, height=3).axes[0]
    draw_reward_histogram(axes, np.full(3, value), np.zeros(3))
    bars = [bar for container in axes.containers for bar in container]
    assert sum(bar.get_height() for bar in bars) == 3
    assert len(bars) < 100


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e9])
def test_histogram_edges_hold_every_value_and_zero(scale):
    rng = np.random.default_rng(0)
    # Many, since rounding puts the extremes outside of some.
    for center in [-9.0, 0.0, 9.0] * 100:
        values = scale * rng.normal(center, 1, size=20)
        edges = histogram_edges(values, bins=10)
        assert edges[0] <= values.min() and edges[-1] >= values.max() and 0.0 in edges
        assert 10 <= len(edges) - 1 <= 12
        np.testing.assert_allclose(np.diff(edges), np.diff(edges)[0], rtol=1e-9)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_ties_are_on_the_right_of_zero(value):
    edges = histogram_edges(np.array([0.0, value]))
    counts, _ = np.histogram([0.0], edges)
    assert edges[:-1][counts > 0].tolist() == [0.0]


def test_histogram_of_bad_scores():
    axes = new_figure(1, 1, width=4, height=3).axes[0]
    with pytest.raises(ValueError, match="NaN for prompt 0"):
        draw_reward_histogram(axes, [np.nan], [0.0])
    with pytest.raises(ValueError, match="must be finite"):
        draw_reward_histogram(axes, [np.inf], [0.0])


def test_accuracy_curves_and_the_coin():
    axes = new_figure(1, 1, width=4, height=3).axes[0]
    draw_accuracy(axes, {"train": ([0, 1, 2], [0.5, np.nan, 0.8]), "eval": ([0, 2], [0.5, 0.6])})
    assert _curves(axes) == [("train", [0, 2], [0.5, 0.8]), ("eval", [0, 2], [0.5, 0.6])]
    assert list(axes.lines[-1].get_ydata()) == [0.5, 0.5]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "eval"]


@pytest.mark.slow
def test_files_are_pngs(tmp_path):
    _write(tmp_path / "ppo", 8, _names(PPO_PANELS))
    _write(tmp_path / "other", 4, ["reward/mean"])
    _write(tmp_path / "dpo", 8, _names(DPO_PANELS))
    pictures = tmp_path / "pictures"
    runs = {"PPO-max": tmp_path / "ppo", "other": [tmp_path / "other" / "metrics.jsonl"]}
    steps = np.arange(5)
    for written, wanted in (
        (plot_ppo(tmp_path / "ppo", pictures / "ppo.png"), "ppo.png"),
        (plot_dpo(str(tmp_path / "dpo"), str(pictures / "dpo.png")), "dpo.png"),
        (compare_runs(runs, pictures / "compare.png", title="Runs"), "compare.png"),
        (plot_reward_histogram([1.0, 2.0], [0.0, 3.0], pictures / "hist.png"), "hist.png"),
        (plot_accuracy({"train": (steps, steps / 4)}, pictures / "acc.png"), "acc.png"),
    ):
        assert written == pictures / wanted
        _assert_png(written)
    # Four rows of panels against two.
    assert _size(pictures / "ppo.png")[1] == 2 * _size(pictures / "dpo.png")[1]
    assert _size(pictures / "ppo.png")[0] == _size(pictures / "dpo.png")[0]


def test_drawing_leaves_matplotlib_alone():
    code = """
import sys, matplotlib
rc = matplotlib.rcParams
names = [name for name in rc if name != "backend"]  # reading the backend imports pyplot
before = {name: rc[name] for name in names}
from pathlib import Path
import tempfile
from rlhf_jax.evaluation.plots import plot_reward_histogram
assert "matplotlib.figure" not in sys.modules, "import does work"
plot_reward_histogram([1.0], [0.0], Path(tempfile.mkdtemp()) / "a.png")
assert "matplotlib.pyplot" not in sys.modules
assert {name: rc[name] for name in names} == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
