"""Tasks: what a policy is asked, what it learns from, and what measures it.

from rlhf_jax.tasks import TaskConfig, make_task

task = make_task(TaskConfig("hh:FOLDER"))
pairs = task.preferences(tokenizer, "train", max_length=512, count=1000)
"""

from rlhf_jax.data.examples import Examples
from rlhf_jax.tasks.arithmetic import Arithmetic
from rlhf_jax.tasks.harm import Harm
from rlhf_jax.tasks.hh import HH
from rlhf_jax.tasks.jsonl import JSONLines
from rlhf_jax.tasks.llamafactory import LlamaFactory
from rlhf_jax.tasks.mix import Mix
from rlhf_jax.tasks.reviews import Reviews
from rlhf_jax.tasks.reviews_zh import ReviewsZh
from rlhf_jax.tasks.steps import PRM800K, MathShepherd, Solutions, Stepwise
from rlhf_jax.tasks.task import TASKS, Task, TaskConfig, make_task

__all__ = ["TASKS", "Examples", "Task", "TaskConfig", "make_task"]

TASKS |= {
    "reviews": Reviews,
    "reviews_zh": ReviewsZh,
    "hh": HH,
    "jsonl": JSONLines,
    "harm": Harm,
    "llamafactory": LlamaFactory,
    "arithmetic": Arithmetic,
    "prm800k": PRM800K,
    "math_shepherd": MathShepherd,
    "stepwise": Stepwise,
    "solutions": Solutions,
    "mix": Mix,
}
