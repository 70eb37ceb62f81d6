"""Labels of steps without people and without a verifier of steps: complete each prefix, and count.

Source: Wang et al. 2023, Math-Shepherd (arXiv 2312.08935), section 3.2: the quality of a step is
the share of completions from it that reach the right answer. It is the value of a state under the
policy that completes, not the correctness of the step: a wrong step that the policy mends counts as
right, and a right one that it never gets home from as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.data.sets.arithmetic import Problem
from rlhf_jax.data.solutions import NEGATIVE, POSITIVE
from rlhf_jax.methods.solving import Attempt, attempt
from rlhf_jax.rollouts.answers import Answer

# Completes each of N beginnings, given as problem and steps: the answers to each.
Complete = Callable[[Sequence[tuple[int, tuple[str, ...]]]], Sequence[Sequence[Answer]]]


def step_values(
    problems: Sequence[Problem], attempts: Sequence[Sequence[Attempt]], complete: Complete
) -> list[list[tuple[float, ...]]]:
    """Share of completions from each step that reach the right answer.

    Equal beginnings of one problem are completed once. The last step of an attempt that has ended
    needs no completion: its value is whether the answer is right. So is that of one that was cut,
    whose answer is never right.

    Args:
      problems: N.
      attempts: those of each problem.
      complete: continues beginnings.

    Returns:
      For each attempt of each problem, a value in [0, 1] of each step.
    """
    beginnings: dict[tuple[int, tuple[str, ...]], float] = {
        (number, one.steps[:length]): 0.0
        for number, some in enumerate(attempts)
        for one in some
        for length in range(1, len(one.steps))
    }
    asked = list(beginnings)
    for (number, steps), answers in zip(asked, complete(asked) if asked else [], strict=True):
        reached = [
            attempt(
                problems[number],
                "".join(steps) + answer.text,
                tokens=len(answer.tokens),
                ended=answer.ended,
            ).right
            for answer in answers
        ]
        beginnings[number, steps] = float(np.mean(reached))
    return [
        [
            (
                *(beginnings[number, one.steps[:length]] for length in range(1, len(one.steps))),
                *([float(one.right)] if one.steps else []),
            )
            for one in some
        ]
        for number, some in enumerate(attempts)
    ]


def hard_labels(values: Sequence[float], *, above: float = 0.0) -> tuple[int, ...]:
    """Ratings from values: right where more than a share of the completions arrives.

    Args:
      values: of the steps.
      above: 0 is Math-Shepherd's hard estimate (equation 3): one that arrives is enough.
    """
    return tuple(POSITIVE if value > above else NEGATIVE for value in values)
