"""Reward-model and direct-preference losses, on plain numbers; rankings, on [K]."""

import math

from tests.references.tokens import kept


def log_sigmoid(x):
    return math.log(1 / (1 + math.exp(-x)))


def pointwise_loss(rewards, ratings):
    return (rewards - ratings) ** 2


def bradley_terry_loss(chosen_rewards, rejected_rewards, margin):
    wins, loses = math.exp(chosen_rewards - margin), math.exp(rejected_rewards)
    return -math.log(wins / (wins + loses))


def pairwise_ranking_loss(rewards, ranks, where):
    losses = []
    for i in range(len(rewards)):
        for j in range(len(rewards)):
            if where[i] and where[j] and ranks[i] < ranks[j]:
                losses.append(-log_sigmoid(rewards[i] - rewards[j]))
    return sum(losses) / len(losses) if losses else 0.0


def plackett_luce_loss(rewards, where):
    left = kept(rewards, where)
    likelihood = 1.0
    while len(left) > 1:
        likelihood *= math.exp(left[0]) / sum(math.exp(r) for r in left)
        left = left[1:]
    return -math.log(likelihood)


def soft_preference_loss(rewards_a, rewards_b, prob_a):
    p = math.exp(rewards_a) / (math.exp(rewards_a) + math.exp(rewards_b))
    return -prob_a * math.log(p) - (1 - prob_a) * math.log(1 - p)


def preference_accuracy(chosen_rewards, rejected_rewards):
    if chosen_rewards == rejected_rewards:
        return 0.5
    return 1.0 if chosen_rewards > rejected_rewards else 0.0


def language_model_loss(log_probs, where, normalize):
    values = kept(log_probs, where)
    return -sum(values) / (max(len(values), 1) if normalize else 1)


def language_model_terms(log_probs, where, normalize, per_token):
    assert per_token
    length = max(sum(bool(m) for m in where), 1) if normalize else 1
    return [-v / length if m else 0.0 for v, m in zip(log_probs, where, strict=True)]


def log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected):
    return math.log(
        (math.exp(chosen) / math.exp(ref_chosen)) / (math.exp(rejected) / math.exp(ref_rejected))
    )


def dpo_loss(
    chosen_log_probs,
    rejected_log_probs,
    ref_chosen_log_probs,
    ref_rejected_log_probs,
    beta,
    label_smoothing,
):
    u = beta * log_ratio_margin(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    return -(1 - label_smoothing) * log_sigmoid(u) - label_smoothing * log_sigmoid(-u)


def ipo_loss(
    chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, beta
):
    margin = log_ratio_margin(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    return (margin - 0.5 / beta) ** 2


def dpo_hinge_loss(
    chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, beta
):
    margin = log_ratio_margin(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    return max(0.0, 1 - beta * margin)


def simpo_loss(chosen_log_probs, rejected_log_probs, beta, margin):
    return -log_sigmoid(beta * chosen_log_probs - beta * rejected_log_probs - margin)


def kto_loss(log_probs, ref_log_probs, desirable, kl, beta, desirable_weight, undesirable_weight):
    """λ_y − v(x, y), as the paper has it."""
    gain = math.log(math.exp(log_probs) / math.exp(ref_log_probs)) - kl
    if desirable:
        return desirable_weight - desirable_weight / (1 + math.exp(-beta * gain))
    return undesirable_weight - undesirable_weight / (1 + math.exp(beta * gain))


def implicit_rewards(log_probs, ref_log_probs, beta):
    return beta * math.log(math.exp(log_probs) / math.exp(ref_log_probs))


def dpo_gradient_coefficient(
    chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, beta
):
    chosen = implicit_rewards(chosen_log_probs, ref_chosen_log_probs, beta)
    rejected = implicit_rewards(rejected_log_probs, ref_rejected_log_probs, beta)
    return math.exp(rejected) / (math.exp(rejected) + math.exp(chosen))


def dpo_diagnostics(
    chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, where, beta
):
    four = chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    chosen = beta * (chosen_log_probs - ref_chosen_log_probs) if where else 0.0
    rejected = beta * (rejected_log_probs - ref_rejected_log_probs) if where else 0.0
    return {
        "dpo/accuracy": preference_accuracy(chosen, rejected) if where else 0.0,
        "dpo/margin": chosen - rejected,
        "dpo/chosen_log_prob": chosen_log_probs if where else 0.0,
        "dpo/rejected_log_prob": rejected_log_probs if where else 0.0,
        "dpo/chosen_reward": chosen,
        "dpo/rejected_reward": rejected,
        "dpo/gradient_coefficient": dpo_gradient_coefficient(*four, beta) if where else 0.0,
    }
