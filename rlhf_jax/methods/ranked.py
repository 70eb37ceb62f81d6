"""Reward modelling from scores and rankings: several responses to a prompt at once.

Source: slide "反馈数据收集", training methods 1 (scores) and 3 (rankings); Ouyang et al. 2022
(arXiv 2203.02155), equation 1, whose batches hold all pairs of a prompt together, so that each
response is read once. Pairs are those of `methods.reward_model`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.losses import (
    language_model_loss,
    pairwise_ranking_loss,
    plackett_luce_loss,
    pointwise_loss,
)
from rlhf_jax.methods.pairwise import PairTrainConfig
from rlhf_jax.methods.reductions import reduction_weights, weighted_sum
from rlhf_jax.methods.reward_model import LISTWISE, POINTWISE, RewardModelConfig
from rlhf_jax.models.heads import ScalarModel, hidden_at, last_real_index, log_probs_of
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.step import make_train_step


def there(batch: dict[str, jax.Array]) -> jax.Array:
    """Which responses are there: `[B, K]` bool, from segments `[B, K, T]`."""
    return batch["segments"][..., 0] > 0


def ordered(batch: dict[str, jax.Array]) -> jax.Array:
    """Which two responses of a prompt are ranked: `[B, K, K]` bool, the first above the second."""
    where, scores = there(batch), batch["scores"]
    both = where[:, :, None] & where[:, None, :]
    return both & (scores[:, :, None] > scores[:, None, :])


def loss_of(
    rewards: jax.Array, batch: dict[str, jax.Array], *, config: RewardModelConfig
) -> jax.Array:
    """The loss of a batch, weighted by what `prepare` adds.

      pointwise       mean over responses of (r − s)²
      listwise        mean over prompts of −log σ(r_i − r_j) over all ordered pairs of a prompt
      plackett_luce   mean over prompts of −log of the probability of the order

    Args:
      rewards: r `[B, K]`.
      batch: of `data.candidates.CandidateBatches`, the best response first, with weights.
      config: says which.
    """
    where, scores = there(batch), batch["scores"]
    if config.comparisons == POINTWISE:
        return weighted_sum(pointwise_loss(rewards, scores), batch["response_weights"])
    if config.comparisons == LISTWISE:
        losses = pairwise_ranking_loss(rewards, -scores, where=where)
    else:
        losses = plackett_luce_loss(rewards, where=where)
    return weighted_sum(losses, batch["prompt_weights"])


def loss_fn(
    model: ScalarModel, batch: dict[str, jax.Array], *, config: RewardModelConfig
) -> tuple[jax.Array, dict]:
    """The loss of scores or rankings, plus β times the LM loss on the best response.

    Args:
      model: trunk with a scalar head and an LM head.
      batch: tokens and segments `[B, K, T]`, the best response first, `scores` `[B, K]`, and
        weights from `prepare`.
      config: the loss.
    """
    prompts, sides, width = batch["tokens"].shape
    tokens, segments = (batch[k].reshape(-1, width) for k in ("tokens", "segments"))
    hidden = model.trunk(tokens, segments)
    rewards = model.read(hidden_at(hidden, last_real_index(segments > 0))).reshape(prompts, sides)
    rewards = jnp.where(there(batch), rewards, 0.0)
    loss = loss_of(rewards, batch, config=config)
    above = rewards[:, :, None] - rewards[:, None, :]
    right = (above > 0) + 0.5 * (above == 0)
    metrics = {
        "loss/ranked": loss,
        "reward/accuracy": weighted_sum(right, batch["pair_weights"]),
        "reward/margin": weighted_sum(above, batch["pair_weights"]),
    }
    if not config.lm_coef:
        return loss, metrics
    best_hidden = hidden.reshape(prompts, sides, width, -1)[:, 0, :-1]
    log_probs, _ = log_probs_of(model.trunk, best_hidden, batch["tokens"][:, 0, 1:])
    nll = language_model_loss(log_probs, where=_trained(batch), per_token=True)
    metrics["loss/lm"] = weighted_sum(nll, batch["lm_weights"])
    return loss + config.lm_coef * metrics["loss/lm"], metrics


def _trained(batch: dict[str, jax.Array]) -> jax.Array:
    return batch["loss_mask"][:, 0, 1:] & batch["valid"][:, None]


def prepare(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds weights in the means over a whole batch: of responses, prompts, pairs, LM tokens."""
    where, pairs = there(batch), ordered(batch)
    ranked = pairs.any(axis=(1, 2))
    return batch | {
        "response_weights": where / jnp.maximum(where.sum(), 1),
        # A prompt whose responses all tie says nothing of an order.
        "prompt_weights": ranked / jnp.maximum(ranked.sum(), 1),
        "pair_weights": pairs / jnp.maximum(pairs.sum(), 1),
        "lm_weights": reduction_weights("token_mean", _trained(batch)),
    }


def make_step(
    config: RewardModelConfig,
    train: PairTrainConfig,
    optimizer: optax.GradientTransformation,
    sharding: Sharding,
    *,
    trunk: Any = None,
) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)`, see `training.step.make_train_step`."""
    return make_train_step(
        functools.partial(loss_fn, config=config),
        optimizer,
        sharding,
        microbatches=train.microbatches,
        prepare=prepare,
        trunk=trunk,
    )
