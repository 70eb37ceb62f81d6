"""Search at inference: does a reward model find the right one of N solutions?

  python -m experiments.search --config configs/search.py:quickstart

For each seed of sampling the policy writes N solutions to each held-out problem, and searches over
steps spend about as many tokens. Compared are one sample (pass@1), the majority (self-consistency),
the best of N and the weighted vote by an outcome and by a process reward model, the step searches
(greedy, beam, DVTS), and the oracle: is any of N right? Writes search.json, report.md and
search.png to the run folder; a seed that is done is not done again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from configs import common
from configs.process_reward import PRM
from experiments import command, folders, reporting, solving, stages
from experiments.settings import DataConfig, Shared
from experiments.solving import SampleConfig, Solver
from rlhf_jax.data.sets import arithmetic
from rlhf_jax.data.sets.arithmetic import Problem
from rlhf_jax.evaluation.comparison import bootstrap_interval
from rlhf_jax.evaluation.panels import COLORS, new_figure
from rlhf_jax.evaluation.plots import save_figure
from rlhf_jax.methods import search
from rlhf_jax.methods.process_reward import NEUTRALS, StepScorer
from rlhf_jax.methods.search import AGGREGATIONS, LAST, Found, step_search
from rlhf_jax.methods.solving import Attempt, canonical
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.files import read_json, write_whole
from rlhf_jax.runtime.run_info import to_json
from rlhf_jax.runtime.settings import check
from rlhf_jax.training.run import OnStep

# What each way to answer is called in tables.
NAMES = {
    "pass_at_1": "one sample",
    "majority": "majority",
    "orm_best": "ORM, best of N",
    "orm_vote": "ORM-weighted vote",
    "prm_best": "PRM, best of N",
    "prm_vote": "PRM-weighted vote",
    "greedy": "PRM, greedy over steps",
    "beam": "PRM, beam search",
    "dvts": "PRM, DVTS",
    "oracle": "any of N (oracle)",
}
SEARCHES = ("greedy", "beam", "dvts")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The policy, and the reward models that choose among its solutions."""

    policy: str
    prm: str
    orm: str
    build: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut(DataConfig):
    """Problems that nothing has been trained on."""

    max_length: int
    test_problems: int

    def __post_init__(self):
        super().__post_init__()
        check(self, max_length="[1, inf)", test_problems="[1, inf)")


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How solutions are searched.

    Attributes:
      seeds: of sampling.
      beams: partial solutions that go on; N / beams continuations are drawn of each.
      max_steps: of a solution.
      aggregation: of the PRM's scores of steps to that of a solution.
      neutral: how a neutral step counts.
    """

    seeds: int
    beams: int
    max_steps: int
    aggregation: str
    neutral: str

    def __post_init__(self):
        check(
            self,
            seeds="[1, inf)",
            beams="[1, inf)",
            max_steps="[1, inf)",
            aggregation=AGGREGATIONS,
            neutral=NEUTRALS,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Every key of configs/search.py."""

    inputs: Inputs
    data: HeldOut
    samples: SampleConfig
    sampling: SamplingConfig
    search: SearchConfig

    def __post_init__(self):
        super().__post_init__()
        if self.samples.per_problem % self.search.beams:
            raise ValueError(
                f"samples.per_problem={self.samples.per_problem} must be divisible by "
                f"search.beams={self.search.beams}: beams x width is N, for equal compute"
            )

    def counts(self) -> list[int]:
        """N of the curves: powers of two, and all of them."""
        most = self.samples.per_problem
        return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def answered(problem: Problem, answer: Any) -> float:
    """1 where an answer is that of the problem."""
    return float(answer is not None and arithmetic.same_number(str(answer), problem.answer))


def of_samples(
    problem: Problem,
    attempts: Sequence[Attempt],
    orm: Sequence[float],
    prm: Sequence[float],
) -> dict[str, float]:
    """What each way to choose makes of the first n attempts at a problem: 1 right, 0 wrong.

    Args:
      problem: what was asked.
      attempts: n.
      orm: their scores by the outcome reward model; 0 of those that were cut.
      prm: by the process reward model.
    """
    answers = [canonical(one.answer) for one in attempts]
    return {
        "pass_at_1": float(attempts[0].right),
        "majority": answered(problem, search.majority(answers)),
        "orm_best": answered(problem, answers[search.best_of_n(orm)]),
        "orm_vote": answered(problem, search.weighted_vote(answers, orm)),
        "prm_best": answered(problem, answers[search.best_of_n(prm)]),
        "prm_vote": answered(problem, search.weighted_vote(answers, prm)),
        "oracle": float(any(one.right for one in attempts)),
    }


def of_search(problem: Problem, found: Found) -> float:
    """1 where the best solution of a search is right; 0 too where none ended."""
    if not found.solutions:
        return 0.0
    return float(arithmetic.verify(problem, found.solutions[0].text).right)


def one_seed(
    settings: Settings,
    solver: Solver,
    policy: Any,
    folder: str,
    problems: Sequence[Problem],
    scorers: Mapping[str, StepScorer],
    seed: int,
) -> dict[str, Any]:
    """Everything of one seed of sampling.

    Returns:
      "right": way -> n -> a 0 or 1 for each problem; "tokens": the same, sampled tokens.
    """
    config, most = settings.search, settings.samples.per_problem
    attempts = solving.sampled(
        solver, policy, folder, problems, "test", most, 1_000 * settings.seed + seed
    )
    aggregations = {"orm": LAST, "prm": config.aggregation}
    scores = {
        name: [
            [search.aggregate(steps, aggregations[name]) if steps else 0.0 for steps in some]
            for some in solving.step_scores_of(scorer, attempts)
        ]
        for name, scorer in scorers.items()
    }
    right: dict[str, dict[str, list[float]]] = {name: {} for name in NAMES}
    tokens: dict[str, dict[str, list[int]]] = {name: {} for name in NAMES}
    for n in settings.counts():
        for i, problem in enumerate(problems):
            some = attempts[i][:n]
            chosen = of_samples(problem, some, scores["orm"][i][:n], scores["prm"][i][:n])
            spent = sum(one.tokens for one in some)
            for name, value in chosen.items():
                right[name].setdefault(str(n), []).append(value)
                tokens[name].setdefault(str(n), []).append(
                    some[0].tokens if name == "pass_at_1" else spent
                )
    run = functools.partial(
        step_search,
        len(problems),
        score=scorers["prm"],
        max_steps=config.max_steps,
        aggregation=config.aggregation,
    )
    key = jax.random.fold_in(jax.random.key(settings.seed), seed)
    for number, name in enumerate(SEARCHES):
        step_policy = solver.step_policy(policy, problems, jax.random.fold_in(key, number))
        beams = 1 if name == "greedy" else config.beams
        found = run(propose=step_policy, beams=beams, width=most // beams, diverse=name == "dvts")
        right[name][str(most)] = [
            of_search(problem, one) for problem, one in zip(problems, found, strict=True)
        ]
        tokens[name][str(most)] = [one.tokens for one in found]
    return {"right": right, "tokens": tokens}


@dataclasses.dataclass(frozen=True)
class Result:
    """One way to answer at one N, over all seeds: accuracy with its interval over problems."""

    name: str
    n: int
    accuracy: float
    low: float
    high: float
    tokens: float
    seeds: list[float]


def results(seeds: Sequence[Mapping[str, Any]]) -> list[Result]:
    """The table: means over seeds, intervals over problems."""
    found = []
    for name in NAMES:
        for n in seeds[0]["right"][name]:
            right = np.array([one["right"][name][n] for one in seeds])  # [seeds, problems]
            spent = np.array([one["tokens"][name][n] for one in seeds])
            value, low, high = bootstrap_interval(right.mean(axis=0))
            found.append(
                Result(
                    name,
                    int(n),
                    value,
                    low,
                    high,
                    float(spent.mean()),
                    right.mean(axis=1).tolist(),
                )
            )
    return found


def against(seeds: Sequence[Mapping[str, Any]], name: str, other: str, n: int) -> dict[str, Any]:
    """Accuracy of one way minus that of another on the same problems, with its interval."""
    mine, its = (np.array([one["right"][way][str(n)] for one in seeds]) for way in (name, other))
    value, low, high = bootstrap_interval((mine - its).mean(axis=0))
    return {"name": name, "against": other, "n": n, "difference": value, "interval": [low, high]}


def write_report(path: Path, table: Sequence[Result], pairs: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy by N and by tokens, and the differences from the majority."""
    most = max(one.n for one in table)
    rows = [
        (
            NAMES[one.name],
            f"{one.accuracy:.3f} [{one.low:.3f}, {one.high:.3f}]",
            f"{one.tokens:.0f}",
            ", ".join(f"{value:.3f}" for value in one.seeds),
        )
        for one in table
        if one.n == most
    ]
    head = (f"N = {most}", "right [95% over problems]", "tokens a problem", "seeds of sampling")
    counts = sorted({one.n for one in table})
    curve = [
        (
            NAMES[name],
            *(
                next((f"{o.accuracy:.3f}" for o in table if o.name == name and o.n == n), "")
                for n in counts
            ),
        )
        for name in NAMES
    ]
    differences = [
        (
            f"{NAMES[one['name']]} minus {NAMES[one['against']]}",
            f"{one['difference']:+.3f} [{one['interval'][0]:+.3f}, {one['interval'][1]:+.3f}]",
        )
        for one in pairs
    ]
    make = functools.partial(tabulate, tablefmt="github", disable_numparse=True)
    write_whole(
        path,
        f"# Search at inference\n\n{make(rows, head)}\n\n"
        f"{make(differences, (f'at N = {most}', 'difference [95% over problems]'))}\n\n"
        f"{make(curve, ('right, by N', *map(str, counts)))}\n",
    )


def draw(path: Path, table: Sequence[Result]) -> None:
    """Accuracy against N and against tokens."""
    figure = new_figure(1, 2, width=10, height=4)
    for axis, of in zip(figure.axes, ("n", "tokens"), strict=True):
        for number, name in enumerate(NAMES):
            points = sorted((one for one in table if one.name == name), key=lambda one: one.n)
            x, y = [getattr(one, of) for one in points], [one.accuracy for one in points]
            color = COLORS[number % len(COLORS)]
            axis.plot(x, y, "o-" if len(x) > 1 else "s", color=color, label=NAMES[name], ms=4)
            if len(x) > 1:
                low, high = [one.low for one in points], [one.high for one in points]
                axis.fill_between(x, low, high, color=color, alpha=0.1)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("solutions" if of == "n" else "tokens sampled for a problem")
        axis.set_ylabel("problems solved")
    figure.axes[0].legend(fontsize=6)
    save_figure(figure, path)


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Samples, searches, compares; resumes after the last seed that was finished."""
    distributed.require_one("search")
    settings = command.open_config("search", config, Settings)
    if not folders.claim(settings, "search"):
        return
    data, inputs, sharding, task = (
        settings.data,
        settings.inputs,
        settings.sharding.make(),
        settings.task(),
    )

    # 1. Held-out problems, the policy, and the reward models.
    problems = solving.problems_of(task, "test", data.test_problems)
    folder = solving.require_policy(settings)
    found = {
        name: stages.require(
            place,
            stage="process_reward",
            argument=common.stage_argument("process_reward", settings, *variants),
            build=inputs.build,
        )
        for name, place, variants in (
            ("prm", inputs.prm, (PRM,)),
            ("orm", inputs.orm, ("outcome",)),
        )
    }
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, date=date)
    policy = stages.load_policy(folder, settings.model, sharding, frozen=True)
    questions = [problem.question for problem in problems]
    scorers = {
        name: solving.load_scorer(
            place,
            questions,
            settings,
            data.max_length,
            sharding,
            neutral=settings.search.neutral,
        )
        for name, place in found.items()
    }
    solver = solving.make_solver(settings, tokenizer, sharding)
    most = settings.samples.per_problem
    reporting.banner(
        "Search at inference",
        {
            "policy": f"{stages.count_parameters(policy):,} parameters, from {folder}",
            "reward models": ", ".join(f"{name} {place}" for name, place in found.items()),
            "problems": f"{len(problems):,} held out",
            "samples": f"{most} a problem, {settings.search.seeds} seeds; searches of "
            f"{settings.search.beams} beams x {most // settings.search.beams}",
            "run folder": settings.workdir,
        },
    )

    # 2. One seed of sampling after the other.
    models = {"inputs.policy": folder, "inputs.prm": found["prm"], "inputs.orm": found["orm"]}
    show = ("search/majority", "search/prm_vote", "search/oracle")
    pinned = stages.inputs(tokenizer, task, date=date, models=models)
    total = settings.search.seeds
    with settings.run(total, "search", show, pinned, on_step=on_step) as run:
        place = run.restore({"seed": jnp.zeros((), jnp.int32)})
        for seed in run.steps():
            made = one_seed(settings, solver, policy, folder, problems, scorers, seed)
            write_whole(run.workdir / f"seed_{seed}.json", json.dumps(made))
            accuracy = {name: float(np.mean(of[str(most)])) for name, of in made["right"].items()}
            run.log(
                seed,
                {
                    "search/pass_at_1": accuracy["pass_at_1"],
                    "search/majority": accuracy["majority"],
                    "search/orm_vote": accuracy["orm_vote"],
                    "search/prm_vote": accuracy["prm_vote"],
                    "search/beam": accuracy["beam"],
                    "search/oracle": accuracy["oracle"],
                },
            )
            run.checkpoint(seed, place)

    # 3. Tables and curves over all seeds.
    seeds = [
        read_json(run.workdir / f"seed_{seed}.json", "remove the run folder")
        for seed in range(total)
    ]
    table = results(seeds)
    others = [name for name in NAMES if name not in ("pass_at_1", "majority", "oracle")]
    pairs = [against(seeds, name, "majority", most) for name in others]
    pairs.append(against(seeds, "prm_vote", "orm_vote", most))
    content = {"results": [dataclasses.asdict(one) for one in table], "differences": pairs}
    write_whole(run.workdir / "search.json", json.dumps(to_json(content), indent=1) + "\n")
    write_report(run.workdir / "report.md", table, pairs)
    draw(run.workdir / "search.png", table)
    best = {one.name: one.accuracy for one in table if one.n == most}
    numbers = {f"{NAMES[name]}, solved": value for name, value in best.items()}
    run.finish(content | {"problems": len(problems), "numbers": numbers})
    print(
        f"search: of {len(problems):,} problems one sample solves {best['pass_at_1']:.3f}, the "
        f"majority of {most} {best['majority']:.3f}, the PRM-weighted vote {best['prm_vote']:.3f}, "
        f"any of them {best['oracle']:.3f}; report in {run.workdir / 'report.md'}"
    )


if __name__ == "__main__":
    command.cli(main, default="configs/search.py:quickstart")
