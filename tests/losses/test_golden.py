"""Numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses

LN2 = 0.6931472


def close(found, expected, tolerance=1e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_masked_mean_divides_by_the_real_tokens_not_by_the_array():
    x = jnp.array([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    where = jnp.array([[True, True, False], [True, False, False]])
    close(losses.masked_mean(x, where=where), 3.0)  # (1 + 2 + 6) / 3, not / 6
    # Sequence mean, then mean over sequences: ((1 + 2)/2 + 6) / 2 = 3.75.
    close(losses.masked_mean(x, where=where, axis=-1), [1.5, 6.0])


def test_masked_mean_counts_beyond_256_in_bfloat16():
    # 257 and 257 · (1 + 1/128) = 259.008 would be rounded to 256 and 260 and give 1 + 2/128.
    x = jnp.full(257, 1 + 1 / 128, jnp.bfloat16)
    found = losses.masked_mean(x, where=jnp.ones(257, bool))
    assert found.dtype == jnp.bfloat16
    close(found.astype(jnp.float32), 1 + 1 / 128)


def test_whiten():
    x, where = jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])
    close(losses.masked_whiten(x, where=where), [-1, 1, 0])  # mean 2, variance (1 + 1)/2
    close(losses.masked_whiten(x, where=where, shift_mean=False), [1, 3, 0])  # ±1, mean back


def test_bfloat16_is_whitened_and_compared_in_float32():
    # The mean 257 and the sum 514 are no bfloat16 numbers: they would be rounded to 256 and 512.
    x = jnp.array([256.0, 258.0], jnp.bfloat16)
    for found, expected in (
        (losses.masked_whiten(x, where=jnp.ones(2, bool)), [-1, 1]),
        (losses.group_advantages(x, eps=0.0), [-1, 1]),
        (losses.leave_one_out_baseline(x), [258, 256]),
    ):
        assert found.dtype == jnp.bfloat16
        close(found.astype(jnp.float32), expected)


def test_bfloat16_logits_are_read_in_float32():
    logits = jnp.arange(64.0).reshape(2, 32) / 8
    tokens = jnp.array([3, 5])
    for measure in (
        lambda z: losses.select_log_probs(z, tokens, temperature=0.7),
        lambda z: losses.token_log_probs(z, tokens, temperature=0.7),
        losses.entropy,
        lambda z: losses.kl_divergence(z, jnp.flip(z, -1)),
    ):
        found = measure(logits.astype(jnp.bfloat16))  # eighths below 8 are bfloat16 numbers
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, measure(logits))


def test_token_log_probs_shifts_by_one():
    # Row t holds the logits for token t+1: p(1) = 3/4 after token 0, p(0) = 1/2 after token 1.
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0], [9.0, 1.0]]))
    found = losses.token_log_probs(logits, jnp.array([0, 1, 0]))
    close(found, np.log([0.75, 0.5]))
    # Temperature 1/2 squares the odds: 9/10 instead of 3/4.
    found = losses.token_log_probs(logits, jnp.array([0, 1, 0]), temperature=0.5)
    close(found, np.log([0.9, 0.5]))


def test_bfloat16_logits_are_normalised_in_float32():
    rng = np.random.default_rng(0)
    logits, other = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(0, 3, (2, 4, 1000)))
    targets = jnp.array([0, 7, 500, 999])
    log_p, log_q = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (np.asarray(logits, np.float64), np.asarray(other, np.float64))
    )
    p = np.exp(log_p)
    for found, expected in (
        (losses.select_log_probs(logits, targets), log_p[np.arange(4), targets]),
        (losses.entropy(logits), -(p * log_p).sum(-1)),
        (losses.kl_divergence(logits, other), (p * (log_p - log_q)).sum(-1)),
    ):
        assert found.dtype == jnp.float32
        close(found, expected, 2e-5)


def test_kl_estimates():
    # d = ln 2: k1 = 0.6931, k2 = 0.6931²/2 = 0.2402, k3 = 1/2 − 1 + 0.6931 = 0.1931.
    new, ref = jnp.array([0.0]), jnp.array([-LN2])
    for name, expected in (("k1", 0.6931472), ("k2", 0.2402265), ("k3", 0.1931472)):
        close(losses.kl_estimate(new, ref, estimator=name), [expected])


def test_k3_keeps_its_digits_near_zero():
    # exp(d) − 1 − d = d²/2 = 5e-7 at d = 1e-3; computed with exp it is off by 10% in float32.
    found = losses.kl_estimate(jnp.array([0.0]), jnp.array([1e-3]), estimator="k3")
    np.testing.assert_allclose(found, 5.0017e-7, rtol=1e-3)


def test_kl_divergence_of_coins():
    # 0.5 ln(0.5/0.75) + 0.5 ln(0.5/0.25) = 0.5 (−0.4055 + 0.6931) = 0.1438
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
    close(losses.kl_divergence(p, q), 0.14384104)


def test_adaptive_coefficients():
    tenth = jnp.array(0.1)
    # KL 12 against 6: the error 1 is clipped to 0.2; 256 of 10,000 episodes: 0.1 (1 + 0.00512).
    found = losses.adaptive_kl_coef(tenth, jnp.array(12.0), target=6.0, horizon=1e4, steps=256)
    close(found, 0.100512)
    # 3 against 6: −0.5 is clipped to −0.2.
    found = losses.adaptive_kl_coef(tenth, jnp.array(3.0), target=6.0, horizon=1e4, steps=256)
    close(found, 0.099488)
    for kl, expected in ((0.016, 0.2), (0.012, 0.1), (0.006, 0.05)):  # bounds 0.015 and 0.00667
        close(losses.adaptive_penalty_coef(tenth, jnp.array(kl), target=0.01), expected)


def test_score_is_paid_on_the_last_real_token_and_keeps_its_fraction():
    where = jnp.array([False, True, True, False])
    new, ref = jnp.array([5.0, -1.0, -2.0, 5.0]), jnp.array([7.0, -2.0, -4.0, 0.0])
    # Penalties 0.1 × (1, 2) on the two real tokens, 0.73 on the second.
    found = losses.kl_shaped_rewards(jnp.array(0.73), new, ref, kl_coef=0.1, where=where)
    close(found, [0, -0.1, 0.73 - 0.2, 0])
    found = losses.sequence_kl_reward(jnp.array(0.73), new, ref, kl_coef=0.1, where=where)
    close(found, 0.73 - 0.3)


def test_gae_by_hand():
    rewards, values = jnp.array([1.0, 0.0, 2.0]), jnp.array([0.5, 1.0, 1.5])
    where = jnp.ones(3, bool)
    # γ = 0.5: δ = (1 + 0.5·1 − 0.5, 0 + 0.5·1.5 − 1, 2 − 1.5) = (1, −0.25, 0.5); γλ = 0.25:
    # A₂ = 0.5; A₁ = −0.25 + 0.125 = −0.125; A₀ = 1 − 0.03125 = 0.96875.
    found = losses.gae(rewards, values, discount=0.5, lambda_=0.5, where=where)
    close(found, [0.96875, -0.125, 0.5])
    # Cut off with value 4 ahead: δ₂ = 2 + 2 − 1.5 = 2.5; A₁ = 0.375; A₀ = 1.09375.
    found = losses.gae(
        rewards, values, discount=0.5, lambda_=0.5, where=where, bootstrap=jnp.array(4.0)
    )
    close(found, [1.09375, 0.375, 2.5])


def test_gae_of_a_ragged_batch_ends_where_the_response_ends():
    rewards, values = jnp.full((2, 3), 1.0), jnp.full((2, 3), 2.0)
    where = jnp.array([[True, True, False], [True, True, True]])
    # λ = 0: δ = 1 + 2 − 2 = 1 inside, 1 + 0 − 2 = −1 on the last real token.
    found = losses.gae(rewards, values, discount=1.0, lambda_=0.0, where=where)
    close(found, [[1, -1, 0], [1, 1, -1]])


def test_nan_of_a_real_token_is_not_taken_for_padding():
    rewards = jnp.array([1.0, np.nan, 2.0])
    found = losses.rewards_to_go(rewards, discount=1.0, where=jnp.ones(3, bool))
    assert np.isnan(found).tolist() == [True, True, False]


def test_separate_runs_are_separate_episodes():
    where = jnp.array([True, True, False, True])
    found = losses.rewards_to_go(jnp.array([1.0, 2.0, 50.0, 4.0]), discount=1.0, where=where)
    close(found, [3, 2, 0, 4])


def test_k_step_advantage_starts_at_its_own_token():
    rewards, values = jnp.array([1.0, 10.0, 100.0]), jnp.array([5.0, 6.0, 7.0])
    # k = 2, γ = 0.1: R₀ = 1 + 1 + 0.01·7 = 2.07; R₁ = 10 + 10 = 20 (ends); R₂ = 100.
    returns = losses.k_step_returns(rewards, values, discount=0.1, k=2, where=jnp.ones(3, bool))
    close(returns, [2.07, 20, 100], 1e-5)


def test_ppo_clip_in_its_four_corners():
    ratio, advantage = jnp.array([1.5, 1.5, 0.5, 0.5]), jnp.array([2.0, -2.0, 2.0, -2.0])
    # A > 0: −min(ρ, 1.2)·2;  A < 0: max(ρ, 0.8)·2.
    found = losses.ppo_clip_loss(jnp.log(ratio), jnp.zeros(4), advantage, clip_eps=0.2)
    close(found, [-2.4, 3.0, -1.0, 1.6])


def test_ppo_clip_with_two_sides():
    ratio, advantage = jnp.array([1.5, 1.25, 0.5, 0.75]), jnp.array([2.0, 2.0, -2.0, -2.0])
    # A > 0: −min(ρ, 1.28)·2;  A < 0: max(ρ, 0.7)·2.
    arrays = jnp.log(ratio), jnp.zeros(4)
    found = losses.ppo_clip_loss(*arrays, advantage, clip_eps=(0.3, 0.28))
    close(found, [-2.56, -2.5, 1.4, 1.5])
    # 1.5 above 1.28, 0.5 below 0.7; the other way round 1.25 and 0.75 keep within, 1.5 and 0.5 not.
    found = losses.ppo_diagnostics(*arrays, clip_eps=(0.3, 0.28))
    close(found["policy/clip_fraction"], [1, 0, 1, 0])
    found = losses.ppo_diagnostics(*arrays, clip_eps=(0.2, 0.6))
    close(found["policy/clip_fraction"], [0, 0, 1, 1])


def test_equal_sides_are_one_number_and_traced_sides_are_allowed():
    log_ratio, zeros = jnp.linspace(-1, 1, 9), jnp.zeros(9)

    def loss(clip_eps):
        advantages = jnp.cos(9 * log_ratio)
        return losses.ppo_clip_loss(log_ratio, zeros, advantages, clip_eps=clip_eps)

    np.testing.assert_array_equal(loss((0.2, 0.2)), loss(0.2))
    close(jax.jit(loss)((0.2, 0.28)), loss([0.2, jnp.float32(0.28)]))
    assert np.any(loss((0.2, 0.28)) != loss(0.2)) and np.any(loss((0.28, 0.2)) != loss(0.2))
    for call in (
        lambda eps: losses.ppo_clip_loss(zeros, zeros, zeros, clip_eps=eps),
        lambda eps: losses.ppo_diagnostics(zeros, zeros, clip_eps=eps),
    ):
        with pytest.raises(AssertionError, match=r"clip_eps is a tuple of 3.*\(low, high\)"):
            call((0.1, 0.2, 0.3))
        with pytest.raises(AssertionError, match=r"clip_eps is float32\[2\].*\(low, high\)"):
            call(jnp.array([0.1, 0.2]))
        with pytest.raises(AssertionError, match=r"clip_eps is a tuple of 2, but must be"):
            call((0.1, jnp.ones(2)))


def test_ppo_diagnostics_see_both_sides_of_the_clip():
    ratio, where = jnp.array([1.5, 0.5, 1.1, 99.0]), jnp.array([True, True, True, False])
    found = losses.ppo_diagnostics(jnp.log(ratio), jnp.zeros(4), clip_eps=0.2, where=where)
    close(found["policy/clip_fraction"], [1, 1, 0, 0])  # |ρ| − 1 would miss 0.5
    close(found["policy/ratio"], [1.5, 0.5, 1.1, 1])
    # k3: 0.5 − ln 1.5, −0.5 − ln 0.5, 0.1 − ln 1.1.
    close(found["policy/approx_kl"], [0.0945349, 0.1931472, 0.0046898, 0])


def test_value_diagnostics_see_both_sides_of_the_clip():
    values, where = jnp.array([1.5, 0.5, 1.1, jnp.nan]), jnp.array([True, True, True, False])
    found = losses.value_diagnostics(values, jnp.ones(4), clip_eps=0.2, where=where)
    close(found["critic/clip_fraction"], [1, 1, 0, 0])
    close(found["critic/value"], [1.5, 0.5, 1.1, 0])


def test_clipped_value_loss():
    # V 1, old 0, ε 0.2: the clipped value is 0.2. Return 2: ½ max(1, 1.8²) = 1.62; return 0.4:
    # ½ max(0.36, 0.04) = 0.18.
    ones, zeros = jnp.ones(2), jnp.zeros(2)
    found = losses.clipped_value_loss(ones, zeros, jnp.array([2.0, 0.4]), clip_eps=0.2)
    close(found, [1.62, 0.18])


def test_explained_variance():
    where, returns = jnp.ones(2, bool), jnp.array([1.0, 3.0])
    for values, expected in (([1, 3], 1), ([2, 2], 0), ([3, 1], -3)):  # errors ∓2: 1 − 4/1
        values = jnp.array(values, jnp.float32)
        close(losses.explained_variance(values, returns, where=where), expected)


def test_bradley_terry():
    found = losses.bradley_terry_loss(jnp.array([2.0, 0.0]), jnp.array([2.0, 2.0]))
    close(found, [LN2, np.log(1 + np.exp(2))])
    # A margin of 2 makes a lead of 2 a tie.
    close(losses.bradley_terry_loss(jnp.array([2.0]), jnp.array([0.0]), margin=2.0), [LN2])


def test_ranking_of_three_equal_scores():
    zeros, all_there = jnp.zeros(3), jnp.ones(3, bool)
    # Three pairs of ln 2 each, divided by C(3, 2) = 3; Plackett-Luce: ln 3! = 1.7918.
    found = losses.pairwise_ranking_loss(zeros, jnp.array([0, 1, 2]), where=all_there)
    close(found, LN2)
    close(losses.plackett_luce_loss(zeros, where=all_there), np.log(6))


def test_preference_accuracy_gives_a_tie_one_half():
    zeros = jnp.zeros(4, jnp.bfloat16)
    close(losses.preference_accuracy(zeros, zeros), [0.5] * 4)


def test_dpo_family():
    pair = [jnp.array([v]) for v in (-4.0, -7.0, -5.0, -6.0)]  # log-ratios +1 and −1
    # u = 0.1 · 2; −ln σ(0.2) = ln(1 + e^−0.2) = 0.598139
    close(losses.dpo_loss(*pair, beta=0.1), [0.5981389])
    # ε = 0.1: 0.9 · 0.598139 + 0.1 · 0.798139
    close(losses.dpo_loss(*pair, beta=0.1, label_smoothing=0.1), [0.6181389])
    close(losses.ipo_loss(*pair, beta=0.1), [9.0])  # (2 − 5)²
    close(losses.dpo_hinge_loss(*pair, beta=0.1), [0.8])  # 1 − 0.2
    close(losses.dpo_gradient_coefficient(*pair, beta=0.1), [0.450166])  # 1/(1 + e^0.2)


def test_simpo_and_kto():
    # β(−1 + 2) − γ = 2 − 0.5; −ln σ(1.5) = ln(1 + e^−1.5) = 0.201413
    found = losses.simpo_loss(jnp.array([-1.0]), jnp.array([-2.0]), beta=2.0, margin=0.5)
    close(found, [0.2014133])
    # r = 1 and −1, z = 0.5: λ_D σ(−0.1 · 0.5) = 2 · 0.487503, λ_U σ(0.1 · (−1.5)) = 3 · 0.462570.
    found = losses.kto_loss(
        jnp.array([-4.0, -7.0]),
        jnp.array([-5.0, -6.0]),
        jnp.array([True, False]),
        jnp.full(2, 0.5),
        beta=0.1,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    close(found, [0.9750052, 1.3877103])


def test_baselines():
    scores = jnp.array([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    close(losses.leave_one_out_baseline(scores), [[4, 3.5, 1.5], [0, 0, 0]])
    close(losses.group_mean_baseline(scores), [[3, 3, 3], [0, 0, 0]])
    close(losses.batch_mean_baseline(scores), np.full((2, 3), 1.5))
    # Deviations −2, −1, 3; variance 14/3, std 2.160247.
    found = losses.group_advantages(scores, eps=0.0001)
    close(found[0], np.array([-2, -1, 3]) / 2.160347)
    close(losses.group_advantages(jnp.full((1, 3), 0.1)), np.zeros((1, 3)), 1e-3)


def test_supervised_losses():
    # RRHF: means −1 and −0.5, the second is worse but likelier by 0.5; best response costs 2.
    log_probs = jnp.array([[-1.0, -1.0], [-0.5, -0.5]])
    where = jnp.ones((2, 2), bool)
    found = losses.rrhf_loss(log_probs, jnp.array([2.0, 1.0]), where=where, rank_weight=3.0)
    close(found, 3.5)
    # PRO: s = (−1, −0.5), T = 2: ln(1 + e^{−1 + 2}) = 1.3133; SFT 0.1 · 1² · 2.
    found = losses.pro_loss(log_probs, jnp.array([3.0, 1.0]), where=where, sft_weight=0.1)
    close(found, np.log(1 + np.e) + 0.2)
    # SLiC: max(0, 1 + 2 − 2.5) + 0.5 · 2.
    chosen, rejected = jnp.array([-2.0]), jnp.array([-2.5])
    found = losses.slic_loss(chosen, rejected, chosen, margin=1.0, target_weight=0.5)
    close(found, [1.5])
    # ORPO: P 1/2 and 1/4, odds 1 and 1/3, −ln σ(ln 3) = ln(4/3); −ln P = ln 2.
    half, quarter = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    close(losses.orpo_loss(half, quarter, weight=0.1), [LN2 + 0.1 * np.log(4 / 3)])
    close(losses.unlikelihood_loss(quarter), [np.log(4 / 3)])


def test_figa_finds_the_edit():
    initial, revised = jnp.array([1, 2, 3, 4, 0]), jnp.array([1, 3, 9, 4, 5])
    real = {"where": jnp.ones(5, bool), "other_where": jnp.array([1, 1, 1, 1, 0], bool)}
    # 1 2 3 4 -> 1 3 9 4 5: drop 2, insert 9 and 5; keep 1, 3, 4.
    found = losses.figa_weights(revised, initial, weight=1.0, **real)
    close(found, [0, 0, 1, 0, 1])
    real = {"where": real["other_where"], "other_where": real["where"]}
    found = losses.figa_weights(initial, revised, weight=-0.5, **real)
    close(found, [0, -0.5, 0, 0, 0])


def test_process_scores():
    probs, where = jnp.array([0.9, 0.5, 0.8, 0.0]), jnp.array([True, True, True, False])
    close(losses.aggregate_step_scores(probs, method="product", where=where), 0.36)
    close(losses.aggregate_step_scores(probs, method="min", where=where), 0.5)
    logits = jnp.log(jnp.array([[0.2, 0.3, 0.5]]))
    close(losses.step_scores(logits, neutral="positive"), [0.8])
    close(losses.step_scores(logits, neutral="negative"), [0.5])
    labels = jnp.array([2, 1, 0, 2, 0])
    found = losses.until_first_error(labels, where=jnp.ones(5, bool))
    assert found.tolist() == [True, True, True, False, False]


def test_entropy_bonus_is_switched_off_above_its_limit():
    found = losses.entropy_bonus(jnp.array([1.9, 2.1]), weight=0.01, max_entropy=2.0)
    close(found, [0.019, 0.0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: losses.kl_estimate(x, x, estimator="k4"), "k4"),
        (lambda x: losses.select_log_probs(x, jnp.int32(0), temperature=0.0), "temperature=0"),
        (lambda x: losses.ipo_loss(x, x, x, x, beta=0.0), "beta=0"),
        (lambda x: losses.dpo_loss(x, x, x, x, beta=0.1, label_smoothing=0.5), "below 0.5"),
        (lambda x: losses.leave_one_out_baseline(x[:1]), "at least 2"),
        (lambda x: losses.group_advantages(x[:1]), "at least 2"),
        (lambda x: losses.aggregate_step_scores(x, method="mean", where=x < 0), "mean"),
        (lambda x: losses.step_scores(x, neutral="maybe"), "maybe"),
        (lambda x: losses.k_step_returns(x, x, discount=1.0, k=0, where=x < 0), "k=0"),
        (lambda x: losses.quality_weights(x, beta=-1.0), "beta=-1"),
        (lambda x: losses.adaptive_kl_coef(x[0], x[0], target=0.0, horizon=1.0), "target=0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.zeros(3))
