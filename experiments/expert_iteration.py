"""Expert iteration: rounds of search by the policy, and of fine-tuning on what the search found.

  python -m experiments.expert_iteration --config configs/expert_iteration.py:quickstart
  python -m experiments.expert_iteration --config configs/expert_iteration.py:quickstart,prm

A round lets the policy attempt the training problems, keeps what the method chooses, adds it to the
pool, and fine-tunes on the pool. Every round is measured on validation problems; the best one is
compared with round 0, the SFT model, on test problems. A round that is done is not done again; its
model lies in `rounds/N`, its attempts in `runs/attempts`. Writes `model/`, report.md, what
each round found to `pool/N.jsonl`, metrics.jsonl, config.json and summary.json to the run folder.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from configs import common
from configs.expert_iteration import scorer_stage
from experiments import command, folders, judging, reporting, solving, stages
from experiments.distilling import distil
from experiments.improving import METHODS, REWARD_MODEL, Measured, ProblemWorld, PromptWorld, World
from experiments.process_reward import Problems
from experiments.settings import Shared, judge_names
from experiments.solving import SampleConfig, Solver
from rlhf_jax.data.encode import encode_prompt
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.evaluation.comparison import bootstrap_interval
from rlhf_jax.methods import expert_iteration
from rlhf_jax.methods.expert_iteration import Example
from rlhf_jax.methods.sft import SFTConfig
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.run import OnStep

FIRST, LATEST = "first", "last"
SHOWN = 6  # problems of the report


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The policy of round 0, and the reward model that chooses or guides."""

    policy: str
    scorer: str
    build: bool


@dataclasses.dataclass(frozen=True)
class ImproveConfig:
    """How a round finds what it distils.

    Attributes:
      rounds: of search and fine-tuning.
      method: what is kept of the attempts, see `methods.expert_iteration`; "prm" searches instead.
      start: whether fine-tuning begins with the weights of round 0, "first" (Uesato et al. 2022),
        or with those of the round before, "last".
      max_steps: of a solution that "prm" searches.
    """

    rounds: int
    method: str
    start: str
    max_steps: int

    def __post_init__(self):
        check(
            self,
            rounds="[1, inf)",
            method=METHODS,
            start=(FIRST, LATEST),
            max_steps="[1, inf)",
        )


@dataclasses.dataclass(frozen=True)
class AttemptsConfig:
    """How a policy is measured: so many attempts at each held-out problem."""

    attempts: int

    def __post_init__(self):
        check(self, attempts="[1, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Every key of configs/expert_iteration.py."""

    inputs: Inputs
    data: Problems
    samples: SampleConfig
    sampling: SamplingConfig
    improve: ImproveConfig
    train: SFTConfig
    optimizer: OptimizerConfig
    eval: AttemptsConfig
    judges: tuple[str, ...]


def write_report(
    settings: Settings,
    path: Path,
    rounds: Sequence[dict[str, float]],
    tested: dict[str, Measured],
    best: int,
) -> None:
    """A table of the rounds, one of the test, and attempts at some problems before and after."""
    names = sorted({name for one in rounds for name in one})
    table = tabulate(
        [[name, *(format_number(one.get(name)) for one in rounds)] for name in names],
        ["validation", *(f"round {i}" for i in range(len(rounds)))],
        "github",
        disable_numparse=True,
    )
    test = tabulate(
        [
            [name, *(format_number(one.numbers[name]) for one in tested.values())]
            for name in next(iter(tested.values())).numbers
        ],
        ["test", *tested],
        "github",
        disable_numparse=True,
    )
    parts = [
        f"# Expert iteration ({settings.improve.method})\n\n{table}\n\nThe best round by "
        f"validation is {best}.\n\n{test}\n\n## First attempts\n"
    ]
    first = next(iter(tested.values())).shown[:SHOWN]
    for number, (prompt, _, _) in enumerate(first):
        parts.append(f"\n`{prompt}`\n")
        for name, one in tested.items():
            _, text, state = one.shown[number]
            parts.append(f"\n{name}, {state}:\n\n```\n{text.rstrip()}\n```\n")
    write_whole(path / "report.md", "".join(parts))


def format_number(value: float | None) -> str:
    """Three digits behind the point; whole numbers as they are."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.3f}"


def make_world(settings: Settings, solver: Solver, scorer_folder: str, sharding: Sharding) -> World:
    """Problems with a verifier, or prompts with a reward model."""
    improve, data, task = settings.improve, settings.data, settings.task()
    if improve.method == REWARD_MODEL:
        texts = {split: prompt_texts(task, split, count) for split, count in data.counts().items()}
        chat = ChatTokenizer(solver.tokenizer)
        room = data.max_length - settings.sampling.max_new_tokens
        encoded = {
            split: [encode_prompt(text, chat, room) for text in some]
            for split, some in texts.items()
        }
        return PromptWorld(
            solver,
            encoded,
            texts,
            stages.load_scalar(scorer_folder, settings.model, sharding, frozen=True),
            judging.load_judges(judge_names(settings.judges, task), settings),
            settings.samples.per_problem,
            settings.seed,
        )
    problems = {
        split: solving.problems_of(task, split, count) for split, count in data.counts().items()
    }
    scorer = None
    if scorer_folder:
        questions = [problem.question for problem in problems["train"]]
        scorer = solving.load_scorer(scorer_folder, questions, settings, data.max_length, sharding)
    return ProblemWorld(
        solver,
        problems,
        improve.method,
        scorer,
        settings.samples.per_problem,
        improve.max_steps,
        settings.eval.attempts,
        settings.seed,
    )


def prompt_texts(task: Task, split: str, count: int) -> list[str]:
    """The first prompts of a split.

    Raises:
      ValueError: a prompt is no plain text, or there are fewer.
    """
    rows = list(itertools.islice(task.rows("prompt", split, DropCounts(), count=count), count))
    if any(not isinstance(row["prompt"], str) or row.get("opening") for row in rows):
        raise ValueError(
            f"improve.method='reward_model' goes on with plain texts, and data.source="
            f"{task.config.source!r} has conversations: use another source"
        )
    if len(rows) < count:
        raise ValueError(f"{split} has {len(rows)} prompts, and {count} are asked for")
    return [row["prompt"] for row in rows]


def require_scorer(settings: Settings) -> str:
    """The folder of the reward model that the method asks, once it is there; empty for none."""
    stage = scorer_stage(settings.improve.method)
    if not stage:
        return ""
    return stages.require(
        settings.inputs.scorer,
        stage=stage[0],
        argument=common.stage_argument(stage[0], settings, *stage[1:]),
        build=settings.inputs.build,
    )


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Rounds of search and fine-tuning; resumes after the last round that was finished."""
    distributed.require_one("expert iteration")
    settings = command.open_config("expert_iteration", config, Settings)
    if not folders.claim(settings, "expert iteration"):
        return
    data, sharding, task = settings.data, settings.sharding.make(), settings.task()
    rounds = settings.improve.rounds

    # 1. The policy, what it is to improve on, and the reward model that chooses or guides.
    folder = solving.require_policy(settings)
    scorer_folder = require_scorer(settings)
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, date=date)
    first = stages.load_policy(folder, settings.model, sharding, frozen=True)
    solver = solving.make_solver(settings, tokenizer, sharding)
    world = make_world(settings, solver, scorer_folder, sharding)
    reporting.banner(
        "Expert iteration",
        {
            "policy": f"{stages.count_parameters(first):,} parameters, from {folder}",
            "problems": ", ".join(f"{count:,} {split}" for split, count in data.counts().items()),
            "method": f"{settings.improve.method}, {settings.samples.per_problem} attempts or "
            "candidates",
            "rounds": f"{rounds}, each from the {settings.improve.start} weights",
            "devices": f"{sharding.mesh.size}, {sharding.mode}",
            "run folder": settings.workdir,
        },
    )

    def model_of(number: int) -> tuple[Any, str]:
        """The policy of a round, and its folder."""
        if number == 0:
            return first, folder
        place = str(run.workdir / "rounds" / str(number))
        return stages.load_policy(place, settings.model, sharding), place

    # 2. Rounds; round 0 is the policy as it is.
    show = (world.metric, "improve/pool", "policy/kl_ref_sequence")
    models = {"inputs.policy": folder, "inputs.scorer": scorer_folder}
    pinned = stages.inputs(tokenizer, task, date=date, models=models)
    with settings.run(rounds + 1, "expert iteration", show, pinned, on_step=on_step) as run:
        place = run.restore({"round": jnp.zeros((), jnp.int32)})
        before = world.measure(first, first, "validation")  # what win rates are against
        for number in run.steps():
            metrics: dict[str, float] = {}
            measured = before
            if number:
                # Policy improvement: search by the policy of the round before.
                last, its_folder = model_of(number - 1)
                found = world.improve(last, its_folder, number)
                write_pool(run.workdir, number, found.examples)
                examples = expert_iteration.pool(read_pool(run.workdir, number))
                # Distillation: fine-tuning on everything that was found so far.
                start = last if settings.improve.start == LATEST else first
                rows = expert_iteration.as_rows(examples)
                policy, metrics = distil(settings, start, rows, tokenizer, sharding, number)
                stages.save(policy, run.workdir / "rounds" / str(number), tokenizer)
                metrics["improve/kept"] = float(len(found.examples))
                metrics["improve/pool"] = float(len(examples))
                metrics["improve/tokens"] = float(found.tokens)
                measured = world.measure(policy, first, "validation")
            run.log(number, metrics | measured.numbers)
            run.checkpoint(number, place)

    # 3. The best round by validation against round 0, on problems that nothing has seen.
    log = solving.logged_rounds(run.workdir, rounds + 1)
    best = int(np.argmax([one[world.metric] for one in log]))
    chosen, _ = model_of(best)
    stages.save(chosen, run.workdir / folders.MODEL, tokenizer)
    tested = {
        name: world.measure(model, first, "test")
        for name, model in {"SFT": first, f"round {best}": chosen}.items()
    }
    gain = bootstrap_interval(tested[f"round {best}"].units - tested["SFT"].units)
    write_report(settings, run.workdir, log, tested, best)
    run.finish(
        {
            "best_round": best,
            "validation": log,
            "test": {name: one.numbers for name, one in tested.items()},
            "gain": gain,
            "numbers": tested[f"round {best}"].numbers | {"gain over SFT": gain.value},
            "units": {name: one.units.tolist() for name, one in tested.items()},
        }
    )
    value, low, high = gain
    print(
        f"expert iteration ({settings.improve.method}): round {best} against SFT, {world.unit}: "
        f"{value:+.3f} [{low:+.3f}, {high:+.3f}]; report in {run.workdir / 'report.md'}"
    )


def write_pool(workdir: Path, number: int, examples: Sequence[Example]) -> None:
    """What a round found, one example a line."""
    lines = (json.dumps(dataclasses.asdict(one), ensure_ascii=False) for one in examples)
    (workdir / "pool").mkdir(exist_ok=True)
    write_whole(workdir / "pool" / f"{number}.jsonl", "".join(f"{line}\n" for line in lines))


def read_pool(workdir: Path, last: int) -> list[list[Example]]:
    """What the rounds up to the last one found."""
    return [
        [Example(**json.loads(line)) for line in (workdir / "pool" / f"{i}.jsonl").open()]
        for i in range(1, last + 1)
    ]


if __name__ == "__main__":
    command.cli(main, default="configs/expert_iteration.py:quickstart")
