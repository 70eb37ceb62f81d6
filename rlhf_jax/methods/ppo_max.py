"""PPO-max: one iteration of Algorithm 1 as functions of a state.

  rollout = method.sample(state, prompts, iteration)                   line 2
  experience, state = method.score(state, rollout)                     lines 3 and 4
  for minibatch in method.minibatches(experience, iteration):
      state, metrics = method.update(state, minibatch, ptx, iteration) lines 5 and 6

Nothing here depends on whether every weight trains or only adapters on frozen ones: the state holds
what trains, and `PPOMax` the frozen weights.

Source: Zheng et al. 2023 (arXiv 2307.04964), Algorithm 1 and Figure 5.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import losses
from rlhf_jax.data.batches import each_repeated
from rlhf_jax.methods import ppo
from rlhf_jax.methods.ppo import PPOConfig
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
    take,
)
from rlhf_jax.rollouts.respond import rollout_statistics
from rlhf_jax.rollouts.rollout import Rollout, SamplingConfig, make_generate
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import TrainState, create_state, divide, make_train_step

CRITIC_STARTS = ("reward_model", "policy", "none")
# Taken on the first minibatch, before any update: 0, 1 and 1 where sampler and trainer agree.
FIRST = ("policy/approx_kl", "policy/ratio_max", "policy/ratio_min")


@dataclasses.dataclass(frozen=True)
class PPOTrainConfig:
    """Batches of a run, all global: counted over devices and microbatches.

    Attributes:
      iterations: number of iterations, each with a buffer of experience.
      prompts_per_iteration: prompts in a buffer.
      samples_per_prompt: responses to each of them.
      minibatch: responses in one update.
      microbatches: parts of a minibatch whose gradients are computed one after the other; models
        score a buffer in parts of the same size.
      epochs: how often an iteration goes over its buffer.
      critic_pretrain_iterations: iterations at the start in which the critic trains alone.
      critic_init: "reward_model" (PPO-max), "policy" (with a zero head), or "none".
    """

    iterations: int
    prompts_per_iteration: int
    minibatch: int
    samples_per_prompt: int = 1
    microbatches: int = 1
    epochs: int = 1
    critic_pretrain_iterations: int = 0
    critic_init: str = "reward_model"

    def __post_init__(self):
        check(
            self,
            iterations="[1, inf)",
            prompts_per_iteration="[1, inf)",
            minibatch="[1, inf)",
            samples_per_prompt="[1, inf)",
            microbatches="[1, inf)",
            epochs="[1, inf)",
            critic_pretrain_iterations="[0, inf)",
            critic_init=CRITIC_STARTS,
        )
        divide("prompts x samples per prompt", self.rollout_batch, self.minibatch)
        divide("train.minibatch", self.minibatch, self.microbatches)
        alone = self.critic_pretrain_iterations
        if alone >= self.iterations:
            raise ValueError(
                f"train.critic_pretrain_iterations={alone} must be below train.iterations="
                f"{self.iterations}: the policy would never train"
            )
        if alone and self.critic_init == "none":
            raise ValueError(
                f"train.critic_pretrain_iterations={alone} needs a critic, and "
                "train.critic_init='none' has none: set it to 0"
            )

    @property
    def rollout_batch(self) -> int:
        """Responses of an iteration: the size of the experience buffer."""
        return self.prompts_per_iteration * self.samples_per_prompt

    @property
    def microbatch(self) -> int:
        """Responses whose gradients are computed at a time."""
        return self.minibatch // self.microbatches

    @property
    def updates_per_iteration(self) -> int:
        """Minibatches of an iteration."""
        return self.epochs * self.rollout_batch // self.minibatch


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The token-level KL penalty of the reward.

    Attributes:
      coef: η.
      target: KL of a response, in nats, that an adaptive η aims at (Ziegler et al. 2019); 0 is off.
      horizon: responses over which η adapts.
    """

    coef: float = 0.0
    target: float = 0.0
    horizon: int = 10_000

    def __post_init__(self):
        check(self, coef="[0, 1e6]", target="[0, 1e6]", horizon="[1, inf)")
        if self.target and not self.coef:
            raise ValueError(
                f"kl.target={self.target} multiplies kl.coef, and kl.coef=0.0 stays 0: give it a "
                "start, such as 0.05"
            )


@dataclasses.dataclass(frozen=True)
class PenaltyConfig:
    """PPO-penalty's β.

    Attributes:
      coef: β at the start.
      target: KL(π_old ‖ π_θ) that an adaptive β aims at (Schulman et al. 2017, section 4); 0 is
        off.
    """

    coef: float = 1.0
    target: float = 0.0

    def __post_init__(self):
        check(self, coef="[0, 1e6]", target="[0, 1e6]")
        if self.target and not self.coef:
            raise ValueError(
                f"penalty.target={self.target} multiplies penalty.coef, and penalty.coef=0.0 stays "
                "0: give it a start, such as 1"
            )


@dataclasses.dataclass(frozen=True)
class PPOMaxConfig:
    """Everything that decides the numbers of a run, except models and data.

    Attributes:
      train: batches.
      sampling: how responses are drawn.
      optimizer: the policy's.
      critic_optimizer: the critic's.
      reward: shaping of rewards.
      kl: the token-level KL penalty.
      advantage: Φ_t.
      ppo: the two losses.
      penalty: β of `ppo.objective="penalty"`.
      trpo: the trust region of `ppo.objective="trpo"`.
      seed: for sampling and for the order of minibatches.
    """

    train: PPOTrainConfig
    sampling: SamplingConfig
    optimizer: OptimizerConfig
    critic_optimizer: OptimizerConfig
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    kl: KLConfig = dataclasses.field(default_factory=KLConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    penalty: PenaltyConfig = dataclasses.field(default_factory=PenaltyConfig)
    trpo: TRPOConfig = dataclasses.field(default_factory=TRPOConfig)
    seed: int = 0

    def __post_init__(self):
        self.advantage.check_samples(self.train.samples_per_prompt)
        if self.advantage.needs_critic and self.train.critic_init == "none":
            raise ValueError(
                f"advantage.method={self.advantage.method!r} needs a critic: set "
                "train.critic_init to 'reward_model' or 'policy'"
            )
        batch, kl = self.train.rollout_batch, self.kl
        # η changes by up to a fifth of batch / horizon at a time: η (1 - 0.2 · 5) is 0.
        if kl.target and batch >= 5 * kl.horizon:
            raise ValueError(
                f"kl.horizon={kl.horizon} must be above a fifth of the {batch} responses of an "
                "iteration: kl.coef would turn 0 or negative"
            )

    @property
    def updates(self) -> int:
        """Minibatches of the run."""
        return self.train.iterations * self.train.updates_per_iteration

    def slower(self, times: int) -> PPOMaxConfig:
        """The same with the learning rates, or TRPO's trust region, halved so many times."""
        halved = 0.5**times
        return dataclasses.replace(
            self,
            optimizer=self.optimizer.scaled(halved),
            critic_optimizer=self.critic_optimizer.scaled(halved),
            trpo=dataclasses.replace(self.trpo, max_kl=self.trpo.max_kl * halved),
        )

    def check_devices(self, devices: int) -> None:
        """Checks that rows can be spread.

        Raises:
          ValueError: names the size that does not divide.
        """
        microbatch, prompts = self.train.microbatch, self.train.prompts_per_iteration
        divide("rows of a microbatch (over devices)", microbatch, devices)
        divide("train.prompts_per_iteration (over devices)", prompts, devices)


class PPOState(flax.struct.PyTreeNode):
    """Everything that a run changes, and so everything that a resumed run needs.

    Attributes:
      policy: π_θ and its optimizer.
      critic: V_φ and its optimizer; None for a Φ_t without critic.
      moments: running moments of the reward.
      kl_coef: η of the token-level KL penalty.
      penalty_coef: β of PPO-penalty.
    """

    policy: TrainState
    critic: TrainState | None
    moments: losses.RunningMoments
    kl_coef: jax.Array
    penalty_coef: jax.Array


class PPOMax:
    """The functions of an iteration, compiled for some models on some devices.

    Args:
      config: every setting.
      policy: π_θ at its start, or adapters on it; it gives its start away, see `Tuning.take`.
      reference: π_ref, frozen.
      reward_model: frozen.
      make_critic: maps the language model that the policy starts from to the critic's start, or
        to None where there is no critic. Called once the policy's state holds its own copy, so that
        no device holds more models than it needs to.
      eos_ids: tokens that end a response.
      pad_id: written after the end.
      sharding: where trees live.
    """

    def __init__(
        self,
        config: PPOMaxConfig,
        *,
        policy: Tuning,
        reference: Transformer,
        reward_model: ScalarModel,
        make_critic: Callable[[Transformer], Tuning | None],
        eos_ids: tuple[int, ...],
        pad_id: int,
        sharding: Sharding,
    ):
        self.config, self._sharding = config, sharding
        self._policy, self._reference, self._reward_model = policy, reference, reward_model
        generate = functools.partial(
            make_generate, config.sampling, eos_ids=eos_ids, pad_id=pad_id, sharding=sharding
        )
        # One response to each prompt, as evaluations ask for.
        self.generate = generate()
        self._generate = functools.cache(
            lambda samples: self.generate if samples == 1 else generate(samples=samples)
        )
        self._score = make_score(config, sharding)
        self._take = jax.jit(take, out_shardings=sharding.batch)
        self._experience_metrics = jax.jit(ppo.experience_metrics)
        optimizers, self._schedule = make_optimizers(config)
        policy_state = create_state(policy.take(), optimizers[0], sharding)
        self._critic = make_critic(policy.trunk or policy_state.model)
        critic_state = None
        if self._critic is not None:
            critic_state = create_state(self._critic.take(), optimizers[1], sharding)
        self._policy_step, self._critic_step = make_updates(
            config, sharding, optimizers, policy.trunk, self._critic and self._critic.trunk
        )
        self._sample_key, self.eval_key = jax.random.split(jax.random.key(config.seed))
        self._start: PPOState | None = PPOState(
            policy=policy_state,
            critic=critic_state,
            moments=sharding.put_everywhere(losses.RunningMoments.zeros()),
            kl_coef=sharding.put_everywhere(jnp.float32(config.kl.coef)),
            penalty_coef=sharding.put_everywhere(jnp.float32(config.penalty.coef)),
        )

    def start(self) -> PPOState:
        """The state at the start, which this object then forgets: updates donate it."""
        state, self._start = self._start, None
        if state is None:
            raise RuntimeError("the start has been taken: an update may have donated it")
        return state

    def policy(self, state: PPOState) -> Transformer:
        """The policy to decode with."""
        return self._policy.sampling_model(state.policy.model)

    def sample(
        self,
        state: PPOState,
        prompts: dict[str, np.ndarray],
        iteration: int,
        *,
        samples: int | None = None,
    ) -> Rollout:
        """Line 2: responses to prompts.

        Args:
          state: whose policy answers.
          prompts: `{"tokens", "mask"}` `[B, P]`.
          iteration: counted from 0; each draws from a key of its own.
          samples: responses to a prompt, which the policy reads once; None is
            `train.samples_per_prompt`.

        Returns:
          The rollout of B x samples rows, those of a prompt adjacent.
        """
        samples = self.config.train.samples_per_prompt if samples is None else samples
        # A few prompts with many samples may be spread by responses only.
        if len(prompts["tokens"]) % (self._sharding.data // self._sharding.shares):
            prompts, samples = each_repeated(prompts, samples), 1
        batch = self._sharding.put_batch(prompts)
        key = jax.random.fold_in(self._sample_key, iteration)
        return self._generate(samples)(self.policy(state), batch["tokens"], batch["mask"], key)

    def score(self, state: PPOState, rollout: Rollout) -> tuple[Experience, PPOState]:
        """Lines 3 and 4: rewards and advantages, and the state with the new reward moments."""
        critic = None
        if self._critic is not None and state.critic is not None:
            critic = self._critic.model(state.critic.model)
        experience, moments = self._score(
            rollout, self._reference, self._reward_model, critic, state.moments, state.kl_coef
        )
        return experience, state.replace(moments=moments)

    def minibatches(self, experience: Experience, iteration: int) -> Iterator[Experience]:
        """Rows of each minibatch of an iteration: every epoch visits every row once."""
        rows, size = self.config.train.rollout_batch, self.config.train.minibatch
        # Rows past the end would not fail: the last one would be taken again and again.
        chex.assert_axis_dimension(experience.rewards, 0, rows)
        rng = np.random.default_rng((self.config.seed, iteration))
        for _ in range(self.config.train.epochs):
            for part in rng.permutation(rows).reshape(-1, size):
                yield self._take(experience, part)

    def update(
        self, state: PPOState, minibatch: Experience, ptx: Iterator[dict], iteration: int
    ) -> tuple[PPOState, dict[str, Any]]:
        """Lines 5 and 6: a step of the critic and, once it is pre-trained, of the policy.

        Args:
          state: donated.
          minibatch: from `minibatches`.
          ptx: batches of SFT text, of which one is taken if the policy's loss needs it.
          iteration: counted from 0.

        Returns:
          The new state, and metrics of both steps.
        """
        metrics: dict[str, Any] = {}
        if state.critic is not None:
            critic, of_critic = self._critic_step(state.critic, (minibatch, None))
            state = state.replace(critic=critic)
            metrics |= {n.replace("optim/", "critic/"): value for n, value in of_critic.items()}
        if iteration >= self.config.train.critic_pretrain_iterations:
            text = self._sharding.put_batch(next(ptx)) if self.config.ppo.ptx_coef else None
            policy, of_policy = self._policy_step(
                state.policy, (minibatch, text), state.penalty_coef
            )
            state = state.replace(policy=policy)
            metrics |= of_policy
        return state, metrics

    def metrics(
        self, experience: Experience, updates: Sequence[dict[str, jax.Array]]
    ) -> dict[str, Any]:
        """Metrics of an iteration: its last update, its first (those in `FIRST`), and its buffer.

        Args:
          experience: the buffer.
          updates: metrics of every update, in order.
        """
        first = {f"{name}_first": updates[0][name] for name in FIRST if name in updates[0]}
        fetched = distributed.fetch((experience.rollout, experience.evaluation))
        return (
            updates[-1]
            | first
            | rollout_statistics(*fetched)
            | self._experience_metrics(experience)
        )

    def adapt(self, state: PPOState, metrics: dict[str, Any]) -> PPOState:
        """Adapts the coefficients that have a target."""
        kl, penalty = self.config.kl, self.config.penalty
        if kl.target:
            coef = losses.adaptive_kl_coef(
                state.kl_coef,
                jnp.float32(metrics["policy/kl_ref_sequence"]),
                target=kl.target,
                horizon=kl.horizon,
                steps=self.config.train.rollout_batch,
            )
            state = state.replace(kl_coef=coef)
        # There is no KL of the policy while the critic trains alone.
        if penalty.target and "policy/approx_kl" in metrics:
            coef = losses.adaptive_penalty_coef(
                state.penalty_coef, metrics["policy/approx_kl"], target=penalty.target
            )
            state = state.replace(penalty_coef=coef)
        return state

    def settings_now(self, state: PPOState) -> dict[str, jax.Array]:
        """What is scheduled or adapts: the learning rate, but for TRPO, and η."""
        now = {"policy/kl_coef": state.kl_coef}
        if self._schedule is not None:
            now["optim/learning_rate"] = self._schedule(state.policy.step)
        return now


def make_optimizers(
    config: PPOMaxConfig,
) -> tuple[
    tuple[optax.GradientTransformation, optax.GradientTransformation], optax.Schedule | None
]:
    """The optimizers of policy and critic, and the policy's learning rate by update.

    TRPO has no rate, and an optimizer that holds no state: the trust region makes its steps.
    """
    critic_optimizer, _ = make_optimizer(config.critic_optimizer, config.updates)
    if config.ppo.objective == "trpo":
        return (optax.identity(), critic_optimizer), None
    policy_optimizer, schedule = make_optimizer(config.optimizer, config.updates)
    return (policy_optimizer, critic_optimizer), schedule


def make_score(config: PPOMaxConfig, sharding: Sharding) -> Callable[..., Any]:
    """Compiled: rollout -> Experience (lines 3 and 4 of Algorithm 1) and new reward moments."""
    train = config.train
    rows = min(train.rollout_batch, train.microbatch)
    microbatches = divide("rollout batch", train.rollout_batch, rows)

    def score(rollout, reference, reward_model, critic, moments, kl_coef):
        evaluation = evaluate(
            rollout,
            reference,
            reward_model,
            critic,
            temperature=config.sampling.policy_temperature,
            microbatches=microbatches,
        )
        rewards, moments = shape_rewards(
            rollout,
            evaluation,
            moments,
            config=config.reward,
            discount=config.advantage.discount,
            kl_coef=kl_coef,
        )
        phi, returns = advantages(
            rewards,
            evaluation.values,
            rollout.response_mask,
            config=config.advantage,
            samples_per_prompt=train.samples_per_prompt,
        )
        return Experience(rollout, evaluation, rewards, phi, returns), moments

    return jax.jit(sharding.bind(score))


def make_updates(
    config: PPOMaxConfig,
    sharding: Sharding,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    policy_trunk: Any = None,
    critic_trunk: Any = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled policy and critic steps.

    Args:
      config: the settings of the run.
      sharding: where trees live.
      optimizers: the policy's and the critic's.
      policy_trunk: frozen weights beside which the policy's adapters train; None without adapters.
      critic_trunk: the same for the critic.
    """
    prepare = functools.partial(ppo.prepare, config=config.ppo)
    microbatches = config.train.microbatches
    temperature = config.sampling.policy_temperature
    if config.ppo.objective == "trpo":
        policy_step = make_trust_region_step(
            config.ppo,
            config.trpo,
            sharding,
            temperature=temperature,
            microbatches=microbatches,
        )
    else:
        policy_step = make_train_step(
            functools.partial(ppo.policy_loss, config=config.ppo, temperature=temperature),
            optimizers[0],
            sharding,
            microbatches=microbatches,
            prepare=prepare,
            trunk=policy_trunk,
        )
    critic_step = make_train_step(
        functools.partial(ppo.critic_loss, config=config.ppo),
        optimizers[1],
        sharding,
        microbatches=microbatches,
        prepare=prepare,
        trunk=critic_trunk,
    )
    return policy_step, critic_step
