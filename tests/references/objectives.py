"""Policy and value losses, on plain numbers; diagnostics, on whole arrays."""

import math

import numpy as np

from tests.references.tokens import kept, masked_var


def policy_gradient_loss(log_probs, weights):
    return -weights * log_probs


def importance_weights(log_probs, behaviour_log_probs):
    return math.exp(log_probs) / math.exp(behaviour_log_probs)


def ppo_clip_loss(log_probs, old_log_probs, advantages, clip_eps):
    ratio = math.exp(log_probs) / math.exp(old_log_probs)
    if advantages >= 0:
        return -min(ratio, 1 + clip_eps) * advantages
    return -max(ratio, 1 - clip_eps) * advantages


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
    new, old = kept(log_probs, where), kept(old_log_probs, where)
    ratios = [math.exp(a) / math.exp(b) for a, b in zip(new, old, strict=True)]
    if not ratios:
        ratios = [1.0]  # as if nothing had moved
    return {
        "policy/approx_kl": sum(r - 1 - math.log(r) for r in ratios) / len(ratios),
        "policy/clip_fraction": sum(r > 1 + clip_eps or r < 1 - clip_eps for r in ratios)
        / len(ratios),
        "policy/ratio_max": max(ratios),
        "policy/ratio_min": min(ratios),
    }


def explained_variance(values, returns, where):
    errors = np.where(where, returns, 0) - np.where(where, values, 0)
    total = masked_var(returns, where)
    return 1 - masked_var(errors, where) / total if total else 0.0
