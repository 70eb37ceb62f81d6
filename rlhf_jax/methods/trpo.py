"""TRPO on a minibatch of experience: the policy step, taken within a trust region."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import losses
from rlhf_jax.methods.ppo import PPOBatch, PPOConfig, prepare
from rlhf_jax.methods.reductions import weighted_sum
from rlhf_jax.methods.trust_region import trust_region_step
from rlhf_jax.models.heads import next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.step import TrainState, constrain, split, state_shardings


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

    def __post_init__(self):
        check(self, max_kl="(0, 1e6]", damping="[0, 1e6]", cg_iterations="[1, inf)")


def make_trust_region_step(
    config: PPOConfig,
    trpo: TRPOConfig,
    sharding: Sharding,
    *,
    temperature: float,
    microbatches: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `step(state, (experience, ptx), penalty_coef)`, as `make_train_step` does.

    π_old of the ratio is the policy that sampled; π_old of the constraint is the policy before this
    step. They are one and the same when a minibatch is the whole buffer, as in TRPO.

    Where the policy is held in half precision, its float32 master moves and the policy follows;
    gain and KL are those of the policy.

    Args:
      config: Reduction, normalisation of the advantages.
      trpo: The region.
      sharding: Where the state lives.
      temperature: The policy's.
      microbatches: Surrogate, KL and their derivatives are summed over so many parts of a minibatch
        one after the other, whose activations are computed again for each derivative. The logits
        of the minibatch before the step are kept whole.
    """

    def step(state: TrainState, batch, penalty_coef):
        del penalty_coef
        ready = prepare(batch, config=config)
        if microbatches > 1:
            ready = jax.tree.map(lambda x: split(x, microbatches), ready)
        before = jax.lax.stop_gradient(state.model)
        old_logits = _each(lambda part: response_logits(before, part), ready, microbatches)

        def gain(weights: Any, part: tuple[PPOBatch, jax.Array]) -> jax.Array:
            return surrogate(_like(weights, state.model), part[0], temperature)

        def distance(weights: Any, part: tuple[PPOBatch, jax.Array]) -> jax.Array:
            return divergence(_like(weights, state.model), *part, temperature)

        weights = state.model if state.master is None else state.master
        parts = (ready, old_logits)
        total_gain = _total(gain, parts, microbatches)
        new, metrics = trust_region_step(
            weights,
            total_gain,
            _total(distance, parts, microbatches),
            max_kl=trpo.max_kl,
            damping=trpo.damping,
            cg_iterations=trpo.cg_iterations,
        )
        metrics["loss/policy"] = -total_gain(weights)
        state = state.replace(
            step=state.step + 1,
            model=_like(new, state.model),
            master=None if state.master is None else new,
        )
        return constrain(state, state_shardings(state, sharding)), metrics

    return jax.jit(sharding.bind(step), donate_argnums=0)


def surrogate(model: Transformer, batch: PPOBatch, temperature: float) -> jax.Array:
    """J(θ) on (part of) a minibatch: its weighted sum."""
    rollout = batch.experience.rollout
    log_probs, _ = next_token_log_probs(
        model,
        rollout.tokens,
        rollout.segments,
        start=rollout.prompt_length,
        temperature=temperature,
    )
    log_probs = jnp.where(rollout.response_mask, log_probs, rollout.log_probs)
    gain = losses.trpo_surrogate(log_probs, rollout.log_probs, batch.experience.advantages)
    return weighted_sum(gain, batch.weights)


def divergence(
    model: Transformer, batch: PPOBatch, old_logits: jax.Array, temperature: float
) -> jax.Array:
    """KL(π_old ‖ π_θ) on (part of) a minibatch: its weighted sum."""
    new_logits = response_logits(model, batch)
    per_token = losses.kl_divergence(old_logits / temperature, new_logits / temperature)
    return weighted_sum(per_token, batch.weights)


def response_logits(model: Transformer, batch: PPOBatch) -> jax.Array:
    """Logits `[B, G, V]` float32 that predict the response tokens."""
    rollout = batch.experience.rollout
    hidden = model(rollout.tokens, rollout.segments)[:, rollout.prompt_length - 1 : -1]
    return model.logits(hidden)


def _like(weights: Any, model: Any) -> Any:
    """The weights in the types of the model."""
    return jax.tree.map(lambda w, m: w.astype(m.dtype), weights, model)


def _each(function: Callable[[Any], jax.Array], parts: Any, microbatches: int) -> jax.Array:
    """A function of each part, one after the other; the parts are the whole where there is one."""
    return function(parts) if microbatches == 1 else jax.lax.map(function, parts)


def _total(
    function: Callable[[Any, Any], jax.Array], parts: Any, microbatches: int
) -> Callable[[Any], jax.Array]:
    """The sum over all parts, as a function of the weights that holds one part at a time."""
    if microbatches == 1:
        return lambda weights: function(weights, parts)

    def total(weights: Any) -> jax.Array:
        def add(so_far: jax.Array, part: Any):
            return so_far + function(weights, part), None

        # Without it a derivative would keep the activations of every part.
        again = jax.checkpoint(add, prevent_cse=False)
        return jax.lax.scan(again, jnp.float32(0), parts)[0]

    return total
