"""Returns, advantages, baselines, shaped rewards. Rows of one response, [T]; groups, [K]."""

import math

import numpy as np

from tests.references.tokens import masked_whiten


def span(where):
    """First and one-past-last real position; the real tokens are contiguous."""
    real = [t for t, m in enumerate(where) if m]
    return (real[0], real[-1] + 1) if real else (0, 0)


def value_at(values, t, end, bootstrap):
    return values[t] if t < end else bootstrap


def rewards_to_go(rewards, where, discount, bootstrap=0.0):
    start, end = span(where)
    out = np.zeros(len(rewards))
    for t in range(start, end):
        out[t] = discount ** (end - t) * bootstrap
        for s in range(t, end):
            out[t] += discount ** (s - t) * rewards[s]
    return out


def total_return(rewards, where, discount, bootstrap=0.0):
    start, end = span(where)
    total = discount ** (end - start) * bootstrap if end > start else 0.0
    return total + sum(discount ** (t - start) * rewards[t] for t in range(start, end))


def td_errors(rewards, values, where, discount, bootstrap=0.0):
    start, end = span(where)
    out = np.zeros(len(rewards))
    for t in range(start, end):
        out[t] = rewards[t] + discount * value_at(values, t + 1, end, bootstrap) - values[t]
    return out


def k_step_returns(rewards, values, where, discount, k, bootstrap=0.0):
    start, end = span(where)
    out = np.zeros(len(rewards))
    for t in range(start, end):
        stop = min(t + k, end)
        for s in range(t, stop):
            out[t] += discount ** (s - t) * rewards[s]
        out[t] += discount ** (stop - t) * value_at(values, stop, end, bootstrap)
    return out


def k_step_advantages(rewards, values, where, discount, k, bootstrap=0.0):
    start, end = span(where)
    out = k_step_returns(rewards, values, where, discount, k, bootstrap)
    for t in range(start, end):
        out[t] -= values[t]
    return out


def gae(rewards, values, where, discount, lambda_, bootstrap=0.0):
    start, end = span(where)
    deltas = td_errors(rewards, values, where, discount, bootstrap)
    out = np.zeros(len(rewards))
    for t in range(start, end):
        for s in range(t, end):
            out[t] += (discount * lambda_) ** (s - t) * deltas[s]
    return out


def kl_shaped_rewards(scores, log_probs, ref_log_probs, where, kl_coef):
    start, end = span(where)
    out = np.zeros(len(log_probs))
    for t in range(start, end):
        out[t] = -kl_coef * (log_probs[t] - ref_log_probs[t]) + (scores if t == end - 1 else 0)
    return out


def sequence_kl_reward(scores, log_probs, ref_log_probs, where, kl_coef):
    start, end = span(where)
    return scores - kl_coef * sum(log_probs[t] - ref_log_probs[t] for t in range(start, end))


def rolling_discounted_sum(rewards, where, discount):
    start, end = span(where)
    out = np.zeros(len(rewards))
    for t in range(start, end):
        for s in range(start, t + 1):
            out[t] += discount ** (t - s) * rewards[s]
    return out


def normalize_advantages(advantages, where, clip=np.inf):
    return np.clip(masked_whiten(advantages, where), -clip, clip)


def batch_mean_baseline(scores):
    return np.full(scores.shape, sum(np.ravel(scores)) / scores.size)


def leave_one_out_baseline(scores):
    out = np.zeros(len(scores))
    for i in range(len(scores)):
        others = [scores[j] for j in range(len(scores)) if j != i]
        out[i] = sum(others) / len(others)
    return out


def group_mean_baseline(scores):
    return np.array([sum(scores) / len(scores) for _ in scores])


def group_advantages(scores, eps):
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((r - mean) ** 2 for r in scores) / len(scores))
    return np.array([(r - mean) / (std + eps) for r in scores])
