"""Policies solve problems: attempts with the verifier's labels, kept by what decides them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from configs import common
from configs.process_reward import of_source
from experiments import folders, stages
from experiments.settings import Shared
from rlhf_jax.data.sets import arithmetic
from rlhf_jax.data.sets.arithmetic import Problem
from rlhf_jax.data.step_labels import encode_whole_prompt
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.methods.process_reward import ProcessRewardConfig, StepScorer
from rlhf_jax.methods.search import Partial, Step
from rlhf_jax.methods.solving import Attempt, attempt
from rlhf_jax.methods.step_policy import StepPolicy
from rlhf_jax.rollouts.answers import Answer, sample_answers
from rlhf_jax.rollouts.rescore import answers_log_probs
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import digests
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.metrics import read_rows
from rlhf_jax.runtime.settings import check, typed
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.tasks.arithmetic import Arithmetic
from rlhf_jax.training.record import read_config

KEPT = "runs/attempts"


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Solutions that a policy writes.

    Attributes:
      per_problem: to each problem.
      rows: the most that are drawn at a time.
    """

    per_problem: int
    rows: int

    def __post_init__(self):
        check(self, per_problem="[1, inf)", rows="[1, inf)")
        if self.per_problem > self.rows:
            raise ValueError(
                f"samples.rows={self.rows} must be at least samples.per_problem="
                f"{self.per_problem}: the solutions to a problem are drawn at a time"
            )


def problems_of(task: Task, split: str, count: int) -> list[Problem]:
    """The first problems of a split.

    Raises:
      ValueError: the source has no problems that a verifier knows, or fewer than asked for.
    """
    if not isinstance(task, Arithmetic):
        raise ValueError(
            f"data.source={task.config.source!r} has no verifier: use arithmetic or "
            "arithmetic:gsm_symbolic"
        )
    return task.problems(split, count)


@dataclasses.dataclass(frozen=True)
class Solver:
    """Lets a policy solve problems.

    Attributes:
      tokenizer: the policy's.
      sampling: how solutions are drawn.
      max_length: tokens of the longest problem with a solution.
      rows: the most solutions that are drawn at a time.
      sharding: where batches go.
      root: folder that kept attempts lie below; empty is the current one.
    """

    tokenizer: Any
    sampling: SamplingConfig
    max_length: int
    rows: int
    sharding: Sharding
    root: str = ""

    def encode(self, problems: Sequence[Problem]) -> list[Any]:
        """Problems as prompts.

        Raises:
          ValueError: one leaves no room for a solution; names both lengths.
        """
        longest = self.max_length - self.sampling.max_new_tokens
        chat = ChatTokenizer(self.tokenizer)
        found = []
        for problem in problems:
            prompt = encode_whole_prompt(problem.question, chat, longest + 1)
            if prompt is None:
                raise ValueError(
                    f"a problem is longer than data.max_length={self.max_length} less "
                    f"sampling.max_new_tokens={self.sampling.max_new_tokens}: "
                    f"{problem.question[:60]!r}"
                )
            found.append(prompt)
        return found

    def answers(
        self, model: Any, prompts: Sequence[Any], samples: int, key: jax.Array
    ) -> list[list[Answer]]:
        """Samples of each encoded prompt."""
        return sample_answers(
            model,
            prompts,
            self.tokenizer,
            samples=samples,
            sampling=self.sampling,
            key=key,
            rows=max(self.rows, samples),
            sharding=self.sharding,
        )

    def solve(
        self, model: Any, problems: Sequence[Problem], samples: int, key: jax.Array
    ) -> list[list[Attempt]]:
        """Attempts of each problem, checked by the verifier."""
        return all_checked(problems, self.answers(model, self.encode(problems), samples, key))

    def solve_and_compare(
        self, model: Any, reference: Any, problems: Sequence[Problem], samples: int, key: jax.Array
    ) -> tuple[list[list[Attempt]], float]:
        """The same, and how far the policy is from a reference: see `moved`."""
        prompts = self.encode(problems)
        drawn = self.answers(model, prompts, samples, key)
        return all_checked(problems, drawn), self.moved(reference, prompts, drawn)

    def moved(
        self, reference: Any, prompts: Sequence[Any], drawn: Sequence[Sequence[Answer]]
    ) -> float:
        """KL(π ‖ π_ref) in nats per answer: the mean over π's answers of log π − log π_ref."""
        there = answers_log_probs(
            reference,
            prompts,
            drawn,
            pad_id=self.tokenizer.pad_token_id,
            temperature=self.sampling.policy_temperature,
            rows=self.rows,
            sharding=self.sharding,
        )
        mine = [answer.log_prob for some in drawn for answer in some]
        return float(np.mean(mine) - np.mean(list(itertools.chain(*there))))

    def step_policy(self, policy: Any, problems: Sequence[Problem], key: jax.Array) -> StepPolicy:
        """A policy that proposes the steps of solutions to problems."""
        return StepPolicy(
            policy,
            self.encode(problems),
            self.tokenizer,
            sampling=self.sampling,
            key=key,
            max_length=self.max_length,
            rows=self.rows,
            is_final=lambda text: arithmetic.final_answer(text) is not None,
            sharding=self.sharding,
        )

    def kept(
        self,
        name: str,
        decides: Sequence[Any],
        make: Callable[[], list[list[Attempt]]],
    ) -> list[list[Attempt]]:
        """Attempts that were made before, or those that `make` makes now.

        Args:
          name: what they are, as a message calls them.
          decides: all that they depend on besides how they are drawn, as values that JSON can hold.
          make: makes them.
        """
        everything = [
            *decides,
            dataclasses.asdict(self.sampling),
            self.rows,
            self.max_length,
            digests.of_files([arithmetic.__file__]),
        ]
        path = Path(self.root) / KEPT / f"{digests.of_text(json.dumps(everything))[:16]}.jsonl"
        if path.exists():
            print(f"{name}: kept in {path}")
            return read_attempts(path)
        start = time.time()
        found = make()
        count = sum(map(len, found))
        print(f"{name}: {count:,} drawn in {time.time() - start:.0f} s, kept in {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_attempts(path, found)
        return found


class Solving(Protocol):
    """Settings of an experiment whose policy solves problems."""

    @property
    def inputs(self) -> Any:
        """Has `policy`, its folder, and `build`, whether it may be made."""
        ...

    @property
    def data(self) -> Any:
        """Has `source`, and `max_length` of a problem with a solution."""
        ...

    @property
    def samples(self) -> SampleConfig:
        """How many solutions."""
        ...

    @property
    def sampling(self) -> SamplingConfig:
        """How they are drawn."""
        ...

    @property
    def root(self) -> str:
        """Folder that kept attempts lie below."""
        ...


def require_policy(settings: Solving) -> str:
    """The folder of the policy, which the SFT stage makes if it may.

    Raises:
      ValueError: it is not there, or has no room for `data.max_length`.
    """
    folder = stages.require(
        settings.inputs.policy,
        stage="sft",
        argument=common.stage_argument("sft", settings, of_source(settings.data.source)),
        build=settings.inputs.build,
    )
    stages.check_lengths({"data.max_length": settings.data.max_length}, folder)
    return folder


def make_solver(settings: Solving, tokenizer: Any, sharding: Sharding) -> Solver:
    """Lets policies with this tokenizer solve problems as the settings say."""
    return Solver(
        tokenizer,
        settings.sampling,
        settings.data.max_length,
        settings.samples.rows,
        sharding,
        settings.root,
    )


def checked(problem: Problem, answer: Answer) -> Attempt:
    """An answer of a policy as an attempt at a problem."""
    return attempt(
        problem,
        answer.text,
        tokens=len(answer.tokens),
        ended=answer.ended,
        log_prob=answer.log_prob,
        entropy=answer.entropy,
    )


def all_checked(
    problems: Sequence[Problem], drawn: Sequence[Sequence[Answer]]
) -> list[list[Attempt]]:
    """The answers to each problem as attempts."""
    return [
        [checked(problem, answer) for answer in answers]
        for problem, answers in zip(problems, drawn, strict=True)
    ]


def write_attempts(path: Path, attempts: Sequence[Sequence[Attempt]]) -> None:
    """Writes attempts, those of a problem a line."""
    lines = (
        json.dumps([dataclasses.asdict(one) for one in some], allow_nan=False) for some in attempts
    )
    write_whole(path, "".join(f"{line}\n" for line in lines))


def read_attempts(path: Path) -> list[list[Attempt]]:
    """What `write_attempts` wrote."""
    with path.open() as lines:
        return [
            [Attempt(**one | {"labels": tuple(one["labels"])}) for one in json.loads(line)]
            for line in lines
        ]


def sampled(
    solver: Solver,
    model: Any,
    folder: str,
    problems: Sequence[Problem],
    split: str,
    samples: int,
    seed: int,
) -> list[list[Attempt]]:
    """Attempts of a policy on file, kept.

    Args:
      solver: how.
      model: the policy.
      folder: of the model, whose weights decide.
      problems: of the split.
      split: its name; other splits are drawn with other keys.
      samples: of each problem.
      seed: of the draws.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(split.encode()))
    decides = [
        stages.weights_digest(folder),
        split,
        [problem.question for problem in problems],
        samples,
        seed,
    ]
    name = f"{samples} solutions to each of {len(problems):,} problems ({split})"
    return solver.kept(name, decides, lambda: solver.solve(model, problems, samples, key))


def load_scorer(
    folder: str,
    prompts: Sequence[Any],
    settings: Shared,
    max_length: int,
    sharding: Sharding,
    *,
    neutral: str = "",
) -> StepScorer:
    """A reward model of solutions that `experiments.process_reward` trained.

    Args:
      folder: of the model.
      prompts: what is scored answers these.
      settings: of the run that asks it.
      max_length: tokens of the longest prompt with a solution.
      sharding: where batches go.
      neutral: how a neutral step counts; empty is as the model was trained.

    Raises:
      ValueError: the folder lies in no run of `experiments.process_reward`.
    """
    method = learned_by(folder)
    stages.check_lengths({"data.max_length": max_length}, folder)
    return StepScorer(
        stages.load_policy(folder, settings.model, sharding, frozen=True),
        stages.load_tokenizer(folder, date=folders.date(settings.workdir)),
        prompts,
        sharding,
        config=dataclasses.replace(method, neutral=neutral or method.neutral),
        max_length=max_length,
    )


def learned_by(folder: str) -> ProcessRewardConfig:
    """What a model of `experiments.process_reward` learned, as its run noted.

    Raises:
      ValueError: the folder lies in no such run.
    """
    config = Path(folder).parent / "config.json"
    record = read_config(config)["config"] if config.exists() else {}
    if record.get("experiment") != "process_reward":
        raise ValueError(
            f"{folder} is no model of experiments.process_reward: what its label tokens are is not "
            "known"
        )
    return typed(ProcessRewardConfig, record["loss"])


def logged_rounds(workdir: Path, count: int) -> list[dict[str, float]]:
    """What a run of rounds logged of each."""
    return [row for _, row in read_rows(workdir)][:count]


def as_partial(number: int, one: Attempt) -> Partial:
    """An attempt at a problem as a scorer of steps reads it."""
    *before, last = one.steps
    return Partial(number, (*(Step(text, 0) for text in before), Step(last, 0, ends=one.ended)))


def step_scores_of(
    scorer: StepScorer, attempts: Sequence[Sequence[Attempt]]
) -> list[list[list[float]]]:
    """P(right) of each step of each attempt; none of one that was cut or says nothing."""
    whole = [
        (number, one)
        for number, some in enumerate(attempts)
        for one in some
        if one.ended and one.steps
    ]
    scored = iter(scorer([as_partial(number, one) for number, one in whole]))
    return [[next(scored) if one.ended and one.steps else [] for one in some] for some in attempts]
