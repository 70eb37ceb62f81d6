"""Supervised alignment and process supervision: prompts of [K, T], solutions of [S]."""

import functools
import math

import numpy as np

from tests.references.preferences import log_sigmoid
from tests.references.tokens import kept, log_softmax


def rrhf_loss(log_probs, scores, where, rank_weight, length_power):
    present = [k for k in range(len(scores)) if any(where[k])]
    total = {k: sum(kept(log_probs[k], where[k])) for k in present}
    p = {k: total[k] / sum(where[k]) ** length_power for k in present}
    loss = 0.0
    for i in present:
        for j in present:
            if scores[i] < scores[j]:
                loss += rank_weight * max(0.0, p[i] - p[j])
    best = max(present, key=lambda k: scores[k], default=None)
    return loss - (total[best] if best is not None else 0.0)


def slic_loss(chosen_log_probs, rejected_log_probs, target_log_probs, margin, target_weight):
    hinge = max(0.0, margin - chosen_log_probs + rejected_log_probs)
    return hinge - target_weight * target_log_probs


def pro_loss(log_probs, rewards, where, sft_weight):
    present = [k for k in range(len(rewards)) if any(where[k])]
    s = {k: sum(kept(log_probs[k], where[k])) / sum(where[k]) for k in present}
    loss = 0.0
    for k in present:
        worse = [i for i in present if i > k]
        if not worse:
            continue
        own = math.exp(s[k] * max(rewards[k] - rewards[i] for i in worse))
        others = sum(math.exp(s[i] * (rewards[k] - rewards[i])) for i in worse)
        loss -= math.log(own / (own + others))
    imitation = -sum(kept(log_probs[0], where[0]))
    return loss + sft_weight * (len(present) - 1) ** 2 * imitation


def orpo_loss(chosen_log_probs, rejected_log_probs, weight):
    def odds(log_p):
        return math.exp(log_p) / (1 - math.exp(log_p))

    ratio = odds(chosen_log_probs) / odds(rejected_log_probs)
    return -chosen_log_probs - weight * log_sigmoid(math.log(ratio))


def unlikelihood_loss(log_probs):
    return -math.log(1 - math.exp(log_probs))


def log1m_exp(x):
    return math.log(1 - math.exp(x))


def quark_loss(log_probs, kl, entropies, kl_coef, entropy_coef):
    return -log_probs + kl_coef * kl - entropy_coef * entropies


def quality_weights(rewards, beta):
    return math.exp(rewards / beta)


def figa_weights(tokens, other_tokens, where, other_where, weight):
    """Walks through every shortest edit and notes which tokens some walk keeps."""
    real = [t for t in range(len(tokens)) if where[t]]
    a = [tokens[t] for t in real]
    b = [token for token, m in zip(other_tokens, other_where, strict=True) if m]

    @functools.cache
    def distance(i, j):
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        same = distance(i + 1, j + 1) + (a[i] != b[j])
        return min(same, distance(i + 1, j) + 1, distance(i, j + 1) + 1)

    kept_by_some = set()

    @functools.cache
    def walk(i, j):
        if i == len(a) or j == len(b):
            return
        left = distance(i, j)
        if a[i] == b[j] and distance(i + 1, j + 1) == left:
            kept_by_some.add(i)
            walk(i + 1, j + 1)
        if a[i] != b[j] and distance(i + 1, j + 1) + 1 == left:
            walk(i + 1, j + 1)
        if distance(i + 1, j) + 1 == left:
            walk(i + 1, j)
        if distance(i, j + 1) + 1 == left:
            walk(i, j + 1)

    walk(0, 0)
    out = np.zeros(len(tokens))
    for i, t in enumerate(real):
        out[t] = 0.0 if i in kept_by_some else weight
    return out


def hindsight_loss_mask(is_output, where):
    out = np.zeros(len(where) - 1, bool)
    for t in range(1, len(where)):
        out[t - 1] = is_output[t] and where[t] and where[t - 1]
    return out


def step_label_loss(logits, labels, where):
    out = np.zeros(len(labels))
    for i in range(len(labels)):
        if where[i]:
            out[i] = -log_softmax(logits[i])[labels[i]]
    return out


def outcome_loss(logits, correct, where):
    out = np.zeros(len(logits))
    for t in range(len(logits)):
        if where[t]:
            out[t] = -correct * log_sigmoid(logits[t]) - (1 - correct) * log_sigmoid(-logits[t])
    return out


def until_first_error(labels, where):
    out = np.zeros(len(labels), bool)
    for i in range(len(labels)):
        wrong_before = any(where[j] and labels[j] == 0 for j in range(i))
        out[i] = where[i] and not wrong_before
    return out


def step_scores(logits, neutral):
    out = np.zeros(len(logits))
    for i, row in enumerate(logits):
        p = [math.exp(v) for v in log_softmax(row)]
        out[i] = p[2] + (p[1] if neutral == "positive" else 0)
    return out


def aggregate_step_scores(probs, where, method):
    score = 1.0
    for p in kept(probs, where):
        score = score * p if method == "product" else min(score, p)
    return score
