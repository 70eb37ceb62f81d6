"""Claims: numbers of synthetic runs whose answer is known, and the three verdicts."""

import math

import numpy as np
import pytest

from experiments import claims, figures
from experiments.claims import CLAIMS, Claim, Curves


def curves(collapses=(), iterations=40, **metrics):
    """A run with metrics that are constant, or a line from the first number to the second."""
    names = {name.replace("__", "/"): value for name, value in metrics.items()}
    log = {"step": np.arange(iterations)}
    for name, value in names.items():
        ends = value if isinstance(value, tuple) else (value, value)
        log[name] = np.linspace(*ends, iterations)
    return Curves(log, iterations, list(collapses))


def claim(sentence):
    (found,) = [c for c in CLAIMS if c.sentence == sentence]
    return found


def number(sentence, **runs):
    return claim(sentence).value(runs)


def test_every_claim_has_one_bound_a_source_and_runs_of_its_figure():
    assert len({c.sentence for c in CLAIMS}) == len(CLAIMS)
    for one in CLAIMS:
        assert one.at_least is not None or one.at_most is not None, one.sentence
        assert "Figure" in one.source and one.threshold
        labels = [series.label for series in figures.FIGURES[one.figure].series]
        assert set(one.series) <= set(labels), one.sentence


def test_reward_up_and_judge_down():
    sentence = "The reward rises while the judge falls."
    run = curves(reward__mean=(0.0, 3.0), win_rate__language_model=(0.8, 0.5))
    assert number(sentence, vanilla=run) == pytest.approx(30)
    flat = curves(reward__mean=1.0, win_rate__language_model=(0.8, 0.5))
    assert number(sentence, vanilla=flat) == -math.inf


def test_what_moves_when_they_part():
    sentence = "KL, perplexity and response length move when reward and judge part."
    still = {"policy__kl_ref_sequence": 3.0, "policy__perplexity": 90.0, "response__length": 20.0}
    assert number(sentence, vanilla=curves(**still)) == 0
    for moved in (
        {"policy__kl_ref_sequence": 10.0},
        {"policy__perplexity": (90.0, 2.0)},
        {"policy__perplexity": (90.0, 900.0)},
        {"response__length": (20.0, 32.0)},
        {"response__length": (20.0, 5.0)},
    ):
        assert number(sentence, vanilla=curves(**(still | moved))) == 1


def test_later_collapse_is_a_ratio_and_none_counts_as_one_after_the_end():
    sentence = "reward_scale delays or prevents the collapse of vanilla PPO."
    vanilla = curves([9])
    assert number(sentence, vanilla=vanilla, reward_scale=curves([19])) == 2.0
    assert number(sentence, vanilla=vanilla, reward_scale=curves()) == 4.1
    assert number(sentence, vanilla=curves(), reward_scale=curves()) == 1.0


def test_order_of_collapses():
    sentence = (
        "Reward scaling collapses first, then advantages clipped at 0.5, then rewards at 0.8."
    )
    runs = {"reward_scale": [3], "adv_norm_0.5": [5], "reward_norm_0.8": [9]}
    made = {name: curves(steps) for name, steps in runs.items()}
    assert claim(sentence).value(made) == 1
    assert claim(sentence).value(made | {"reward_norm_0.8": curves()}) == 1
    assert claim(sentence).value(made | {"adv_norm_0.5": curves()}) == 0


def test_early_moves():
    run = curves(response__length=(20.0, 40.0), policy__perplexity=100.0, iterations=80)
    value = number("With kl, length or perplexity moves early.", kl=run)
    # Steps 10 to 19 against 0 to 4, on a line from 20 to 40.
    assert value == pytest.approx((20 + 14.5 * 20 / 79) / (20 + 2 * 20 / 79) - 1)


def test_critics_value_loss_is_read_where_the_policy_trains():
    sentence = "A critic that is trained before PPO begins with nearly no value loss."
    trained = curves(loss__value=(40.0, 1.0), loss__policy=0.0)
    trained.log["loss/policy"][:10] = np.nan  # ten iterations of the critic alone
    vanilla = curves(loss__value=(40.0, 1.0), loss__policy=0.0)
    assert number(sentence, critic_pretrain=trained, vanilla=vanilla) == pytest.approx(
        (40 - 12) / (40 - 2)
    )


TOY = Claim("4", "s", "Figure 4", "m", lambda seed: seed["a"].first("x"), ("a",), at_least=1.0)


def verdict(*values, failed=()):
    seeds = {i: {"a": curves(x=value)} for i, value in enumerate(values)}
    return claims.judge(TOY, seeds, failed=failed)


def test_verdicts():
    assert verdict(2.0, 3.0, 1.5).verdict == claims.REPRODUCED
    assert verdict(0.2, 0.3, 0.9).verdict == claims.NOT_REPRODUCED
    assert verdict(2.0, 0.3, 1.5).verdict == claims.UNDECIDED
    assert verdict(2.0).verdict == claims.UNDECIDED  # one seed shows nothing
    assert verdict().verdict == claims.UNDECIDED
    reproduced = verdict(2.0, 3.0, 1.5)
    assert 1.5 <= reproduced.low < reproduced.high <= 3.0


def test_a_failed_seed_keeps_no_bound():
    result = verdict(2.0, 3.0, failed=[5])
    assert result.verdict == claims.UNDECIDED and math.isnan(result.values[5])
    assert verdict(failed=[0, 1]).verdict == claims.NOT_REPRODUCED


def test_a_seed_without_a_run_says_nothing():
    result = claims.judge(TOY, {0: {"a": curves(x=2.0)}, 1: {"b": curves(x=0.0)}})
    assert list(result.values) == [0]
