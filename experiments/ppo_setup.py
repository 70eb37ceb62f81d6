"""What `ppo_max` needs before its loop: checks, inputs, the compiled functions."""

from __future__ import annotations

import functools

import jax
from ml_collections import ConfigDict

from experiments import harness, stages
from rlhf_jax.methods import ppo
from rlhf_jax.methods.trpo import TRPOConfig, make_trust_region_step
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.lora import Tuning
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.experience import (
    AdvantageConfig,
    Experience,
    RewardConfig,
    advantages,
    evaluate,
    shape_rewards,
)
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import TrainState, create_state, make_train_step


def check(config: ConfigDict, advantage: AdvantageConfig, devices: int) -> None:
    """Checks batch sizes and the critic before anything is loaded.

    Raises:
      ValueError: sizes that do not divide, or a Φ_t whose critic is missing.
    """
    train = config.train
    harness.positive("train.iterations", train.iterations)
    harness.positive("eval.every", config.eval.every)
    harness.divide("prompts x samples per prompt", rollout_batch(config), train.minibatch)
    harness.divide("train.minibatch", train.minibatch, train.microbatch)
    harness.divide("train.microbatch (over devices)", train.microbatch, devices)
    prompts = train.prompts_per_iteration
    harness.divide("train.prompts_per_iteration (over devices)", prompts, devices)
    if advantage.needs_critic and train.critic_init == "none":
        raise ValueError(
            f"advantage.method={advantage.method!r} needs a critic: set train.critic_init to "
            "'reward_model' or 'policy'"
        )
    if config.lora.rank and config.ppo.objective == "trpo":
        raise ValueError("ppo.objective='trpo' steps in every weight: set lora.rank=0")


def require_inputs(config: ConfigDict) -> None:
    """Makes sure of the stages before: SFT (and its `policy_variant`), reward model."""
    inputs = config.inputs
    policy_variant = inputs.variant
    if inputs.policy_variant:
        named = f"{config.scale},{inputs.policy_variant}"
        policy_variant = inputs.variant.replace(config.scale, named, 1)
    for folder, stage, variant in (
        (inputs.reference, "sft", inputs.variant),
        (inputs.policy, "sft", policy_variant),
        (inputs.reward_model, "reward_model", inputs.variant),
    ):
        stages.require(folder, stage=stage, variant=variant, build=inputs.build)


def load_policies(config: ConfigDict, sharding) -> tuple[Tuning, Transformer]:
    """π_θ to be trained, and π_ref: with adapters on the same weights, the ones beside them."""
    inputs = config.inputs
    policy = stages.make_tuning(config, stages.load_policy(inputs.policy, config, sharding))
    if policy.trunk is not None and inputs.policy == inputs.reference:
        return policy, policy.trunk
    return policy, stages.load_policy(inputs.reference, config, sharding, frozen=True)


def load_reward_model(config: ConfigDict, policy: Tuning, sharding) -> ScalarModel:
    """The reward model, on the policy's frozen weights if it was trained beside the same."""
    folder = config.inputs.reward_model
    beside = stages.load_scalar_beside(folder, policy.trunk, sharding)
    return beside or stages.load_scalar(folder, config, sharding, frozen=True)


def derived_numbers(config: ConfigDict, policy: str, sharding, prompts) -> dict[str, str]:
    """The banner: every number that follows from the config."""
    train, batch = config.train, rollout_batch(config)
    per_iteration = train.epochs * batch // train.minibatch
    longest = prompts.shapes[-1].length + config.sampling.max_new_tokens
    return {
        "policy": f"{policy}, from {config.inputs.policy}",
        "reward model": config.inputs.reward_model,
        "prompts": f"{prompts.count_text()}, {train.prompts_per_iteration} per iteration, "
        f"buckets of {', '.join(str(shape.length) for shape in prompts.shapes)} tokens",
        "responses per iteration": f"{batch} of at most {config.sampling.max_new_tokens} tokens "
        f"({train.samples_per_prompt} per prompt)",
        "updates per iteration": f"{per_iteration} of {train.minibatch} responses "
        f"in microbatches of {train.microbatch}",
        "iterations": f"{train.iterations} ({train.critic_pretrain_iterations} of the critic "
        f"alone), "
        f"{prompts.epochs_text(train.iterations)} of prompts",
        "tokens per iteration": f"at most {batch * longest:,}, prompts included",
        "devices": f"{sharding.mesh.size}, {sharding.mode}",
        "run folder": config.workdir,
    }


def make_score(config: ConfigDict, advantage: AdvantageConfig, sharding):
    """Jits: rollout -> Experience (lines 3 and 4 of Algorithm 1) and the new reward moments."""
    reward = RewardConfig(**config.reward)
    microbatches = harness.divide(
        "rollout batch", rollout_batch(config), min(rollout_batch(config), config.train.microbatch)
    )

    def score(rollout, reference, reward_model, critic, moments, kl_coef):
        evaluation = evaluate(
            rollout,
            reference,
            reward_model,
            critic,
            temperature=config.sampling.temperature or 1.0,
            microbatches=microbatches,
        )
        rewards, moments = shape_rewards(
            rollout,
            evaluation,
            moments,
            config=reward,
            discount=advantage.discount,
            kl_coef=kl_coef,
        )
        phi, returns = advantages(
            rewards, evaluation.values, rollout.response_mask, config=advantage
        )
        return Experience(rollout, evaluation, rewards, phi, returns), moments

    return jax.jit(sharding.bind(score))


def rollout_batch(config: ConfigDict) -> int:
    """Responses per iteration: the size of the experience buffer."""
    return config.train.prompts_per_iteration * config.train.samples_per_prompt


def make_optimizers(config: ConfigDict, updates: int):
    """The optimizers of policy and critic, and the policy's learning rate by update."""
    policy_optimizer, schedule = make_optimizer(OptimizerConfig(**config.optimizer), updates)
    critic_optimizer, _ = make_optimizer(OptimizerConfig(**config.critic_optimizer), updates)
    return (policy_optimizer, critic_optimizer), schedule


def make_updates(config: ConfigDict, sharding, optimizers, policy_trunk=None, critic_trunk=None):
    """The compiled policy and critic steps.

    Args:
      config: Of the run.
      sharding: Where trees live.
      optimizers: Of policy and critic.
      policy_trunk: Frozen weights beside which the policy's adapters train; None without adapters.
      critic_trunk: The same of the critic.
    """
    ppo_config = ppo.PPOConfig(**config.ppo)
    settings = {
        "sharding": sharding,
        "microbatches": harness.divide(
            "train.minibatch", config.train.minibatch, config.train.microbatch
        ),
        "prepare": functools.partial(ppo.prepare, config=ppo_config),
    }
    temperature = config.sampling.temperature or 1.0
    if config.ppo.objective == "trpo":
        policy_step = make_trust_region_step(
            ppo_config, TRPOConfig(**config.trpo), temperature=temperature
        )
    else:
        policy_step = make_train_step(
            functools.partial(ppo.policy_loss, config=ppo_config, temperature=temperature),
            optimizers[0],
            trunk=policy_trunk,
            **settings,
        )
    critic_step = make_train_step(
        functools.partial(ppo.critic_loss, config=ppo_config),
        optimizers[1],
        trunk=critic_trunk,
        **settings,
    )
    return policy_step, critic_step


def create_states(
    config: ConfigDict, sharding, policy: Tuning, reward_model: ScalarModel, optimizers
) -> tuple[TrainState, Tuning | None, TrainState | None]:
    """The state of the policy, the critic, and its state; None without a critic.

    A state copies its model. What was loaded is let go with each call, so that no device holds
    both for longer than it takes to make one state.

    Args:
      config: Of the run.
      sharding: Where trees live.
      policy: π_θ; its start is taken.
      reward_model: Where the critic may start.
      optimizers: Of policy and critic.
    """
    state = create_state(policy.take(), optimizers[0], sharding)
    critic = create_critic(config, policy.trunk or state.model, reward_model, sharding)
    if critic is None:
        return state, None, None
    return state, critic, create_state(critic.take(), optimizers[1], sharding)


def create_critic(
    config: ConfigDict, language: Transformer, reward_model: ScalarModel, sharding
) -> Tuning | None:
    """The critic's start: the reward model (PPO-max), the policy with a zero head, or none.

    Adapters stand beside the frozen weights of the model that they start from: a reward model's
    own, or the policy's where the reward model is adapters beside these, which then train on.
    """
    init = config.train.critic_init
    if init == "reward_model":
        start = reward_model
        if not config.lora.rank:
            start = stages.load_scalar(config.inputs.reward_model, config, sharding)
        return stages.make_tuning(config, start, name="critic")
    if init == "policy":
        return stages.make_tuning(config, ScalarModel(language), name="critic")
    if init == "none":
        return None
    raise ValueError(f"train.critic_init={init!r} must be 'reward_model', 'policy' or 'none'")
