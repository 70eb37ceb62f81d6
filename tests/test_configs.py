"""Configs: every variant builds and changes something, every key is read, errors are one line."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, dpo, ppo_max, reward_model, sft
from experiments import command, inspect_data, stages
from rlhf_jax.runtime.settings import typed

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem[0] != "_")
EXPERIMENTS = [name for name in EXPERIMENTS if name not in ("common", "unread")]


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
def test_every_key_has_a_typed_field(experiment):
    """Settings refuse a key without a field, so a config holds no key that nobody declared."""
    settings = importlib.import_module(f"experiments.{experiment}").Settings
    for scale in scales_of(experiment):
        typed(settings, common.resolve(get(experiment, scale)).to_dict())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_key_is_explained_where_it_stands(experiment):
    """A comment after the key, or in the lines right above it."""
    explained = set()
    for path in (ROOT / "configs").glob("*.py"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            key = re.match(r"\s+(?:config|keys|data)\.([\w.]+) = ", line)
            if key and ("  # " in line or lines[number - 1].lstrip().startswith("# ")):
                explained.add(key[1].split(".")[-1])
    keys = {key.split(".")[-1] for key in leaves(get(experiment, "quickstart"))}
    # Sizes and counts whose names say it all.
    plain = {"hidden_size", "num_layers", "num_heads", "intermediate_size", "wandb_project"}
    plain |= {"prompts_per_iteration", "samples_per_prompt", "tensorboard"}
    assert sorted(keys - explained - plain) == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_scales_include_the_common_ones(experiment):
    assert {"tiny", "quickstart"} <= set(scales_of(experiment))


@pytest.mark.parametrize("variant", sorted(ppo_max.VARIANTS))
def test_every_variant_of_ppo_max_changes_the_config(variant):
    ignore = {"workdir", "label", "variants"}
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
        assert differing - {"workdir", "label", "variants"} == keys, variant


def test_figure_8_differs_from_ppo_max_in_one_thing():
    ppo_max_itself = leaves(get("ppo_max", "quickstart"))
    for variant, keys in {
        "policy_pretrained": {"inputs.policy_variant"},
        "critic_sft": {"train.critic_init"},
    }.items():
        changed = leaves(get("ppo_max", variant))
        differing = {key for key in changed if changed[key] != ppo_max_itself[key]}
        assert differing - {"workdir", "label", "variants"} == keys, variant


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
    # 250 buffers x 128 / 32 = 1000 updates of the policy.
    policy = config.train.iterations - config.train.critic_pretrain_iterations
    assert policy * 128 // 32 == 1000
    longer = [ppo_max.get_config(f"paper_en,{name}").train for name in ("steps_0.8", "steps_10")]
    updates = [4 * (train.iterations - train.critic_pretrain_iterations) for train in longer]
    assert updates == [800, 10_000]
    sampling = common.flat(config.eval.sampling)
    assert (sampling["temperature"], sampling["top_p"]) == (0.8, 0.9)
    # 2 epochs; 168 pairs in each of 1000 steps are 1.05 of 160k.
    assert (sft.get_config("paper_en").train.epochs, sft.get_config("paper_en").train.steps) == (
        2,
        0,
    )
    pairs = reward_model.get_config("paper_en").train
    assert pairs.min_pairs == pairs.max_pairs == 168 and 168 * pairs.steps / 160_000 == 1.05
    assert reward_model.get_config("paper_zh").data.eval_pairs == 3_000
    assert sft.get_config("paper_en").optimizer.learning_rate == 9.5e-6
    assert reward_model.get_config("paper_en").optimizer.learning_rate == 5e-6
    assert reward_model.get_config("paper_en").loss.lm_coef == 1.0


def test_moss_numbers():
    config = ppo_max.get_config("moss_zh")
    assert (config.kl.coef, config.reward.transform, config.ppo.ptx_coef) == (0.1, "scale", 0.0)
    assert (config.sampling.temperature, config.sampling.top_p) == (0.8, 0.9)
    assert (config.train.minibatch, config.sharding.devices, config.seed) == (14, 7, 42)
    assert max(config.data.prompt_buckets) + config.sampling.max_new_tokens == 2048
    assert ppo_max.get_config("moss_en").kl.coef == 0.01
    assert reward_model.get_config("moss_en").loss.lm_coef == 0.0


COMMAS = (
    "/a,b/model",
    "/it's, so",
    "jsonl:/x(1,2).jsonl,",
    '"',
    "12",
    "True",
    " /x",
    "(",
    "/a\\b,c",
    "",
)


@pytest.mark.parametrize("text", COMMAS)
@pytest.mark.parametrize("place", ["tiny,{},seed=2", "{},seed=2,tiny", "seed=2,tiny,{}"])
def test_a_value_in_quotes_may_hold_anything(text, place):
    for quotes in (common.quoted(text), repr(text)):
        argument = place.format(f"inputs.model={quotes}")
        config = sft.get_config(argument)
        assert (config.inputs.model, config.seed, config.scale) == (text, 2, "tiny")


def test_quotes_may_be_of_either_kind_and_are_not_needed():
    for argument in (
        """inputs.model='/a,b',data.source="jsonl:/c, d.jsonl", tiny""",
        """tiny,data.source='jsonl:/c, d.jsonl' ,inputs.model="/a,b\"""",
    ):
        config = sft.get_config(argument)
        assert (config.inputs.model, config.data.source) == ("/a,b", "jsonl:/c, d.jsonl")
    for text in ("/plain", "/it's", "hh:/data/hh", "/a(1)/b", "/x[1,2]", "stream:hh"):
        assert common.quoted(text) == text
        assert sft.get_config(f"tiny,inputs.model={text},seed=2").inputs.model == text
    domains = sft.get_config("tiny,data.domains=('a,b)', \"c'\"),seed=2").data.domains
    assert domains == ("a,b)", "c'")


def test_the_stages_before_get_a_source_with_a_comma():
    source = "jsonl:/data/a, b.jsonl"
    config = common.resolve(ppo_max.get_config(f"tiny,data.source={source!r}"))
    argument = common.stage_argument("sft", config)
    assert sft.get_config(argument).data.source == source
    *_, shown = shlex.split(stages.command_of("sft", argument))
    assert shown == f"configs/sft.py:{argument}"
    assert stages.command_of("sft", "tiny,seed=3").endswith("configs/sft.py:tiny,seed=3")


def test_variants_and_assignments_combine():
    config = ppo_max.get_config("tiny,reward_scale,seed=3,ppo.clip_eps=0.1")
    assert config.reward.transform == "scale" and config.ppo.clip_eps == 0.1
    config = common.resolve(config)
    assert config.workdir == "runs/ppo_max/tiny-reward_scale-ppo.clip_eps=0.1-seed=3"
    assert config.inputs.model == "runs/sft/tiny-seed=3/model"
    assert config.inputs.reward_model == "runs/reward_model/tiny-seed=3/model"
    assert common.stage_argument("sft", config) == "tiny,seed=3"


def test_flags_and_assignments_mean_the_same():
    """A flag sets a key after `get_config`: run folder and stages before follow it all the same."""
    flagged = ppo_max.get_config("tiny")
    flagged.seed, flagged.ppo.clip_eps = 3, 0.1
    assigned = common.resolve(ppo_max.get_config("tiny,seed=3,ppo.clip_eps=0.1"))
    assert leaves(common.resolve(flagged)) == leaves(assigned)
    # What does not change the numbers does not name a folder.
    free = ppo_max.get_config("tiny,log.tensorboard=False,checkpoint.every=1")
    assert common.resolve(free).workdir == "runs/ppo_max/tiny"


def test_keys_take_numbers_and_arrays_of_numpy():
    config = ppo_max.get_config("tiny")
    common.set_key(config, "ppo.clip_eps", np.linspace(0, 1, 11)[1])
    common.set_key(config, "seed", np.int64(3))
    common.set_key(config, "data.prompt_buckets", np.array([8, 16]))
    assert (config.ppo.clip_eps, config.seed, config.data.prompt_buckets) == (0.1, 3, (8, 16))
    assert [type(v) for v in (config.ppo.clip_eps, config.seed)] == [float, int]
    with pytest.raises(ValueError, match=r"seed=0\.5 has the wrong type"):
        common.set_key(config, "seed", np.float64(0.5))


@pytest.mark.parametrize(
    ("argument", "now"),
    [
        ("tiny,train.microbatch=4", "train.microbatches"),
        ("tiny,inputs.policy=x", "inputs.model"),
        ("paper", "paper_en"),
    ],
)
def test_old_names_are_refused_with_the_new_one(argument, now):
    with pytest.raises(ValueError, match=rf"\(now {now}"):
        ppo_max.get_config(argument)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("tiny,no_such", "unknown variant 'no_such'"),
        ("tiny,quickstart", "at most one"),
        ("tiny,ppo.no_such=1", "unknown config key 'ppo.no_such'"),
        ("tiny,seed=abc", "wrong type"),
        ("tiny,ppo.clip_eps.deeper=1", "unknown config key"),
        ("tiny,workdir='/a b", "workdir='/a b begins with a quote that nothing closes"),
        ("tiny,workdir='/a'b", "begins with a quote that nothing closes at its end"),
    ],
)
def test_wrong_arguments_are_one_line(arg, message):
    with pytest.raises(ValueError, match=message) as caught:
        ppo_max.get_config(arg)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", EXPERIMENTS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_config_of_another_experiment_is_one_line(experiment, given):
    settings = importlib.import_module(f"experiments.{experiment}").Settings
    if given == experiment:
        assert isinstance(command.open_config(experiment, get(given, "tiny"), settings), settings)
        return
    line = f"this is a config of '{given}': give configs/{experiment}.py"
    with pytest.raises(ValueError, match=rf"^{line}$"):
        command.open_config(experiment, get(given, "tiny"), settings)


def test_what_is_no_config_of_an_experiment_is_one_line():
    with pytest.raises(ValueError, match=r"^this config is of no experiment: give configs/sft.py$"):
        inspect_data.main(ConfigDict({"seed": 1}), 3, "train")
    error = AttributeError("module 'config_config' has no attribute 'get_config'")
    assert command._one_line(error, []).startswith("the file of --config has no get_config")


def test_stages_before_are_those_on_the_same_data():
    argument = "tiny,data.source=hh:/data/hh,seed=2"
    config = common.resolve(ppo_max.get_config(argument))
    assert config.workdir == "runs/ppo_max/tiny-data.source=hh:_data_hh-seed=2"
    before = [common.resolve(stage.get_config(argument)) for stage in (sft, reward_model)]
    assert config.inputs.reference == config.inputs.model == f"{before[0].workdir}/model"
    assert config.inputs.reward_model == f"{before[1].workdir}/model"
    assert before[1].inputs.model == f"{before[0].workdir}/model"
    assert common.stage_argument("sft", config) == argument
    after = common.resolve(dpo.get_config(argument))
    assert after.inputs.model == config.inputs.reference
    assert after.compare.ppo_max == f"{config.workdir}/model"
    given = common.resolve(ppo_max.get_config(f"{argument},inputs.model=runs/mine/model"))
    assert given.inputs.model == "runs/mine/model"


@pytest.mark.parametrize("root", ["/data/me", "/data/me, and you"])
def test_every_folder_of_a_run_lies_below_its_root(root):
    below = [ppo_max.get_config(argument) for argument in ("tiny,seed=1", "smollm2")]
    for config in below:
        config.root = root
        made = common.resolve(config)
        folders = [made.workdir, made.inputs.model, made.inputs.reference, made.inputs.reward_model]
        assert all(folder.startswith(f"{root}/runs/") for folder in folders), folders
        assert common.resolve(made) == made
        # A stage before that is missing is made there as well.
        stage = common.resolve(reward_model.get_config(common.stage_argument("reward_model", made)))
        assert f"{stage.workdir}/model" == made.inputs.reward_model
        assert stage.inputs.model.startswith(f"{root}/runs/")
    compared = dpo.get_config("tiny")
    compared.root = root
    assert common.resolve(compared).compare.ppo_max == f"{root}/runs/ppo_max/tiny/model"


def test_a_root_leaves_alone_what_is_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = ppo_max.get_config("tiny,root=mine,inputs.model=org/name,workdir=/tmp/run")
    made = common.resolve(config)
    assert made.root == str(tmp_path / "mine")
    assert made.inputs.model == "org/name" and made.workdir == "/tmp/run"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_stages_before_exist_for_every_scale(experiment):
    """The command that an error or `build` names can be run."""
    for scale in scales_of(experiment):
        config = get(experiment, scale)
        for stage in ("sft", "reward_model") if experiment == "ppo_max" else ("sft",):
            argument = common.stage_argument(stage, config)
            # A stage that shares the scale has data of its own there, and needs no other word.
            assert "data." not in argument, argument
            get(stage, argument)


def test_half_goes_to_the_reward_model_and_gold_has_the_other_half_and_its_own_weights():
    config = common.resolve(ppo_max.get_config("quickstart,half,seed=2"))
    assert config.inputs.reward_model == "runs/reward_model/quickstart-half-seed=2/model"
    assert config.inputs.model == "runs/sft/quickstart-seed=2/model"  # no ratings are read there
    assert common.stage_argument("reward_model", config) == "quickstart,half,seed=2"
    assert config.label == "PPO-max"  # the data do not name the method
    assert ppo_max.get_config("tiny,half,no_kl").label == "no_kl"
    before = common.resolve(reward_model.get_config("quickstart,half,seed=2"))
    gold = common.resolve(reward_model.get_config("quickstart,gold"))
    assert (config.data.half, before.data.half, gold.data.half) == ("first", "first", "second")
    assert gold.workdir == "runs/reward_model/quickstart-gold"
    assert gold.inputs.model == "runs/sft/quickstart-seed=100/model"
    assert common.resolve(dpo.get_config("tiny,half")).compare.reward_model.endswith(
        "tiny-half/model"
    )
    for experiment, argument in (("ppo_max", "paper_en,half"), ("reward_model", "paper_en,gold")):
        with pytest.raises(
            ValueError, match=r"takes half of the rated reviews, and data\.source='hh'"
        ):
            get(experiment, argument)
