"""Problems with a verifier, and what a policy makes of them: attempts, and what they are worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.sets import arithmetic
from rlhf_jax.data.sets.arithmetic import Problem
from rlhf_jax.data.solutions import NEGATIVE, POSITIVE, Solution
from rlhf_jax.methods.search import majority, pass_at_k


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One solution that a policy wrote.

    Attributes:
      text: without the question.
      tokens: that were sampled, the stop token included.
      ended: whether the policy ended it.
      labels: of each step, whether it is right given those before; None where nobody can say.
      answer: the final answer as text; None where there is none.
      right: whether the final answer is right.
      log_prob: of the whole, in nats, under the policy that wrote it.
      entropy: of the policy, mean over the tokens, in nats.
    """

    text: str
    tokens: int
    ended: bool
    labels: tuple[bool | None, ...]
    answer: str | None
    right: bool
    log_prob: float = math.nan
    entropy: float = math.nan

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps, as many as labels."""
        return tuple(arithmetic.split_steps(self.text))

    @property
    def first_error(self) -> int:
        """Index of the first wrong step, -1 where none is known to be wrong."""
        return next((i for i, right in enumerate(self.labels) if right is False), -1)

    @property
    def traced(self) -> bool:
        """Whether the answer is right, and no step is known to be wrong."""
        return self.right and self.first_error < 0


def attempt(
    problem: Problem,
    text: str,
    *,
    tokens: int,
    ended: bool,
    log_prob: float = math.nan,
    entropy: float = math.nan,
) -> Attempt:
    """Has a solution checked by the verifier; see `Attempt`.

    One that was cut off has no final answer, whatever its last line says: a digit may be missing.
    """
    verdict = arithmetic.verify(problem, text)
    return Attempt(
        text=text,
        tokens=tokens,
        ended=ended,
        labels=verdict.steps,
        answer=verdict.answer if ended else None,
        right=verdict.right and ended,
        log_prob=log_prob,
        entropy=entropy,
    )


def as_solution(problem: Problem, one: Attempt) -> Solution:
    """An attempt with the verifier's labels, for a process reward model.

    Of one that was cut off nobody knows what the last step would have been, nor the outcome.
    """
    labels = [None if right is None else POSITIVE if right else NEGATIVE for right in one.labels]
    if not one.ended and labels:
        labels[-1] = None
    right = one.right if one.ended else None
    wrong = labels.index(NEGATIVE) if NEGATIVE in labels else -1
    letters = arithmetic.letters_right(problem, one.steps, wrong) if wrong >= 0 else 0
    return Solution(problem.question, one.steps, tuple(labels), right, letters)


def canonical(answer: str | None) -> str | None:
    """One text for equal numbers: votes for 3 and for 3.0 are votes for one answer."""
    if answer is None:
        return None
    number = answer.replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def statistics(
    problems: Sequence[Problem], attempts: Sequence[Sequence[Attempt]]
) -> dict[str, float]:
    """What a policy solves, over N problems with k attempts each.

    Args:
      problems: N.
      attempts: N x k.

    Returns:
      `solve/pass_at_1`, `solve/pass_at_k` (the oracle of k), `solve/majority`;
      `solve/trace_error`, the share of right answers with a wrong step; `solve/ended`;
      `solve/tokens`, mean of an attempt; `solve/distinct`, the share of a problem's attempts that
      differ; `solve/entropy`, in nats per token.

    Raises:
      ValueError: no attempt, or problems with other numbers of them.
    """
    counts = {len(some) for some in attempts}
    if len(problems) != len(attempts) or len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"{len(problems)} problems with {sorted(counts)} attempts: needs as many for each"
        )
    (k,) = counts
    every = [one for some in attempts for one in some]
    right = [one for one in every if one.right]
    voted = [
        arithmetic.same_number(str(majority([canonical(one.answer) for one in some])), asked.answer)
        for asked, some in zip(problems, attempts, strict=True)
    ]
    return {
        "solve/pass_at_1": len(right) / len(every),
        "solve/pass_at_k": float(
            np.mean([pass_at_k(sum(one.right for one in some), k, k) for some in attempts])
        ),
        "solve/majority": float(np.mean(voted)),
        "solve/trace_error": float(np.mean([not one.traced for one in right])) if right else 0.0,
        "solve/ended": float(np.mean([one.ended for one in every])),
        "solve/tokens": float(np.mean([one.tokens for one in every])),
        "solve/distinct": float(
            np.mean([len({one.text for one in some}) / k for some in attempts])
        ),
        "solve/entropy": float(np.mean([one.entropy for one in every])),
    }
