"""Policy and value losses, on plain numbers."""

import math

import numpy as np

from tests.references.tokens import masked_var


def policy_gradient_loss(log_probs, weights):
    return -weights * log_probs


def importance_weights(log_probs, behaviour_log_probs):
    return math.exp(log_probs) / math.exp(behaviour_log_probs)


def ppo_clip_loss(log_probs, old_log_probs, advantages, clip_eps):
    ratio = math.exp(log_probs) / math.exp(old_log_probs)
    low, high = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    if advantages >= 0:
        return -min(ratio, 1 + high) * advantages
    return -max(ratio, 1 - low) * advantages


def ppo_penalty_loss(log_probs, old_log_probs, advantages, kl, kl_coef):
    return -(math.exp(log_probs) / math.exp(old_log_probs) * advantages - kl_coef * kl)


def trpo_surrogate(log_probs, old_log_probs, advantages):
    return math.exp(log_probs) / math.exp(old_log_probs) * advantages


def entropy_bonus(entropies, weight, max_entropy):
    return weight * entropies if entropies < max_entropy else 0.0


def value_loss(values, returns):
    return 0.5 * (values - returns) ** 2


def clipped_value_loss(values, old_values, returns, clip_eps):
    near = values
    if values > old_values + clip_eps:
        near = old_values + clip_eps
    if values < old_values - clip_eps:
        near = old_values - clip_eps
    return 0.5 * max((values - returns) ** 2, (near - returns) ** 2)


def ppo_diagnostics(log_probs, old_log_probs, where, clip_eps):
    ratio = math.exp(log_probs) / math.exp(old_log_probs) if where else 1.0
    low, high = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    return {
        "policy/approx_kl": ratio - 1 - math.log(ratio),
        "policy/clip_fraction": float(ratio > 1 + high or ratio < 1 - low),
        "policy/ratio": ratio,
    }


def value_diagnostics(values, old_values, where, clip_eps):
    if not where:
        return {"critic/value": 0.0, "critic/clip_fraction": 0.0}
    far = values > old_values + clip_eps or values < old_values - clip_eps
    return {"critic/value": values, "critic/clip_fraction": float(far)}


def explained_variance(values, returns, where):
    errors = np.where(where, returns, 0) - np.where(where, values, 0)
    total = masked_var(returns, where)
    return 1 - masked_var(errors, where) / total if total else 0.0
