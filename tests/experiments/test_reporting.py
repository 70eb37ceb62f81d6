"""What the report says of the reward model, and of runs without a KL penalty."""

import json
import types

import numpy as np
import pytest

from experiments import reporting
from rlhf_jax.rollouts.respond import Responses


def responses(reward=0.0, perplexity=100.0, length=24.0, distinct=0.8) -> Responses:
    statistics = {
        "reward/mean": reward,
        "policy/perplexity": perplexity,
        "response/length": length,
        "response/distinct_2": distinct,
    }
    return Responses([], [], np.zeros(0), {}, statistics)


def log_wins(folder, wins):
    lines = [{"step": n, "time": 0.0, "win_rate/vader": win} for n, win in enumerate(wins)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def verdict(tmp_path, policy: Responses, wins=(0.5, 0.7, 0.9)) -> str:
    log_wins(tmp_path, wins)
    (line,) = reporting.figure_4(tmp_path, {"SFT": responses(), "vanilla": policy})
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("changes", "wins", "found"),
    [
        ({"perplexity": 1.05}, (0.5, 0.9), "gave way: perplexity 100 → 1.05."),
        ({"perplexity": 201.0}, (0.5, 0.9), "gave way: perplexity 100 → 201."),
        ({"length": 49.0}, (0.5, 0.9), "gave way: length 24 → 49."),
        ({"distinct": 0.55}, (0.5, 0.9), "gave way: distinct-2 0.8 → 0.55."),
        ({}, (0.5, 0.8, 0.7), "gave way: win rate by vader 80% → 70%."),
        (
            {"length": 5.0, "distinct": 0.1},
            (0.5, 0.9),
            "gave way: length 24 → 5, distinct-2 0.8 → 0.1.",
        ),
    ],
)
def test_each_sign_of_figure_4_is_found(tmp_path, changes, wins, found):
    line = verdict(tmp_path, responses(reward=2.0, **changes), wins)
    assert line.endswith(found) and "This run shows it: reward 0 → 2;" in line


@pytest.mark.parametrize(
    ("policy", "found"),
    [
        (responses(reward=2.0, perplexity=60.0, length=13.0, distinct=0.6), "gave way: nothing."),
        (responses(reward=-1.0, distinct=0.1), "gave way: distinct-2 0.8 → 0.1."),
    ],
)
def test_a_run_that_does_not_show_it_says_so(tmp_path, policy, found):
    line = verdict(tmp_path, policy)
    assert "**does not show it**" in line and line.endswith(found)


def settings_with(reward_model: str):
    return types.SimpleNamespace(inputs=types.SimpleNamespace(reward_model=reward_model))


def reward_target(tmp_path, accuracy: float):
    summary = {"accuracy": accuracy, "judges_accuracy": {"vader": 0.7}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return reporting.reward_model_targets(settings_with(str(tmp_path / "model")))


def test_the_report_says_by_how_much_the_reward_model_falls_short(tmp_path):
    (missed,) = reward_target(tmp_path, 0.66)
    assert not missed.reached
    assert (missed.wanted, missed.got) == ("> 70.0%, that of vader", "66.0% (-4.0 points)")
    (reached,) = reward_target(tmp_path, 0.78)
    assert reached.reached and reached.got == "78.0% (+8.0 points)"


def test_a_reward_model_from_elsewhere_has_no_target(tmp_path):
    assert reporting.reward_model_targets(settings_with("org/reward-model")) == []
