"""No key takes a number that makes no sense: each is refused by name before anything is loaded."""

import copy
import fnmatch
import importlib
import math

import pytest

from configs import common
from rlhf_jax.runtime.settings import typed
from tests.test_configs import EXPERIMENTS, get, leaves

TRIED = (0, -1, math.nan, math.inf, 1e30)

# What makes sense at the ends, and why. Keys may be patterns; a value stands for its sign.
OFF = "0 is off, none or all"
SAME = "as in training"
CONTROL = "0 leaves a part out of the sum: a control"
START = "0 is a beginning or an end of the scale"
NEVER = "a bound as large as this is never reached"
MEANS_IT = {
    OFF: {
        "seed": (0,),
        "sharding.devices": (0,),
        "lora.rank": (0,),
        "checkpoint.every": (0,),
        "data.limit": (0,),
        "inputs.layers": (0,),
        "train.critic_pretrain_iterations": (0,),
        "sampling.top_k": (0,),
        "reward.clip": (0,),
        "kl.target": (0,),
        "penalty.target": (0,),
        "ppo.value_clip_eps": (0,),
        "ppo.entropy_max": (0,),
        "ppo.advantage_clip": (0,),
        "*optimizer.max_grad_norm": (0,),
        "eval.samples": (0,),
        "collapse.retries": (0,),  # the first collapse stops
        "sft:train.epochs": (0,),  # train.steps says how long
        "expert_iteration:train.epochs": (0,),
        "eval.people": (0,),
        "constitutional:train.epochs": (0,),
        "revise.ordinary": (0,),
        "labels.above": (0,),  # one completion that arrives is enough
    },
    SAME: {
        "eval.sampling.max_new_tokens": (0,),
        "eval.sampling.temperature": (0, -1),  # 0 is greedy
        "eval.sampling.top_p": (0,),
        "eval.sampling.top_k": (0, -1),  # 0 is off
        "eval.sampling.repetition_penalty": (0,),
    },
    CONTROL: {
        "*optimizer.learning_rate": (0,),
        "*optimizer.weight_decay": (0,),
        "reward.missing_eos_penalty": (0,),
        "kl.coef": (0,),
        "penalty.coef": (0,),
        "ppo.entropy_coef": (0,),
        "ppo.ptx_coef": (0,),
        "loss.lm_coef": (0,),
        "loss.margin_coef": (0,),
        "dpo.sft_coef": (0,),
        "dpo.label_smoothing": (0,),
        "dpo.margin": (0,),
        "dpo.*desirable_weight": (0,),
        "objective.quark.*": (0,),
        "objective.rrhf.*": (0,),  # a power of 0 is without the length
        "objective.slic.*": (0,),
        "objective.pro.*": (0,),
        "objective.orpo.*": (0,),
        "objective.unlikelihood.*": (0,),
        "objective.figa.*weight": (0,),
        "objective.chain_of_hindsight.max_rate": (0,),
    },
    START: {
        "*optimizer.warmup_fraction": (0,),
        "*optimizer.end_fraction": (0,),
        "*optimizer.b1": (0,),  # no memory of gradients before
        "*optimizer.b2": (0,),
        "sampling.temperature": (0,),  # greedy
        "revise.temperature": (0,),
        "advantage.discount": (0,),  # the next reward alone
        "advantage.lambda_": (0,),  # the TD error
        "keep.threshold": (0, -1),  # a score may be negative
        "objective.figa.nll_min": (0,),  # the likeliest tokens too
        "trpo.damping": (0,),  # of a Fisher matrix that has no flat direction
    },
    NEVER: {
        "reward.clip": (1e30,),
        "ppo.clip_eps": (1e30,),
        "ppo.value_clip_eps": (1e30,),
        "ppo.entropy_max": (1e30,),
        "ppo.advantage_clip": (1e30,),
        "*optimizer.max_grad_norm": (1e30,),
        "objective.figa.nll_max": (1e30,),
    },
}


def makes_sense(experiment: str, key: str, value: float) -> bool:
    return any(
        value in values
        and any(fnmatch.fnmatchcase(name, pattern) for name in (key, f"{experiment}:{key}"))
        for table in MEANS_IT.values()
        for pattern, values in table.items()
    )


def settings_of(experiment: str):
    return importlib.import_module(f"experiments.{experiment}").Settings


def numbers(experiment: str) -> dict[str, object]:
    """Keys with a number, or a tuple of them."""

    def counts(value) -> bool:
        several = isinstance(value, tuple) and len(value) > 0
        value = value[0] if several else value
        return isinstance(value, int | float) and not isinstance(value, bool)

    return {k: v for k, v in leaves(get(experiment, "tiny")).items() if counts(v)}


def refusal(experiment: str, plain: dict, key: str, value) -> str:
    """What the settings say of a value; empty where they take it."""
    values = copy.deepcopy(plain)
    *groups, leaf = key.split(".")
    node = values
    for group in groups:
        node = node[group]
    node[leaf] = value
    try:
        typed(settings_of(experiment), values)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_makes_no_sense_is_refused_by_its_key(experiment):
    plain = common.resolve(get(experiment, "tiny")).to_dict()
    wrong = []
    for key, before in numbers(experiment).items():
        for tried in TRIED:
            value = int(tried) if isinstance(before, int) and math.isfinite(tried) else tried
            value = (value,) if isinstance(before, tuple) else value
            said = refusal(experiment, plain, key, value)
            right = bool(said) != makes_sense(experiment, key, tried)
            if not right or "\n" in said or (said and key not in said):
                wrong.append(f"{key}={value}: {said or 'taken'}")
    assert wrong == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_words_that_name_nothing_are_refused_by_their_key(experiment):
    """At the start, not when they are first used; what names folders and texts may be anything."""
    # Problems have no domains; the prompts of a variant have.
    argument = {"expert_iteration": "tiny,reviews"}.get(experiment, "tiny")
    plain = common.resolve(get(experiment, argument)).to_dict()
    free = {
        "root",
        "workdir",
        "experiment",
        "scale",
        "variants",
        "label",
        "judges",
        "log.wandb_project",
    }
    free |= {"data.instruction"}
    for key, before in leaves(get(experiment, argument)).items():
        words = isinstance(before, str) or (isinstance(before, tuple) and before[:1] == ("movie",))
        if words and key not in free and not key.startswith(("inputs.", "compare.")):
            nothing = ("nothing",) if isinstance(before, tuple) else "nothing"
            said = refusal(experiment, plain, key, nothing)
            assert key.removeprefix("data.") in said and "\n" not in said, key


def test_every_exception_is_one_of_a_key_that_is_there():
    keys = {key for name in EXPERIMENTS for key in numbers(name)}
    keys |= {f"{name}:{key}" for name in EXPERIMENTS for key in numbers(name)}
    for table in MEANS_IT.values():
        for pattern in table:
            assert fnmatch.filter(keys, pattern), pattern


@pytest.mark.parametrize(
    ("experiment", "argument", "message"),
    [
        ("ppo_max", "optimizer.schedule=cosin", "optimizer.schedule='cosin' is unknown; use one"),
        ("ppo_max", "critic_optimizer.b1=1.0", r"critic_optimizer.b1=1.0 must be in \[0, 1\)"),
        ("ppo_max", "ppo.reduction=mean", "ppo.reduction='mean' is unknown"),
        ("ppo_max", "data.prompt_buckets=()", r"prompt_buckets=\(\) must hold one or more numbers"),
        ("ppo_max", "data.prompt_buckets=(8,0)", r"\(8, 0\) must hold .*, each at least 1"),
        ("ppo_max", "eval.samples=17", "eval.samples=17 must be at most eval.final_prompts=16"),
        ("ppo_max", "label=SFT", "label='SFT' must be a name of its own"),
        ("dpo", "label=PPO-max", "label='PPO-max' must be a name of its own: .* SFT, PPO-max"),
        ("ppo_max", "kl.target=6.0,kl.coef=0.0", "kl.coef=0.0 stays 0"),
        ("ppo_max", "penalty,penalty.target=0.1,penalty.coef=0.0", "penalty.coef=0.0 stays 0"),
        ("ppo_max", "kl.target=6.0,kl.horizon=3", "kl.horizon=3 must be above a fifth of the 16"),
        ("sft", "sizes.num_heads=3", "sizes.hidden_size=32 must be divisible by 2 x sizes.num_h"),
        ("reward_model", "train.min_pairs=17", "min_pairs=17 must be at most train.max_pairs=16"),
        ("reward_model", "data.min_gap=0.0", "data.min_gap=0.0 must be above 0"),
        ("reward_model", "data.domains=('books',)", "data.domains=.*must name some of movie"),
        ("reward_model", "data.source=reviws", "source='reviws' must be one of"),
        (
            "dpo",
            "kto,train.microbatches=2",
            "train.microbatches=2 must be 1 for dpo.objective='kto'",
        ),
        ("sft", f"train.steps={10**12}", r"train.steps=1000000000000 must be below 2\*\*31"),
    ],
)
def test_what_does_not_go_together_is_refused_at_the_start(experiment, argument, message):
    config = common.resolve(get(experiment, f"tiny,{argument}")).to_dict()
    with pytest.raises(ValueError, match=message) as caught:
        typed(settings_of(experiment), config)
    assert "\n" not in str(caught.value)
