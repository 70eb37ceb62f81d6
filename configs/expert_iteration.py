"""Expert iteration: rounds of search by the policy and of fine-tuning on what it found.

  python -m experiments.expert_iteration --config configs/expert_iteration.py:quickstart

Scales:
  tiny        seconds on two CPU cores; for tests
  quickstart  sums in steps, from the SFT model of `configs/sft.py:quickstart,arithmetic`
  smollm2     word problems, from SmolLM2-135M after SFT on them, adapters of rank 8
Variants (Uesato et al. 2022, section 2.4; without one: an attempt whose final answer is right):
  all_right   every different attempt whose answer is right (rejection-sampling fine-tuning)
  orm         the attempt that an outcome reward model scores highest
  prm         a search over steps that a process reward model guides
  control     as many random attempts at the same problems as the final answer would keep
  continued   each round goes on with the weights of the round before
  reviews     openings of reviews in place of problems, the best of 8 by the reward model (RAFT)
"""

from ml_collections import ConfigDict

from configs import common
from configs.process_reward import PRM, of_source
from configs.unread import EMPTY, Unread, among, no


def _quickstart() -> ConfigDict:
    config = common.shared()
    config.checkpoint.every = 1  # a step of this run is a round
    config.inputs = ConfigDict()
    config.inputs.policy = ""  # the policy of round 0; empty is the SFT model
    config.inputs.scorer = ""  # model folder of a process or outcome reward model; empty is ours
    config.inputs.build = True  # run the stages before where their models are missing
    config.data = common.task(common.SUMS)
    del config.data.instruction  # prompts are gone on with as they stand
    del config.data.limit  # each split has a number of problems
    config.data.max_length = 192  # tokens of a problem with a solution
    config.data.problems = 1_500  # to search
    config.data.validation_problems = 200  # held out, to choose the best round
    config.data.test_problems = 500  # held out, for the report
    config.samples = ConfigDict()
    config.samples.per_problem = 8  # attempts of a round; candidates of each step for "prm"
    config.samples.rows = 512  # the most that are drawn at a time
    config.sampling = common.sampling(144)
    config.improve = ConfigDict()
    config.improve.rounds = 3  # of search and fine-tuning
    # What is kept: "final_answer", "all_right", "orm", "prm" or "control"; of other prompts
    # "reward_model".
    config.improve.method = "final_answer"
    # Weights that a round's fine-tuning begins with: those of round 0, "first", or of the round
    # before, "last".
    config.improve.start = "first"
    config.improve.max_steps = 12  # of a solution that "prm" searches
    config.train = ConfigDict()
    config.train.steps = 0  # updates of a round; 0 where train.epochs says how long
    config.train.epochs = 2.0  # how often a round reads the pool; 0 where train.steps says it
    config.train.minibatch = 32  # rows of an update
    config.train.microbatches = 1  # parts of a minibatch, one after the other
    config.train.row_length = 192  # tokens of a row, into which solutions are packed
    config.optimizer = common.optimizer(5e-4, "cosine", warmup_fraction=0.1, b2=0.98)
    config.optimizer.weight_decay = 0.1
    config.eval = ConfigDict()
    config.eval.attempts = 8  # attempts at each held-out problem; other prompts have one answer
    config.judges = ()  # of answers to other prompts; () asks the task
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.data.update(source="arithmetic", max_length=96)
    config.data.update(problems=24, validation_problems=8, test_problems=8)
    config.samples.update(per_problem=4, rows=32)
    config.sampling.max_new_tokens = 48
    config.improve.update(rounds=2, max_steps=3)
    config.train.update(steps=2, epochs=0.0, minibatch=8, microbatches=2, row_length=96)
    config.eval.attempts = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.data.update(source="arithmetic:gsm_symbolic", max_length=320)
    config.data.update(problems=100, validation_problems=20, test_problems=50)
    config.samples.update(per_problem=4, rows=64)
    config.sampling.max_new_tokens = 160
    config.improve.rounds = 1
    config.train.update(minibatch=8, row_length=320)
    config.eval.attempts = 2
    config.lora.rank = 8
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    return config


def _method(name: str) -> common.Change:
    def change(config: ConfigDict) -> None:
        config.improve.method = name

    return change


def _reviews(config: ConfigDict) -> None:
    tiny = config.scale == "tiny"
    config.improve.method = "reward_model"
    config.data.update(source="reviews", max_length=96 if tiny else 64)
    config.sampling.max_new_tokens = 8 if tiny else 32
    if not tiny:
        config.data.update(problems=2_000, validation_problems=256, test_problems=512)
        config.train.row_length = 64


def _continued(config: ConfigDict) -> None:
    config.improve.start = "last"


SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2}
VARIANTS = {
    "all_right": _method("all_right"),
    "orm": _method("orm"),
    "prm": _method("prm"),
    "control": _method("control"),
    "continued": _continued,
    "reviews": _reviews,
}
UNREAD = (
    Unread("train.epochs", unless="train.steps", is_=EMPTY),
    Unread("inputs.scorer", unless="improve.method", is_=among("orm", "prm", "reward_model")),
    Unread("improve.max_steps", unless="improve.method", is_=among("prm")),
    Unread("judges", unless="improve.method", is_=among("reward_model")),
    Unread("eval.attempts", unless="improve.method", is_=no("reward_model")),
)


def derive(config: ConfigDict) -> None:
    """The folders of the stages before."""
    inputs, stage = config.inputs, scorer_stage(config.improve.method)
    sft = of_source(config.data.source)
    inputs.policy = inputs.policy or common.stage_folder("sft", config, sft)
    if stage:
        inputs.scorer = inputs.scorer or common.stage_folder(stage[0], config, *stage[1:])


def scorer_stage(method: str) -> tuple[str, ...]:
    """The experiment that makes the reward model of a method, and its variants; () for none."""
    stages = {
        "orm": ("process_reward", "outcome"),
        "prm": ("process_reward", PRM),
        "reward_model": ("reward_model",),
    }
    return stages.get(method, ())


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("expert_iteration", arg, scales=SCALES, variants=VARIANTS)
