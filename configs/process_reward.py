"""Reward models of steps (PRM) and of outcomes (ORM), on a policy's own solutions.

  python -m experiments.process_reward --config configs/process_reward.py:quickstart

Scales:
  tiny        seconds on two CPU cores; for tests
  quickstart  from the SFT model of sums in steps (`configs/sft.py:quickstart,arithmetic`)
  smollm2     from SmolLM2-135M after SFT on word problems, adapters of rank 8
Variants:
  outcome     an outcome reward model: was the final answer right, asked at every token
  likelihood  a step is as likely to be right as the model is to write it: no label token
  rollouts    labels by completing each step (Math-Shepherd) in place of the verifier's
  last_token  the label of a step is asked at its last token alone, as in the paper
  human       labels by people: data.source=prm800k:FOLDER, or another source of labelled steps
"""

from ml_collections import ConfigDict

from configs import common
from configs.unread import Unread, among

PRM = "likelihood"  # the variant that searches are guided by


def _quickstart() -> ConfigDict:
    config = common.shared()
    config.inputs = ConfigDict()
    config.inputs.policy = ""  # writes the solutions, and is trained on; empty is the SFT model
    config.inputs.build = True  # run the stage before where its model is missing
    config.data = common.problems(common.SUMS)
    config.data.max_length = 192  # tokens of a problem with a solution
    config.data.problems = 6_000  # to train on; of labelled solutions, how many of these
    config.data.validation_problems = 100  # held out, for the curves
    config.data.test_problems = 300  # held out, for the report
    config.samples = ConfigDict()
    config.samples.per_problem = 4  # solutions that the policy writes to each problem
    config.samples.rows = 512  # the most that are drawn at a time
    config.sampling = common.sampling(144)
    config.labels = ConfigDict()
    config.labels.method = "exact"  # of steps: the verifier's; "rollouts"; "human"
    config.labels.completions = 8  # of each step, for "rollouts"
    config.labels.above = 0.0  # share of them that must arrive for a step to count as right
    config.loss = ConfigDict()
    # "process", a class of each step; "outcome", one for all tokens; "likelihood", its probability.
    config.loss.supervision = "process"
    config.loss.neutral = "positive"  # how a neutral step counts in a score, or "negative"
    # Whether the label of a step is asked at all of its tokens, or, as in the paper, at the last.
    config.loss.every_token = True
    config.loss.lm_coef = 1.0  # weight of the LM loss on solutions that are right in every step
    config.loss.tokens = ("-", "?", "+")  # what is said of a step: wrong, neutral, right
    config.train = ConfigDict()
    config.train.steps = 800  # updates
    config.train.minibatch = 32  # rows of an update
    config.train.microbatches = 1  # parts of a minibatch, one after the other
    config.train.row_length = 192  # tokens of a row, into which solutions are packed
    config.optimizer = common.optimizer(2e-3, "cosine", warmup_fraction=0.1, b2=0.98)
    config.optimizer.weight_decay = 0.1
    config.eval = ConfigDict()
    config.eval.every = 100  # updates between two measurements on held-out solutions
    config.eval.threshold = 0.5  # a step whose chance to be right is lower counts as wrong
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.data.update(source="arithmetic", max_length=96)
    config.data.update(problems=24, validation_problems=8, test_problems=8)
    config.samples.update(per_problem=4, rows=32)
    config.sampling.max_new_tokens = 48
    config.labels.completions = 2
    config.train.update(steps=6, minibatch=8, microbatches=2, row_length=96)
    config.eval.every = 3
    config.checkpoint.every = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.data.update(source="arithmetic:gsm_symbolic", max_length=320)
    config.data.update(problems=100, validation_problems=20, test_problems=50)
    config.samples.update(per_problem=4, rows=64)
    config.sampling.max_new_tokens = 160
    config.train.update(steps=40, minibatch=8, row_length=320)
    config.eval.every = 20
    config.lora.rank = 8
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    return config


def _outcome(config: ConfigDict) -> None:
    config.loss.supervision = "outcome"


def _likelihood(config: ConfigDict) -> None:
    config.loss.supervision = "likelihood"
    # The model knows what it is asked: it needs fewer updates, and large ones unmake it.
    config.train.steps = min(config.train.steps, 400)
    config.eval.every = min(config.eval.every, 50)
    if config.scale != "smollm2":
        config.optimizer.learning_rate = 3e-4


def _rollouts(config: ConfigDict) -> None:
    config.labels.method = "rollouts"


def _last_token(config: ConfigDict) -> None:
    config.loss.every_token = False


def _human(config: ConfigDict) -> None:
    config.labels.method = "human"
    config.data.source = "prm800k:data/prm800k"


SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2}
VARIANTS = {
    "outcome": _outcome,
    "likelihood": _likelihood,
    "rollouts": _rollouts,
    "human": _human,
    "last_token": _last_token,
}
UNREAD = (
    Unread("samples.* sampling.*", unless="labels.method", is_=among("exact", "rollouts")),
    Unread("labels.completions labels.above", unless="labels.method", is_=among("rollouts")),
    Unread("loss.every_token", unless="loss.supervision", is_=among("process")),
    Unread("loss.neutral", unless="loss.supervision", is_=among("process", "likelihood")),
    Unread("loss.tokens", unless="loss.supervision", is_=among("process", "outcome")),
)


def derive(config: ConfigDict) -> None:
    """The folder of the stage before."""
    config.inputs.policy = config.inputs.policy or common.stage_folder(
        "sft", config, of_source(config.data.source)
    )


def of_source(source: str) -> str:
    """What the SFT stage is given so that it learns the same: a variant, or the source."""
    return (
        "arithmetic" if source.startswith("arithmetic") else f"data.source={common.quoted(source)}"
    )


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("process_reward", arg, scales=SCALES, variants=VARIANTS)
