"""Constitutional AI at `tiny`: rounds that are kept, SFT on them, what follows from the model."""

import importlib
import itertools
import json
from pathlib import Path

import pytest

from configs import ai_labels, common, ppo_max, reward_model
from configs import constitutional as configs
from experiments import ai_labels as labelling
from experiments import command, constitutional, judging, stages
from experiments import ppo_max as policies
from experiments import reward_model as scorers
from experiments.constitutional import as_document, request_of, training_rows, whole
from rlhf_jax.methods import ai_feedback
from rlhf_jax.methods.constitution import load_constitution
from rlhf_jax.training.record import read_summary

TASK = load_constitution("reviews")
NO_TASK = load_constitution("harmless")
CHAT = {"prompt": [{"role": "system", "content": "Review it."}], "opening": "The film"}
TEXT = {"prompt": "The film"}
ASKED = {"prompt": [{"role": "user", "content": "how do I?"}]}


def config_of(chain, folder: Path, argument: str = ""):
    parts = ["tiny", argument, "sharding.devices=1", "log.tensorboard=False"]
    config = configs.get_config(",".join(part for part in parts if part))
    config.workdir = str(folder)
    config.inputs.policy = str(chain.sft)
    return config


def test_a_prompt_is_the_beginning_of_the_text_or_what_was_asked():
    assert [request_of(row, TASK) for row in (CHAT, TEXT)] == [TASK.task] * 2
    assert request_of(ASKED, NO_TASK) == "how do I?" and request_of(TEXT, NO_TASK) == "The film"
    assert [whole(row, " x", TASK) for row in (CHAT, TEXT)] == ["The film x"] * 2
    assert [whole(row, "x", NO_TASK) for row in (ASKED, TEXT)] == ["x", "x"]
    assert as_document(TEXT, "All.", TASK) == {"text": "All."}
    assert as_document(CHAT, "All.", TASK) == {"prompt": CHAT["prompt"], "response": "All."}
    assert as_document(TEXT, "No.", NO_TASK) == {"prompt": "The film", "response": "No."}


def test_sft_reads_the_revisions_of_all_rounds_and_ordinary_documents(chain, tmp_path):
    config = config_of(chain, tmp_path / "run", "revise.ordinary=0.5")
    settings = command.open_config("constitutional", config, constitutional.Settings)
    rounds = [["a one.", "b one.", " "], ["a two.", "b two.", "c two."]]
    rows = training_rows(settings, settings.task(), [TEXT] * 3, rounds)
    texts = [row["text"] for row in rows]
    assert texts[:5] == ["a one.", "b one.", "a two.", "b two.", "c two."]
    assert len(texts) == 5 + 2 and all(len(text.split()) > 1 for text in texts[5:])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("revise.constitution=nothing", "revise.constitution: no constitution 'nothing'"),
        ("revise.max_length=6", "revise.max_length=6 must be above revise.max_new_tokens=6"),
        ("data.max_length=8", "data.max_length=8 leaves no room for a prompt"),
        ("revise.rounds=0", "revise.rounds=0 must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused_at_the_start(argument, message):
    with pytest.raises(ValueError, match=message) as told:
        constitutional.main(configs.get_config(f"tiny,{argument}"))
    assert "\n" not in str(told.value)


def test_labels_by_principles_need_a_template_that_asks_by_them():
    for argument in ("labels.template=compare_cai", "labels.constitution=harmless"):
        with pytest.raises(ValueError, match="do not go together") as told:
            labelling.main(ai_labels.get_config(f"tiny,{argument}"))
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("scale", ["tiny", "smollm2", "smollm2,harm"])
def test_each_stage_names_the_one_before(scale):
    policy = common.resolve(ppo_max.get_config(f"{scale},constitutional,seed=2"))
    folder = f"runs/constitutional/{scale.replace(',', '-')}-seed=2"
    assert policy.inputs.model == policy.inputs.reference == f"{folder}/model"
    argument = common.stage_argument("constitutional", policy)
    assert common.resolve(configs.get_config(argument)).workdir == folder
    argument = common.stage_argument("reward_model", policy, "constitutional")
    scorer = common.resolve(reward_model.get_config(argument))
    assert policy.inputs.reward_model == f"{scorer.workdir}/model"
    argument = common.stage_argument("ai_labels", scorer, "constitutional")
    labels = common.resolve(ai_labels.get_config(argument))
    assert scorer.inputs.labels == f"{labels.workdir}/labels" and scorer.loss.labels == "soft"
    assert labels.inputs.policy == f"{folder}/model"
    assert labels.labels.template == "compare_cai"
    wanted = "harmless" if "harm" in scale else "reviews"
    assert labels.labels.constitution == wanted
    assert common.resolve(configs.get_config(f"{scale},seed=2")).revise.constitution == wanted


def test_what_is_missing_is_built_by_the_stage_that_makes_it(monkeypatch):
    """PPO-max asks for SL-CAI, the reward model for labels, and labels for SL-CAI again."""
    asked = []

    def require(folder, *, stage="", argument="", build=False):
        module = importlib.import_module(f"configs.{stage}")
        asked.append(stage)
        leaf = "labels" if stage == "ai_labels" else "model"
        made = common.resolve(module.get_config(argument)).workdir
        assert build and folder == f"{made}/{leaf}", (folder, made)
        return folder

    monkeypatch.setattr(stages, "require", require)
    monkeypatch.setattr(stages, "check_lengths", lambda *_, **__: None)
    monkeypatch.setattr(judging, "require_judges", lambda *_: {})
    for variant, start in (("constitutional", "constitutional"), ("rlaif", "sft")):
        config = ppo_max.get_config(f"tiny,half,{variant}")
        settings = command.open_config("ppo_max", config, policies.Settings)
        policies.require_stages(settings)
        assert asked == [start, start, "reward_model"]
        asked.clear()
        argument = common.stage_argument("reward_model", settings, settings.inputs.reward_variant)
        config = reward_model.get_config(argument)
        scorers.require_labels(command.open_config("reward_model", config, scorers.Settings))
        assert asked == ["ai_labels"]
        asked.clear()


def test_rounds_are_kept_and_not_done_again(chain, tmp_path, monkeypatch, capsys):
    folder, rounds = tmp_path / "run", []
    real = constitutional.one_round

    def stops(settings, asker, rows, responses, number):
        if number == 2 and not rounds.count(2):
            rounds.append(number)
            raise KeyboardInterrupt
        rounds.append(number)
        return real(settings, asker, rows, responses, number)

    monkeypatch.setattr(constitutional, "one_round", stops)
    with pytest.raises(KeyboardInterrupt):
        constitutional.main(config_of(chain, folder))
    constitutional.main(config_of(chain, folder))
    assert rounds == [1, 2, 2]
    kept = [
        [json.loads(line) for line in (folder / "revisions" / f"{n}.jsonl").open()]
        for n in range(3)
    ]
    assert [len(some) for some in kept] == [16, 16, 16]
    for before, after in itertools.pairwise(kept):
        assert [one["before"] for one in after] == [one["response"] for one in before]
        assert all(one["response"] in (one["revision"], one["before"]) for one in after)
    assert {one["principle"] for one in kept[1]} <= {one.name for one in TASK.principles}
    summary = read_summary(folder)
    assert len(summary["rounds"]) == 3 and "revise/unchanged" not in summary["rounds"][0]
    assert set(summary["policies"]) == {"before", "after"} and "vader" in summary["win_rates"]
    assert (folder / "model" / "config.json").exists()
    report = (folder / "report.md").read_text()
    assert "## Transcripts" in report and "most frequent sentence" in report
    assert summary["rounds"][1]["revise/cut"] > 16  # examples that did not fit are counted
    capsys.readouterr()
    constitutional.main(config_of(chain, folder))
    assert "has finished already" in capsys.readouterr().out


def test_each_pair_is_compared_by_a_principle_that_is_drawn(monkeypatch):
    config = ai_labels.get_config("tiny,constitutional")
    settings = command.open_config("ai_labels", config, labelling.Settings)
    told = {}
    monkeypatch.setattr(
        ai_feedback, "label", lambda judge, pairs, template, **how: told.update(how)
    )
    pairs = [labelling.Pair({"prompt": "q"}, ("a", "b"))] * 40
    labelling.Labeller(None, settings)(pairs, "train")
    questions = told["questions"]
    assert len(questions) == 40
    assert set(questions) == {one.comparison for one in TASK.principles}
    labelling.Labeller(None, settings)(pairs, "test")
    assert told["questions"] != questions
