"""Judges of a run: built where missing, and never taught by what the policy learns from."""

import json
import shutil

import pytest

from configs import dpo as dpo_configs
from configs import ppo_max as ppo_configs
from configs import reward_model as reward_configs
from experiments import command, dpo, judges, judging, ppo_max
from rlhf_jax.data.splits import half_of
from rlhf_jax.runtime.files import read_json
from rlhf_jax.runtime.metrics import read_metrics

EXPERIMENTS = {"ppo_max": (ppo_configs, ppo_max), "dpo": (dpo_configs, dpo)}


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """No run is there."""
    monkeypatch.chdir(tmp_path)


def settings(argument, experiment="ppo_max", **inputs):
    configs, module = EXPERIMENTS[experiment]
    config = configs.get_config(f"{argument},inputs.build=False")
    config.inputs.update(inputs)
    return command.open_config(experiment, config, module.Settings)


def made(folder, **data):
    """A reward model of a run, as far as its data go; returns the model's folder."""
    config = reward_configs.get_config("tiny")
    config.data.update(data)
    (folder / "model").mkdir(parents=True)
    content = json.dumps({"config": config.to_dict()})
    for file, text in (
        ("config.json", content),
        ("summary.json", "{}"),
        ("model/config.json", "{}"),
    ):
        (folder / file).write_text(text)
    return str(folder / "model")


def test_gold_is_named_by_the_scale_and_by_nothing_else():
    command_line = "python -m experiments.reward_model --config configs/reward_model.py:tiny,gold"
    for argument in ("tiny,half", "tiny,half,no_kl,seed=2"):
        with pytest.raises(FileNotFoundError) as error:
            judging.require_judges(("vader", "gold"), settings(argument))
        assert str(error.value) == (
            f"runs/reward_model/tiny-gold/model is missing: run `{command_line}` first"
        )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_run_that_learns_from_the_texts_of_gold_is_refused_before_anything_is_made(experiment):
    with pytest.raises(ValueError, match=r"judge 'gold' has learned from 104 of the 200 texts of "):
        judging.require_judges(("gold",), settings("tiny", experiment))
    with pytest.raises(FileNotFoundError, match="tiny-gold/model is missing"):
        judging.require_judges(("gold",), settings("tiny,half", experiment))


def test_ppo_refuses_before_it_trains_a_stage():
    with pytest.raises(ValueError, match="which the policy learns from: add the variant half"):
        ppo_max.require_stages(settings("tiny,judges=('gold',)"))


def test_what_was_made_counts_and_not_what_its_folder_is_called(tmp_path):
    first, second, both = (
        made(tmp_path / name, half=half)
        for name, half in (("gold", "first"), ("half", "second"), ("all", ""))
    )
    for policy, judge, apart in (
        (first, second, True),
        (second, first, True),
        (both, second, False),
        (first, both, False),
        (first, first, False),
    ):
        run = settings("tiny", reward_model=policy)
        if apart:
            assert list(judging.require_judges((f"gold:{judge}",), run)) == [f"gold:{judge}"]
            continue
        for name in ("gold", "reward_model"):
            with pytest.raises(ValueError, match=r"^the judge .*, which the policy learns from"):
                judging.require_judges((f"{name}:{judge}",), run)


def test_the_same_model_is_refused_and_an_unknown_one_is_said(tmp_path, capsys):
    unknown = str(tmp_path / "downloaded")
    run = settings("tiny", reward_model=unknown)
    with pytest.raises(ValueError, match=f"judge 'reward_model:{unknown}' is {unknown}, which"):
        judging.require_judges((f"reward_model:{unknown}",), run)
    assert capsys.readouterr().out == ""
    other = made(tmp_path / "other")
    judging.require_judges((f"gold:{other}",), run)
    assert capsys.readouterr().out == (
        f"note: whether the judge 'gold:{other}' has learned from texts of {unknown} is not known\n"
    )


def test_rows_that_nobody_rated_are_told_apart_by_their_source(tmp_path, capsys):
    mine = {"source": "jsonl:mine.jsonl"}
    one, same = (made(tmp_path / name, **mine) for name in ("one", "same"))
    with pytest.raises(ValueError, match="has learned from the texts of"):
        judging.require_judges((f"gold:{same}",), settings("tiny", reward_model=one))
    judging.require_judges((f"gold:{same}",), settings("tiny", reward_model=made(tmp_path / "b")))
    assert "is not known" in capsys.readouterr().out


def test_another_task_has_no_gold():
    with pytest.raises(ValueError, match=r"learned from reviews, and data\.source='hh:x' is anoth"):
        judging.require_judges(("gold",), settings("tiny,data.source=hh:x"))
    with pytest.raises(ValueError, match="the variant gold takes half of the rated reviews"):
        judging.require_judges(("gold",), settings("paper_en"))


def test_training_texts_are_those_of_the_half():
    data = reward_configs.get_config("quickstart,gold").data.to_dict()
    texts = judging.training_texts(data)
    assert len(texts) > 5000 and {half_of(text) for text in texts} == {"second"}
    assert not texts & judging.training_texts(data | {"half": "first"})


def test_a_model_of_a_chat_is_asked_as_it_was_trained(tmp_path):
    chat = made(tmp_path / "chat", half="second", instruction="Review a movie.")
    run = settings("tiny", reward_model=made(tmp_path / "first", half="first"))
    found = judging.require_judges((f"gold:{chat}",), run)
    assert found[f"gold:{chat}"] == {"default_model": chat, "instruction": "Review a movie."}


def of_half(folder, to, half):
    """A copy of a run that says that it has read a half."""
    shutil.copytree(folder, to)
    config = read_json(to / "config.json", "")
    config["config"]["data"]["half"] = half
    (to / "config.json").write_text(json.dumps(config))
    return str(to / "model")


def test_ppo_logs_and_reports_gold_beside_vader(chain, tmp_path):
    first, second = (
        of_half(chain.reward_model.parent, tmp_path / half, half) for half in ("first", "second")
    )
    config = ppo_configs.get_config("tiny,sharding.devices=1,half,train.iterations=2,eval.every=1")
    config.workdir, config.judges = str(tmp_path / "run"), ("vader", f"gold:{second}")
    config.inputs.update(model=str(chain.sft), reference=str(chain.sft), reward_model=first)
    ppo_max.main(config)
    log = read_metrics(tmp_path / "run")
    assert {"win_rate/gold", "judge/gold", "win_rate/vader"} <= set(log)
    summary = read_json(tmp_path / "run" / "summary.json", "")
    assert list(summary["win_rates"]) == ["vader", "gold"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "second judges by a reward model" in report and "second orders" in report
    judge = judges.build(f"reward_model:{second}", examples=True)
    assert judge.name == "second" and judge(["a fine film"]).shape == (1,)
