"""Expert iteration: rounds of search by the policy, and of fine-tuning on what the search found.

  python -m experiments.expert_iteration --config configs/expert_iteration.py:quickstart
  python -m experiments.expert_iteration --config configs/expert_iteration.py:quickstart,prm

A round lets the policy attempt the training problems, keeps what the method chooses, adds it to the
pool, and fine-tunes on the pool. Every round is measured on validation problems; the best one is
compared with round 0, the SFT model, on test problems. A round that is done is not done again; its
model lies in `rounds/N`, its attempts in `runs/attempts`. Writes `model/`, report.md, pool.jsonl,
metrics.jsonl, config.json and summary.json to the run folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from configs import common
from configs.expert_iteration import scorer_variants
from configs.process_reward import of_source
from experiments import command, folders, reporting, solving, stages
from experiments.process_reward import Problems
from experiments.settings import Shared
from experiments.solving import SampleConfig, Solver
from rlhf_jax.data.batches import packed_batches
from rlhf_jax.data.prepare import encode_rows
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets import arithmetic
from rlhf_jax.data.sets.arithmetic import Problem
from rlhf_jax.evaluation.comparison import bootstrap_interval
from rlhf_jax.methods import expert_iteration, sft
from rlhf_jax.methods.expert_iteration import Example
from rlhf_jax.methods.process_reward import StepScorer
from rlhf_jax.methods.search import LAST, step_search
from rlhf_jax.methods.sft import SFTConfig
from rlhf_jax.methods.solving import Attempt, statistics
from rlhf_jax.methods.step_policy import StepPolicy
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.run import OnStep
from rlhf_jax.training.step import create_state

FINAL_ANSWER, ALL_RIGHT, ORM, PRM, CONTROL = "final_answer", "all_right", "orm", "prm", "control"
METHODS = (FINAL_ANSWER, ALL_RIGHT, ORM, PRM, CONTROL)
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
    """How a policy is measured: `samples` attempts at each held-out problem."""

    samples: int

    def __post_init__(self):
        check(self, samples="[1, inf)")


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


@dataclasses.dataclass(frozen=True)
class Improvement:
    """What a round's search found.

    Attributes:
      examples: to be distilled.
      tokens: that were sampled for them.
    """

    examples: list[Example]
    tokens: int


def improve(
    settings: Settings,
    solver: Solver,
    policy: Any,
    folder: str,
    problems: Sequence[Problem],
    scorer: StepScorer | None,
    number: int,
) -> Improvement:
    """One round of policy improvement by the method of the settings."""
    method, width = settings.improve.method, settings.samples.per_problem
    prompts = [problem.question for problem in problems]
    rng = np.random.default_rng([settings.seed, number])
    if method == PRM:
        assert scorer is not None
        return searched(settings, solver, policy, problems, scorer, number)
    attempts = solving.sampled(
        solver, policy, folder, problems, f"round {number}", width, settings.seed
    )
    tokens = sum(one.tokens for some in attempts for one in some)
    texts = [[one.text for one in some] for some in attempts]
    if method == ORM:
        assert scorer is not None
        scores = outcome_scores(scorer, attempts)
        return Improvement(expert_iteration.best(prompts, texts, scores), tokens)
    if method == ALL_RIGHT:
        return Improvement(expert_iteration.all_right(prompts, attempts), tokens)
    if method == CONTROL:
        # As many as the final answer would keep, at the same problems.
        counts = [int(any(one.right for one in some)) for some in attempts]
        return Improvement(expert_iteration.random(prompts, texts, counts, rng), tokens)
    return Improvement(expert_iteration.final_answer(prompts, attempts, rng), tokens)


def outcome_scores(scorer: StepScorer, attempts: Sequence[Sequence[Attempt]]) -> list[list[float]]:
    """P(right) of each attempt at its last token; -inf of one that was cut or is empty."""
    scores = solving.step_scores_of(scorer, attempts)
    return [[one[-1] if one else -np.inf for one in some] for some in scores]


def searched(
    settings: Settings,
    solver: Solver,
    policy: Any,
    problems: Sequence[Problem],
    scorer: StepScorer,
    number: int,
) -> Improvement:
    """The solution to each problem whose every step a process reward model chose (greedy)."""
    key = jax.random.fold_in(jax.random.key(settings.seed), number)
    step_policy = StepPolicy(
        policy,
        solver.encode(problems),
        solver.tokenizer,
        sampling=settings.sampling,
        key=key,
        max_length=settings.data.max_length,
        rows=settings.samples.rows,
        is_final=lambda text: arithmetic.final_answer(text) is not None,
        sharding=solver.sharding,
    )
    found = step_search(
        len(problems),
        step_policy,
        scorer,
        beams=1,
        width=settings.samples.per_problem,
        max_steps=settings.improve.max_steps,
        aggregation=LAST,
    )
    examples = [
        Example(problem.question, one.solutions[0].text)
        for problem, one in zip(problems, found, strict=True)
        if one.solutions
    ]
    return Improvement(examples, sum(one.tokens for one in found))


def distil(
    settings: Settings,
    start: Any,
    examples: Sequence[Example],
    tokenizer: Any,
    sharding: Sharding,
    number: int,
) -> tuple[Any, dict[str, float]]:
    """Fine-tunes on the pool; returns the model, and what the last update measured."""
    train, drops = settings.train, DropCounts()
    documents = encode_rows(
        "sft",
        expert_iteration.as_rows(examples),
        tokenizer,
        max_length=settings.data.max_length,
        drops=drops,
    )
    batches = packed_batches(
        documents,
        rows=train.minibatch,
        length=train.row_length,
        seed=settings.seed + number,
        pad_id=tokenizer.pad_token_id,
    )
    steps = train.updates(batches)
    optimizer, _ = make_optimizer(settings.optimizer, steps)
    tuning = stages.make_tuning(settings, start, name=f"round {number}")
    train_step = sft.make_step(train, optimizer, sharding, trunk=tuning.trunk)
    state = create_state(tuning.take(), optimizer, sharding)
    metrics: dict[str, Any] = {}
    for _ in range(steps):
        state, metrics = train_step(state, sharding.put_batch(next(batches)))
    told = {"loss/lm": float(metrics["loss/lm"]), "improve/updates": float(steps)}
    return tuning.merged(state.model), told


def measure(
    settings: Settings,
    solver: Solver,
    policy: Any,
    reference: Any,
    problems: Sequence[Problem],
    split: str,
) -> tuple[dict[str, float], list[list[Attempt]]]:
    """What a policy solves of held-out problems, and how far it has moved from round 0."""
    key = jax.random.fold_in(jax.random.key(settings.seed), len(split))
    attempts, moved = solver.solve_and_compare(
        policy, reference, problems, settings.eval.samples, key
    )
    return statistics(problems, attempts) | {"policy/kl_ref_sequence": moved}, attempts


def write_report(
    settings: Settings,
    path: Path,
    rounds: Sequence[dict[str, float]],
    tested: dict[str, tuple[dict[str, float], list[list[Attempt]]]],
    problems: Sequence[Problem],
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
            [name, *(format_number(numbers[name]) for numbers, _ in tested.values())]
            for name in next(iter(tested.values()))[0]
        ],
        ["test", *tested],
        "github",
        disable_numparse=True,
    )
    parts = [
        f"# Expert iteration ({settings.improve.method})\n\n{table}\n\nThe best round by "
        f"validation is {best}.\n\n{test}\n\n## First attempts\n"
    ]
    for number, problem in enumerate(problems[:SHOWN]):
        parts.append(f"\n`{problem.question}` {problem.answer}\n")
        for name, (_, attempts) in tested.items():
            one = attempts[number][0]
            state = "right" if one.traced else "right answer, wrong step" if one.right else "wrong"
            parts.append(f"\n{name}, {state}:\n\n```\n{one.text.rstrip()}\n```\n")
    write_whole(path / "report.md", "".join(parts))


def format_number(value: float | None) -> str:
    """Three digits behind the point; whole numbers as they are."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.3f}"


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Rounds of search and fine-tuning; resumes after the last round that was finished."""
    distributed.require_one("expert iteration")
    settings = command.open_config("expert_iteration", config, Settings)
    if not folders.claim(settings, "expert iteration"):
        return
    data, sharding, task = settings.data, settings.sharding.make(), settings.task()
    method, rounds = settings.improve.method, settings.improve.rounds

    # 1. The policy, problems, and the reward model that chooses or guides.
    folder = stages.require(
        settings.inputs.policy,
        stage="sft",
        argument=common.stage_argument("sft", settings, of_source(data.source)),
        build=settings.inputs.build,
    )
    stages.check_lengths({"data.max_length": data.max_length}, folder)
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, date=date)
    first = stages.load_policy(folder, settings.model, sharding, frozen=True)
    solver = Solver(
        tokenizer,
        settings.sampling,
        data.max_length,
        settings.samples.rows,
        sharding,
        settings.root,
    )
    problems = {
        split: solving.problems_of(task, split, count) for split, count in data.counts().items()
    }
    scorer, models = None, {"inputs.policy": folder}
    if method in (ORM, PRM):
        models["inputs.scorer"] = stages.require(
            settings.inputs.scorer,
            stage="process_reward",
            argument=common.stage_argument("process_reward", settings, *scorer_variants(method)),
            build=settings.inputs.build,
        )
        questions = [problem.question for problem in problems["train"]]
        scorer = solving.load_scorer(
            models["inputs.scorer"], questions, settings, data.max_length, sharding
        )
    reporting.banner(
        "Expert iteration",
        {
            "policy": f"{stages.count_parameters(first):,} parameters, from {folder}",
            "problems": ", ".join(f"{len(some):,} {split}" for split, some in problems.items()),
            "method": f"{method}, {settings.samples.per_problem} attempts or candidates",
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
    show = ("solve/pass_at_1", "solve/pass_at_k", "improve/pool")
    pinned = stages.inputs(tokenizer, task, date=date, models=models)
    with settings.run(rounds + 1, "expert iteration", show, pinned, on_step=on_step) as run:
        place = run.restore({"round": jnp.zeros((), jnp.int32)})
        for number in run.steps():
            metrics: dict[str, float] = {}
            policy = first
            if number:
                # Policy improvement: search by the policy of the round before.
                before, its_folder = model_of(number - 1)
                found = improve(
                    settings, solver, before, its_folder, problems["train"], scorer, number
                )
                write_pool(run.workdir, number, found.examples)
                examples = expert_iteration.pool(read_pool(run.workdir, number))
                # Distillation: fine-tuning on everything that was found so far.
                start = before if settings.improve.start == LATEST else first
                policy = before
                if examples:
                    policy, metrics = distil(settings, start, examples, tokenizer, sharding, number)
                else:
                    print(f"round {number}: no attempt was kept, and the policy stays as it is")
                stages.save(policy, run.workdir / "rounds" / str(number), tokenizer)
                metrics["improve/kept"] = float(len(found.examples))
                metrics["improve/pool"] = float(len(examples))
                metrics["improve/tokens"] = float(found.tokens)
            numbers, _ = measure(
                settings, solver, policy, first, problems["validation"], "validation"
            )
            run.log(number, metrics | numbers)
            run.checkpoint(number, place)

    # 3. The best round by validation against round 0, on problems that nothing has seen.
    log = solving.logged_rounds(run.workdir, rounds + 1)
    best = int(np.argmax([one["solve/pass_at_1"] for one in log]))
    chosen, _ = model_of(best)
    stages.save(chosen, run.workdir / folders.MODEL, tokenizer)
    tested = {
        name: measure(settings, solver, model, first, problems["test"], "test")
        for name, model in {"SFT": first, f"round {best}": chosen}.items()
    }
    gains = solved(tested[f"round {best}"][1]) - solved(tested["SFT"][1])
    gain = bootstrap_interval(gains)
    write_report(settings, run.workdir, log, tested, problems["test"], best)
    run.finish(
        {
            "best_round": best,
            "validation": log,
            "test": {name: numbers for name, (numbers, _) in tested.items()},
            "gain": gain,
            "solved": {name: solved(attempts).tolist() for name, (_, attempts) in tested.items()},
        }
    )
    value, low, high = gain
    print(
        f"expert iteration ({method}): round {best} solves {value:+.3f} [{low:+.3f}, {high:+.3f}] "
        f"more test problems than SFT in one attempt; report in {run.workdir / 'report.md'}"
    )


def solved(attempts: Sequence[Sequence[Attempt]]) -> np.ndarray:
    """Share of right attempts of each problem, [N]."""
    return np.array([np.mean([one.right for one in some]) for some in attempts])


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
