"""Claims: numbers of synthetic runs whose answer is known, and the three verdicts."""

import dataclasses
import math

import numpy as np
import pytest

from experiments import claims, paper_figures
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
        labels = [series.label for series in paper_figures.FIGURES[one.figure].series]
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


WINS = Claim(
    "10",
    "s",
    "Figure 10",
    "m",
    lambda seed: seed["a"].win_rates["language_model"]["win_rate"],
    ("a",),
    at_least=0.55,
    of_win_rates=True,
)


def won(win, tie, count):
    lose = 1 - win - tie
    rates = {"win": win, "tie": tie, "lose": lose, "win_rate": win + tie / 2, "num_prompts": count}
    run = curves()
    return {"a": dataclasses.replace(run, win_rates={"language_model": rates})}


def test_an_interval_of_win_rates_has_the_error_of_the_prompts():
    # Seeds that agree: all of the error is that of 3 x 100 prompts. Without ties the outcome of a
    # prompt has variance .6 x .4 = .24; with ties .2 + .8 / 4 - .6² = .04.
    for win, tie, variance in ((0.6, 0.0, 0.24), (0.2, 0.8, 0.04)):
        alike = {seed: won(win, tie, 100) for seed in range(3)}
        result = claims.judge(WINS, alike)
        half = 1.96 * math.sqrt(variance / 300)
        assert result.low == pytest.approx(0.6 - half, abs=0.006)
        assert result.high == pytest.approx(0.6 + half, abs=0.006)
    many = {seed: won(0.6, 0.0, 10_000) for seed in range(3)}
    assert claims.judge(WINS, many).verdict == claims.REPRODUCED
    # Each seed keeps the bound of .55 and so few prompts do not show it.
    few = {seed: won(0.6, 0.0, 100) for seed in range(3)}
    assert claims.judge(WINS, few).verdict == claims.UNDECIDED


def test_the_error_of_seeds_and_that_of_prompts_add_up():
    shares = np.array([0.4, 0.5, 0.6, 0.7])
    result = claims.judge(WINS, {i: won(share, 0.0, 50) for i, share in enumerate(shares)})
    # Resampled seeds: the variance of the four, over four. Prompts: the mean of p (1 - p) / 50.
    variance = shares.var() / 4 + (shares * (1 - shares)).mean() / 50 / 4
    half = 1.96 * math.sqrt(variance)
    assert (result.high - result.low) / 2 == pytest.approx(half, rel=0.1)
    _, low, high = claims.bootstrap_interval(shares)
    assert result.high - result.low > 1.1 * (high - low)


def test_a_curve_of_win_rates_is_redrawn_around_its_own_value():
    """The best of a noisy curve rises when it is redrawn; that is no error of the prompts."""
    one = claim("PPO-max keeps what it has won over ten times the steps.")
    run = dataclasses.replace(curves(win_rate__language_model=0.5), eval_prompts=128)
    result = claims.judge(one, {seed: {"PPO-max, long": run} for seed in range(3)})
    assert set(result.values.values()) == {0.0}
    assert result.low < 0 < result.high and result.high - result.low < 15
    known = claims.judge(
        one, {s: {"PPO-max, long": curves(win_rate__language_model=0.5)} for s in (0, 1)}
    )
    assert (known.low, known.high) == (0.0, 0.0)  # nobody knows of how many prompts


def test_redrawn_win_rates_are_shares_of_the_prompts_and_gaps_stay():
    run = dataclasses.replace(curves(win_rate__vader=0.3, reward__mean=1.0), eval_prompts=8)
    run.log["win_rate/vader"][::2] = np.nan
    drawn = run.redrawn(np.random.default_rng(0)).log
    assert np.isnan(drawn["win_rate/vader"][::2]).all()
    assert {0.125, 0.25} <= set(drawn["win_rate/vader"][1::2]) <= set(np.arange(9) / 8)
    assert np.array_equal(drawn["reward/mean"], run.log["reward/mean"])
    assert run.log["win_rate/vader"][1] == 0.3


def test_claims_of_win_rates_are_those_that_another_draw_of_prompts_moves():
    random = np.random.default_rng(0)
    names = ("reward/mean", "policy/kl_ref_sequence", "policy/perplexity", "response/length")
    names += ("loss/value", "loss/policy", "reward/q95", "reward/accuracy", "eval/accuracy")
    log = {name.replace("/", "__"): (1.0, 3.0) for name in names}
    rates = won(0.6, 0.1, 100)["a"].win_rates
    run = dataclasses.replace(
        curves([9], **log, reward__q05=(-1.0, -3.0), win_rate__language_model=(0.6, 0.4)),
        win_rates=rates,
        differences=np.array([1.0, -1.0]),
        eval_prompts=128,
    )
    for one in CLAIMS:
        seed = dict.fromkeys(one.series, run)
        drawn = {one.value(claims._redrawn(seed, random)) for _ in range(20)}
        assert (len(drawn) > 1) == one.of_win_rates, one.sentence
