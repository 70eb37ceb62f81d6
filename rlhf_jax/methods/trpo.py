"""TRPO on a minibatch of experience: the policy step, taken within a trust region."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax import losses
from rlhf_jax.methods.ppo import PPOBatch, PPOConfig, prepare
from rlhf_jax.methods.reductions import weighted_sum
from rlhf_jax.methods.trust_region import trust_region_step
from rlhf_jax.models.heads import next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class TRPOConfig:
    """Size and accuracy of a trust-region step.

    Attributes:
      max_kl: δ, bound on the mean KL(π_old ‖ π_θ) per token, in nats.
      damping: added to the diagonal of the Fisher matrix.
      cg_iterations: products with the Fisher matrix.
    """

    max_kl: float = 0.01
    damping: float = 0.1
    cg_iterations: int = 10


def make_trust_region_step(
    config: PPOConfig, trpo: TRPOConfig, *, temperature: float
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `step(state, (experience, ptx), penalty_coef)`, as `make_train_step` does.

    π_old of the ratio is the policy that sampled; π_old of the constraint is the policy before this
    step. They are one and the same when a minibatch is the whole buffer, as in TRPO.

    Raises (when traced):
      ValueError: a ptx loss or an entropy bonus, which have no place in TRPO's problem.
    """
    if config.ptx_coef or config.entropy_coef:
        raise ValueError("ppo.objective='trpo' has no ptx loss and no entropy bonus: set both to 0")

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch, penalty_coef):
        del penalty_coef
        ready = prepare(batch, config=config)
        rollout, where = ready.experience.rollout, ready.experience.rollout.response_mask
        old_logits = jax.lax.stop_gradient(response_logits(state.model, ready))

        def surrogate(model: Transformer) -> jax.Array:
            log_probs, _ = next_token_log_probs(
                model,
                rollout.tokens,
                rollout.segments,
                start=rollout.prompt_length,
                temperature=temperature,
            )
            log_probs = jnp.where(where, log_probs, rollout.log_probs)
            gain = losses.trpo_surrogate(log_probs, rollout.log_probs, ready.experience.advantages)
            return weighted_sum(gain, ready.weights)

        def divergence(model: Transformer) -> jax.Array:
            new_logits = response_logits(model, ready)
            per_token = losses.kl_divergence(old_logits / temperature, new_logits / temperature)
            return weighted_sum(per_token, ready.weights)

        model, metrics = trust_region_step(
            state.model,
            surrogate,
            divergence,
            max_kl=trpo.max_kl,
            damping=trpo.damping,
            cg_iterations=trpo.cg_iterations,
        )
        metrics["loss/policy"] = -surrogate(state.model)
        return state.replace(step=state.step + 1, model=model), metrics

    return step


def response_logits(model: Transformer, batch: PPOBatch) -> jax.Array:
    """Logits `[B, G, V]` float32 that predict the response tokens."""
    rollout = batch.experience.rollout
    hidden = model(rollout.tokens, rollout.segments)[:, rollout.prompt_length - 1 : -1]
    return model.logits(hidden)
