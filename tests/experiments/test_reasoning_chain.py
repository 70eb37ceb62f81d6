"""From sums in steps to reward models of solutions, search and expert iteration, at `tiny`."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from configs import common
from experiments import solving
from rlhf_jax.data.sets.arithmetic import load_problems
from rlhf_jax.data.solutions import Solution, write_solutions
from rlhf_jax.runtime.metrics import read_rows
from rlhf_jax.training.record import read_summary

# One worker makes the stages once for all of them.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("reasoning")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Of all runs: a stage that one of them has made serves the others."""
    return tmp_path_factory.mktemp("reasoning")


def run(experiment: str, argument: str, root: Path, **settings) -> Path:
    module = importlib.import_module(f"configs.{experiment}")
    parts = ["tiny", argument, "sharding.devices=1", "log.tensorboard=False"]
    config = module.get_config(",".join(part for part in parts if part))
    config.root = str(root)
    for key, value in settings.items():
        common.set_key(config, key.replace("__", "."), value)
    importlib.import_module(f"experiments.{experiment}").main(config)
    return Path(common.resolve(config).workdir)


@pytest.mark.parametrize("variant", ["", "outcome", "rollouts", "likelihood"])
def test_a_reward_model_of_solutions(root, variant):
    # Every beginning of a solution is completed: few problems have many.
    few = {"data__problems": 8} if variant == "rollouts" else {}
    folder = run("process_reward", variant, root, **few)
    summary = read_summary(folder)
    numbers = summary["numbers"]
    assert summary["held_out_solutions"] > 0
    assert 0 <= numbers["calibration_error"] <= 1 and 0 <= numbers["outcome_accuracy"] <= 1
    assert ("label_agreement" in numbers) == (variant == "rollouts")
    losses = [row["loss/step_labels"] for _, row in read_rows(folder)]
    assert losses[-1] < losses[0]
    report = (folder / "report.md").read_text()
    assert "| step" in report and "P(right)" in report
    # It is a language model, whose run says what its label tokens are.
    wanted = variant if variant in ("outcome", "likelihood") else "process"
    assert solving.learned_by(str(folder / "model")).supervision == wanted


def test_labels_by_people(root, tmp_path):
    """Solutions whose steps a file rates; no policy writes any."""
    rows = [
        Solution(p.question, p.steps, (1,) * (len(p.steps) - 1) + (-1 if i % 2 else 1,), not i % 2)
        for i, p in enumerate(load_problems("chain_sum", "all", 400))
    ]
    write_solutions(tmp_path / "rated.jsonl", rows)
    policy = run("sft", "arithmetic", root)
    folder = run(
        "process_reward",
        "human",
        root,
        data__source=f"solutions:{tmp_path / 'rated.jsonl'}",
        inputs__policy=str(policy / "model"),
        workdir=str(tmp_path / "run"),
    )
    numbers = read_summary(folder)["numbers"]
    assert 0.5 < numbers["right_steps"] < 1


def test_search_compares_every_way_over_all_seeds(root):
    folder = run("search", "", root)
    content = json.loads((folder / "search.json").read_text())
    by = {(one["name"], one["n"]): one for one in content["results"]}
    assert {n for name, n in by if name == "majority"} == {1, 2, 4}
    for name in ("greedy", "beam", "dvts", "prm_vote", "orm_best"):
        assert len(by[name, 4]["seeds"]) == 2 and by[name, 4]["tokens"] > 0
    for n in (1, 2, 4):
        assert by["oracle", n]["accuracy"] >= by["majority", n]["accuracy"]
        assert by["oracle", n]["accuracy"] >= by["orm_vote", n]["accuracy"]
    assert by["majority", 1]["accuracy"] == by["pass_at_1", 1]["accuracy"]
    assert by["majority", 4]["tokens"] > by["pass_at_1", 4]["tokens"]
    assert (folder / "search.png").stat().st_size > 10_000
    assert "PRM-weighted vote minus majority" in (folder / "report.md").read_text()


@pytest.mark.parametrize("variant", ["", "orm", "prm", "control", "continued"])
def test_rounds_of_expert_iteration(root, variant, monkeypatch):
    # So small a policy is right by luck; the verifier is lenient, and the rounds have to do.
    lenient(monkeypatch)
    folder = run("expert_iteration", variant, root, workdir=str(root / f"rounds-{variant}"))
    log = [row for _, row in read_rows(folder)]
    assert len(log) == 3
    assert log[0]["policy/kl_ref_sequence"] == pytest.approx(0, abs=1e-4)
    assert log[1]["policy/kl_ref_sequence"] != log[0]["policy/kl_ref_sequence"]
    pool = [(folder / "pool" / f"{n}.jsonl").read_text().splitlines() for n in (1, 2)]
    assert log[1]["improve/kept"] == len(pool[0]) > 0
    assert log[2]["improve/pool"] == len(set(pool[0]) | set(pool[1]))
    summary = read_summary(folder)
    assert summary["best_round"] == np.argmax([row["solve/pass_at_1"] for row in log])
    assert len(summary["units"]["SFT"]) == 8
    assert (folder / "model" / "config.json").exists()


def lenient(monkeypatch):
    """A verifier by which answers with an even number of letters are right."""
    verify = solving.arithmetic.verify

    def judged(problem, text):
        return type(verify(problem, text))(
            verify(problem, text).steps, str(len(text)), len(text) % 2 == 0
        )

    monkeypatch.setattr(solving.arithmetic, "verify", judged)


def test_a_round_that_is_done_is_not_done_again(root, monkeypatch):
    lenient(monkeypatch)
    whole = run("expert_iteration", "", root, workdir=str(root / "whole"))
    seen = []

    class Enough(Exception):
        pass

    def stop(step, metrics):
        seen.append(step)
        if step == 2:  # before its round is saved
            raise Enough

    module = importlib.import_module("experiments.expert_iteration")
    config = importlib.import_module("configs.expert_iteration").get_config(
        "tiny,sharding.devices=1,log.tensorboard=False"
    )
    config.root, config.workdir = str(root), str(root / "parts")
    with pytest.raises(Enough):
        module.main(config, stop)
    trained = []
    distil = module.distil
    monkeypatch.setattr(module, "distil", lambda *a: trained.append(a[-1]) or distil(*a))
    module.main(config)
    assert trained == [2]
    for name in ("pool/1.jsonl", "pool/2.jsonl"):
        assert (root / "parts" / name).read_text() == (whole / name).read_text()
    before, after = (read_summary(folder)["validation"] for folder in (whole, root / "parts"))
    assert before == after


def test_best_of_n_by_the_reward_model_of_reviews(root):
    folder = run("expert_iteration", "reviews", root)
    log = [row for _, row in read_rows(folder)]
    assert log[0]["win_rate/vader"] == 0.5
    assert {"reward/mean", "judge/vader", "policy/kl_ref_sequence"} <= set(log[2])
    assert "| judge/vader" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("experiment", "settings", "message"),
    [
        ("process_reward", {"data__max_length": 20}, "longer than data.max_length=20 less"),
        ("process_reward", {"loss__tokens": ("bad", "?", "+")}, "'bad', which is"),
        ("process_reward", {"samples__rows": 1}, "samples.rows=1 must be at least"),
        ("process_reward", {"train__row_length": 10}, "train.row_length=10 must be at least"),
        ("search", {"search__beams": 3}, "must be divisible by search.beams=3"),
        ("search", {"search__beams": 0}, "search.beams=0"),
        ("search", {"data__source": "reviews"}, "has no verifier"),
        (
            "search",
            {"inputs__prm": ".", "inputs__orm": "."},
            "no model of experiments.process_reward",
        ),
    ],
)
def test_bad_input_is_said_in_one_line(root, experiment, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        run(experiment, "", root, workdir=str(tmp_path / "run"), **settings)
    assert "\n" not in str(error.value)
