"""Expert iteration: a policy improved by search writes what the policy is then fine-tuned on.

Source: Anthony et al. 2017 (arXiv 1705.08439); for solutions in steps Uesato et al. 2022 (arXiv
2211.14275), sections 2.4 to 2.6; with a reward model's best of N for rounds of samples it is RAFT
(Dong et al. 2023, arXiv 2304.06767). What is here chooses from attempts; sampling, search and
fine-tuning are the caller's.

  final_answer   one attempt whose answer is right, drawn from them; none where no answer is right
  all_right      every different attempt whose answer is right (rejection sampling, STaR)
  best           the attempt that a reward model scores highest: ORM argmax, RAFT
  random         any attempt: the control, which is given as many
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.methods.solving import Attempt


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with an answer to be distilled.

    Attributes:
      prompt: text.
      response: text.
    """

    prompt: str
    response: str


def final_answer(
    prompts: Sequence[str], attempts: Sequence[Sequence[Attempt]], rng: np.random.Generator
) -> list[Example]:
    """One attempt at random of those whose answer is right, of each problem that has any."""
    return [
        Example(prompt, right[int(rng.integers(len(right)))])
        for prompt, some in zip(prompts, attempts, strict=True)
        if (right := [one.text for one in some if one.right])
    ]


def all_right(prompts: Sequence[str], attempts: Sequence[Sequence[Attempt]]) -> list[Example]:
    """Every attempt whose answer is right, equal ones of a problem once."""
    return [
        Example(prompt, text)
        for prompt, some in zip(prompts, attempts, strict=True)
        for text in dict.fromkeys(one.text for one in some if one.right)
    ]


def best(
    prompts: Sequence[str], texts: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
) -> list[Example]:
    """The answer to each prompt that scores highest, the first of equals.

    Args:
      prompts: N.
      texts: answers to each.
      scores: as many numbers; higher is better, and an answer with -inf is never taken.

    Raises:
      ValueError: other numbers of texts and scores, or NaN.
    """
    chosen = []
    for prompt, some, values in zip(prompts, texts, scores, strict=True):
        if len(some) != len(values):
            raise ValueError(f"{len(some)} answers and {len(values)} scores of one prompt")
        if np.isnan(values).any():
            raise ValueError("the score of an answer is NaN")
        if len(values) and max(values) > -np.inf:
            chosen.append(Example(prompt, some[int(np.argmax(values))]))
    return chosen


def random(
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    counts: Sequence[int],
    rng: np.random.Generator,
) -> list[Example]:
    """As many answers to each prompt as another choice took, whatever they are worth.

    Args:
      prompts: N.
      texts: answers to each.
      counts: how many of each; drawn without replacement.
      rng: draws.

    Raises:
      ValueError: more are asked for than there are.
    """
    chosen = []
    for prompt, some, count in zip(prompts, texts, counts, strict=True):
        if count > len(some):
            raise ValueError(f"{count} of {len(some)} answers are asked for")
        picked = rng.choice(len(some), size=count, replace=False)
        chosen += [Example(prompt, some[int(i)]) for i in picked]
    return chosen


def pool(rounds: Iterable[Sequence[Example]]) -> list[Example]:
    """All examples of all rounds, equal ones once, in the order in which they came.

    The pool grows (Polu and Sutskever 2020; Uesato et al. 2022, section 2.6).
    """
    return list(dict.fromkeys(one for examples in rounds for one in examples))


def as_rows(examples: Iterable[Example]) -> list[dict[str, Any]]:
    """Rows for supervised fine-tuning."""
    return [{"prompt": one.prompt, "response": one.response} for one in examples]
