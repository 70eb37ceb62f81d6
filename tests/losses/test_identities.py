"""Equations between the functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses

RNG = np.random.default_rng(1)
T = 6
REWARDS, VALUES = (jnp.asarray(RNG.normal(size=(3, T)), jnp.float32) for _ in range(2))
WHERE = jnp.asarray(np.arange(T)[None] < np.array([[6], [3], [1]]))
CUT = jnp.asarray(RNG.normal(size=3), jnp.float32)
LOG_PROBS, OLD = (jnp.asarray(-RNG.uniform(0.1, 2, (3, T)), jnp.float32) for _ in range(2))
PAIR = [jnp.asarray(-RNG.uniform(1, 9, 5), jnp.float32) for _ in range(4)]


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def gae(lambda_, discount=0.9):
    return losses.gae(
        REWARDS, VALUES, discount=discount, lambda_=lambda_, where=WHERE, bootstrap=CUT
    )


def test_gae_at_lambda_0_is_the_td_error():
    close(gae(0.0), losses.td_errors(REWARDS, VALUES, discount=0.9, where=WHERE, bootstrap=CUT))


def test_gae_at_lambda_1_is_the_return_less_the_value():
    togo = losses.rewards_to_go(REWARDS, discount=0.9, where=WHERE, bootstrap=CUT)
    close(gae(1.0), togo - jnp.where(WHERE, VALUES, 0))


def test_gae_is_the_mix_of_k_step_advantages():
    # (1 − λ) Σ_{k<n} λ^{k−1} A^k + λ^{n−1} A^n: from n = T on, all k-step advantages are equal.
    k_step = [
        losses.k_step_advantages(REWARDS, VALUES, discount=0.9, k=k, where=WHERE, bootstrap=CUT)
        for k in range(1, T + 1)
    ]
    mix = sum(0.3 * 0.7 ** (k - 1) * k_step[k - 1] for k in range(1, T))
    close(gae(0.7), mix + 0.7 ** (T - 1) * k_step[-1])


def test_one_step_and_all_steps():
    settings = {"discount": 0.9, "where": WHERE, "bootstrap": CUT}
    one = losses.k_step_advantages(REWARDS, VALUES, k=1, **settings)
    close(one, losses.td_errors(REWARDS, VALUES, **settings))
    every = losses.k_step_returns(REWARDS, VALUES, k=10**9, **settings)
    close(every, losses.rewards_to_go(REWARDS, **settings))


def test_total_return_is_the_reward_to_go_of_the_first_token():
    settings = {"discount": 0.9, "where": WHERE, "bootstrap": CUT}
    total = losses.total_return(REWARDS, **settings)
    close(total, losses.rewards_to_go(REWARDS, **settings)[:, 0])


def test_rewards_of_tokens_add_up_to_the_reward_of_the_response():
    scores, settings = CUT, {"kl_coef": 0.2, "where": WHERE}
    tokens = losses.kl_shaped_rewards(scores, LOG_PROBS, OLD, **settings)
    close(tokens.sum(-1), losses.sequence_kl_reward(scores, LOG_PROBS, OLD, **settings))
    ratio = jnp.where(WHERE, LOG_PROBS - OLD, 0).sum(-1)
    close(tokens.sum(-1), scores - 0.2 * ratio)


def test_plackett_luce_of_two_is_bradley_terry_and_so_is_a_ranking_of_two():
    pairs = jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32)
    wanted = losses.bradley_terry_loss(pairs[:, 0], pairs[:, 1])
    there = jnp.ones((5, 2), bool)
    close(losses.plackett_luce_loss(pairs, where=there), wanted)
    ranks = jnp.broadcast_to(jnp.array([0, 1]), (5, 2))
    close(losses.pairwise_ranking_loss(pairs, ranks, where=there), wanted)


def test_sure_soft_labels_are_hard_labels_and_swapping_sides_swaps_the_label():
    a, b, p = PAIR[0], PAIR[1], jnp.full(5, 0.3)
    close(losses.soft_preference_loss(a, b, jnp.ones(5)), losses.bradley_terry_loss(a, b))
    close(losses.soft_preference_loss(a, b, p), losses.soft_preference_loss(b, a, 1 - p))


def test_reward_losses_do_not_see_a_shift():
    a, b = PAIR[0], PAIR[1]
    close(losses.bradley_terry_loss(a + 7, b + 7), losses.bradley_terry_loss(a, b))
    rewards, there = REWARDS[0], jnp.ones(T, bool)
    shifted = losses.plackett_luce_loss(rewards + 7, where=there)
    close(shifted, losses.plackett_luce_loss(rewards, where=there))


def test_very_wrong_pairs_keep_their_gradient():
    slope = jax.grad(lambda r: losses.bradley_terry_loss(r, jnp.float32(80.0)))(jnp.float32(0.0))
    close(slope, -1.0)


def test_dpo_at_the_reference_is_ln_2_and_its_gradient_is_half():
    chosen, rejected = PAIR[:2]
    close(losses.dpo_loss(chosen, rejected, chosen, rejected, beta=0.3), np.full(5, np.log(2)))
    close(
        losses.dpo_gradient_coefficient(chosen, rejected, chosen, rejected, beta=0.3),
        np.full(5, 0.5),
    )


def test_dpo_gradient_is_the_coefficient_times_the_difference():
    def total(chosen, rejected):
        return jnp.sum(losses.dpo_loss(chosen, rejected, *PAIR[2:], beta=0.3))

    to_chosen, to_rejected = jax.grad(total, argnums=(0, 1))(*PAIR[:2])
    pull = 0.3 * losses.dpo_gradient_coefficient(*PAIR, beta=0.3)
    close(to_chosen, -pull)
    close(to_rejected, pull)


def test_dpo_is_bradley_terry_on_implicit_rewards():
    chosen = losses.implicit_rewards(PAIR[0], PAIR[2], beta=0.3)
    rejected = losses.implicit_rewards(PAIR[1], PAIR[3], beta=0.3)
    close(losses.dpo_loss(*PAIR, beta=0.3), losses.bradley_terry_loss(chosen, rejected))


def test_ipo_has_its_minimum_at_a_margin_of_one_over_two_beta():
    ref = PAIR[2:]
    chosen = ref[0] + 1 / (2 * 0.25)
    close(losses.ipo_loss(chosen, ref[1], *ref, beta=0.25), np.zeros(5))


@pytest.mark.parametrize("name", ["clip", "penalty", "surrogate"])
def test_every_ppo_gradient_at_ratio_1_is_the_policy_gradient(name):
    advantages = REWARDS

    def objective(log_probs):
        if name == "clip":
            return losses.ppo_clip_loss(log_probs, OLD, advantages, clip_eps=0.2).sum()
        if name == "surrogate":
            return -losses.trpo_surrogate(log_probs, OLD, advantages).sum()
        kl = losses.old_policy_kl(log_probs, OLD)
        return losses.ppo_penalty_loss(log_probs, OLD, advantages, kl, kl_coef=5.0).sum()

    def policy_gradient(log_probs):
        return losses.policy_gradient_loss(log_probs, advantages).sum()

    close(jax.grad(objective)(OLD), jax.grad(policy_gradient)(OLD))


def test_the_sampled_kl_to_the_old_policy_has_the_gradient_of_the_exact_one():
    new, old = (jax.nn.log_softmax(jnp.asarray(RNG.normal(size=7), jnp.float32)) for _ in range(2))

    def sampled(logits):  # every token of the vocabulary, as often as the old policy draws it
        return jnp.sum(jnp.exp(old) * losses.old_policy_kl(jax.nn.log_softmax(logits), old))

    def exact(logits):
        return losses.kl_divergence(old, logits)

    close(sampled(new), exact(new))
    close(jax.grad(sampled)(new), jax.grad(exact)(new))


def test_penalty_without_a_penalty_is_the_surrogate_and_so_is_clip_without_a_clip():
    surrogate = losses.trpo_surrogate(LOG_PROBS, OLD, REWARDS)
    infinite = losses.ppo_clip_loss(LOG_PROBS, OLD, REWARDS, clip_eps=float("inf"))
    close(infinite, -surrogate)
    free = losses.ppo_penalty_loss(LOG_PROBS, OLD, REWARDS, jnp.ones_like(OLD), kl_coef=0.0)
    close(free, -surrogate)


def test_clipped_value_loss_without_a_clip_is_the_value_loss():
    found = losses.clipped_value_loss(VALUES, REWARDS, LOG_PROBS, clip_eps=float("inf"))
    close(found, losses.value_loss(VALUES, LOG_PROBS))


def test_exact_kl_is_the_mean_of_k1_and_of_k3():
    p, q = (jax.nn.log_softmax(jnp.asarray(RNG.normal(size=7), jnp.float32)) for _ in range(2))
    exact = losses.kl_divergence(p, q)
    for name in ("k1", "k3"):
        close(jnp.sum(jnp.exp(p) * losses.kl_estimate(p, q, estimator=name)), exact)


def test_entropy_is_log_v_less_the_kl_to_uniform():
    logits = jnp.asarray(RNG.normal(size=7), jnp.float32)
    close(losses.entropy(logits), np.log(7) - losses.kl_divergence(logits, jnp.zeros(7)))


def test_truncated_vocabularies_are_finite():
    top_p = jnp.array([1.0, 0.0, -jnp.inf])
    for measure in (losses.entropy, lambda z: losses.kl_divergence(z, jnp.zeros(3))):
        assert jnp.isfinite(measure(top_p))
        assert bool(jnp.all(jnp.isfinite(jax.grad(measure)(top_p))))


def test_leave_one_out_advantage_is_the_group_advantage_up_to_a_factor():
    scores = REWARDS
    one_out = scores - losses.leave_one_out_baseline(scores)
    close(one_out, (scores - losses.group_mean_baseline(scores)) * T / (T - 1))


def test_fully_normalised_rewards_and_advantages_are_whitened():
    everything = jnp.ones_like(REWARDS, bool)
    moments = losses.update_moments(losses.RunningMoments.zeros(), REWARDS)
    white = losses.masked_whiten(REWARDS, where=everything)
    close(losses.normalize_rewards(REWARDS, moments, clip=float("inf")), white)
    close(losses.normalize_advantages(REWARDS, where=everything), white, 0)
    found = losses.normalize_advantages(REWARDS, where=everything, clip=float("inf"))
    close(found, white, 0)


def test_reward_model_loss_terms_are_both_negative_log_likelihoods():
    log_probs, where = LOG_PROBS, WHERE
    summed = losses.language_model_loss(log_probs, where=where)
    close(summed, -losses.sequence_log_prob(log_probs, where=where))
    assert bool(jnp.all(summed > 0))


def test_first_minibatch_has_ratio_1_and_no_kl():
    found = losses.ppo_diagnostics(OLD, OLD, clip_eps=0.2, where=WHERE)
    for name, wanted in (("approx_kl", 0), ("clip_fraction", 0), ("ratio", 1)):
        close(found[f"policy/{name}"], np.full(OLD.shape, wanted), 0)


def test_diagnostics_take_weights_as_well_as_masks():
    """As a trainer weighs them, and as a mean over the real tokens: the two agree."""
    weights = WHERE / WHERE.sum()
    for found in (
        losses.ppo_diagnostics(LOG_PROBS, OLD, clip_eps=0.2, where=WHERE),
        losses.value_diagnostics(VALUES, REWARDS, clip_eps=0.2, where=WHERE),
        losses.dpo_diagnostics(LOG_PROBS, OLD, REWARDS, VALUES, beta=0.3, where=WHERE),
    ):
        for number in found.values():
            assert number.shape == WHERE.shape
            close(jnp.sum(number * weights), losses.masked_mean(number, where=WHERE))


def test_diagnostics_are_the_formulas_that_trainers_weigh():
    """To the bit: a trainer that calls them logs the numbers that it has always logged."""
    ratio = jnp.exp(LOG_PROBS - OLD)
    found = losses.ppo_diagnostics(LOG_PROBS, OLD, clip_eps=0.2)
    k3 = losses.kl_estimate(OLD, LOG_PROBS, estimator="k3")
    np.testing.assert_array_equal(found["policy/approx_kl"], k3)
    np.testing.assert_array_equal(found["policy/ratio"], ratio)
    np.testing.assert_array_equal(found["policy/clip_fraction"], jnp.abs(ratio - 1) > 0.2)
    found = losses.dpo_diagnostics(*PAIR, beta=0.3)
    chosen, rejected = 0.3 * (PAIR[0] - PAIR[2]), 0.3 * (PAIR[1] - PAIR[3])
    np.testing.assert_array_equal(found["dpo/chosen_reward"], chosen)
    np.testing.assert_array_equal(found["dpo/margin"], chosen - rejected)
    np.testing.assert_array_equal(found["dpo/accuracy"], (chosen > rejected).astype(np.float32))
    pull = losses.dpo_gradient_coefficient(*PAIR, beta=0.3)
    np.testing.assert_array_equal(found["dpo/gradient_coefficient"], pull)
    log_ratio = LOG_PROBS - OLD
    kl = losses.old_policy_kl(LOG_PROBS, OLD)
    np.testing.assert_array_equal(kl, jnp.expm1(log_ratio) - log_ratio)


def test_terms_of_the_language_model_loss_add_up_to_it():
    for normalize in (False, True):
        settings = {"where": WHERE, "normalize": normalize}
        terms = losses.language_model_loss(LOG_PROBS, per_token=True, **settings)
        close(terms.sum(-1), losses.language_model_loss(LOG_PROBS, **settings))


def test_filling_padding_first_keeps_an_element_wise_loss_clean_in_the_backward_pass():
    dirty = jnp.where(WHERE, LOG_PROBS, jnp.nan)

    def loss(log_probs):
        log_probs = losses.masked_fill(log_probs, where=WHERE)
        return losses.masked_mean(
            losses.ppo_clip_loss(log_probs, OLD, REWARDS, clip_eps=0.2), where=WHERE
        )

    close(jax.grad(loss)(dirty), jax.grad(loss)(LOG_PROBS), 0)


@pytest.mark.parametrize("length", [8, 512])
def test_gae_has_no_python_loop_over_time(length):
    def equations(size):
        x, where = jnp.zeros((2, size)), jnp.ones((2, size), bool)
        traced = jax.make_jaxpr(
            lambda r, v: losses.gae(r, v, discount=1.0, lambda_=0.9, where=where)
        )
        return str(traced(x, x)).count("=")

    assert equations(length) == equations(4)
