"""What must hold before the first update, for every way of sampling: ratio 1, KL 0; and what more
padding must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.extend import core as jex_core

from rlhf_jax import losses
from rlhf_jax.methods import ppo
from rlhf_jax.methods.ppo import PPOConfig
from rlhf_jax.rollouts import experience
from rlhf_jax.rollouts.experience import AdvantageConfig, Evaluation, Experience, RewardConfig
from rlhf_jax.rollouts.rollout import Rollout
from tests import tiny
from tests.rollouts.test_experience import evaluation, padded_pair

CONFIG = PPOConfig(normalize_advantages=True, entropy_coef=0.1, value_clip_eps=0.2)


def build(rollout: Rollout, result: Evaluation) -> Experience:
    rewards, _ = experience.shape_rewards(
        rollout,
        result,
        losses.RunningMoments.zeros(),
        config=RewardConfig("normalize", clip=0.8, missing_eos_penalty=1.0),
        discount=1.0,
        kl_coef=0.1,
    )
    phi, returns = experience.advantages(
        rewards, result.values, rollout.response_mask, config=AdvantageConfig("gae", lambda_=0.9)
    )
    return Experience(rollout, result, rewards, phi, returns)


@tiny.jit
def losses_of(model, critic, rollout, result, temperature):
    """Losses and metrics of policy and critic on the whole rollout as one minibatch."""
    batch = ppo.prepare((build(rollout, result), None), config=CONFIG)
    loss, metrics = ppo.policy_loss(
        model, batch, jnp.float32(0.0), config=CONFIG, temperature=temperature
    )
    value_loss, value_metrics = ppo.critic_loss(critic, batch, config=CONFIG)
    return {"loss": loss, "value loss": value_loss} | metrics | value_metrics


@pytest.mark.slow
@pytest.mark.parametrize("setting", tiny.SETTINGS)
def test_ratio_is_one_and_kl_zero(setting):
    metrics = losses_of(
        tiny.language_model(),
        tiny.scalar_model(seed=8),
        tiny.rollout(setting),
        evaluation(setting),
        tiny.SETTINGS[setting].policy_temperature,
    )
    wanted = {
        "policy/ratio_max": 1.0,
        "policy/ratio_min": 1.0,
        "policy/approx_kl": 0.0,
        "policy/clip_fraction": 0.0,
        "critic/clip_fraction": 0.0,
    }
    tiny.close({name: metrics[name] for name in wanted}, wanted)


def test_another_policy_has_another_ratio():
    metrics = losses_of(
        tiny.language_model(seed=1), tiny.scalar_model(seed=8), tiny.rollout(), evaluation(), 1.0
    )
    assert metrics["policy/ratio_max"] > 1.1 and metrics["policy/approx_kl"] > 0.01


@pytest.mark.slow
def test_padding_changes_no_advantage_and_no_loss():
    narrow, wide = build(tiny.rollout(), evaluation()), build(*padded_pair())
    for name in ("rewards", "advantages", "returns"):
        tiny.close(getattr(wide, name)[:, : tiny.RESPONSE], getattr(narrow, name))
        assert not np.any(getattr(wide, name)[:, tiny.RESPONSE :])
    models = tiny.language_model(), tiny.scalar_model(seed=8)
    tiny.close(
        losses_of(*models, *padded_pair(), 1.0),
        losses_of(*models, tiny.rollout(), evaluation(), 1.0),
    )


def policy_loss_of(model, batch):
    return ppo.policy_loss(model, batch, jnp.float32(0.0), config=CONFIG, temperature=0.8)[0]


def vocabulary_rows(jaxpr) -> list[int]:
    """Rows of every array whose last axis is the vocabulary, nested programs included."""
    rows = []
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")]
        rows += [int(np.prod(s[:-1])) for s in shapes if len(s) > 1 and s[-1] == tiny.VOCAB]
        for inner in jex_core.jaxprs_in_params(equation.params):
            rows += vocabulary_rows(inner)
    return rows


def test_logits_of_the_policy_are_made_for_responses_only_and_none_is_kept():
    """Forward and backward pass of the whole loss; 8 responses of 7 tokens after prompts of 6."""
    model = tiny.language_model()
    batch = ppo.prepare((build(tiny.rollout(), evaluation()), None), config=CONFIG)
    rows = vocabulary_rows(jax.make_jaxpr(jax.grad(policy_loss_of))(model, batch).jaxpr)
    assert max(rows) == 8 * tiny.RESPONSE
    kept = [
        aval.shape
        for aval, where in saved_residuals(policy_loss_of, model, batch)
        if "argument" not in where
    ]
    assert kept and not [shape for shape in kept if tiny.VOCAB in shape]
