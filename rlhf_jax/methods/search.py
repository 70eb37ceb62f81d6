"""Search for better answers at inference: votes, best-of-N, and searches over steps.

Everything here is a function of callables: a `Propose` that continues partial solutions by one
step, and a `Score` that says how likely each step is right. Neither need be a model of this
library. Searches take all problems at once, so that a sampler has whole batches.

  samples -> best_of_n, majority, weighted_vote    (whole solutions, drawn independently)
  step_search(beams=1)                             (greedy: Uesato et al. 2022, section 2.4)
  step_search(beams=4, width=4)                    (beam search: Snell et al. 2024, section 5.1)
  step_search(beams=4, width=4, diverse=True)      (DVTS: Beeching et al. 2024)
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

PRODUCT, MIN, LAST = "product", "min", "last"
AGGREGATIONS = (PRODUCT, MIN, LAST)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a solution.

    Attributes:
      text: as it was sampled, its break included.
      tokens: that were sampled.
      ends: whether the solution ends with it.
    """

    text: str
    tokens: int
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Partial:
    """A solution so far.

    Attributes:
      problem: index among the problems of the search.
      steps: so far.
      scores: probability that each step is right, as long as `steps` once they are scored.
    """

    problem: int
    steps: tuple[Step, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """All steps."""
        return "".join(step.text for step in self.steps)

    @property
    def tokens(self) -> int:
        """That were sampled for it."""
        return sum(step.tokens for step in self.steps)

    @property
    def ended(self) -> bool:
        """Whether it is whole."""
        return bool(self.steps) and self.steps[-1].ends


# Continues each of P partial solutions by `count` steps, drawn independently.
Propose = Callable[[Sequence[Partial], int], Sequence[Sequence[Step]]]
# The probability that each step is right, for each of P partial solutions.
Score = Callable[[Sequence[Partial]], Sequence[Sequence[float]]]


def aggregate(scores: Sequence[float], method: str) -> float:
    """Score of a solution from those of its steps; `losses.aggregate_step_scores` on one solution.

    Args:
      scores: of the steps, each in [0, 1].
      method: "product", "min", or "last" (Snell et al. 2024, section 5.1).

    Returns:
      A number in [0, 1]; 1 without steps.

    Raises:
      ValueError: an unknown method, or a score that is no probability.
    """
    if method not in AGGREGATIONS:
        raise ValueError(f"aggregation {method!r} must be one of {', '.join(AGGREGATIONS)}")
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError(f"scores must be probabilities, got {list(scores)}")
    if not scores:
        return 1.0
    if method == PRODUCT:
        return math.prod(scores)
    return min(scores) if method == MIN else scores[-1]


def best_of_n(scores: Sequence[float]) -> int:
    """Index of the best of N solutions, the first of equals.

    Args:
      scores: of N solutions.

    Raises:
      ValueError: no solution, or NaN.
    """
    values = np.asarray(scores, np.float64)
    if not values.size or np.isnan(values).any():
        raise ValueError(f"best of N needs N numbers, got {list(scores)}")
    return int(values.argmax())


def weighted_vote(answers: Sequence[Hashable | None], weights: Sequence[float]) -> Hashable | None:
    """The answer whose solutions weigh most together (Uesato et al. 2022, section 2.4).

        argmax_a Σ_y w(y) [y answers a]

    Args:
      answers: of N solutions; None where a solution has none, which votes for nothing.
      weights: of the N solutions, not negative.

    Returns:
      The answer, of equals the one that comes first; None where no solution has any.

    Raises:
      ValueError: other numbers of both, or a weight that is negative or NaN.
    """
    if len(answers) != len(weights):
        raise ValueError(f"{len(answers)} answers and {len(weights)} weights")
    if not all(weight >= 0 for weight in weights):
        raise ValueError(f"weights must not be negative, got {list(weights)}")
    votes: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=lambda answer: votes[answer], default=None)


def majority(answers: Sequence[Hashable | None]) -> Hashable | None:
    """Self-consistency (Wang et al. 2022): the most frequent answer; see `weighted_vote`."""
    return weighted_vote(answers, [1.0] * len(answers))


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Chance that at least one of k samples is right (Chen et al. 2021, equation 1).

        1 − C(n − c, k) / C(n, k)

    Args:
      right: c, of the samples.
      samples: n.
      k: at most n.

    Raises:
      ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"right={right}, samples={samples}, k={k}: needs c <= n and 1 <= k <= n")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found for one problem.

    Attributes:
      solutions: the best first; those that did not end are left out.
      tokens: that were sampled on the way, those of steps that were given up included.
    """

    solutions: tuple[Partial, ...]
    tokens: int


def step_search(
    num_problems: int,
    propose: Propose,
    score: Score,
    *,
    beams: int,
    width: int,
    max_steps: int,
    diverse: bool = False,
    aggregation: str = PRODUCT,
) -> list[Found]:
    """Searches solutions step by step, guided by scores of steps.

    Of every partial solution `width` continuations are drawn; the best `beams` of all go on, equal
    texts once, since copies of one solution would crowd out the others. With
    `diverse` each of the `beams` partial solutions is a tree of its own, of which the best
    continuation goes on, so that they cannot become one (DVTS). A solution that has ended keeps its
    place among the beams until a better one takes it. `beams=1` is the greedy search.

    Args:
      num_problems: P.
      propose: continues partial solutions.
      score: says how likely each step is right.
      beams: how many partial solutions of a problem go on.
      width: continuations that are drawn of each.
      max_steps: a solution that has not ended by then is given up.
      diverse: whether beams are trees of their own.
      aggregation: how the scores of steps become that of a solution, see `aggregate`.

    Returns:
      P results, with at most `beams` solutions each.

    Raises:
      ValueError: a budget of 0, an unknown aggregation, or a callable that gives another number of
        results than it was asked for.
    """
    for name, value in {"beams": beams, "width": width, "max_steps": max_steps}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    aggregate((), aggregation)  # refuses an unknown one before anything is sampled
    spent = [0] * num_problems
    # Slots of a problem: one of all beams, or one for each tree.
    slots = beams if diverse else 1
    kept = 1 if diverse else beams
    # At the start all beams are alike, and one draws as many as all of them would.
    open_slots = {(p, s): [Partial(p)] for p in range(num_problems) for s in range(slots)}
    for depth in range(max_steps):
        count = width * kept if depth == 0 else width
        candidates = _continue(open_slots, propose, score, count, spent)
        for place, partials in candidates.items():
            done = [partial for partial in open_slots[place] if partial.ended]
            ranked = _best_first([*done, *partials], aggregation)
            different: dict[str, Partial] = {}
            for partial in ranked:
                different.setdefault(partial.text, partial)
            open_slots[place] = list(different.values())[:kept]
        if all(partial.ended for partials in open_slots.values() for partial in partials):
            break
    found: dict[int, list[Partial]] = collections.defaultdict(list)
    for (problem, _), partials in open_slots.items():
        found[problem] += [partial for partial in partials if partial.ended]
    return [Found(tuple(_best_first(found[p], aggregation)), spent[p]) for p in range(num_problems)]


def _best_first(partials: Sequence[Partial], aggregation: str) -> list[Partial]:
    return sorted(partials, key=lambda partial: -aggregate(partial.scores, aggregation))


def _continue(
    open_slots: dict[Any, list[Partial]],
    propose: Propose,
    score: Score,
    count: int,
    spent: list[int],
) -> dict[Any, list[Partial]]:
    """Scored continuations of everything that has not ended, by slot; adds to the tokens spent."""
    places = [
        (place, partial)
        for place, partials in open_slots.items()
        for partial in partials
        if not partial.ended
    ]
    if not places:
        return {}
    proposed = propose([partial for _, partial in places], count)
    _check_count("propose", len(proposed), len(places))
    longer = []
    for (place, partial), steps in zip(places, proposed, strict=True):
        _check_count("propose", len(steps), count)
        spent[partial.problem] += sum(step.tokens for step in steps)
        longer += [
            (place, dataclasses.replace(partial, steps=(*partial.steps, step))) for step in steps
        ]
    scored = score([partial for _, partial in longer])
    _check_count("score", len(scored), len(longer))
    candidates: dict[Any, list[Partial]] = collections.defaultdict(list)
    for (place, partial), scores in zip(longer, scored, strict=True):
        _check_count("score", len(scores), len(partial.steps))
        candidates[place].append(dataclasses.replace(partial, scores=tuple(map(float, scores))))
    return candidates


def _check_count(name: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{name} gave {got} results instead of {wanted}")
