"""Every key of every config is read: changing it changes what a run shows, or is refused.

Each experiment runs dry (see tests/dry.py) at `tiny`, and again with one key changed. Programs,
their inputs, the log, the saved model, the report: something must differ, or the key is refused
because another one switches it off (`UNREAD` of configs/), and then it is tried where it is read.
What is printed does not count. A key that nothing reads fails.
"""

import fnmatch
import json
from typing import Any

import pytest

from configs import common
from tests import dry
from tests.tasks import golden
from tests.test_configs import EXPERIMENTS, get, leaves

# What no number follows from, and why.
ASIDE = {
    "experiment": "given by the file",
    "scale": "given by the argument",
    "variants": "given by the argument",
    "workdir": "where results lie",
    "root": "where run folders lie: tests/test_configs.py",
    "inputs.build": "who makes what is missing",
    "log.*": "what is written besides",
    "checkpoint.*": "when a state is kept",
    "sharding.*": "where arrays lie",
    "collapse.[rskp]*": "seen where a policy collapses: tests/training/test_collapse_in_a_run.py",
    "keep.cut": "seen where answers are cut: tests/methods/test_curation.py",
    "improve.start": "whose weights a round begins with, and here all folders hold the same",
    "labels.clamp": "every label is one half in a dry run: tests/experiments/test_ai_labels.py",
    "model.attention": "which kernel computes the same, on a GPU",
}

# Runs as short as they can be, with one device and few files.
SHORT = {
    "sft": ("train.steps=2", "eval.every=1", "data.limit=60"),
    "reward_model": ("train.steps=2", "eval.every=1"),
    "ppo_max": ("train.iterations=2", "eval.every=1"),
    "dpo": ("train.steps=2", "eval.every=1"),
    "process_reward": ("train.steps=2", "eval.every=1"),
    "search": ("search.seeds=1",),
    "expert_iteration": ("improve.rounds=1",),
    "ai_labels": (),
    "supervised": ("train.steps=2", "eval.every=1"),
    "curate": ("keep.similarity=1.0",),
    "constitutional": ("revise.rounds=1",),
}

# Keys that are refused at `tiny`, and a run that reads them.
READ_IN = {
    "lora.*": {"sft": "inputs.model=runs/x/model,lora.rank=2", "": "lora.rank=2"},
    "*optimizer.end_fraction": {
        "ppo_max": "optimizer.schedule=linear,critic_optimizer.schedule=linear"
    },
    "trpo.*": {"ppo_max": "trpo"},
    "data.responses": {"reward_model": "listwise"},
    "data.votes": {"reward_model": "loss.labels=soft"},
    "penalty.*": {"ppo_max": "penalty_adaptive,train.iterations=3"},
    "ppo.entropy_max": {"ppo_max": "entropy"},
    "kl.horizon": {"ppo_max": "adaptive_kl"},
    "advantage.k": {"ppo_max": "k_step"},
    "train.epochs": {
        "sft": "train.steps=0,train.epochs=2.0",
        "expert_iteration": "train.steps=0,train.epochs=2.0",
        "constitutional": "train.steps=0,train.epochs=2.0",
    },
    "labels.max_new_tokens": {"ai_labels": "reasons"},
    "labels.*": {"process_reward": "rollouts"},
    "inputs.scorer": {"expert_iteration": "orm"},
    "improve.max_steps": {"expert_iteration": "prm"},
    "judges": {"expert_iteration": "reviews"},
    "data.[dh]*": {"expert_iteration": "reviews"},
    "dpo.margin": {"dpo": "simpo"},
    "dpo.*desirable_weight": {"dpo": "kto"},
    "objective.texts": {"supervised": "c_rlft"},
    **{
        f"objective.{name}.*": {"supervised": name}
        for name in ("quark", "c_rlft", "chain_of_hindsight", "pro", "slic", "orpo")
    },
    "objective.unlikelihood.*": {"supervised": "unlikelihood"},
    "objective.figa.*": {"supervised": "figa"},
    "data.pairs": {"supervised": "orpo"},
    "data.min_gap": {"supervised": "orpo"},
    "keep.threshold": {"curate": "threshold"},
    "keep.quantiles": {"curate": "quantiles"},
}

# Values that make sense where half of a number does not, or is the same to a run so short.
OTHER: dict[str, Any] = {
    "eval.threshold": 0.15,
    "eval.sampling.temperature": 0.5,
    "eval.sampling.top_k": 5,
    "eval.sampling.max_new_tokens": 4,
    "lora.rank": 2,
    "lora.targets": ("q",),
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "data.domains": ("amazon",),
    "data.half": "second",
    "data.prompt_buckets": (24,),
    "data.ptx_length": 40,
    "data.max_length": 90,
    "data.limit": 50,
    "judges": ("length",),
    "collapse.action": "off",
    "label": "another",
    "tokenizer.vocab_size": 400,
    "sizes.hidden_size": 64,
    "sizes.intermediate_size": 32,
    "train.minibatch": 16,
    "train.prompts_per_iteration": 8,
    "train.iterations": 3,
    "train.samples_per_prompt": 2,
    "train.max_tokens": 1600,
    "train.max_pairs": 8,
    "train.microbatches": 2,
    "train.row_length": 100,
    "train.critic_pretrain_iterations": 0,
    "train.critic_init": "policy",
    "reward.transform": "scale",
    "advantage.method": "td",
    "advantage.returns": "monte_carlo",
    "penalty.target": 0.1,
    "ppo.objective": "surrogate",
    "ppo.ratio_denominator": "reference",
    "ppo.reduction": "sequence_mean",
    "dpo.objective": "ipo",
    "dpo.label_smoothing": 0.25,
    "loss.comparisons": "batch",
    "loss.labels": "soft",
    "dpo.labels": "soft",
    "*optimizer.schedule": "constant",
    "*optimizer.warmup_fraction": 0.5,
    "inputs.policy_variant": "pretrain",
    "inputs.reward_variant": "no_lm",
    "labels.method": "rollouts",
    "labels.of": "pairs",
    "labels.template": "rate_reviews",
    "labels.max_length": 200,
    "labels.above": 0.5,
    "loss.supervision": "outcome",
    "*.neutral": "negative",
    "loss.tokens": ("-", "?", "*"),
    "search.aggregation": "min",
    "improve.method": "all_right",
    "labels.constitution": "harmless",
    "revise.constitution": "harmless",
    "revise.rounds": 2,
    "revise.max_length": 120,
    "improve.rounds": 2,
    "objective.method": "pro",
    "objective.texts": ("Poor: ", "Good: "),
    "objective.figa.nll_min": 0.0,
    "objective.figa.nll_max": 9.0,
    "candidates.read": "pairs",
    "samples.per_prompt": 3,
    "train.max_sequences": 8,
    "keep.rule": "quantiles",
    "keep.similarity": 0.1,
}

# What must be changed beside a key for the change to make sense.
WITH = {
    ("reward_model", "loss.comparisons"): "data.domains=('movie',),data.instruction=Review it.",
    ("reward_model", "data.instruction"): "data.domains=('movie',)",
    ("dpo", "data.instruction"): "data.domains=('movie',)",
    ("sft", "lora.rank"): "inputs.model=runs/x/model",
    ("sft", "train.microbatches"): "train.microbatches=1",
    ("sft", "train.minibatch"): "train.microbatches=1",
    ("process_reward", "train.microbatches"): "train.microbatches=1",
    ("expert_iteration", "train.microbatches"): "train.microbatches=1",
    ("constitutional", "train.microbatches"): "train.microbatches=1",
    ("constitutional", "train.minibatch"): "train.microbatches=1",
    ("constitutional", "data.limit"): "data.prompts=100",
    ("ai_labels", "labels.constitution"): "constitutional",
    ("process_reward", "data.source"): "data.max_length=500,train.row_length=500",
    ("search", "data.source"): "data.max_length=500",
    ("expert_iteration", "data.source"): "data.max_length=500,train.row_length=500",
    ("expert_iteration", "data.max_length"): "prm",
    ("curate", "data.limit"): "samples.prompts=60",
    ("supervised", "data.instruction"): "data.domains=('movie',)",
    ("supervised", "data.source"): "orpo",
    ("supervised", "data.max_length"): "orpo",
    ("supervised", "train.max_tokens"): "orpo,train.max_sequences=64",
}

# Keys that only say what must not be: they are read where a value is refused by them.
GUARDS = {"train.min_pairs": 16, "train.min_sequences": 17}


def matching(table: dict, key: str, default: Any = None) -> Any:
    return next((v for pattern, v in table.items() if fnmatch.fnmatchcase(key, pattern)), default)


def other(key: str, value: Any) -> Any:
    """Another value that makes sense."""
    found = matching(OTHER, key)
    if found is not None:
        return found
    assert not key.endswith("source"), "it is a file in the folder of the runs"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value // 2 if value > 1 else value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.5
    assert isinstance(value, str), f"say in OTHER what {key}={value!r} may be besides"
    return f"{value}another"


class Knobs:
    """Runs of one experiment, each as far as it differs from a run without the change."""

    def __init__(self, experiment: str, folder):
        self.experiment, self._folder = experiment, folder
        self._dry, self._plain = dry.Dry(folder / "run"), {}
        (folder / "config.json").write_text("{}")
        prompts = "".join(json.dumps({"prompt": f"is {n} a number?"}) + "\n" for n in range(400))
        (folder / "prompts.jsonl").write_text(prompts)
        self.sources = {
            "data.source": golden.write_jsonl(folder / "rows.jsonl"),
            "data.prompt_source": f"jsonl:{folder / 'prompts.jsonl'}",
        }
        labels = folder / "labels"
        labels.mkdir()
        for split in ("train", "validation", "test"):
            golden.write_jsonl(labels / f"{split}.jsonl")
        self.sources["inputs.labels"] = str(labels)
        if experiment in ("process_reward", "search", "expert_iteration"):
            self.sources["data.source"] = "arithmetic:gsm_symbolic"

    def config(self, argument: str, key: str = "", value: Any = None):
        parts = ["tiny", "sharding.devices=1", "log.tensorboard=False", *SHORT[self.experiment]]
        config = get(self.experiment, ",".join([*parts, argument] if argument else parts))
        # What the report compares with is there.
        if "compare" in config:
            config.compare.update({name: str(self._folder) for name in config.compare})
        if key:
            *groups, leaf = key.split(".")
            node = config
            for group in groups:
                node = node[group]
            node[leaf] = value
        return config

    def keys(self, argument: str = "") -> dict[str, Any]:
        return leaves(self.config(argument))

    def seen(self, key: str, value: Any, argument: str = "") -> str:
        """What differs; empty where nothing does.

        Raises:
          ValueError: the change is refused.
        """
        if argument not in self._plain:
            self._plain[argument] = self._notes(self.config(argument))
        changed = self.config(argument, key, value)
        try:
            self._notes(changed.copy_and_resolve_references(), self._plain[argument])
            # Nothing differs. Fresh traces take their time: they are for what would be dead.
            self._dry.forget()
            plain = self._notes(self.config(argument))
            self._dry.forget()
            self._notes(changed, plain)
        except dry.Differs as difference:
            return str(difference)
        return ""

    def _notes(self, config: Any, expected: list[dry.Note] | None = None) -> list[dry.Note]:
        return self._dry.notes(self.experiment, config, expected)


@pytest.fixture(scope="module")
def knobs(tmp_path_factory):
    """The runs of an experiment, by its name."""
    made: dict[str, Knobs] = {}

    def knobs_of(experiment: str) -> Knobs:
        if experiment not in made:
            made[experiment] = Knobs(experiment, tmp_path_factory.mktemp(experiment))
        return made[experiment]

    return knobs_of


def unread_at(knobs: Knobs, argument: str = "") -> dict:
    module = __import__(f"configs.{knobs.experiment}", fromlist=["UNREAD"])
    return common.unread.unread((*common.UNREAD, *module.UNREAD), knobs.keys(argument))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_key_changes_what_a_run_shows(knobs, experiment):
    runs, dead = knobs(experiment), []
    unread = unread_at(runs)
    for key, value in runs.keys().items():
        if matching(ASIDE, key) or key in unread or key in GUARDS:
            continue
        argument = WITH.get((experiment, key), "")
        value = runs.keys(argument)[key]
        value = runs.sources[key] if key in runs.sources else other(key, value)
        if not runs.seen(key, value, argument):
            dead.append(f"{key}={value!r}")
    assert dead == [], "nothing differs: nobody reads them"


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_unread_keys_are_refused_and_read_where_the_refusal_says(knobs, experiment):
    runs = knobs(experiment)
    for key, rule in unread_at(runs).items():
        changed = runs.config("", key, other(key, runs.keys()[key]))
        deciding = " or ".join(rule.deciding(runs.keys()))
        with pytest.raises(ValueError, match=f"^{key}=.* is read where {deciding} is ") as error:
            common.resolve(changed)
        assert "\n" not in str(error.value)
        if matching(ASIDE, key):
            continue
        places = matching(READ_IN, key, {})
        argument = places.get(experiment, places.get(""))
        assert argument is not None, f"say in READ_IN where {experiment} reads {key}"
        assert key not in unread_at(runs, argument), f"{key} is refused with {argument}, too"
        value = other(key, runs.keys(argument)[key])
        assert runs.seen(key, value, argument), f"nobody reads {key}, not even with {argument}"


@pytest.mark.parametrize("experiment", ["reward_model", "dpo", "supervised"])
def test_guards_refuse_by_their_name(knobs, experiment):
    runs = knobs(experiment)
    there = runs.keys()
    guards = {key: value for key, value in GUARDS.items() if key in there}
    assert guards
    for key, value in guards.items():
        with pytest.raises(ValueError, match=key.split(".")[-1]):
            runs.seen(key, value)


@pytest.mark.slow
def test_a_run_without_a_change_leaves_the_same_notes(tmp_path):
    """The control, on runs of its own: what jax traced before may name a program's parts anew."""
    for experiment in ("sft", "ppo_max", "search"):
        (tmp_path / experiment).mkdir()
        assert Knobs(experiment, tmp_path / experiment).seen("log.wandb", False) == ""


def test_the_lists_name_keys_that_are_there():
    keys = {key for experiment in EXPERIMENTS for key in leaves(get(experiment, "tiny"))}
    for pattern in (*ASIDE, *READ_IN, *OTHER, *GUARDS, *(key for _, key in WITH)):
        assert fnmatch.filter(keys, pattern), pattern
