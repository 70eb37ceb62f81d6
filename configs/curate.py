"""Alignment data from a policy's own samples, kept by a reward model.

  python -m experiments.curate --config configs/curate.py:quickstart

Scales:
  tiny        seconds on two CPU cores; for tests
  quickstart  samples of the quickstart's SFT policy, the ones that configs/supervised.py:quickstart
              reads: they are drawn once
  smollm2     of SmolLM2-135M-Instruct
Variants (what is kept, and which stage reads it):
  rankings    every answer to a prompt in the order of their scores (the default): for `rrhf` and
              `pro` of configs/supervised.py, and as pairs for reward models and DPO
  quantiles   every answer with the quantile of its score: for `quark`
  best_of_n   the best of 16 answers to each prompt: for SFT
  threshold   every answer that scores at least keep.threshold: for SFT

  half        the first half of the texts, so that the judge `gold` may be asked later on
"""

from ml_collections import ConfigDict

from configs import common, supervised
from configs.unread import Unread, among


def _at(scale: str) -> ConfigDict:
    other = supervised.get_config(scale)
    config = common.shared()
    del config.lora  # nothing is trained
    config.checkpoint.every = 1  # the one step of this run draws and keeps
    config.inputs = ConfigDict()
    config.inputs.model = other.inputs.model  # folder of the policy that samples; empty is SFT's
    config.inputs.reward_model = ""  # folder; scores samples; empty is that of the same scale
    config.inputs.build = other.inputs.build  # run the stages before where models are missing
    config.model = other.model
    config.data = other.data
    del config.data.max_length, config.data.min_gap, config.data.pairs
    config.samples, config.sampling = other.samples, other.sampling
    config.keep = ConfigDict()
    config.keep.rule = "rankings"  # or "quantiles", "best_of_n", "threshold"
    config.keep.threshold = 1.0  # the least score, for "threshold"
    config.keep.quantiles = 5  # how many, for "quantiles"
    config.keep.cut = True  # whether answers that did not end are kept
    config.keep.similarity = 0.8  # share of runs of three words that makes a near duplicate
    return config


def _quickstart() -> ConfigDict:
    return _at("quickstart")


def _tiny() -> ConfigDict:
    return _at("tiny")


def _smollm2() -> ConfigDict:
    return _at("smollm2")


def _rule(name: str):
    """A variant that keeps by a rule; of prompts and answers that stay whole."""

    def change(config: ConfigDict) -> None:
        config.keep.rule = name

    return change


def _for_sft(name: str, per_prompt: int = 0):
    """The same for fine-tuning: what was cut off is not what the policy is to say."""

    def change(config: ConfigDict) -> None:
        config.keep.update(rule=name, cut=False)
        if per_prompt:
            drawn = config.samples.prompts * config.samples.per_prompt
            config.samples.update(prompts=drawn // per_prompt, per_prompt=per_prompt)

    return change


SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2}
VARIANTS = {
    "rankings": _rule("rankings"),
    "quantiles": _rule("quantiles"),
    "best_of_n": _for_sft("best_of_n", 16),
    "threshold": _for_sft("threshold"),
    "half": common.half,
}
UNREAD = (
    Unread("keep.threshold", unless="keep.rule", is_=among("threshold")),
    Unread("keep.quantiles", unless="keep.rule", is_=among("quantiles")),
)


def derive(config: ConfigDict) -> None:
    """The folders of the stages before."""
    inputs = config.inputs
    inputs.model = inputs.model or common.stage_folder("sft", config)
    inputs.reward_model = inputs.reward_model or common.stage_folder("reward_model", config)


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("curate", arg, scales=SCALES, variants=VARIANTS)
