"""Masked reductions, log-probabilities, divergences."""

import math

import numpy as np


def kept(x, where):
    return [float(v) for v, m in zip(np.ravel(x), np.ravel(where), strict=True) if m]


def masked_fill(x, where, fill):
    return x if where else fill


def masked_sum(x, where):
    total = 0.0
    for value in kept(x, where):
        total += value
    return total


def masked_mean(x, where):
    values = kept(x, where)
    return sum(values) / len(values) if values else 0.0


def masked_var(x, where):
    values = kept(x, where)
    mean = masked_mean(x, where)
    return sum((v - mean) ** 2 for v in values) / len(values) if values else 0.0


def masked_whiten(x, where, shift_mean=True):
    mean, var = masked_mean(x, where), masked_var(x, where)
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        if where[index]:
            white = (x[index] - mean) / math.sqrt(var + 1e-8)
            out[index] = white if shift_mean else white + mean
    return out


def last_token_mask(where):
    out = np.zeros(len(where), bool)
    for t in range(len(where)):
        out[t] = where[t] and not any(where[t + 1 :])
    return out


def log_softmax(logits):
    total = sum(math.exp(z) for z in logits)
    return [z - math.log(total) for z in logits]


def select_log_probs(logits, targets, temperature):
    out = np.zeros(len(targets))
    for t, target in enumerate(targets):
        out[t] = log_softmax([z / temperature for z in logits[t]])[target]
    return out


def token_log_probs(logits, tokens, temperature):
    out = np.zeros(len(tokens) - 1)
    for t in range(len(tokens) - 1):
        out[t] = log_softmax([z / temperature for z in logits[t]])[tokens[t + 1]]
    return out


def sequence_log_prob(log_probs, where, normalize):
    values = kept(log_probs, where)
    return sum(values) / (max(len(values), 1) if normalize else 1)


def entropy(logits):
    return -sum(math.exp(v) * v for v in log_softmax(logits))


def kl_estimate(log_probs, ref_log_probs, estimator):
    d = log_probs - ref_log_probs
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]


def old_policy_kl(log_probs, old_log_probs):
    ratio = math.exp(log_probs) / math.exp(old_log_probs)
    return ratio - 1 - math.log(ratio)


def kl_divergence(logits_p, logits_q):
    p, q = log_softmax(logits_p), log_softmax(logits_q)
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def adaptive_kl_coef(coef, kl, target, horizon, steps):
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * steps / horizon)


def adaptive_penalty_coef(coef, kl, target):
    if kl > 1.5 * target:
        return 2 * coef
    return coef / 2 if kl < target / 1.5 else coef
