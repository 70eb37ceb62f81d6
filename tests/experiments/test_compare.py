"""Comparing runs: which folders are whose, what is drawn, what is refused."""

import json
from pathlib import Path

import pytest

from experiments import compare
from rlhf_jax.evaluation.panels import PPO_PANELS, REWARD_MODEL_PANELS

PPO_LOG = {"reward/mean": 1.0, "policy/entropy": 2.0, "win_rate/vader": 0.5, "win_rate/other": 0.4}
REWARD_LOG = {"reward/accuracy": 0.6, "eval/accuracy": 0.7, "loss/bradley_terry": 0.69}


def made(folder: Path, experiment: str, log: dict, summary: dict, report: dict | None = None):
    """The folder of a finished run."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"experiment": experiment}}))
    rows = [{"step": step, **log} for step in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def ppo_run(folder: Path, reward: float = 1.0) -> Path:
    report = {
        "summary": {"SFT": {"reward": 0.0}, "PPO-max": {"reward": reward, "distinct-2": 0.5}},
        "win_rates": {"PPO-max against SFT, vader": {"win_rate": 0.8}},
    }
    summary = {"win_rates": {"vader": {"win_rate": 0.8}}}
    return made(folder, "ppo_max", PPO_LOG, summary, report)


def reward_run(folder: Path, accuracy: float = 0.75) -> Path:
    summary = {"accuracy": accuracy, "judges_accuracy": {"vader": 0.7}}
    return made(folder, "reward_model", REWARD_LOG, summary)


def test_labels_and_folders_may_hold_commas_and_equals_signs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    domains = "runs/tiny-data.domains=('movie', 'nyt')"
    for name in (domains, "runs/a", "runs/seed=1"):
        ppo_run(Path(name))
    as_text = lambda *a: {k: [str(f) for f in v] for k, v in compare.parse_runs(a).items()}  # noqa: E731
    assert as_text("A, with a comma=runs/a") == {"A, with a comma": ["runs/a"]}
    assert as_text("clip=0.1=runs/seed=1,runs/a") == {"clip=0.1": ["runs/seed=1", "runs/a"]}
    assert as_text(f"both={domains},runs/a") == {"both": [domains, "runs/a"]}
    assert as_text(domains, "runs/seed=1") == {
        "tiny-data.domains=('movie', 'nyt')": [domains],
        "seed=1": ["runs/seed=1"],
    }
    with pytest.raises(ValueError, match="the label 'x' is given twice"):
        compare.parse_runs(["x=runs/a", "x=runs/seed=1"])


def unfinished(folder):
    (ppo_run(folder) / "summary.json").unlink()


def not_a_run(folder):
    reward_run(folder / "one")


def of_another_kind(folder):
    made(folder, "preflight", PPO_LOG, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is no folder: give the folder of a finished run"),
        (not_a_run, r"not the folder of a run \(no config.json\); it holds the runs one$"),
        (unfinished, "has not finished"),
        (of_another_kind, "a run of 'preflight': give one of sft, reward_model, ppo_max, dpo"),
    ],
)
def test_a_folder_that_is_no_finished_run_is_refused(tmp_path, make, message):
    make(tmp_path / "x")
    for argument in (f"A={tmp_path / 'x'}", str(tmp_path / "x")):
        with pytest.raises(ValueError, match=message) as caught:
            compare.parse_runs([argument])
        assert str(tmp_path / "x") in str(caught.value) and "\n" not in str(caught.value)


def test_panels_are_those_of_the_experiments_or_those_asked_for(tmp_path):
    ppo, reward = ppo_run(tmp_path / "ppo"), reward_run(tmp_path / "reward")
    assert compare.choose_panels({"a": [ppo]}) == PPO_PANELS
    assert compare.choose_panels({"a": [reward]}) == REWARD_MODEL_PANELS
    both = {panel.title for panel in compare.choose_panels({"a": [reward], "b": [ppo]})}
    assert {"Pair accuracy", "Reward"} <= both
    names = ["win rate against sft", "policy/entropy", "reward/mean", "win_rate/*"]
    chosen = compare.choose_panels({"a": [ppo]}, names)
    assert [panel.title for panel in chosen] == [
        "Win rate against SFT",
        "Entropy",
        "Reward",
        "Win rate against SFT",
    ]
    (bare,) = compare.choose_panels({"a": [reward]}, ["eval/accuracy"])
    assert list(bare.metrics) == ["eval/accuracy"]
    with pytest.raises(ValueError, match=r"no metric 'policy/no_such': panels are Reward, .*metri"):
        compare.choose_panels({"a": [ppo]}, ["policy/no_such"])
    with pytest.raises(ValueError, match="'Perplexitty'"):
        compare.choose_panels({"a": [ppo]}, ["Perplexitty"])


def test_numbers_over_seeds_of_policies_and_of_reward_models(tmp_path):
    ppo = [ppo_run(tmp_path / f"ppo{i}", reward=float(i)) for i in range(3)]
    reward = reward_run(tmp_path / "reward")
    first, second = compare.table({"PPO": ppo, "rm": [reward]})
    assert first["run"] == "PPO" and first["reward"] == "1 [0, 2]"
    assert first["win rate against SFT by vader"] == "0.8 [0.8, 0.8]"
    assert first["held-out pair accuracy"] == second["reward"] == "–"
    assert second["held-out pair accuracy"] == "0.75"
    assert second["pair accuracy of vader"] == "0.7"


def test_more_runs_than_colours_are_drawn_and_written(tmp_path, capsys):
    names = [f"m{i}" for i in range(9)]
    for i, name in enumerate(names):
        reward_run(tmp_path / name, accuracy=0.7 + i / 100)
    out = tmp_path / "out"
    arguments = [str(tmp_path / name) for name in names]
    compare.main(arguments, str(out), ["Pair accuracy"])
    assert (out / "curves.png").stat().st_size > 1000
    table = (out / "table.md").read_text()
    assert all(f"| {name} " in table or f" {name} |" in table for name in names) and "0.78" in table
    assert table in capsys.readouterr().out + "\n"


def test_the_command_line(tmp_path):
    options = compare.parse(["a=b", "c", "--panels", "Reward", "win_rate/*", "--out", "x"])
    assert (options.runs, options.panels, options.out) == (
        ["a=b", "c"],
        ["Reward", "win_rate/*"],
        "x",
    )
