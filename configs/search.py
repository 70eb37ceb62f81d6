"""Search at inference: votes, best-of-N and searches over steps, at equal compute.

  python -m experiments.search --config configs/search.py:quickstart

Scales:
  tiny        seconds on two CPU cores; for tests
  quickstart  sums in steps, by the SFT model of `configs/sft.py:quickstart,arithmetic` and two
              reward models of configs/process_reward.py: `quickstart,likelihood` of steps and
              `quickstart,outcome`
  smollm2     word problems
"""

from ml_collections import ConfigDict

from configs import common
from configs.process_reward import PRM, of_source


def _quickstart() -> ConfigDict:
    config = common.shared()
    del config.lora  # nothing is trained
    config.checkpoint.every = 1  # a step of this run is a seed of sampling
    config.inputs = ConfigDict()
    config.inputs.policy = ""  # whose solutions are searched; empty is the SFT model
    config.inputs.prm = ""  # model folder of a process reward model; empty is ours
    config.inputs.orm = ""  # model folder of an outcome reward model; empty is ours
    config.inputs.build = True  # run the stages before where their models are missing
    config.data = common.problems(common.SUMS)
    config.data.max_length = 192  # tokens of a problem with a solution
    config.data.test_problems = 300  # held out
    config.samples = ConfigDict()
    config.samples.per_problem = 16  # N; smaller powers of two are the first of them
    config.samples.rows = 512  # the most that are drawn at a time
    config.sampling = common.sampling(144)
    config.search = ConfigDict()
    config.search.seeds = 5  # of sampling; each draws everything anew
    config.search.beams = 4  # partial solutions that go on; beams x width is N for equal compute
    config.search.max_steps = 12  # of a solution
    config.search.aggregation = "product"  # of the PRM's step scores: "product", "min", "last"
    config.search.neutral = "positive"  # how a neutral step counts in a score, or "negative"
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.data.update(source="arithmetic", test_problems=8, max_length=96)
    config.samples.update(per_problem=4, rows=32)
    config.sampling.max_new_tokens = 48
    config.search.update(seeds=2, beams=2, max_steps=4)
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.data.update(source="arithmetic:gsm_symbolic", max_length=320, test_problems=30)
    config.samples.update(per_problem=4, rows=64)
    config.sampling.max_new_tokens = 160
    config.search.update(seeds=1, beams=2)
    return config


SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2}
VARIANTS: dict[str, common.Change] = {}
UNREAD = ()


def derive(config: ConfigDict) -> None:
    """The folders of the stages before."""
    inputs = config.inputs
    sft = of_source(config.data.source)
    inputs.policy = inputs.policy or common.stage_folder("sft", config, sft)
    inputs.prm = inputs.prm or common.stage_folder("process_reward", config, PRM)
    inputs.orm = inputs.orm or common.stage_folder("process_reward", config, "outcome")


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("search", arg, scales=SCALES, variants=VARIANTS)
