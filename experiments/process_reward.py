"""Process and outcome reward models: which step of a solution is wrong, is its answer right?

  python -m experiments.process_reward --config configs/process_reward.py:quickstart
  python -m experiments.process_reward --config configs/process_reward.py:quickstart,outcome

A policy writes solutions, a verifier (or completions of each step, or people) labels their steps,
and the policy's own weights learn the labels. Writes `model/` (a language model that says the
label as its next token), report.md with solutions and their scores, metrics.jsonl, config.json and
summary.json to the run folder. The solutions lie in `runs/attempts` and serve every run that needs
the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from experiments import command, folders, reporting, solving, stages
from experiments.settings import DataConfig, EvalConfig, Shared
from experiments.solving import SampleConfig, Solver
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets.arithmetic import Problem
from rlhf_jax.data.solutions import NEGATIVE, Solution
from rlhf_jax.data.step_labels import (
    UNRATED,
    EncodedSolution,
    SolutionBatches,
    encode_solutions,
    encode_steps,
)
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.evaluation import steps as step_metrics
from rlhf_jax.methods import monte_carlo, process_reward
from rlhf_jax.methods.process_reward import (
    LIKELIHOOD,
    OUTCOME,
    ProcessRewardConfig,
    SolutionTrainConfig,
)
from rlhf_jax.methods.solving import Attempt, as_solution
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.settings import check
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.run import OnStep
from rlhf_jax.training.step import create_state

EXACT, ROLLOUTS, HUMAN = "exact", "rollouts", "human"
SHOWN = 10  # solutions of the report


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The policy that writes the solutions; training starts from its weights."""

    policy: str
    build: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problems(DataConfig):
    """Problems of each split, of which none is longer than `max_length` tokens with a solution."""

    max_length: int
    problems: int
    validation_problems: int
    test_problems: int

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            max_length="[1, inf)",
            problems="[1, inf)",
            validation_problems="[1, inf)",
            test_problems="[1, inf)",
        )

    def counts(self) -> dict[str, int]:
        """Problems by split."""
        return {
            "train": self.problems,
            "validation": self.validation_problems,
            "test": self.test_problems,
        }


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Who labels the steps.

    Attributes:
      method: "exact", the verifier; "rollouts", completions of each step; "human", the source.
      completions: of each step, for "rollouts".
      above: the share of them that must arrive for a step to count as right.
    """

    method: str
    completions: int
    above: float

    def __post_init__(self):
        check(
            self,
            method=(EXACT, ROLLOUTS, HUMAN),
            completions="[1, inf)",
            above="[0, 1)",
        )


@dataclasses.dataclass(frozen=True)
class StepsEval(EvalConfig):
    """When held-out steps are scored, and below which chance one counts as wrong."""

    threshold: float

    def __post_init__(self):
        super().__post_init__()
        check(self, threshold="(0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Every key of configs/process_reward.py."""

    inputs: Inputs
    data: Problems
    samples: SampleConfig
    sampling: SamplingConfig
    labels: LabelConfig
    loss: ProcessRewardConfig
    train: SolutionTrainConfig
    optimizer: OptimizerConfig
    eval: StepsEval

    def __post_init__(self):
        super().__post_init__()
        if self.train.row_length < self.data.max_length:
            raise ValueError(
                f"train.row_length={self.train.row_length} must be at least data.max_length="
                f"{self.data.max_length}: every solution fits into a row"
            )


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Solutions of a split; `agreement` is NaN but where labels were estimated and known too."""

    solutions: list[Solution]
    agreement: float = float("nan")


def labelled_solutions(
    settings: Settings, task: Task, solver: Solver, policy: Any, folder: str, split: str
) -> Labelled:
    """The solutions of a split with the labels that the run learns, or of which it is told.

    Held-out solutions are labelled as exactly as they can be: by the verifier, or by people.
    """
    count = settings.data.counts()[split]
    if settings.labels.method == HUMAN:
        drops = DropCounts()
        found: list[Solution] = []
        prompts: set[str] = set()
        for solution in task.solutions(split, drops):
            prompts.add(str(solution.prompt))
            if len(prompts) > count:
                break
            found.append(solution)
        print(f"solutions that people labelled ({split}): {len(found):,}, {drops.summary()}")
        return Labelled(found)
    problems = solving.problems_of(task, split, count)
    attempts = solving.sampled(
        solver, policy, folder, problems, split, settings.samples.per_problem, settings.seed
    )
    exact = [
        as_solution(problem, one)
        for problem, some in zip(problems, attempts, strict=True)
        for one in some
        if one.steps
    ]
    if settings.labels.method == EXACT or split != "train":
        return Labelled(exact)
    return estimated(settings, solver, policy, problems, attempts, exact)


def estimated(
    settings: Settings,
    solver: Solver,
    policy: Any,
    problems: Sequence[Problem],
    attempts: Sequence[Sequence[Attempt]],
    exact: Sequence[Solution],
) -> Labelled:
    """The same solutions with labels from completions of each step, and how often both agree."""
    prompts, chat = solver.encode(problems), ChatTokenizer(solver.tokenizer)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)

    def complete(beginnings: Sequence[tuple[int, tuple[str, ...]]]) -> Any:
        encoded = [
            encode_steps(prompts[number], steps, chat, ended=False)[0]
            for number, steps in beginnings
        ]
        print(f"{settings.labels.completions} completions of each of {len(encoded):,} beginnings")
        return solver.answers(policy, encoded, settings.labels.completions, key)

    there = [[one for one in some if one.steps] for some in attempts]
    values = monte_carlo.step_values(problems, there, complete)
    labels = [
        monte_carlo.hard_labels(one, above=settings.labels.above) for some in values for one in some
    ]
    agree = [
        mine == label
        for one, mine_of in zip(exact, labels, strict=True)
        for mine, label in list(zip(mine_of, one.labels, strict=True))[: last_labelled(one)]
        if label is not None
    ]
    solutions = [
        dataclasses.replace(one, labels=mine if one.right is not None else (*mine[:-1], None))
        for one, mine in zip(exact, labels, strict=True)
    ]
    return Labelled(solutions, float(np.mean(agree)))


def last_labelled(solution: Solution) -> int:
    """How many of its steps are there up to the first wrong one."""
    wrong = solution.first_error
    return len(solution.steps) if wrong < 0 else wrong + 1


def measure(
    settings: Settings, solutions: Sequence[EncodedSolution], scores: Sequence[np.ndarray]
) -> dict[str, float]:
    """Step accuracy, first-error F1, calibration and outcome accuracy of scores of solutions."""
    pairs = [
        (score, label - 1 > NEGATIVE)
        for one, found in zip(solutions, scores, strict=True)
        for score, label in zip(found, one.labels, strict=True)
        if label != UNRATED
    ]
    p, right = np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])
    bar = settings.eval.threshold
    wrong_at = [
        next((i for i, label in enumerate(one.labels) if label - 1 == NEGATIVE), -1)
        for one in solutions
    ]
    found_at = [step_metrics.first_error(found, threshold=bar) for found in scores]
    errors = step_metrics.first_error_f1(found_at, wrong_at)
    # An outcome model says it at the end; by the others each step has to hold.
    last = settings.loss.supervision == OUTCOME
    known = [
        ((found[-1] if last else min(found)) > bar, one.right == 1.0)
        for one, found in zip(solutions, scores, strict=True)
        if not np.isnan(one.right)
    ]
    return {
        "step_accuracy": float(np.mean((p > bar) == right)),
        "right_steps": float(np.mean(right)),
        "first_error_f1": errors.f1,
        "first_error_wrong": errors.wrong,
        "first_error_right": errors.right,
        "calibration_error": step_metrics.expected_calibration_error(p, right),
        "brier_score": step_metrics.brier_score(p, right),
        "outcome_accuracy": float(np.mean([a == b for a, b in known])) if known else 0.0,
    }


def write_report(
    settings: Settings,
    path: Any,
    numbers: dict[str, float],
    solutions: Sequence[Solution],
    scores: Sequence[np.ndarray],
) -> None:
    """Numbers, and some solutions with what the model says of each step."""
    table = tabulate(
        [(name, f"{value:.3f}") for name, value in numbers.items()],
        ("held out", "value"),
        "github",
        disable_numparse=True,
    )
    parts = [f"# {settings.loss.supervision} reward model\n\n{table}\n\n## Solutions\n"]
    for solution, found in zip(solutions[:SHOWN], scores, strict=False):
        rows = [
            (step.rstrip("\n"), "" if label is None else f"{label:+d}", f"{score:.2f}")
            for step, label, score in zip(solution.steps, solution.labels, found, strict=False)
        ]
        head = ("step", "label", "P(right)")
        body = tabulate(rows, head, "github", disable_numparse=True)
        parts.append(f"\n`{str(solution.prompt)[:200]}`\n\n{body}\n")
    write_whole(path / "report.md", "".join(parts))


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Samples, labels, trains, measures; resumes where an earlier run stopped."""
    distributed.require_one("process reward modelling")
    settings = command.open_config("process_reward", config, Settings)
    if not folders.claim(settings, "process reward model"):
        return
    train, data, sharding = settings.train, settings.data, settings.sharding.make()
    method, task = settings.loss, settings.task()

    # 1. The policy, and solutions that it wrote or that people labelled.
    folder = solving.require_policy(settings)
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, date=date)
    token_ids = () if method.supervision == LIKELIHOOD else method.token_ids(tokenizer)
    model = stages.load_policy(folder, settings.model, sharding)
    solver = solving.make_solver(settings, tokenizer, sharding)
    labelled = {
        split: labelled_solutions(settings, task, solver, model, folder, split)
        for split in data.counts()
    }
    drops = DropCounts()
    encoded = {
        split: encode_solutions(found.solutions, tokenizer, max_length=data.max_length, drops=drops)
        for split, found in labelled.items()
    }
    tuning = stages.make_tuning(settings, model)
    batches = SolutionBatches(
        encoded["train"],
        batch_size=train.minibatch,
        length=train.row_length,
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id,
        every_token=method.every_token and method.supervision != LIKELIHOOD,
    )

    # 2. Optimizer and the compiled step.
    optimizer, schedule = make_optimizer(settings.optimizer, train.steps)
    train_step = process_reward.make_step(
        method, train, optimizer, sharding, token_ids=token_ids, trunk=tuning.trunk
    )
    state = create_state(tuning.take(), optimizer, sharding)
    reporting.banner(
        f"Reward model of solutions ({method.supervision})",
        {
            "model": f"{stages.parameters_line(tuning, state.model)}, from {folder}",
            "solutions": ", ".join(f"{len(rows):,} {name}" for name, rows in encoded.items())
            + f"; {drops.summary()}",
            "labels": settings.labels.method,
            "updates": f"{train.steps:,} of {train.minibatch} rows; "
            f"{batches.epochs_text(train.steps)}",
            "devices": f"{sharding.mesh.size}, {sharding.mode}",
            "run folder": settings.workdir,
        },
    )

    def scores_of(model: Any, solutions: Sequence[EncodedSolution]) -> list[np.ndarray]:
        return process_reward.score_steps(
            model,
            [(one.tokens, one.ends, int(one.begins[0])) for one in solutions],
            sharding,
            config=method,
            token_ids=token_ids,
            pad_id=tokenizer.pad_token_id,
        )

    # 3. Train.
    show = ("loss/step_labels", "steps/accuracy", "eval/first_error_f1")
    pinned = stages.inputs(tokenizer, task, date=date, models={"inputs.policy": folder})
    with settings.run(train.steps, "process reward model", show, pinned, on_step=on_step) as run:
        state = run.restore(state, batches)
        for step in run.steps():
            state, metrics = train_step(state, sharding.put_batch(next(batches)))
            metrics["optim/learning_rate"] = schedule(step)
            if run.is_due(step, settings.eval.every):
                current = scores_of(tuning.model(state.model), encoded["validation"])
                held_out = measure(settings, encoded["validation"], current)
                known = {
                    "eval/step_accuracy": held_out["step_accuracy"],
                    "eval/first_error_f1": held_out["first_error_f1"],
                    "eval/outcome_accuracy": held_out["outcome_accuracy"],
                    "eval/calibration_error": held_out["calibration_error"],
                }
                # Where no solution has an error, or each has one, there is no F1.
                metrics |= {name: value for name, value in known.items() if np.isfinite(value)}
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 4. Save, score the solutions to test problems, report.
    trained = stages.save_tuned(tuning, state.model, run.workdir, tokenizer, base=folder)
    scores = scores_of(trained, encoded["test"])
    numbers = measure(settings, encoded["test"], scores)
    if settings.labels.method == ROLLOUTS:
        numbers["label_agreement"] = labelled["train"].agreement
    if distributed.is_main():
        write_report(settings, run.workdir, numbers, labelled["test"].solutions, scores)
    run.finish({"numbers": numbers, "held_out_solutions": len(encoded["test"])})
    which = "outcome_accuracy" if method.supervision == OUTCOME else "step_accuracy"
    print(
        f"process reward model: {which} {numbers[which]:.3f}, first-error F1 "
        f"{numbers['first_error_f1']:.3f} on {len(encoded['test']):,} held-out solutions; "
        f"report in {run.workdir / 'report.md'}"
    )


if __name__ == "__main__":
    command.cli(main, default="configs/process_reward.py:quickstart")
