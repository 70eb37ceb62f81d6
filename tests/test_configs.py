"""Configs: every variant builds and changes something, every key is read, wrong input is told."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import dpo, ppo_max, reward_model, sft
from experiments.dpo_setup import DPOConfig
from rlhf_jax.methods.ppo import PPOConfig
from rlhf_jax.methods.trpo import TRPOConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rollouts.experience import AdvantageConfig, RewardConfig
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.training.optimizers import OptimizerConfig

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem[0] != "_")
EXPERIMENTS.remove("common")
# Groups that are passed on whole, as keywords of these classes.
SPLATTED = {
    "model": ModelConfig,
    "lora": LoRAConfig,
    "optimizer": OptimizerConfig,
    "critic_optimizer": OptimizerConfig,
    "sampling": SamplingConfig,
    "reward": RewardConfig,
    "advantage": AdvantageConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
    "trpo": TRPOConfig,
}


def leaves(config: ConfigDict, prefix: str = "") -> dict:
    found = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def scales_of(experiment: str) -> list[str]:
    return sorted(importlib.import_module(f"configs.{experiment}").SCALES)


def get(experiment: str, arg: str) -> ConfigDict:
    return importlib.import_module(f"configs.{experiment}").get_config(arg)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_key_is_read_by_code(experiment):
    source = "".join(path.read_text() for path in (ROOT / "experiments").glob("*.py"))
    source += (ROOT / "configs" / "common.py").read_text()
    for scale in scales_of(experiment):
        for key in leaves(get(experiment, scale)):
            *groups, leaf = key.split(".")
            group = groups[-1] if groups else ""
            if group in SPLATTED and re.search(rf"\*\*config\.{group}\b", source):
                fields = {field.name for field in dataclasses.fields(SPLATTED[group])}
                assert leaf in fields, f"{key} is no field of {SPLATTED[group].__name__}"
            else:
                assert re.search(rf"\b\w+\.{leaf}\b", source), f"nothing reads {key}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_scales_include_the_common_ones(experiment):
    assert {"tiny", "quickstart"} <= set(scales_of(experiment))


@pytest.mark.parametrize("variant", sorted(ppo_max.VARIANTS))
def test_every_variant_of_ppo_max_changes_the_config(variant):
    ignore = {"workdir", "label"}
    base, changed = leaves(get("ppo_max", "quickstart")), leaves(get("ppo_max", variant))
    differing = {key for key in base if base[key] != changed[key]} - ignore
    # The quickstart's own η is that of Figure 7, so this variant only names it.
    assert bool(differing) != (variant == "kl_0.05")


def test_figures_differ_from_vanilla_in_one_thing():
    vanilla = leaves(get("ppo_max", "vanilla"))
    expected = {
        "reward_scale": {"reward.transform"},
        "reward_norm_0.3": {"reward.transform", "reward.clip"},
        "reward_norm_0.8": {"reward.transform", "reward.clip"},
        "adv_norm_0.5": {"ppo.normalize_advantages", "ppo.advantage_clip"},
        "adv_norm_0.12": {"ppo.normalize_advantages", "ppo.advantage_clip"},
        "kl": {"kl.coef"},
        "importance_sample": {"ppo.ratio_denominator"},
        "kl_importance_sample": {"kl.coef", "ppo.ratio_denominator"},
        "entropy": {"ppo.entropy_coef", "ppo.entropy_max"},
        "critic_pretrain": {"train.critic_pretrain_iterations"},
    }
    for variant, keys in expected.items():
        changed = leaves(get("ppo_max", variant))
        differing = {key for key in vanilla if vanilla[key] != changed[key]}
        assert differing - {"workdir", "label"} == keys, variant


def test_figure_8_differs_from_ppo_max_in_one_thing():
    ppo_max_itself = leaves(get("ppo_max", "quickstart"))
    for variant, keys in {
        "policy_pretrained": {"inputs.policy_variant", "inputs.policy"},
        "critic_sft": {"train.critic_init"},
    }.items():
        changed = leaves(get("ppo_max", variant))
        differing = {key for key in changed if changed[key] != ppo_max_itself[key]}
        assert differing - {"workdir", "label"} == keys, variant


def test_values_with_commas_and_words_for_flags():
    config = ppo_max.get_config(
        "tiny,data.domains=('movie','nyt'),data.prompt_buckets=(8,16),"
        "ppo.normalize_advantages=true,seed=2"
    )
    assert config.data.domains == ("movie", "nyt")
    assert config.data.prompt_buckets == (8, 16)
    assert config.ppo.normalize_advantages is True and config.seed == 2
    assert ppo_max.get_config("log.tensorboard=false").log.tensorboard is False


def test_paper_numbers():
    config = ppo_max.get_config("paper_en")
    assert (config.optimizer.learning_rate, config.critic_optimizer.learning_rate) == (
        5e-7,
        1.65e-6,
    )
    assert (config.train.prompts_per_iteration, config.train.minibatch) == (128, 32)
    assert (config.kl.coef, config.advantage.lambda_, config.reward.clip) == (0.05, 0.9, 0.8)
    # 250 buffers x 128 / 32 = 1000 updates.
    assert config.train.iterations * 128 // 32 == 1000
    assert sft.get_config("paper_en").optimizer.learning_rate == 9.5e-6
    assert reward_model.get_config("paper_en").optimizer.learning_rate == 5e-6
    assert reward_model.get_config("paper_en").loss.lm_coef == 1.0


def test_moss_numbers():
    config = ppo_max.get_config("moss_zh")
    assert (config.kl.coef, config.reward.transform, config.ppo.ptx_coef) == (0.1, "scale", 0.0)
    assert (config.sampling.temperature, config.sampling.top_p) == (0.8, 0.9)
    assert ppo_max.get_config("moss_en").kl.coef == 0.01
    assert reward_model.get_config("moss_en").loss.lm_coef == 0.0


def test_variants_and_assignments_combine():
    config = ppo_max.get_config("tiny,reward_scale,seed=3,ppo.clip_eps=0.1")
    assert config.reward.transform == "scale" and config.ppo.clip_eps == 0.1
    assert config.workdir == "runs/ppo_max/tiny-reward_scale-seed=3-ppo.clip_eps=0.1"
    assert config.inputs.policy == "runs/sft/tiny-seed=3/model"
    assert config.inputs.reward_model == "runs/reward_model/tiny-seed=3/model"
    assert config.inputs.variant == "tiny,seed=3"


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("tiny,no_such", "unknown variant 'no_such'"),
        ("tiny,quickstart", "at most one"),
        ("tiny,ppo.no_such=1", "unknown config key 'ppo.no_such'"),
        ("tiny,seed=abc", "wrong type"),
        ("tiny,ppo.clip_eps.deeper=1", "unknown config key"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arg, message):
    with pytest.raises(ValueError, match=message) as caught:
        ppo_max.get_config(arg)
    assert "\n" not in str(caught.value)


def test_stages_before_are_those_on_the_same_data():
    argument = "tiny,seed=2,data.source=hh:/data/hh"
    config = ppo_max.get_config(argument)
    assert config.workdir == "runs/ppo_max/tiny-seed=2-data.source=hh:_data_hh"
    assert config.inputs.variant == argument
    before = sft.get_config(config.inputs.variant), reward_model.get_config(config.inputs.variant)
    assert config.inputs.reference == config.inputs.policy == f"{before[0].workdir}/model"
    assert config.inputs.reward_model == f"{before[1].workdir}/model"
    assert before[1].inputs.model == f"{before[0].workdir}/model"
    after = dpo.get_config(argument)
    assert after.inputs.reference == config.inputs.reference
    assert after.compare.ppo_max == f"{config.workdir}/model"
    given = ppo_max.get_config(f"{argument},inputs.policy=runs/mine/model")
    assert given.inputs.policy == "runs/mine/model"
