"""The loss of the critic against NumPy, and the metrics of a buffer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlhf_jax.methods import ppo
from rlhf_jax.methods.ppo import PPOConfig
from tests import bigram, tiny

WHERE = bigram.where()
BASE = PPOConfig()
CRITIC_CHANGES = {
    "unclipped": {"value_clip_eps": 0.0},
    "clip eps": {"value_clip_eps": 0.9},
    "sequence mean": {"reduction": "sequence_mean"},
}


def critic_run(model, experience, config: PPOConfig):
    batch = ppo.prepare((experience, None), config=config)
    loss = functools.partial(ppo.critic_loss, batch=batch, config=config)
    return jax.value_and_grad(loss, has_aux=True)(model)


def numpy_critic_loss(weights, experience, config: PPOConfig) -> float:
    tokens, terms = np.asarray(experience.rollout.tokens), {}
    for row, t in zip(*np.nonzero(WHERE), strict=True):
        value = weights[tokens[row, bigram.PROMPT + t - 1]]
        old = float(experience.evaluation.values[row, t])
        target = float(experience.returns[row, t])
        eps = config.value_clip_eps or np.inf
        limited = min(max(value, old - eps), old + eps)
        terms[row, t] = max((value - target) ** 2, (limited - target) ** 2) / 2
    return bigram.mean(terms, config.reduction)


@pytest.mark.parametrize("name", ["base", *CRITIC_CHANGES])
def test_critic_loss_and_gradient_against_numpy(name):
    config = dataclasses.replace(BASE, **CRITIC_CHANGES.get(name, {}))
    experience = bigram.experience()
    (loss, metrics), grads = critic_run(bigram.critic(), experience, config)
    weights = np.asarray(bigram.critic().weights, np.float64)

    def wanted(weights):
        return numpy_critic_loss(weights, experience, config)

    tiny.close(loss, wanted(weights))
    for token in range(bigram.VOCAB):
        direction = np.eye(bigram.VOCAB)[token]
        slope = bigram.directional(wanted, weights, direction)
        np.testing.assert_allclose(grads.weights[token], slope, 1e-3, 1e-4)
    if name == "base":
        values = weights[np.asarray(experience.rollout.tokens)[:, bigram.PROMPT - 1 : -1]][WHERE]
        moved = np.abs(values - np.asarray(experience.evaluation.values)[WHERE])
        tiny.close(metrics["critic/value"], values.mean())
        tiny.close(metrics["critic/clip_fraction"], np.mean(moved > 0.2))


def test_every_critic_switch_changes_the_loss():
    (base, _), _ = critic_run(bigram.critic(), bigram.experience(), BASE)
    for changes in CRITIC_CHANGES.values():
        config = dataclasses.replace(BASE, **changes)
        (loss, _), _ = critic_run(bigram.critic(), bigram.experience(), config)
        assert abs(float(loss) - float(base)) > 1e-3


def test_targets_and_old_values_are_constants_and_nan_on_padding_is_harmless():
    for config in (BASE, dataclasses.replace(BASE, value_clip_eps=0.0)):
        clean, poisoned = (
            critic_run(bigram.critic(), bigram.experience(fill=fill), config)
            for fill in (0.0, np.nan)
        )
        tiny.close(poisoned, clean, 0.0)

        def loss(experience, config=config):
            batch = ppo.prepare((experience, None), config=config)
            return ppo.critic_loss(bigram.critic(), batch, config=config)[0]

        assert not any(np.any(g) for g in bigram.constants_gradient(loss, bigram.experience()))


def test_metrics_of_an_experience():
    experience = bigram.experience(fill=np.nan)
    metrics = ppo.experience_metrics(experience)
    rewards, values, returns, advantages = (
        np.asarray(x, np.float64)
        for x in (
            experience.rewards,
            experience.evaluation.values,
            experience.returns,
            experience.advantages,
        )
    )
    tiny.close(metrics["reward/shaped"], np.nansum(rewards, axis=1).mean())
    tiny.close(metrics["critic/return"], returns[WHERE].mean())
    tiny.close(metrics["critic/advantage"], advantages[WHERE].mean())
    explained = 1 - np.var((returns - values)[WHERE]) / np.var(returns[WHERE])
    tiny.close(metrics["critic/explained_variance"], explained)
