"""Claims of the slides on policy gradients, each with a metric and a bound fixed before the runs.

A claim is a number of each seed, with a 95% interval by a bootstrap over prompts, and a bound. It
is 'reproduced' where there are two seeds or more and the whole interval of each keeps the bound;
'not reproduced' where the whole interval of each is beyond it; 'undecided' otherwise.

The reference of the biases is Φ = reward_to_go − V: subtracting what depends on the state alone
leaves the expectation as it is, whatever the critic, which was trained on other responses. It has
the expected gradient of reward_to_go with less variance, so that biases are seen with fewer
responses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED
from rlhf_jax.evaluation.comparison import Interval
from rlhf_jax.evaluation.gradients import percentile_interval
from rlhf_jax.rollouts.experience import AdvantageConfig

REFERENCE, UNIT = "reward_to_go_baseline", "reward_to_go"
LAMBDAS = (0.5, 0.9, 0.95)


def estimators(discount: float) -> dict[str, AdvantageConfig]:
    """Every Φ_t that is measured, by name.

    Args:
      discount: γ of the run.
    """

    def of(method: str, **settings: Any) -> AdvantageConfig:
        return AdvantageConfig(method=method, discount=discount, **settings)

    return {
        **{name: of(name) for name in ("total_return", UNIT, REFERENCE)},
        **{f"gae_{lambda_:g}": of("gae", lambda_=lambda_) for lambda_ in reversed(LAMBDAS)},
        "k_step": of("k_step", k=4),
        **{name: of(name) for name in ("td", "batch_mean", "rloo", "grpo")},
    }


# λ of GAE -> estimator. GAE is δ_t for λ = 0 and R_t − V_t for λ = 1, which are measured by name.
CURVE = {0.0: "td"} | {lambda_: f"gae_{lambda_:g}" for lambda_ in LAMBDAS} | {1.0: REFERENCE}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a claim may ask of one seed.

    Attributes:
      names: of the estimators.
      numbers: quantity of `compare_gradients` -> `[R + 1, A]`.
    """

    names: tuple[str, ...]
    numbers: Mapping[str, np.ndarray]

    def of(self, quantity: str, name: str) -> np.ndarray:
        """A quantity of an estimator, `[R + 1]`: of the sample, then of its resamples."""
        return self.numbers[quantity][:, self.names.index(name)]

    def curve(self, quantity: str) -> np.ndarray:
        """A quantity along λ, `[R + 1, λ]`."""
        return np.stack([self.of(quantity, name) for name in CURVE.values()], axis=1)


@dataclasses.dataclass(frozen=True)
class EstimatorClaim:
    """A sentence of the slides, and what would show it.

    Attributes:
      sentence: the claim.
      source: where it stands.
      metric: the number, in words.
      value: the number of a seed and of its resamples, `[R + 1]`.
      at_least: lower bound; -inf where it is not bounded so.
      at_most: upper bound.
    """

    sentence: str
    source: str
    metric: str
    value: Callable[[Measured], np.ndarray]
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def threshold(self) -> str:
        """The bound, in words."""
        low = [f"at least {self.at_least:g}"] if math.isfinite(self.at_least) else []
        high = [f"at most {self.at_most:g}"] if math.isfinite(self.at_most) else []
        return ", ".join(low + high)

    def keeps(self, interval: Interval) -> bool:
        """Whether a whole interval keeps the bound; one with NaN does not."""
        return self.at_least <= interval.low and interval.high <= self.at_most

    def breaks(self, interval: Interval) -> bool:
        """Whether a whole interval is beyond the bound."""
        return interval.high < self.at_least or interval.low > self.at_most


_SLIDE = 'slide "Policy Gradient Methods"'
_GAE = 'slide "GAE"'


def _same(name: str) -> EstimatorClaim:
    return EstimatorClaim(
        f"Φ = {name} has the same expected gradient.",
        _SLIDE,
        f"‖E g − E g_ref‖² / ‖E g_ref‖², where ref is {REFERENCE}",
        lambda seed: seed.of("bias", name),
        at_most=0.1,
    )


def _less(sentence: str, one: str, other: str, at_most: float) -> EstimatorClaim:
    return EstimatorClaim(
        sentence,
        _SLIDE,
        f"variance of {one} over that of {other}",
        lambda seed: seed.of("variance", one) / seed.of("variance", other),
        at_most=at_most,
    )


def _largest_step(curve: np.ndarray) -> np.ndarray:
    """The largest ratio of a number to that at the next λ, `[R + 1]`."""
    return np.max(curve[:, :-1] / curve[:, 1:], axis=1)


def _smallest_drop(curve: np.ndarray) -> np.ndarray:
    """The smallest difference of a number and that at the next λ, `[R + 1]`."""
    return np.min(curve[:, :-1] - curve[:, 1:], axis=1)


CLAIMS = (
    *(
        _same(name)
        for name in (
            "total_return",
            "reward_to_go",
            "td",
            "k_step",
            "gae_0.9",
            "rloo",
            "batch_mean",
            "grpo",
        )
    ),
    _less(
        "Rewards-to-go have less variance than the total return.",
        "reward_to_go",
        "total_return",
        1.0,
    ),
    _less(
        "The critic as baseline lowers the variance of rewards-to-go.",
        "reward_to_go_baseline",
        "reward_to_go",
        0.9,
    ),
    _less(
        "The mean of the batch as baseline lowers the variance of the total return.",
        "batch_mean",
        "total_return",
        0.9,
    ),
    _less(
        "The mean of the other samples as baseline lowers the variance of the total return.",
        "rloo",
        "total_return",
        0.9,
    ),
    EstimatorClaim(
        "The variance of GAE rises with λ.",
        _GAE,
        "largest ratio of the variance at a λ to that at the next, of 0, 0.5, 0.9, 0.95 and 1",
        lambda seed: _largest_step(seed.curve("variance")),
        at_most=1.0,
    ),
    EstimatorClaim(
        "λ = 0 has much less variance than λ = 1.",
        _GAE,
        "variance at λ = 0 over that at λ = 1",
        lambda seed: seed.of("variance", CURVE[0.0]) / seed.of("variance", CURVE[1.0]),
        at_most=0.8,
    ),
    EstimatorClaim(
        "λ = 0 is biased.",
        _GAE,
        "‖E g − E g_ref‖² / ‖E g_ref‖² at λ = 0",
        lambda seed: seed.of("bias", CURVE[0.0]),
        at_least=0.1,
    ),
    EstimatorClaim(
        "The bias of GAE falls with λ.",
        _GAE,
        "smallest drop of ‖E g − E g_ref‖² / ‖E g_ref‖² from a λ to the next",
        lambda seed: _smallest_drop(seed.curve("bias")),
        at_least=-0.01,
    ),
)


def judge(claim: EstimatorClaim, seeds: Mapping[str, Measured]) -> dict[str, Any]:
    """Tries a claim.

    Args:
      claim: which.
      seeds: what was measured, by the seed or the run.

    Returns:
      For the JSON: sentence, source, metric, threshold, `values` (seed -> value, low, high) and the
      verdict.
    """
    values = {name: percentile_interval(claim.value(seed)) for name, seed in seeds.items()}
    intervals = list(values.values())
    verdict = UNDECIDED
    if len(intervals) > 1 and all(map(claim.keeps, intervals)):
        verdict = REPRODUCED
    elif intervals and all(map(claim.breaks, intervals)):
        verdict = NOT_REPRODUCED
    return {
        "sentence": claim.sentence,
        "source": claim.source,
        "metric": claim.metric,
        "threshold": claim.threshold,
        "values": values,
        "verdict": verdict,
    }
