"""RLAIF: labels by a judge, a reward model of these, PPO-max on it; each builds the one before."""

import json
import shutil

import pytest

from configs import ai_labels, common, ppo_max, reward_model
from experiments import judging
from experiments import ppo_max as experiment
from rlhf_jax.training.record import read_summary


def test_each_stage_names_the_one_before():
    policy = common.resolve(ppo_max.get_config("tiny,rlaif,half,seed=3"))
    argument = common.stage_argument("reward_model", policy, "ai_labels")
    assert argument == "tiny,half,ai_labels,seed=3"
    scorer = common.resolve(reward_model.get_config(argument))
    assert policy.inputs.reward_model == f"{scorer.workdir}/model"
    assert scorer.loss.labels == "soft"
    argument = common.stage_argument("ai_labels", scorer)
    assert argument == "tiny,half,seed=3"
    labels = common.resolve(ai_labels.get_config(argument))
    assert scorer.inputs.labels == f"{labels.workdir}/labels"
    # Without the variant nothing of this is read.
    plain = common.resolve(reward_model.get_config("tiny"))
    assert plain.inputs.labels == "" and plain.loss.labels == "hard"
    given = common.resolve(reward_model.get_config("tiny,ai_labels,inputs.labels=runs/mine/labels"))
    assert given.inputs.labels == "runs/mine/labels"


@pytest.mark.parametrize("scale", ["tiny", "quickstart", "smollm2"])
def test_every_scale_has_its_labels(scale):
    scorer = common.resolve(reward_model.get_config(f"{scale},ai_labels"))
    assert scorer.inputs.labels == f"runs/ai_labels/{scale}/labels"
    assert scorer.loss.comparisons == "pairs"


def test_a_variant_beside_a_folder_is_refused():
    config = ppo_max.get_config("tiny,inputs.reward_model=a/model,inputs.reward_variant=gold")
    with pytest.raises(ValueError, match=r"inputs.reward_variant='gold' is read where") as told:
        common.resolve(config)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_ppo_max_builds_labels_and_the_reward_model_of_them(chain, tmp_path):
    shutil.copytree(chain.sft.parent, tmp_path / "runs" / "sft" / "tiny")
    short = "train.iterations=2,eval.every=2,sharding.devices=1,log.tensorboard=False"
    config = ppo_max.get_config(f"tiny,rlaif,{short}")
    config.root = str(tmp_path)
    experiment.main(config)
    folder = common.resolve(config).workdir
    assert read_summary(folder) is not None
    labels = tmp_path / "runs" / "ai_labels" / "tiny"
    rows = [json.loads(line) for line in (labels / "labels" / "train.jsonl").open()]
    scorer = tmp_path / "runs" / "reward_model" / "tiny-ai_labels"
    summary = read_summary(scorer)
    assert 0 < summary["held_out_pairs"] <= 8 < len(rows)
    assert 0 <= summary["people_accuracy"][0] <= 1
    # What it has learned from is the labels, not the ratings of the reviews.
    told = judging.data_of(str(scorer / "model"))
    assert told["source"] == f"jsonl:{labels / 'labels'}"
    assert judging.training_texts(told) is None
