"""What expert iteration improves on: problems with a verifier, or prompts with a reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from experiments import solving
from experiments.solving import Solver
from rlhf_jax.data.sets.arithmetic import Problem
from rlhf_jax.evaluation.comparison import paired_outcomes
from rlhf_jax.evaluation.judges import Judge
from rlhf_jax.methods import expert_iteration
from rlhf_jax.methods.expert_iteration import Example
from rlhf_jax.methods.process_reward import StepScorer
from rlhf_jax.methods.search import LAST, step_search
from rlhf_jax.methods.solving import Attempt, statistics
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rollouts.answers import Answer
from rlhf_jax.rollouts.rescore import answers_scores

FINAL_ANSWER, ALL_RIGHT, ORM, PRM, CONTROL = "final_answer", "all_right", "orm", "prm", "control"
REWARD_MODEL = "reward_model"
METHODS = (FINAL_ANSWER, ALL_RIGHT, ORM, PRM, CONTROL, REWARD_MODEL)


@dataclasses.dataclass(frozen=True)
class Improvement:
    """What a round's search found.

    Attributes:
      examples: to be distilled.
      tokens: that were sampled for them.
    """

    examples: list[Example]
    tokens: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """A policy on held-out prompts.

    Attributes:
      numbers: means, by metric.
      units: what the policy is judged by, one number for each prompt [N].
      shown: for some prompts: the prompt, an answer, and what it is worth.
    """

    numbers: dict[str, float]
    units: np.ndarray
    shown: list[tuple[str, str, str]]


class World(Protocol):
    """Prompts, and what says which answer is better.

    Attributes:
      metric: of `Measured.numbers`, by which the best round is chosen.
      unit: what the units are, in words.
    """

    @property
    def metric(self) -> str:
        """See the attributes."""
        ...

    @property
    def unit(self) -> str:
        """See the attributes."""
        ...

    def improve(self, policy: Any, folder: str, number: int) -> Improvement:
        """Round `number` of search by a policy, whose weights lie in a folder."""
        ...

    def measure(self, policy: Any, reference: Any, split: str) -> Measured:
        """What a policy is worth on a held-out split, and how far it is from a reference."""
        ...


@dataclasses.dataclass(frozen=True)
class ProblemWorld:
    """Problems whose answers a verifier knows.

    Attributes:
      solver: lets policies solve problems.
      problems: by split.
      method: what is kept of the attempts; see `methods.expert_iteration`.
      scorer: the outcome or process reward model, for "orm" and "prm".
      width: attempts at each problem, or candidates of each step.
      max_steps: of a solution that is searched step by step.
      samples: attempts at each held-out problem.
      seed: of all draws.
    """

    solver: Solver
    problems: Mapping[str, Sequence[Problem]]
    method: str
    scorer: StepScorer | None
    width: int
    max_steps: int
    samples: int
    seed: int
    metric: str = "solve/pass_at_1"
    unit: str = "problems solved in one attempt"

    def improve(self, policy: Any, folder: str, number: int) -> Improvement:
        """See `World`."""
        if self.method == PRM:
            return self._searched(policy, number)
        problems = self.problems["train"]
        prompts = [problem.question for problem in problems]
        rng = np.random.default_rng([self.seed, number])
        attempts = solving.sampled(
            self.solver, policy, folder, problems, f"round {number}", self.width, self.seed
        )
        texts = [[one.text for one in some] for some in attempts]
        if self.method == ORM:
            assert self.scorer is not None
            steps = solving.step_scores_of(self.scorer, attempts)
            scores = [[one[-1] if one else -np.inf for one in some] for some in steps]
            examples = expert_iteration.best(prompts, texts, scores)
        elif self.method == ALL_RIGHT:
            examples = expert_iteration.all_right(prompts, attempts)
        elif self.method == CONTROL:
            # As many as the final answer would keep, at the same problems.
            counts = [int(any(one.right for one in some)) for some in attempts]
            examples = expert_iteration.random(prompts, texts, counts, rng)
        else:
            examples = expert_iteration.final_answer(prompts, attempts, rng)
        return Improvement(examples, sum(one.tokens for some in attempts for one in some))

    def _searched(self, policy: Any, number: int) -> Improvement:
        """The solution to each problem whose every step a process reward model chose."""
        assert self.scorer is not None
        problems = self.problems["train"]
        step_policy = self.solver.step_policy(
            policy, problems, jax.random.fold_in(jax.random.key(self.seed), number)
        )
        found = step_search(
            len(problems),
            step_policy,
            self.scorer,
            beams=1,
            width=self.width,
            max_steps=self.max_steps,
            aggregation=LAST,
        )
        examples = [
            Example(problem.question, one.solutions[0].text)
            for problem, one in zip(problems, found, strict=True)
            if one.solutions
        ]
        return Improvement(examples, sum(one.tokens for one in found))

    def measure(self, policy: Any, reference: Any, split: str) -> Measured:
        """See `World`."""
        problems = self.problems[split]
        key = jax.random.fold_in(jax.random.key(self.seed), len(split))
        attempts, moved = self.solver.solve_and_compare(
            policy, reference, problems, self.samples, key
        )
        numbers = statistics(problems, attempts) | {"policy/kl_ref_sequence": moved}
        units = np.array([np.mean([one.right for one in some]) for some in attempts])
        shown = [
            (problem.question, some[0].text, worth(some[0]))
            for problem, some in zip(problems, attempts, strict=True)
        ]
        return Measured(numbers, units, shown)


def worth(one: Attempt) -> str:
    """An attempt in words."""
    return "right" if one.traced else "right answer, wrong step" if one.right else "wrong"


@dataclasses.dataclass
class PromptWorld:
    """Prompts whose answers a reward model scores: the best of N is distilled (RAFT).

    Attributes:
      solver: lets policies answer.
      prompts: encoded, by split.
      texts: of the prompts, as they are fine-tuned on and judged, by split.
      reward_model: scores answers.
      judges: that nothing is trained by; the first one decides which round is best.
      width: answers to each prompt.
      seed: of all draws.
    """

    solver: Solver
    prompts: Mapping[str, Sequence[Any]]
    texts: Mapping[str, Sequence[str]]
    reward_model: ScalarModel
    judges: Mapping[str, Judge]
    width: int
    seed: int

    def __post_init__(self):
        name = next(iter(self.judges))
        self.metric, self.unit = f"judge/{name}", f"score of the judge {name}"
        self._before: dict[str, dict[str, np.ndarray]] = {}

    def improve(self, policy: Any, folder: str, number: int) -> Improvement:
        """See `World`."""
        del folder
        prompts = self.prompts["train"]
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        drawn = self.solver.answers(policy, prompts, self.width, key)
        scores = self._scores(prompts, drawn)
        # What was cut off is not what the policy is to say.
        scores = [
            [score if one.ended else -np.inf for score, one in zip(values, some, strict=True)]
            for values, some in zip(scores, drawn, strict=True)
        ]
        texts = [[one.text for one in some] for some in drawn]
        examples = expert_iteration.best(self.texts["train"], texts, scores)
        return Improvement(examples, sum(len(one.tokens) for some in drawn for one in some))

    def _scores(
        self, prompts: Sequence[Any], drawn: Sequence[Sequence[Answer]]
    ) -> list[list[float]]:
        return answers_scores(
            self.reward_model,
            prompts,
            drawn,
            pad_id=self.solver.tokenizer.pad_token_id,
            rows=self.solver.rows,
            sharding=self.solver.sharding,
        )

    def measure(self, policy: Any, reference: Any, split: str) -> Measured:
        """See `World`; win rates are against the first policy that was measured on the split."""
        prompts = self.prompts[split]
        key = jax.random.fold_in(jax.random.key(self.seed), len(split))
        drawn = self.solver.answers(policy, prompts, 1, key)
        read = [text + some[0].text for text, some in zip(self.texts[split], drawn, strict=True)]
        judged = {name: judge(read) for name, judge in self.judges.items()}
        before = self._before.setdefault(split, judged)
        one = [some[0] for some in drawn]
        numbers = {
            "reward/mean": float(np.mean(self._scores(prompts, drawn))),
            "policy/kl_ref_sequence": self.solver.moved(reference, prompts, drawn),
            "policy/entropy": float(np.mean([a.entropy for a in one])),
            "response/length": float(np.mean([len(a.tokens) for a in one])),
            "response/eos_rate": float(np.mean([a.ended for a in one])),
        }
        for name, scores in judged.items():
            numbers[f"judge/{name}"] = float(np.mean(scores))
            numbers[f"win_rate/{name}"] = float(np.mean(paired_outcomes(scores, before[name])))
        units = judged[next(iter(judged))]
        shown = [
            (text, a.text, f"{score:.2f}")
            for text, a, score in zip(self.texts[split], one, units, strict=True)
        ]
        return Measured(numbers, units, shown)
