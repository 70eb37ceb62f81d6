"""The losses of PPO against NumPy: every objective, every switch, value and gradient.

Run op by op: thirty settings of a small loss compile slower than they run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.methods import ppo
from rlhf_jax.methods.ppo import PPOConfig
from rlhf_jax.methods.reductions import REDUCTIONS
from tests import bigram, tiny

PENALTY = 0.7
WHERE = bigram.where()

# A base on which every switch of the policy has something to do, and one change per line.
BASE = PPOConfig(clip_eps=0.1, entropy_coef=0.2, entropy_max=1.6, ptx_coef=0.5)
POLICY_CHANGES = {
    "penalty": {"objective": "penalty"},
    "surrogate": {"objective": "surrogate"},
    "policy gradient": {"objective": "policy_gradient"},
    "clip eps": {"clip_eps": 0.3},
    "reference": {"ratio_denominator": "reference"},
    "no entropy": {"entropy_coef": 0.0},
    "no entropy limit": {"entropy_max": 0.0},
    "ptx": {"ptx_coef": 1.5},
    "normalised": {"normalize_advantages": True},
    "clipped": {"advantage_clip": 0.3},
    "both": {"normalize_advantages": True, "advantage_clip": 0.3},
    "sequence mean": {"reduction": "sequence_mean"},
    "sequence sum": {"reduction": "sequence_sum"},
}


def numpy_advantages(experience, config: PPOConfig) -> np.ndarray:
    advantages = np.asarray(experience.advantages, np.float64)
    if config.normalize_advantages:
        real = advantages[WHERE]
        advantages = (advantages - real.mean()) / np.sqrt(real.var() + 1e-8)
    if config.advantage_clip:
        advantages = np.clip(advantages, -config.advantage_clip, config.advantage_clip)
    return advantages


def objective(config: PPOConfig, log_prob: float, old: float, advantage: float) -> float:
    ratio = np.exp(log_prob - old)
    if config.objective == "clip":
        limited = min(max(ratio, 1 - config.clip_eps), 1 + config.clip_eps)
        return -min(ratio * advantage, limited * advantage)
    if config.objective == "penalty":
        return -(ratio * advantage - PENALTY * (ratio - 1 - np.log(ratio)))
    if config.objective == "surrogate":
        return -ratio * advantage
    return -log_prob * advantage


def numpy_policy_loss(table, experience, ptx, config: PPOConfig, temperature: float) -> float:
    log_pi = bigram.table_log_probs(table, temperature)
    tokens = np.asarray(experience.rollout.tokens)
    old = experience.rollout.log_probs
    if config.ratio_denominator == "reference":
        old = experience.evaluation.ref_log_probs
    advantages, terms = numpy_advantages(experience, config), {}
    for row, t in zip(*np.nonzero(WHERE), strict=True):
        now, chosen = tokens[row, bigram.PROMPT + t - 1], tokens[row, bigram.PROMPT + t]
        terms[row, t] = objective(
            config, log_pi[now, chosen], float(old[row, t]), advantages[row, t]
        )
        entropy = -np.sum(np.exp(log_pi[now]) * log_pi[now])
        if entropy < (config.entropy_max or np.inf):
            terms[row, t] -= config.entropy_coef * entropy
    plain = bigram.table_log_probs(table, 1.0)
    words, trained = np.asarray(ptx["tokens"]), np.asarray(ptx["loss_mask"])
    nll = [-plain[words[r, t - 1], words[r, t]] for r, t in zip(*np.nonzero(trained), strict=True)]
    return bigram.mean(terms, config.reduction) + config.ptx_coef * np.mean(nll)


def policy_run(model, experience, ptx, config: PPOConfig, temperature: float = 0.8):
    """(loss, metrics), gradient."""

    def loss(model):
        batch = ppo.prepare((experience, ptx), config=config)
        return ppo.policy_loss(
            model, batch, jnp.float32(PENALTY), config=config, temperature=temperature
        )

    return jax.value_and_grad(loss, has_aux=True)(model)


def run(changes: dict | None = None, *, model=None, experience=None, ptx=None):
    config = dataclasses.replace(BASE, **(changes or {}))
    experience = bigram.experience() if experience is None else experience
    ptx = bigram.language_batch() if ptx is None else ptx
    return policy_run(model or bigram.policy(), experience, ptx, config)


@pytest.mark.parametrize("name", ["base", *POLICY_CHANGES])
def test_policy_loss_and_gradient_against_numpy(name):
    changes = POLICY_CHANGES.get(name, {})
    config, experience = dataclasses.replace(BASE, **changes), bigram.experience()
    (loss, _), grads = run(changes)
    table = np.asarray(bigram.policy().table, np.float64)

    def wanted(table):
        return numpy_policy_loss(table, experience, bigram.language_batch(), config, 0.8)

    tiny.close(loss, wanted(table))
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=table.shape)
        slope = float(np.sum(np.asarray(grads.table, np.float64) * direction))
        np.testing.assert_allclose(slope, bigram.directional(wanted, table, direction), 1e-3, 1e-4)


def test_every_policy_switch_changes_the_loss_and_the_gradient():
    (base, _), base_grads = run()
    for name, changes in POLICY_CHANGES.items():
        (loss, _), grads = run(changes)
        assert abs(float(loss) - float(base)) > 1e-3, name
        assert tiny.largest_difference(grads, base_grads) > 1e-3, name


def test_every_field_is_under_test():
    covered = {key for changes in POLICY_CHANGES.values() for key in changes}
    assert covered | {"value_clip_eps"} == {field.name for field in dataclasses.fields(PPOConfig)}
    reductions = {d.get("reduction", "token_mean") for d in POLICY_CHANGES.values()}
    assert reductions == set(REDUCTIONS)
    # "trpo" takes another step altogether.
    objectives = {d.get("objective", "clip") for d in POLICY_CHANGES.values()}
    assert objectives == set(ppo.OBJECTIVES) - {"trpo"}


def test_temperature_and_penalty_weight_matter():
    (base, _), _ = run({"objective": "penalty"})
    config = dataclasses.replace(BASE, objective="penalty")
    args = (bigram.policy(), bigram.experience(), bigram.language_batch())
    (hot, _), _ = policy_run(*args, config, 1.3)
    assert abs(float(hot) - float(base)) > 1e-3
    batch = ppo.prepare(args[1:], config=config)
    free, _ = ppo.policy_loss(args[0], batch, jnp.float32(0.0), config=config, temperature=0.8)
    assert abs(float(free) - float(base)) > 1e-3


def test_metrics_against_numpy():
    experience = bigram.experience()
    (_, metrics), _ = run({"entropy_coef": 0.0})
    log_pi = bigram.table_log_probs(bigram.policy().table, 0.8)
    tokens = np.asarray(experience.rollout.tokens)
    new = log_pi[tokens[:, bigram.PROMPT - 1 : -1], tokens[:, bigram.PROMPT :]][WHERE]
    ratio = np.exp(new - np.asarray(experience.rollout.log_probs, np.float64)[WHERE])
    wanted = {
        "policy/approx_kl": np.mean(ratio - 1 - np.log(ratio)),
        "policy/clip_fraction": np.mean(np.abs(ratio - 1) > BASE.clip_eps),
        "policy/ratio_max": ratio.max(),
        "policy/ratio_min": ratio.min(),
        "policy/log_prob": new.mean(),
    }
    assert 0 < wanted["policy/clip_fraction"] < 1
    for name, value in wanted.items():
        tiny.close(metrics[name], value)
    assert set(metrics) == {*wanted, "loss/policy", "loss/ptx"}


def test_without_a_ptx_batch_there_is_no_ptx_loss():
    config = dataclasses.replace(BASE, ptx_coef=0.0)
    (with_batch, _), _ = policy_run(
        bigram.policy(), bigram.experience(), bigram.language_batch(), config
    )
    (without, metrics), _ = policy_run(bigram.policy(), bigram.experience(), None, config)
    tiny.close(with_batch, without, 1e-6)
    assert "loss/ptx" not in metrics


@pytest.mark.parametrize("name", ["base", "penalty", "reference", "both", "policy gradient"])
def test_nan_on_padding_is_harmless_to_the_policy(name):
    clean, poisoned = (
        run(POLICY_CHANGES.get(name), experience=bigram.experience(fill=fill))
        for fill in (0.0, np.nan)
    )
    tiny.close(poisoned, clean, 0.0)


@pytest.mark.parametrize("name", ["base", "penalty", "reference", "policy gradient"])
def test_old_policy_reference_and_advantages_are_constants(name):
    config = dataclasses.replace(BASE, **POLICY_CHANGES.get(name, {}))

    def loss(experience):
        batch = ppo.prepare((experience, None), config=config)
        return ppo.policy_loss(
            bigram.policy(), batch, jnp.float32(PENALTY), config=config, temperature=0.8
        )[0]

    assert not any(np.any(g) for g in bigram.constants_gradient(loss, bigram.experience()))


def mean_entropy(model) -> float:
    log_pi = bigram.table_log_probs(model.table, 0.8)
    tokens = np.asarray(bigram.experience().rollout.tokens)[:, bigram.PROMPT - 1 : -1]
    return float(np.mean((-np.exp(log_pi) * log_pi).sum(1)[tokens][WHERE]))


def test_one_step_on_the_entropy_bonus_raises_the_entropy():
    flat = bigram.experience()
    flat = flat.replace(advantages=jnp.zeros_like(flat.advantages))
    changes = {"entropy_max": 0.0, "ptx_coef": 0.0}
    _, grads = run(changes, experience=flat)
    stepped = jax.tree.map(lambda w, g: w - 0.5 * g, bigram.policy(), grads)
    assert mean_entropy(stepped) > mean_entropy(bigram.policy()) + 1e-3
    # Above its bound the bonus is off: nothing is left to move the policy.
    _, off = run(changes | {"entropy_max": 0.01}, experience=flat)
    assert not np.any(off.table)


def test_one_step_makes_good_tokens_likelier():
    experience = bigram.experience()
    _, grads = run({"entropy_coef": 0.0, "ptx_coef": 0.0}, experience=experience)
    stepped = jax.tree.map(lambda w, g: w - 0.1 * g, bigram.policy(), grads)
    tokens = np.asarray(experience.rollout.tokens)
    before, after = tokens[:, bigram.PROMPT - 1 : -1], tokens[:, bigram.PROMPT :]
    change = (
        bigram.table_log_probs(stepped.table, 0.8)
        - bigram.table_log_probs(bigram.policy().table, 0.8)
    )[before, after]
    assert np.sum(change[WHERE] * np.asarray(experience.advantages)[WHERE]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "ppo"}, "objective='ppo' is unknown; use one of clip, penalty"),
        ({"reduction": "mean"}, "reduction='mean' is unknown; use one of token_mean"),
        ({"clip_eps": 0.0}, "clip_eps=0.0 must be above 0"),
        ({"ratio_denominator": "ref"}, "ratio_denominator='ref' is unknown; use one of old"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)
