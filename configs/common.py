"""How the argument of a config file becomes a config: `FILE:VARIANT,VARIANT,key=value`.

A config file has scales (tiny, quickstart, paper_en, ...: sizes, data and models, one per config)
and variants (reward_scale, no_kl, ...: what an experiment changes, any number). Assignments come
last, as in `configs/ppo_max.py:quickstart,reward_scale,seed=1`; they mean the same as flags,
`--config.seed=1`. A value that holds a comma stands in quotes: `inputs.model='/models/a,b'`. What
depends on other keys (the run folder, the folders of the stages before) is left empty here and
derived by `resolve`, once flags have been read.
"""

import ast
import importlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import unread
from configs.unread import SET, Unread, among, rows_by

# The folder that SmolLM2-135M-Instruct is converted to, and what it is asked.
SMOLLM2 = "runs/pretrained/smollm2/model"
# Sums that the quickstart model solves about half of the time.
SUMS = "arithmetic:chain_sum:5-8"
INSTRUCTION = "Review a movie in a few words."

# Keys that do not change the numbers of a run, and so do not name its folder.
FREE = ("log.", "checkpoint.", "sharding.", "collapse.", "root", "workdir", "label", "inputs.build")

# Keys and scales of version 0.1 -> their names now.
RENAMED = {
    "train.eval_every": "eval.every",
    "train.microbatch": "train.microbatches (parts of a minibatch)",
    "inputs.policy": "inputs.model",
    "inputs.variant": "nothing: it follows from the scale, the seed and data.source",
    "paper": "paper_en",
    **{
        f"model.{name}": f"sizes.{name}"
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length")
    },
}

# Variants that the stages before take as well; "harm" is named after the source that it reads.
PASSED_ON = ("harm", "zh", "half")

_SOURCES = "data.source data.prompt_source"
_FALLING = among("linear", "cosine")
# What no experiment reads; see configs/unread.py.
UNREAD = (
    Unread("lora.alpha lora.targets", unless="lora.rank", is_=SET),
    Unread("log.wandb_project", unless="log.wandb", is_=SET),
    Unread("data.domains", unless=_SOURCES, is_=rows_by("domains")),
    Unread("data.half", unless="data.source", is_=rows_by("half")),
    Unread("data.instruction", unless=_SOURCES, is_=rows_by("instruction")),
    Unread("data.min_gap", unless="data.source", is_=rows_by("min_gap")),
    Unread("sampling.top_p sampling.top_k", unless="sampling.temperature", is_=SET),  # greedy
    Unread("optimizer.end_fraction", unless="optimizer.schedule", is_=_FALLING),
    Unread("critic_optimizer.end_fraction", unless="critic_optimizer.schedule", is_=_FALLING),
)

Change = Callable[[ConfigDict], None]

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
QUOTES = ("'", '"')
# A comma, or what holds commas that divide nothing: a value in quotes, or brackets.
_COMMAS = re.compile(
    rf"(?<==)(?:{_QUOTED})(?=\s*(?:,|$))|[(\[](?:{_QUOTED}|[^()\[\]])*[)\]]|(?P<comma>,)"
)


def build(
    experiment: str,
    arg: str | None,
    *,
    scales: Mapping[str, Callable[[], ConfigDict]],
    variants: Mapping[str, Change],
) -> ConfigDict:
    """Builds a config from its argument.

    Args:
      experiment: name of the experiment; names the run folder.
      arg: what follows the colon; empty means `quickstart`.
      scales: functions that return a whole config.
      variants: functions that change one.

    Raises:
      ValueError: unknown scale, variant or key, or two scales.
    """
    parts = split(arg or "")
    assignments = [part for part in parts if "=" in part]
    names = [part for part in parts if "=" not in part]
    for name in names:
        if name not in scales and name not in variants:
            raise ValueError(
                f"unknown variant {name!r} of configs/{experiment}.py{_renamed(name)}; scales: "
                f"{', '.join(sorted(scales))}; variants: {', '.join(sorted(variants)) or 'none'}"
            )
    chosen = [name for name in names if name in scales]
    if len(chosen) > 1:
        raise ValueError(f"{chosen} are scales: give at most one of them")
    scale = chosen[0] if chosen else "quickstart"
    changes = [name for name in names if name in variants]

    config = scales[scale]()
    config.experiment, config.scale, config.variants = experiment, scale, tuple(changes)
    if "label" in config:
        config.label = ", ".join(n for n in changes if n not in PASSED_ON) or config.label
    for name in changes:
        variants[name](config)
    for assignment in assignments:
        assign(config, assignment)
    return config


def split(arg: str) -> list[str]:
    """The parts of an argument, which commas divide.

    Commas in brackets belong to a value, and so do those of a value in quotes, as Python has them.

    >>> split("tiny, data.domains=('movie', 'nyt'), inputs.model='/models/a,b', seed=1")
    ['tiny', "data.domains=('movie', 'nyt')", "inputs.model='/models/a,b'", 'seed=1']
    """
    ends = [found.start() for found in _COMMAS.finditer(arg) if found["comma"]]
    parts = [arg[a:b] for a, b in zip([0, *(end + 1 for end in ends)], [*ends, None], strict=True)]
    return [part.strip() for part in parts if part.strip()]


def quoted(text: str) -> str:
    """A text as the value of an assignment: in quotes where it would be read otherwise.

    >>> quoted("hh:/data/hh"), quoted("jsonl:/data/a,b.jsonl"), quoted("12")
    ('hh:/data/hh', "'jsonl:/data/a,b.jsonl'", "'12'")
    """
    alone = f"key={text}"
    plain = split(alone) == [alone] and _value(text) == text and text[:1] not in QUOTES
    return text if plain else repr(text)


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy in which what was left empty is derived from the other keys.

    The run folder is named after the scale, the variants and every setting that differs from
    theirs, whether it was assigned or set by a flag: another config goes to another folder. With
    `root` the run folder, and whatever begins with runs/, lies there.

    Args:
      config: the result of a `get_config`, perhaps changed since.

    Raises:
      ValueError: a key was set that nothing reads, see configs/unread.py; or a source without the
        variant that sets lengths and loss for it.
    """
    module = importlib.import_module(f"configs.{config.experiment}")
    config = config.copy_and_resolve_references()
    _check_variant(config, module.VARIANTS)
    before, now = flat(module.get_config(",".join([config.scale, *config.variants]))), flat(config)
    unread.refuse((*UNREAD, *module.UNREAD), now, before)
    if not config.workdir:
        changed = [k for k in now if now[k] != before.get(k) and not k.startswith(FREE)]
        settings = [f"{key}={now[key]}" for key in changed]
        name = "-".join([config.scale, *config.variants, *settings])
        config.workdir = f"runs/{config.experiment}/" + name.replace("/", "_")
    module.derive(config)
    if config.root:
        _move_under_root(config)
    return config


def _check_variant(config: ConfigDict, variants: Mapping[str, Change]) -> None:
    """Refuses a source that has a variant of its name where only the source was given."""
    source, named = config.data.source, list(config.variants)
    if source in PASSED_ON and source in variants and source not in named:
        argument = ",".join([config.scale, *named, source])
        raise ValueError(
            f"data.source={source!r} needs the lengths and the loss of the variant {source}: use "
            f"--config configs/{config.experiment}.py:{argument} in its place"
        )


def _move_under_root(config: ConfigDict) -> None:
    """Makes folders of runs absolute, below `root`; those that are absolute stay what they are."""
    config.root = os.path.abspath(os.path.expanduser(config.root))
    config.workdir = os.path.join(config.root, config.workdir)
    for group in (config.inputs, config.get("compare", {})):
        for key, value in group.items():
            if isinstance(value, str) and value.startswith("runs/"):
                group[key] = os.path.join(config.root, value)


def idle_variants(config: ConfigDict) -> list[str]:
    """Variants that change nothing: they name the scale's own values, or keys that are not read."""
    module = importlib.import_module(f"configs.{config.experiment}")
    named, names_it = list(config.variants), ("variants", "label")

    def values(names: list[str]) -> dict[str, Any]:
        keys = flat(module.get_config(",".join([config.scale, *names])))
        dead = unread.unread((*UNREAD, *module.UNREAD), keys)
        return {k: v for k, v in keys.items() if k not in names_it and k not in dead}

    return [n for n in named if values(named) == values([m for m in named if m != n])]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key: `{"ppo.clip_eps": 0.2, ...}`, in order."""
    keys: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            keys |= flat(value, f"{prefix}{name}.")
        else:
            keys[prefix + name] = value
    return keys


def command_of(config: ConfigDict) -> list[str]:
    """The words of a command line that runs a config, with every key that its variants do not set.

    Args:
      config: the result of a `get_config`, perhaps changed since.
    """
    name = config.experiment
    argument = ",".join([config.scale, *config.variants])
    before = flat(importlib.import_module(f"configs.{name}").get_config(argument))
    changed = {key: value for key, value in flat(config).items() if value != before[key]}
    flags = [f"--config.{key}={value}" for key, value in changed.items()]
    file = f"configs/{name}.py:{argument}"
    return ["python", "-m", f"experiments.{name}", "--config", file, *flags]


def stage_argument(stage: str, config: Any, *variants: str) -> str:
    """The argument of an earlier stage's config file: same scale, seed and data.

    A source goes to the stage where it was set. What a scale reads itself, each stage has of its
    own: conversations, pairs or prompts.

    Args:
      stage: name of the experiment.
      config: the config of the run that needs the stage, or its typed settings.
      *variants: variants of that stage.
    """
    module = importlib.import_module(f"configs.{stage}")
    # Variants of the data, such as harm, are those of every stage.
    wanted = {*config.variants, config.data.source}
    passed = [name for name in PASSED_ON if name in wanted and name in module.VARIANTS]
    parts = [scale_of_stage(stage, config.scale), *passed, *variants]
    own = importlib.import_module(f"configs.{config.experiment}").get_config(
        ",".join([config.scale, *config.variants])
    )
    for key in ("source", "prompt_source"):
        if key in module.get_config(",".join(parts)).data:
            value = getattr(config.data, key)
            if value != own.data[key] and value not in passed:
                parts.append(f"data.{key}={quoted(value)}")
    if config.seed:
        parts.append(f"seed={config.seed}")
    return ",".join([*parts, *root_argument(config.root)])


def root_argument(root: str) -> list[str]:
    """What an argument needs so that a stage lies below the same root as the run that needs it."""
    return [f"root={quoted(root)}"] if root else []


def scale_of_stage(stage: str, scale: str) -> str:
    """The scale of an earlier stage's config that goes with a scale of this one."""
    if scale in importlib.import_module(f"configs.{stage}").SCALES:
        return scale
    # The released scripts have no stages of their own before PPO: the paper's are used.
    return scale.replace("moss_", "paper_")


def stage_folder(stage: str, config: ConfigDict, *variants: str, leaf: str = "model") -> str:
    """The folder, by default of the model, that the stage of `stage_argument` writes."""
    module = importlib.import_module(f"configs.{stage}")
    argument = stage_argument(stage, config, *variants)
    return f"{resolve(module.get_config(argument)).workdir}/{leaf}"


def assign(config: ConfigDict, assignment: str) -> None:
    """Sets `a.b.c=value` in place; the key must exist and the type must fit.

    Raises:
      ValueError: unknown key, a value of another type, or a quote that is not closed.
    """
    path, text = assignment.split("=", 1)
    value = _value(text)
    if value == text and text[:1] in QUOTES:
        raise ValueError(f"{path}={text} begins with a quote that nothing closes at its end")
    set_key(config, path, value)


def set_key(config: ConfigDict, path: str, value: Any) -> None:
    """Sets the key `a.b.c` in place; it must exist and the type must fit.

    Raises:
      ValueError: unknown key, or a value of another type.
    """
    *parents, leaf = path.split(".")
    node = config
    for name in [*parents, leaf]:
        if not isinstance(node, ConfigDict) or name not in node:
            known = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "none"
            raise ValueError(
                f"unknown config key {path!r}{_renamed(path)} ({name!r} is not one of: {known})"
            )
        parent, node = node, node[name]
    if hasattr(value, "tolist"):  # a number or an array of NumPy, as sweeps have them
        value = value.tolist()
    try:
        parent[leaf] = value
    except TypeError as error:
        raise ValueError(f"{path}={value} has the wrong type: {error}") from None


def _value(text: str) -> Any:
    """What an assignment gives a key: a number, bool, text in quotes or tuple, or the bare text."""
    text = {"true": "True", "false": "False"}.get(text, text)
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _renamed(name: str) -> str:
    """The present name of a key or scale of version 0.1, for an error."""
    return f" (now {RENAMED[name]})" if name in RENAMED else ""


def shared() -> ConfigDict:
    """Keys that every experiment has."""
    config = ConfigDict()
    config.seed = 0  # of weights, data order, sampling
    config.root = ""  # folder that runs/ is in; empty is the current one
    config.workdir = ""  # the run folder; empty names it after what differs from the scale
    config.experiment = ""  # set by the config file
    config.scale = ""  # set from the argument
    config.variants = ()  # set from the argument
    config.sharding = ConfigDict()
    config.sharding.devices = 0  # 0 is all of them
    config.sharding.mode = "zero2"  # what is spread over devices, see runtime/sharding.py
    config.sharding.tensor = 1  # devices that share a layer, in mode "tensor"
    config.model = ConfigDict()
    config.model.dtype = "float32"  # of weights and activations, or "bfloat16"
    config.model.remat = "none"  # what the backward pass recomputes: "none", "dots", "full"
    config.model.attention = "xla"  # or "cudnn" on NVIDIA GPUs in bfloat16
    config.lora = ConfigDict()
    config.lora.rank = 0  # 0 trains every weight; adapters need ten times the learning rate
    config.lora.alpha = 16.0  # adapters are scaled by alpha / rank
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")  # matrices of each layer
    config.log = ConfigDict()
    config.log.tensorboard = True
    config.log.wandb = False  # needs an account
    config.log.wandb_project = "rlhf_jax"
    config.checkpoint = ConfigDict()
    config.checkpoint.every = 100  # steps; 0 saves at the end and at a stop only
    config.checkpoint.keep = 2  # checkpoints that stay on disk; the newest whole one is resumed
    return config


def task(source: str = "reviews") -> ConfigDict:
    """Keys of the data that every experiment has; see rlhf_jax/tasks."""
    data = ConfigDict()
    data.source = source  # reviews, hh, hh:FOLDER, jsonl:FILE, stream:hh, harm, ...
    data.domains = ("movie", "amazon")  # for reviews: which are read
    data.half = ""  # for reviews: "first" or "second" half of the training texts; empty is both
    data.limit = 0  # the most rows of a split; 0 is all
    data.instruction = ""  # for reviews: what a chat model is asked; empty is plain text
    return data


def problems(source: str) -> ConfigDict:
    """The same of experiments that say how many problems they read: no review is among them."""
    data = task(source)
    for key in ("domains", "half", "instruction", "limit"):
        del data[key]
    return data


def half(config: ConfigDict) -> None:
    """The variant `half`: the half of the rated texts that the gold reward model never sees.

    Raises:
      ValueError: the source has no halves.
    """
    check_halves(config, "half")
    config.data.half = "first"


def zh(config: ConfigDict) -> None:
    """The variant `zh`: Chinese shop reviews in place of English ones."""
    config.data.update(source="reviews_zh", domains=(), instruction="")


def check_halves(config: ConfigDict, variant: str) -> None:
    """Refuses a variant that takes half of the texts of a source that is not divided.

    Raises:
      ValueError: names the variant and the source.
    """
    if config.data.source not in ("reviews", "reviews_zh"):
        raise ValueError(
            f"the variant {variant} takes half of the rated reviews, and data.source="
            f"{config.data.source!r} is not divided: judges=('reward_model:FOLDER',) names a "
            "reward model of your own"
        )


def optimizer(learning_rate: float, schedule: str, warmup_fraction: float, b2: float) -> ConfigDict:
    """AdamW."""
    keys = ConfigDict()
    keys.learning_rate = learning_rate  # at its peak
    keys.schedule = schedule  # after warm-up: "constant", "linear", "cosine", "inverse_sqrt"
    keys.warmup_fraction = warmup_fraction  # share of updates that rise, from a tenth of the peak
    keys.end_fraction = 0.1  # last rate as a share of the peak, for "linear" and "cosine"
    keys.b1 = 0.9  # decay of the first moment
    keys.b2 = b2  # decay of the second moment
    keys.eps = 1e-8  # added outside the square root
    keys.weight_decay = 0.0  # of matrices only
    keys.max_grad_norm = 1.0  # gradients are clipped to it; 0 is off
    return keys


def sampling(max_new_tokens: int) -> ConfigDict:
    """How responses are drawn."""
    keys = ConfigDict()
    keys.max_new_tokens = max_new_tokens  # a response that has not ended by then is cut
    keys.temperature = 1.0  # of sampling and of the policy that is optimised
    keys.top_p = 1.0  # nucleus mass; 1 is off
    keys.top_k = 0  # candidates; 0 is off
    keys.repetition_penalty = 1.0  # divides logits of tokens seen; 1 is off
    return keys


def eval_sampling() -> ConfigDict:
    """How responses are drawn for measurements; here all as in `sampling`."""
    keys = ConfigDict()
    keys.max_new_tokens = 0  # 0 is as in sampling
    keys.temperature = -1.0  # below 0 is as in sampling
    keys.top_p = 0.0  # 0 is as in sampling
    keys.top_k = -1  # below 0 is as in sampling
    keys.repetition_penalty = 0.0  # 0 is as in sampling
    return keys


def full_size() -> ConfigDict:
    """Memory settings of models of seven billion parameters on GPUs."""
    return ConfigDict({"dtype": "bfloat16", "remat": "full", "attention": "cudnn"})
