"""Two runs side by side: the same prompts, judges that score and judges that compare."""

import json

import numpy as np
import pytest

from experiments import judge
from experiments.judge import on_the_same_prompts, prefers_longer, read_run
from rlhf_jax.methods import ai_feedback
from rlhf_jax.methods.ai_feedback import Compared, Comparison
from tests.experiments.test_ai_labels import labels


def a_run(folder, label, answers, baseline="dull", finished=True):
    """The files of a run that are read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {"label": label}}))
    rows = [
        {"prompt": prompt, "responses": {"SFT": f"{baseline} {n}", label: response}, "judged": {}}
        for n, (prompt, response) in enumerate(answers)
    ]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "summary.json").write_text("{}")
    return str(folder)


ANSWERS = [("The film ", "is a great joy"), ("The film ", "is awful"), ("A book ", "was good")]


def test_a_run_gives_its_own_answers_or_those_of_another_policy(tmp_path):
    where = a_run(tmp_path / "run", "PPO-max", ANSWERS)
    assert read_run(where) == (f"{where} (PPO-max)", ANSWERS)
    name, answers = read_run(f"{where}:SFT")
    assert name == f"{where} (SFT)" and answers[1] == ("The film ", "dull 1")
    with pytest.raises(ValueError, match=r"has no answers of 'DPO': it has SFT, PPO-max"):
        read_run(f"{where}:DPO")
    unfinished = a_run(tmp_path / "begun", "PPO-max", ANSWERS, finished=False)
    for missing in (unfinished, str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match=r"holds no finished run with responses.jsonl"):
            read_run(missing)


def test_pairs_are_of_the_same_prompts_and_a_prompt_asked_twice_is_two():
    other = [("A book ", "bores"), ("The film ", "x"), ("Else ", "y"), ("The film ", "z")]
    wanted = [
        Comparison("The film ", "is a great joy", "x"),
        Comparison("The film ", "is awful", "z"),
        Comparison("A book ", "was good", "bores"),
    ]
    assert on_the_same_prompts(ANSWERS, other) == wanted
    assert on_the_same_prompts(ANSWERS, other, most=1) == wanted[:1]
    with pytest.raises(ValueError, match="answered no prompt in common"):
        on_the_same_prompts(ANSWERS, [("Else ", "y")])


def test_a_comparison_counts_if_it_survives_the_swap(monkeypatch):
    told: Compared = labels(0.9, 0.9, 0.2, 0.6, second=[0.6, 0.3, 0.1, 0.5])
    monkeypatch.setattr(ai_feedback, "compare", lambda model, pairs, template: told)
    model = ai_feedback.FeedbackModel(None, None, name="fake")
    pairs = [Comparison("", "a", "b")] * 4
    verdict = judge.by_comparison(model, pairs, ai_feedback.load_template("compare_reviews"))
    assert verdict.outcomes.tolist() == [1.0, 0.5, 0.0, 0.5]
    assert verdict.habits["feedback/flip_rate"] == 0.25
    found = judge.measured(verdict, pairs)
    assert (found["win"], found["tie"], found["lose"]) == (0.25, 0.5, 0.25)


def test_a_love_of_length_is_seen_among_decided_pairs_alone():
    outcomes = np.array([1, 1, 0, 0.5, 1])
    assert prefers_longer(outcomes, np.array([5, -2, -3, 9, 0])) == 2 / 3
    assert prefers_longer(np.array([0.5, 1]), np.array([3, 0])) == 0.5


def test_two_runs_by_two_judges(tmp_path, monkeypatch, capsys):
    good = a_run(tmp_path / "a", "PPO-max", [(p, "is great and wonderful") for p, _ in ANSWERS])
    bad = a_run(tmp_path / "b", "vanilla", [(p, "is a horrible mess") for p, _ in ANSWERS])
    monkeypatch.setattr(
        judge,
        "by_comparison",
        lambda model, pairs, template: judge.Verdict(
            "fake compares", np.array([1.0, 0.5, 0.0]), {"feedback/flip_rate": 1 / 3}
        ),
    )
    monkeypatch.setattr(ai_feedback, "load_feedback_model", lambda folder, **_: None)
    monkeypatch.setattr(judge.stages, "require", lambda folder: folder)
    out = tmp_path / "out"
    arguments = ["--a", good, "--b", bad, "--by", "vader", "compare", "--out", str(out)]
    judge.main(judge.parse(arguments))
    content = json.loads((out / "judge.json").read_text())
    vader, fake = content["judges"]
    assert vader["win"] == 1 and fake["tie"] == pytest.approx(1 / 3)
    assert content["prompts"] == 3 and content["kappa"][0]["judges"] == ["VADER", "fake compares"]
    assert "| VADER" in (out / "judge.md").read_text() and (out / "judge.png").exists()
    assert "100.0% / 0.0% / 0.0%" in capsys.readouterr().out


def test_what_cannot_be_asked_is_refused(capsys):
    for wrong in (["--prompts", "-1"], ["--by", "vader", "vader"]):
        with pytest.raises(SystemExit):
            judge.parse(["--a", "x", "--b", "y", *wrong])
    said = capsys.readouterr().err
    assert "--prompts -1" in said and "names a judge twice" in said
