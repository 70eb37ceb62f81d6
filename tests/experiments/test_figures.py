"""The figure suite: what it would run, runs that fail, JSON, pictures, verdicts."""

import json

import numpy as np
import pytest

from configs import common, ppo_max, reward_model
from experiments import figures, reporting
from experiments.figures import Job, jobs_of
from experiments.paper_figures import FIGURES, ITERATIONS, PPO, Series
from rlhf_jax.runtime.errors import UserError

METRICS = {
    "reward/mean": (0.0, 3.0),
    "policy/kl_ref": (0.0, 0.2),
    "policy/kl_ref_sequence": (0.0, 20.0),
    "policy/perplexity": (100.0, 20.0),
    "response/length": (20.0, 31.0),
    "response/distinct_2": (0.9, 0.4),
    "loss/policy": (0.0, 0.1),
    "loss/value": (2.0, 0.1),
    "win_rate/language_model": (0.5, 0.7),
    "reward/accuracy": (0.5, 0.9),
    "eval/accuracy": (0.5, 0.75),
    "reward/q05": (-2.0, -8.0),
    "reward/q25": (-1.0, -2.0),
    "reward/q50": (0.0, 1.0),
    "reward/q75": (1.0, 2.0),
    "reward/q95": (2.0, 4.0),
}
WINS = {"win": 0.6, "tie": 0.1, "lose": 0.3, "win_rate": 0.65}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finish(job, steps=20, commit="abc", hardware="two cores", prompts=0):
    """Leaves the folder of a finished run."""
    job.folder.mkdir(parents=True)
    lines = [
        {"step": i} | {n: a + (b - a) * i / (steps - 1) for n, (a, b) in METRICS.items()}
        for i in range(steps)
    ]
    write = (job.folder / "metrics.jsonl").write_text
    write("\n".join(json.dumps(line | {"time": 0.0}) for line in lines) + "\n")
    files = {
        "config": {
            "config": {"eval": {"prompts": prompts}},
            "git": {"commit": commit},
            "command": "x",
        },
        "report": {"hardware": hardware},
        "summary": {
            "seconds": 60.0,
            "win_rates": {"language_model": WINS},
            "statistics": {"SFT": {"reward/mean": 0.0}, "PPO": {"reward/mean": 1.23456}},
        },
    }
    if job.series.experiment != PPO:
        del files["report"], files["summary"]["win_rates"], files["summary"]["statistics"]
        files["config"]["processor"] = hardware
        chosen, rejected = np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 0.5, 1.0, 2.0])
        np.savez(job.folder / reporting.HELD_OUT, chosen=chosen, rejected=rejected)
    else:
        row = {"prompt": "It", "responses": {"SFT": "is", "PPO": "is" * 200}, "judged": {}}
        (job.folder / reporting.RESPONSES).write_text(5 * (json.dumps(row) + "\n"))
    for name, content in files.items():
        (job.folder / f"{name}.json").write_text(json.dumps(content))


def options(*arguments):
    return figures.parse([*arguments, "--scale", "tiny"])


@pytest.mark.parametrize("scale", ITERATIONS)
@pytest.mark.parametrize("name", FIGURES)
def test_every_run_has_a_config_that_means_it(name, scale):
    for job in jobs_of([name], scale, [3]):
        if (scale, "policy_pretrained") == ("smollm2", job.series.label):
            continue  # its start is the pretrained model already
        configs = ppo_max if job.series.experiment == PPO else reward_model
        config = common.resolve(configs.get_config(job.argument))
        assert config.seed == 3 and config.workdir == str(job.folder)
        if job.series.experiment != PPO:
            assert config.train.steps == job.iterations
            continue
        assert config.train.iterations == job.iterations > config.train.critic_pretrain_iterations
        assert config.eval.every <= job.iterations


def test_the_reward_model_of_a_figure_is_that_of_ppo():
    for seed in (0, 2):
        (job,) = jobs_of(["2"], "quickstart", [seed])
        config = common.resolve(ppo_max.get_config(f"quickstart,seed={seed}"))
        assert config.inputs.reward_model == f"{job.folder}/model"


def test_runs_are_shared_and_told_apart():
    jobs = jobs_of(list(FIGURES), "quickstart", [0, 1])
    assert len({job.folder for job in jobs}) == len(jobs)
    every = [Job(one, 0, "quickstart") for figure in FIGURES.values() for one in figure.series]
    assert len({job.argument for job in every}) == len({job.folder for job in every})
    settings = {job.argument.partition("workdir=")[0] for job in jobs}
    assert len(settings) == len(jobs), "two folders with one config"
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)


def test_dry_run_lists_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(figures, "run_all", None)
    job = jobs_of(["4"], "tiny", [0])[0]
    finish(job)
    figures.main(options("4", "--seeds", "0", "1", "--dry_run"))
    out = capsys.readouterr().out
    assert f"finished  {job.folder}" in out
    # 60 s for 8 iterations is what the finished run took.
    assert "about 1.0 min  runs/ppo_max/tiny-vanilla-seed=1-iterations=8" in out
    assert "2 runs, about 1 minutes one by one" in out


def test_unknown_figure_and_scale(capsys):
    with pytest.raises(ValueError, match="no figure '5': choose some of 2, 3, 4, 6, 7, 8, 9"):
        figures.main(options("5"))
    with pytest.raises(SystemExit):
        figures.parse(["4", "--scale", "huge"])
    assert "invalid choice: 'huge'" in capsys.readouterr().err


def test_json_picture_and_claims_from_finished_runs(capsys):
    for job in jobs_of(["4"], "tiny", [0, 1, 2]):
        finish(job, commit=f"commit{job.seed}")
    figures.main(options("4"))
    folder = figures.Path("runs/figures/tiny")
    content = json.loads((folder / "figure_4.json").read_text())
    assert content["mixed"] == ["commit"]
    seed = content["series"]["vanilla"]["seeds"]["1"]
    assert (seed["status"], seed["minutes"], seed["commit"]) == ("finished", 1.0, "commit1")
    assert seed["curves"]["reward/mean"]["value"][-1] == 3.0
    assert seed["collapses"] == []
    assert seed["samples"] == 3 * [{"prompt": "It", "SFT": "is", "PPO": 80 * "is"}]
    assert "seed=S" in content["series"]["vanilla"]["command"]
    assert (folder / "figure_4.png").stat().st_size > 10_000
    text = (folder / "claims.md").read_text()
    row = next(line for line in text.splitlines() if "The reward rises while" in line)
    # The win rate ends at its best: a drop of 0 in every seed.
    assert "0, 0, 0 [0, 0]" in row and "**not reproduced**" in row


def test_intervals_of_win_rates_know_the_prompts_of_the_runs():
    for seed, prompts in ((0, 32), (1, 32)):
        finish(jobs_of(["4"], "tiny", [seed])[0], prompts=prompts)
    fell, *others = figures.collect("4", "tiny", [0, 1], {})["claims"]
    # The best of the curve minus its last value is 0 in each seed, give or take the prompts.
    low, high = fell["interval"]
    assert fell["values"] == {"0": 0.0, "1": 0.0} and low < 0 < high
    assert fell["interval_over"] == ["seeds", "prompts"]
    assert all(one["interval_over"] == ["seeds"] for one in others)


@pytest.mark.parametrize("name", ["2", "3", "10", "13"])
def test_figures_with_a_drawing_of_their_own(name):
    for job in jobs_of([name], "tiny", [0, 1]):
        finish(job)
    figures.main(options(name, "--seeds", "0", "1"))
    folder = figures.Path("runs/figures/tiny")
    assert (folder / f"figure_{name}.png").stat().st_size > 10_000
    content = json.loads((folder / f"figure_{name}.json").read_text())
    assert content["mixed"] == []
    seed = next(iter(content["series"].values()))["seeds"]["1"]
    values = [claim["values"]["1"] for claim in content["claims"]]
    if name == "2":
        assert seed["differences"]["right"] == 0.75 and values == [75.0]
        assert sum(seed["differences"]["counts"]) == 4 and 0.0 in seed["differences"]["edges"]
    elif name == "3":
        assert seed["hardware"] == "two cores" and "collapses" not in seed
        assert values[0] == 75.0 and len(values) == 2
    elif name == "10":
        assert seed["win_rates"]["language_model"] == WINS and values == [65.0]
    else:
        # The mean of the first and of the last ten of twenty iterations.
        assert values == [pytest.approx((4 + 8 * 14.5 / 19) / (4 + 8 * 4.5 / 19))]


def test_no_finished_run_is_said():
    with pytest.raises(ValueError, match="no run of figure 2 has finished"):
        figures.draw(figures.collect("2", "tiny", [0], {}), "x.png")


def test_a_seed_that_failed_is_said_drawn_and_counted(monkeypatch, capsys):
    good, bad = jobs_of(["4"], "tiny", [0, 1])
    finish(good)
    monkeypatch.setattr(
        Job, "command", ["-c", "print('a word'); raise SystemExit('no such thing')"]
    )
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        figures.main(options("4", "--seeds", "0", "1"))
    assert f"failed: {bad.folder}: status 1: no such thing" in capsys.readouterr().err
    content = json.loads(figures.Path("runs/figures/tiny/figure_4.json").read_text())
    assert content["series"]["vanilla"]["seeds"]["1"] == {"status": "status 1: no such thing"}
    assert content["claims"][0]["values"] == {"0": 0.0, "1": "NaN"}
    assert "failed" in figures.Path("runs/figures/tiny/claims.md").read_text()


def test_a_stopped_run_stops_the_suite(monkeypatch):
    monkeypatch.setattr(Job, "command", ["-c", "raise SystemExit(130)"])
    with pytest.raises(KeyboardInterrupt):
        figures.run_all(jobs_of(["4"], "tiny", [0]), 1)


def test_runs_side_by_side_have_their_own_cores(monkeypatch):
    code = (
        "import os, sys, json, pathlib; f = pathlib.Path(sys.argv[1]);"
        "(f / 'cores').write_text(str(sorted(os.sched_getaffinity(0))))"
    )
    monkeypatch.setattr(Job, "command", property(lambda job: ["-c", code, str(job.folder)]))
    jobs = jobs_of(["4"], "tiny", [0, 1])
    assert figures.run_all(jobs, 2) == {}
    cores = [(job.folder / "cores").read_text() for job in jobs]
    assert cores[0] != cores[1] or len(figures.os.sched_getaffinity(0)) == 1


def test_curves_are_thinned_to_means():
    log = {"step": np.arange(1000), "x": np.arange(1000.0), "y": np.full(1000, np.nan)}
    curves = figures.thinned(log, ["x", "y"])
    assert set(curves) == {"x"} and len(curves["x"]["value"]) == figures.POINTS
    assert curves["x"]["step"][0] == pytest.approx(curves["x"]["value"][0], abs=0.1)
    short = figures.thinned({"step": np.arange(3), "x": np.array([1.0, np.nan, 2.0])}, ["x"])
    assert short == {"x": {"step": [0.0, 2.0], "value": [1.0, 2.0]}}


def test_labels_fit_the_colours():
    for figure in FIGURES.values():
        assert len(figure.series) <= 7
    assert Series("a", ("vanilla",)).argument("tiny", 0).startswith("tiny,vanilla,seed=0,")
