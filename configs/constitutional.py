"""Constitutional AI, its supervised part: critiques and revisions by principles, then SFT on them.

  python -m experiments.constitutional --config configs/constitutional.py:smollm2

Scales:
  tiny        seconds on two CPU cores; for tests: the tiny policy criticises itself
  quickstart  reviews of the quickstart's SFT policy, which SmolLM2-135M-Instruct criticises and
              revises, since a model of one million parameters can do neither
  smollm2     reviews of SmolLM2-135M-Instruct, revised by itself, adapters of rank 8
Variants:
  harm        answers to harmful prompts, by the constitution `harmless`, opt-in: `smollm2,harm`;
              the report shows none of them
  half        prompts of the first half of the texts, see docs/judges.md

The part that follows, comparisons by the principles, a reward model and PPO, are the variants
`constitutional` of configs/ai_labels.py, configs/reward_model.py and configs/ppo_max.py.
"""

from ml_collections import ConfigDict

from configs import common
from configs.unread import EMPTY, Unread


def _quickstart() -> ConfigDict:
    config = common.shared()
    config.checkpoint.every = 1  # a step of this run is a round
    config.inputs = ConfigDict()
    config.inputs.policy = ""  # who answers and is fine-tuned; empty is the SFT model of the scale
    # Folder or hub name of who criticises and revises; empty is the policy itself.
    config.inputs.critic = common.SMOLLM2
    config.inputs.build = True  # run the stage before where its model is missing
    config.data = common.task()
    config.data.max_length = 128  # tokens of a prompt with a response
    config.data.prompts = 500  # to train on
    config.data.eval_prompts = 256  # held out, to compare the policy before and after
    config.revise = ConfigDict()
    # A name of rlhf_jax/methods/constitutions, or a TOML file.
    config.revise.constitution = "reviews"
    config.revise.rounds = 4  # of a critique and a revision
    config.revise.max_new_tokens = 64  # of a critique, and of a revision
    config.revise.max_length = 1024  # tokens of examples and talk; the oldest examples go first
    config.revise.temperature = 1.0  # of critiques and revisions; 0 is greedy
    config.revise.ordinary = 1.0  # documents of the data in the fine-tuning, for each revision
    config.samples = ConfigDict()
    config.samples.rows = 64  # answers that are drawn at a time, the most
    config.sampling = common.sampling(32)
    config.train = ConfigDict()
    config.train.steps = 0  # updates; 0 where train.epochs says how long
    config.train.epochs = 1.0  # how often the revisions are read; 0 where train.steps says it
    config.train.minibatch = 32  # rows of an update
    config.train.microbatches = 1  # parts of a minibatch, one after the other
    config.train.row_length = 128  # tokens of a row, into which responses are packed
    config.optimizer = common.optimizer(5e-4, "constant", warmup_fraction=0.0, b2=0.98)
    config.eval = ConfigDict()
    config.eval.samples = 4  # transcripts that the report shows
    config.judges = ()  # of responses; () asks the task
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.inputs.critic = ""
    config.data.update(limit=200, max_length=20, prompts=16, eval_prompts=8)
    config.revise.update(rounds=2, max_new_tokens=6, max_length=200)
    config.samples.rows = 16
    config.sampling.max_new_tokens = 8
    config.train.update(steps=2, epochs=0.0, minibatch=8, microbatches=2, row_length=64)
    config.optimizer.schedule = "cosine"
    config.eval.samples = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.inputs.update(policy=common.SMOLLM2, critic="")
    config.data.update(domains=("movie",), max_length=96, instruction=common.INSTRUCTION)
    config.data.update(prompts=64, eval_prompts=64)
    config.sampling.max_new_tokens = 24
    config.train.minibatch = 16
    config.lora.rank = 8
    config.optimizer.learning_rate = 1e-3
    return config


def _harm(config: ConfigDict) -> None:
    config.data.update(source="harm", domains=(), instruction="", max_length=192)
    config.revise.constitution = "harmless"
    config.sampling.max_new_tokens = 64
    config.train.row_length = max(config.train.row_length, 192)
    config.eval.samples = 0


SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2}
VARIANTS = {"harm": _harm, "half": common.half}
UNREAD = (Unread("train.epochs", unless="train.steps", is_=EMPTY),)


def derive(config: ConfigDict) -> None:
    """The folders of the policy and of the critic."""
    inputs = config.inputs
    inputs.policy = inputs.policy or common.stage_folder("sft", config)
    inputs.critic = inputs.critic or inputs.policy


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("constitutional", arg, scales=SCALES, variants=VARIANTS)
