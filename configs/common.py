"""How the argument of a config file becomes a config: `FILE:VARIANT,VARIANT,key=value`.

A config file has scales (tiny, quickstart, paper_en, ...: sizes, data and models, one per config)
and variants (reward_scale, no_kl, ...: what an experiment changes, any number). Assignments come
last, as in `configs/ppo_max.py:quickstart,reward_scale,seed=1`.
"""

import ast
import re
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

# The folder that SmolLM2-135M-Instruct is converted to, and what it is asked for.
SMOLLM2 = "runs/pretrained/smollm2/model"
INSTRUCTION = "Review a movie in a few words."

Change = Callable[[ConfigDict], None]


def build(
    experiment: str,
    arg: str | None,
    *,
    scales: Mapping[str, Callable[[], ConfigDict]],
    variants: Mapping[str, Change],
    finish: Change = lambda config: None,
) -> ConfigDict:
    """Builds a config from its argument.

    Args:
      experiment: Name of the experiment; names the run folder.
      arg: What stands behind the colon; empty means `quickstart`.
      scales: Functions that return a whole config.
      variants: Functions that change one.
      finish: Derives what depends on other keys (input folders on the seed); runs at the end.

    Raises:
      ValueError: unknown scale, variant or key, or two scales.
    """
    # Commas within brackets belong to a value: `data.domains=('movie', 'nyt')`.
    parts = [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", arg or "") if part.strip()]
    assignments = [part for part in parts if "=" in part]
    names = [part for part in parts if "=" not in part]
    for name in names:
        if name not in scales and name not in variants:
            raise ValueError(
                f"unknown variant {name!r} of configs/{experiment}.py; scales: "
                f"{', '.join(sorted(scales))}; variants: {', '.join(sorted(variants)) or 'none'}"
            )
    chosen = [name for name in names if name in scales]
    if len(chosen) > 1:
        raise ValueError(f"{chosen} are scales: give at most one of them")
    scale = chosen[0] if chosen else "quickstart"
    changes = [name for name in names if name in variants]

    config = scales[scale]()
    config.scale = scale
    for name in changes:
        variants[name](config)
    for assignment in assignments:
        assign(config, assignment)
    config.label = ", ".join(changes) or config.label
    config.workdir = f"runs/{experiment}/" + _folder("-".join([scale, *changes, *assignments]))
    finish(config)
    _pass_source_on(config, assignments)
    return config


def _folder(name: str) -> str:
    """A name without the slashes of paths that were assigned."""
    return name.replace("/", "_")


def _pass_source_on(config: ConfigDict, assignments: list[str]) -> None:
    """Stages before a run on other data are those on the same data, not those of the scale."""
    source = [part for part in assignments if part.startswith("data.source=")]
    if not source:
        return
    for group in ("inputs", "compare"):
        for key, value in config[group].items() if group in config else ():
            given = any(part.startswith(f"{group}.{key}=") for part in assignments)
            if not given and str(value).startswith("runs/"):
                folder = value.removesuffix("/model")
                config[group][key] = f"{folder}-{_folder(source[-1])}/model"
    if "variant" in config.inputs:
        config.inputs.variant += f",{source[-1]}"


def assign(config: ConfigDict, assignment: str) -> None:
    """Sets `a.b.c=value` in place; the key must exist and the type must fit.

    Raises:
      ValueError: unknown key, or a value of another type.
    """
    path, text = assignment.split("=", 1)
    *parents, leaf = path.split(".")
    node = config
    for name in [*parents, leaf]:
        if not isinstance(node, ConfigDict) or name not in node:
            known = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "none"
            raise ValueError(f"unknown config key {path!r} ({name!r} is not one of: {known})")
        parent, node = node, node[name]
    text = {"true": "True", "false": "False"}.get(text, text)
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    try:
        parent[leaf] = value
    except TypeError as error:
        raise ValueError(f"{path}={text} has the wrong type: {error}") from None


def shared() -> ConfigDict:
    """Keys that every experiment has."""
    config = ConfigDict()
    config.seed = 0
    config.workdir = ""
    config.scale = ""
    # How reports and plots call the result; the names of the variants, if there are any.
    config.label = ""
    # 0 devices is all; `tensor` of them share a layer, in mode "tensor".
    config.sharding = ConfigDict({"devices": 0, "mode": "zero2", "tensor": 1})
    # Rank 0 trains every weight; adapters want a learning rate about ten times as high.
    config.lora = ConfigDict({"rank": 0, "alpha": 16.0})
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.log = ConfigDict({"tensorboard": True, "wandb": False, "wandb_project": "rlhf_jax"})
    config.checkpoint = ConfigDict({"every": 100, "keep": 1})
    return config


def with_seed(path: str, seed: int) -> str:
    """The argument or run folder of the same scale with this seed; seed 0 is the default."""
    if not seed:
        return path
    return f"{path}-seed={seed}" if "/" in path else f"{path},seed={seed}"
