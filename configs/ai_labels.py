"""Pairs that a language model labels, in place of people.

  python -m experiments.ai_labels --config configs/ai_labels.py:quickstart

Scales:
  tiny        seconds on two CPU cores; for tests: the tiny policy judges itself
  quickstart  samples of the quickstart's SFT policy, judged by SmolLM2-135M-Instruct, since a model
              of one million parameters judges nothing
  smollm2     samples of SmolLM2-135M-Instruct, judged by itself
Variants:
  compare     both responses in one prompt, in both orders (Lee et al. 2023); without it, each alone
  reasons     the same after reasons, with labels clamped to 0.4 and 0.6 (Bai et al. 2022)
  rate        each response alone, from 1 to 10
  pairs       the pairs of the data, that people ranked, in place of samples
  constitutional  samples of the model that experiments.constitutional makes, compared by the
              principles of its constitution (Bai et al. 2022, section 4)
  half        prompts and pairs of the first half of the texts, see docs/judges.md
  harm        prompts of the harm data, opt-in; the report shows no pair of it
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import common
from configs.unread import SET, Unread, no


def _quickstart() -> ConfigDict:
    config = common.shared()
    del config.lora  # nothing is trained
    config.checkpoint.every = 1  # a step of this run is a split
    config.inputs = ConfigDict()
    config.inputs.policy = ""  # whose samples are labelled; empty is the SFT model of the scale
    # Folder or hub name of a language model; empty is the policy itself.
    config.inputs.judge = common.SMOLLM2
    config.inputs.build = True  # run the stages before where their models are missing
    config.data = common.task()
    config.data.max_length = 128  # tokens of a prompt with one response
    config.data.pairs = 2_000  # to train on
    config.data.validation_pairs = 200  # held out, for curves
    config.data.eval_pairs = 400  # held out, for the report
    config.labels = ConfigDict()
    config.labels.of = "samples"  # two of the policy's to each prompt; or the "pairs" of the data
    # What the judge is asked: a template of rlhf_jax/methods/feedback_templates, or a TOML file.
    config.labels.template = "score_reviews"
    # Whose principles fill the field {question} of the template, one drawn for each pair: a name of
    # rlhf_jax/methods/constitutions, or a TOML file; empty for templates without that field.
    config.labels.constitution = ""
    config.labels.reasons = False  # whether a judge that compares gives reasons first
    config.labels.max_new_tokens = 96  # of the reasons
    config.labels.clamp = 0.5  # labels stay within 0.5 - clamp and 0.5 + clamp
    config.labels.max_length = 1024  # tokens of the longest prompt of the judge
    config.labels.batch_tokens = 1024  # that the judge reads at a time, about
    config.samples = ConfigDict()
    config.samples.rows = 256  # responses that are drawn at a time, the most
    config.sampling = common.sampling(32)
    config.eval = ConfigDict()
    config.eval.people = 300  # pairs that people ranked, to measure the judge by; 0 is none
    config.eval.samples = 4  # pairs that the report shows
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.inputs.judge = ""
    config.data.update(limit=200, max_length=20, pairs=40, validation_pairs=8, eval_pairs=8)
    config.labels.update(template="compare_reviews", max_new_tokens=4, max_length=384)
    config.samples.rows = 32
    config.sampling.max_new_tokens = 8
    config.eval.people = 12
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.inputs.update(policy=common.SMOLLM2)
    config.data.update(domains=("movie",), max_length=64, instruction=common.INSTRUCTION)
    config.data.update(pairs=600, validation_pairs=60, eval_pairs=120)
    config.samples.rows = 64
    config.sampling.max_new_tokens = 24
    return config


def _compare(config: ConfigDict) -> None:
    config.labels.template = "compare_reviews"


def _reasons(config: ConfigDict) -> None:
    _compare(config)
    config.labels.update(reasons=True, clamp=0.1)


def _rate(config: ConfigDict) -> None:
    config.labels.template = "rate_reviews"


def _pairs(config: ConfigDict) -> None:
    config.labels.of = "pairs"


def _constitutional(config: ConfigDict) -> None:
    config.inputs.policy = ""
    config.labels.template = "compare_cai"
    config.labels.constitution = "harmless" if config.data.source == "harm" else "reviews"


def _harm(config: ConfigDict) -> None:
    config.data.update(source="harm", domains=(), instruction="", max_length=192)
    by_principle = bool(config.labels.constitution)
    config.labels.template = "compare_cai" if by_principle else "compare_rlaif"
    config.labels.constitution = "harmless" if by_principle else ""
    config.sampling.max_new_tokens = 64
    config.eval.samples = 0


CONSTITUTIONAL = "constitutional"
SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2}
VARIANTS = {
    "compare": _compare,
    "reasons": _reasons,
    "rate": _rate,
    "pairs": _pairs,
    CONSTITUTIONAL: _constitutional,
    "half": common.half,
    "harm": _harm,
}
UNREAD = (
    Unread("labels.max_new_tokens", unless="labels.reasons", is_=SET),
    Unread("samples.* sampling.*", unless="labels.of", is_=no("pairs")),
    Unread("data.max_length", unless="labels.of", is_=no("pairs")),
)


def derive(config: ConfigDict) -> None:
    """The folders of the policy and of the judge."""
    inputs = config.inputs
    inputs.policy = inputs.policy or common.stage_folder(policy_stage(config.variants), config)
    inputs.judge = inputs.judge or inputs.policy


def policy_stage(variants: Sequence[str]) -> str:
    """The experiment that makes the policy."""
    return CONSTITUTIONAL if CONSTITUTIONAL in variants else "sft"


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("ai_labels", arg, scales=SCALES, variants=VARIANTS)
