"""What `ppo_max` needs before its loop: checks, inputs, the compiled functions."""

from __future__ import annotations

import functools

import jax
from ml_collections import ConfigDict

from experiments import harness, stages
from rlhf_jax import ppo
from rlhf_jax.experience import (
    AdvantageConfig,
    Experience,
    RewardConfig,
    advantages,
    evaluate,
    shape_rewards,
)
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.lora import Tuning
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.train import make_train_step
from rlhf_jax.trpo import TRPOConfig, make_trust_region_step


def check(config: ConfigDict, advantage: AdvantageConfig, devices: int) -> None:
    """Checks batch sizes and the critic before anything is loaded.

    Raises:
      ValueError: sizes that do not divide, or a Φ_t whose critic is missing.
    """
    train = config.train
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
        policy_variant = f"{config.scale},{inputs.policy_variant}"
        policy_variant += f",seed={config.seed}" if config.seed else ""
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


def derived_numbers(config: ConfigDict, policy: Tuning, sharding, prompts) -> dict[str, str]:
    """The banner: every number that follows from the config."""
    train, batch = config.train, rollout_batch(config)
    per_iteration = train.epochs * batch // train.minibatch
    size = prompts.steps_per_epoch * train.prompts_per_iteration
    return {
        "policy": f"{stages.parameters_line(policy)}, from {config.inputs.policy}",
        "reward model": config.inputs.reward_model,
        "prompts": f"about {size:,}, {train.prompts_per_iteration} per iteration, "
        f"buckets of {', '.join(str(shape.length) for shape in prompts.shapes)} tokens",
        "responses per iteration": f"{batch} of at most {config.sampling.max_new_tokens} tokens "
        f"({train.samples_per_prompt} per prompt)",
        "updates per iteration": f"{per_iteration} of {train.minibatch} responses "
        f"in microbatches of {train.microbatch}",
        "iterations": f"{train.iterations} ({train.critic_pretrain_iterations} of the critic "
        f"alone), "
        f"{train.iterations * train.prompts_per_iteration / size:.2f} epochs of prompts",
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


def make_updates(
    config: ConfigDict,
    sharding,
    updates: int,
    policy: Tuning | None = None,
    critic: Tuning | None = None,
):
    """The compiled policy and critic steps, with their optimizers and schedules.

    Args:
      config: Of the run.
      sharding: Where trees live.
      updates: Of the whole run, for the schedules.
      policy: What of the policy trains; None is every weight.
      critic: The same of the critic.
    """
    ppo_config = ppo.PPOConfig(**config.ppo)
    settings = {
        "sharding": sharding,
        "microbatches": harness.divide(
            "train.minibatch", config.train.minibatch, config.train.microbatch
        ),
        "prepare": functools.partial(ppo.prepare, config=ppo_config),
    }
    policy_optimizer, schedule = make_optimizer(OptimizerConfig(**config.optimizer), updates)
    critic_optimizer, _ = make_optimizer(OptimizerConfig(**config.critic_optimizer), updates)
    temperature = config.sampling.temperature or 1.0
    if config.ppo.objective == "trpo":
        policy_step = make_trust_region_step(
            ppo_config, TRPOConfig(**config.trpo), temperature=temperature
        )
    else:
        policy_step = make_train_step(
            functools.partial(ppo.policy_loss, config=ppo_config, temperature=temperature),
            policy_optimizer,
            trunk=policy and policy.trunk,
            **settings,
        )
    critic_step = make_train_step(
        functools.partial(ppo.critic_loss, config=ppo_config),
        critic_optimizer,
        trunk=critic and critic.trunk,
        **settings,
    )
    return policy_step, policy_optimizer, critic_step, critic_optimizer, schedule


def create_critic(
    config: ConfigDict, policy: Tuning, reward_model: ScalarModel, sharding
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
        return stages.make_tuning(config, ScalarModel(policy.trunk or policy.start), name="critic")
    if init == "none":
        return None
    raise ValueError(f"train.critic_init={init!r} must be 'reward_model', 'policy' or 'none'")
