"""The two losses of a PPO update, for minibatches of `Experience`.

Everything that the paper compares is a field of `PPOConfig`; the formulas are in `losses`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax import losses
from rlhf_jax.methods.reductions import REDUCTIONS, reduction_weights, weighted_sum
from rlhf_jax.models.heads import ScalarModel, log_probs_of
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.experience import Experience, state_values
from rlhf_jax.runtime.settings import check

OBJECTIVES = ("clip", "penalty", "surrogate", "policy_gradient", "trpo")
DENOMINATORS = ("old", "reference")
# Of the rewards of an iteration.
QUANTILES = {
    "reward/q05": 0.05,
    "reward/q25": 0.25,
    "reward/q50": 0.50,
    "reward/q75": 0.75,
    "reward/q95": 0.95,
}


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """What the policy and the critic minimise.

    Attributes:
      objective: "clip" (PPO-clip), "penalty" (PPO-penalty), "surrogate" (the ratio without either),
        "policy_gradient" (log π weighted by Φ, no ratio), or "trpo" (the surrogate within a trust
        region: `trpo.make_trust_region_step` in place of `policy_loss`).
      clip_eps: ε of PPO-clip; other objectives only count the tokens whose ratio leaves it, and
        TRPO does not read it.
      value_clip_eps: the critic's move away from its old value is clipped to this; 0 is off.
      ratio_denominator: "old" is the policy that sampled; "reference" is the paper's importance
        sampling ablation (Figure 7): the ratio is against the frozen reference.
      entropy_coef: weight of the entropy bonus; 0 is off.
      entropy_max: δ, the bonus is off where the entropy is above it, in nats; 0 is no bound.
      ptx_coef: weight of the language-model loss on SFT data; 0 is off.
      normalize_advantages: mean 0 and std 1 over the minibatch.
      advantage_clip: advantages are clipped to ±this after normalisation; 0 is off.
      reduction: "token_mean", "sequence_mean" or "sequence_sum".
    """

    objective: str = "clip"
    clip_eps: float = 0.2
    value_clip_eps: float = 0.2
    ratio_denominator: str = "old"
    entropy_coef: float = 0.0
    entropy_max: float = 0.0
    ptx_coef: float = 0.0
    normalize_advantages: bool = False
    advantage_clip: float = 0.0
    reduction: str = "token_mean"

    def __post_init__(self):
        check(
            self,
            objective=OBJECTIVES,
            clip_eps="(0, inf)",
            value_clip_eps="[0, inf)",
            ratio_denominator=DENOMINATORS,
            entropy_coef="[0, 1e6]",
            entropy_max="[0, inf)",
            ptx_coef="[0, 1e6]",
            advantage_clip="[0, inf)",
            reduction=REDUCTIONS,
        )
        if self.objective == "trpo" and (self.ptx_coef or self.entropy_coef):
            raise ValueError(
                "ppo.objective='trpo' has no place for a ptx loss or an entropy bonus: "
                f"ppo.ptx_coef={self.ptx_coef} and ppo.entropy_coef={self.entropy_coef} must be 0"
            )


@flax.struct.dataclass
class PPOBatch:
    """A minibatch with everything that is normalised over all of it.

    Attributes:
      experience: rows of the buffer; advantages normalised and clipped if asked.
      weights: `[B, G]` float32, the reduction's weight of each response token.
      ptx: None, or a language-model batch `{"tokens", "segments", "loss_mask"}` `[B', T]`.
      ptx_weights: None, or `[B', T - 1]` float32.
    """

    experience: Experience
    weights: jax.Array
    ptx: Any = None
    ptx_weights: Any = None


def prepare(batch: tuple[Experience, Any], *, config: PPOConfig) -> PPOBatch:
    """Makes the loss weights; normalises and clips advantages over the whole minibatch."""
    experience, ptx = batch
    where = experience.rollout.response_mask
    advantages, clip = experience.advantages, config.advantage_clip
    if config.normalize_advantages:
        advantages = losses.normalize_advantages(advantages, where=where, clip=clip or None)
    elif clip:
        advantages = jnp.clip(advantages, -clip, clip)
    experience = experience.replace(advantages=advantages)
    weights = reduction_weights(config.reduction, where)
    if ptx is None:
        return PPOBatch(experience, weights)
    return PPOBatch(
        experience, weights, ptx, reduction_weights("token_mean", ptx["loss_mask"][:, 1:])
    )


def policy_loss(
    model: Transformer,
    batch: PPOBatch,
    penalty_coef: jax.Array,
    *,
    config: PPOConfig,
    temperature: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of the policy on (part of) a minibatch.

    Args:
      model: the policy.
      batch: see `PPOBatch`.
      penalty_coef: scalar β of PPO-penalty; unused by the other objectives.
      config: the objective.
      temperature: the sampling temperature, see `rollout`.
    """
    experience, rollout = batch.experience, batch.experience.rollout
    where = rollout.response_mask
    batches = [(rollout.tokens, rollout.segments)]
    if batch.ptx is not None:
        batches.append((batch.ptx["tokens"], batch.ptx["segments"]))
    hidden, *ptx_hidden = model.together(*batches)
    start = rollout.prompt_length
    log_probs, entropy = log_probs_of(
        model,
        hidden[:, start - 1 : -1],
        rollout.tokens[:, start:],
        temperature=temperature,
        with_entropy=config.entropy_coef > 0,
    )
    # Selected, not multiplied: no number from padding enters a ratio.
    log_probs = jnp.where(where, log_probs, rollout.log_probs)
    old = rollout.log_probs
    if config.ratio_denominator == "reference":
        old = jnp.where(where, experience.evaluation.ref_log_probs, old)
    per_token = _objective(log_probs, old, experience.advantages, penalty_coef, config)
    loss = weighted_sum(per_token, batch.weights)
    metrics = {"loss/policy": loss}

    if entropy is not None:
        bonus = losses.entropy_bonus(
            entropy, weight=config.entropy_coef, max_entropy=config.entropy_max or jnp.inf
        )
        loss -= weighted_sum(bonus, batch.weights)
    if batch.ptx is not None:
        ptx_log_probs, _ = log_probs_of(model, ptx_hidden[0][:, :-1], batch.ptx["tokens"][:, 1:])
        nll = losses.language_model_loss(
            ptx_log_probs, where=batch.ptx["loss_mask"][:, 1:], per_token=True
        )
        metrics["loss/ptx"] = weighted_sum(nll, batch.ptx_weights)
        loss += config.ptx_coef * metrics["loss/ptx"]

    # The KL is from the policy that sampled, whatever the ratio is against.
    moved = losses.ppo_diagnostics(log_probs, rollout.log_probs, clip_eps=config.clip_eps)
    of_ratio = losses.ppo_diagnostics(log_probs, old, clip_eps=config.clip_eps)
    metrics |= {
        "policy/approx_kl": weighted_sum(moved["policy/approx_kl"], batch.weights),
        "policy/clip_fraction": weighted_sum(of_ratio["policy/clip_fraction"], batch.weights),
        "policy/ratio_max": jnp.max(of_ratio["policy/ratio"], where=where, initial=0.0),
        "policy/ratio_min": jnp.min(of_ratio["policy/ratio"], where=where, initial=jnp.inf),
        "policy/log_prob": weighted_sum(log_probs, batch.weights),
    }
    return loss, metrics


def _objective(log_probs, old_log_probs, advantages, penalty_coef, config: PPOConfig) -> jax.Array:
    """Unreduced policy loss `[B, G]` for the chosen objective."""
    if config.objective == "clip":
        return losses.ppo_clip_loss(log_probs, old_log_probs, advantages, clip_eps=config.clip_eps)
    if config.objective == "penalty":
        kl = losses.old_policy_kl(log_probs, old_log_probs)
        return losses.ppo_penalty_loss(
            log_probs, old_log_probs, advantages, kl, kl_coef=penalty_coef
        )
    if config.objective == "surrogate":
        return -losses.trpo_surrogate(log_probs, old_log_probs, advantages)
    return losses.policy_gradient_loss(log_probs, advantages)


def critic_loss(
    model: ScalarModel, batch: PPOBatch, *, config: PPOConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of the critic on (part of) a minibatch."""
    experience, rollout = batch.experience, batch.experience.rollout
    values = jnp.where(rollout.response_mask, state_values(model, rollout), 0.0)
    old_values = jnp.where(rollout.response_mask, experience.evaluation.values, 0.0)
    if config.value_clip_eps:
        per_token = losses.clipped_value_loss(
            values, old_values, experience.returns, clip_eps=config.value_clip_eps
        )
    else:
        per_token = losses.value_loss(values, experience.returns)
    loss = weighted_sum(per_token, batch.weights)
    diagnostics = losses.value_diagnostics(
        values, old_values, clip_eps=config.value_clip_eps or float("inf")
    )
    metrics = {name: weighted_sum(value, batch.weights) for name, value in diagnostics.items()}
    return loss, {"loss/value": loss, **metrics}


def experience_metrics(experience: Experience) -> dict[str, jax.Array]:
    """Means over the real tokens of a buffer, before any update."""
    where = experience.rollout.response_mask
    values, scores = experience.evaluation.values, experience.evaluation.scores
    quantiles = jnp.quantile(scores, jnp.array(list(QUANTILES.values())))
    return {
        "reward/std": scores.std(),
        **dict(zip(QUANTILES, quantiles, strict=True)),
        "reward/shaped": losses.masked_sum(experience.rewards, where=where, axis=-1).mean(),
        "critic/return": losses.masked_mean(experience.returns, where=where),
        "critic/advantage": losses.masked_mean(experience.advantages, where=where),
        "critic/explained_variance": losses.explained_variance(
            values, experience.returns, where=where
        ),
    }
