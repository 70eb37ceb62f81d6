"""Claims on policy-gradient estimators: numbers whose answer is known, and the three verdicts."""

import math

import numpy as np
import pytest

from experiments import estimator_claims
from experiments.claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED
from experiments.estimator_claims import CLAIMS, CURVE, EstimatorClaim, Measured, estimators
from rlhf_jax.rollouts.experience import ADVANTAGES

NAMES = tuple(estimators(1.0))


def measured(spread=0.0, **quantities):
    """A seed in which estimators have given numbers, 0 where none is; resamples scatter evenly."""
    scatter = np.concatenate([[0.0], np.linspace(-spread, spread, 41)])
    return Measured(
        NAMES,
        {
            quantity: np.stack([numbers.get(name, 0.0) + scatter for name in NAMES], axis=1)
            for quantity, numbers in quantities.items()
        },
    )


def claim(sentence):
    (found,) = [c for c in CLAIMS if c.sentence == sentence]
    return found


def number(sentence, **quantities):
    return claim(sentence).value(measured(**quantities))[0]


def test_every_claim_has_a_bound_a_source_and_its_own_sentence():
    assert len({one.sentence for one in CLAIMS}) == len(CLAIMS)
    for one in CLAIMS:
        assert one.threshold and "slide" in one.source
        assert math.isfinite(one.at_least) or math.isfinite(one.at_most)


def test_every_choice_of_the_slide_is_measured():
    assert {config.method for config in estimators(0.9).values()} == set(ADVANTAGES)
    assert set(CURVE.values()) <= set(NAMES) and list(CURVE) == sorted(CURVE)
    assert all(config.discount == 0.9 for config in estimators(0.9).values())


def test_numbers_of_claims():
    assert number("Φ = td has the same expected gradient.", bias={"td": 0.3}) == 0.3
    variance = {"total_return": 2.0, "reward_to_go": 1.0, "reward_to_go_baseline": 0.5, "td": 0.1}
    variance |= {"gae_0.5": 0.2, "gae_0.9": 0.45, "gae_0.95": 0.4}
    assert (
        number("Rewards-to-go have less variance than the total return.", variance=variance) == 0.5
    )
    assert number("λ = 0 has much less variance than λ = 1.", variance=variance) == 0.2
    # 0.45 at 0.9 over 0.4 at 0.95 is the only step that falls.
    steps = number("The variance of GAE rises with λ.", variance=variance)
    assert steps == pytest.approx(0.45 / 0.4)
    bias = {"td": 0.5, "gae_0.5": 0.2, "gae_0.9": 0.21, "gae_0.95": 0.05}
    assert number("The bias of GAE falls with λ.", bias=bias) == pytest.approx(-0.01)


TOY = EstimatorClaim("s", 'slide "x"', "m", lambda seed: seed.of("bias", "td"), at_most=0.1)


def verdict(*seeds):
    made = {str(i): measured(spread, bias={"td": value}) for i, (value, spread) in enumerate(seeds)}
    return estimator_claims.judge(TOY, made)["verdict"]


def test_verdicts_are_of_whole_intervals():
    assert verdict((0.05, 0.01), (0.0, 0.05)) == REPRODUCED
    assert verdict((0.05, 0.01)) == UNDECIDED  # one seed shows nothing
    assert verdict((0.05, 0.2), (0.0, 0.05)) == UNDECIDED  # too wide
    assert verdict((0.5, 0.1), (0.3, 0.1)) == NOT_REPRODUCED
    assert verdict((0.5, 0.1), (0.05, 0.01)) == UNDECIDED
    assert verdict() == UNDECIDED


def test_a_gradient_that_is_not_told_from_zero_decides_nothing():
    unknown = measured(bias={"td": math.nan})
    assert estimator_claims.judge(TOY, {"0": unknown, "1": unknown})["verdict"] == UNDECIDED
