"""A PPO run as shapes, to compile elsewhere: what it holds, and its programs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import losses
from rlhf_jax.methods.ppo_max import (
    PPOMaxConfig,
    make_optimizers,
    make_score,
    make_updates,
)
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.preflight.programs import Program
from rlhf_jax.preflight.run_shapes import (
    RunShapes,
    language_shapes,
    scalar_shapes,
    tree_bytes,
    whole_row_counts,
)
from rlhf_jax.rollouts.rollout import make_generate
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training import memory


class PPORun(RunShapes):
    """A PPO run as shapes: its trees, where they lie, and its programs.

    Args:
      config: the settings of the run.
      sizes: the sizes of its models.
      sharding: mesh of abstract devices, and mode.
      prompt_length: tokens of the longest bucket of prompts.
      ptx_length: tokens of a row of the ptx loss.

    Raises:
      ValueError: sizes that do not divide.
    """

    unit = "iteration"
    samples = "responses"

    def __init__(
        self,
        config: PPOMaxConfig,
        sizes: ModelConfig,
        sharding: Sharding,
        *,
        prompt_length: int,
        ptx_length: int,
    ):
        super().__init__(sizes, sharding)
        config.check_devices(sharding.data)
        self.config = config
        self.prompt_length, self.ptx_length = prompt_length, ptx_length
        self.rows, self.updates = config.train.rollout_batch, config.train.updates_per_iteration
        language, scalar = language_shapes(sizes), scalar_shapes(sizes)
        self.reference, self.reward_model = self.frozen(language), self.frozen(scalar)
        optimizers, _ = make_optimizers(config)
        self.policy_step, self.critic_step = make_updates(config, sharding, optimizers)
        self._optimizers = dict(zip(("policy", "critic"), optimizers, strict=True))
        self.policy = self.state(language, optimizers[0])
        has_critic = config.train.critic_init != "none"
        self.critic = self.state(scalar, optimizers[1]) if has_critic else None
        generate = functools.partial(
            make_generate, config.sampling, eos_ids=(2,), pad_id=0, sharding=sharding
        )
        self.per_prompt = config.train.samples_per_prompt
        self.generate = generate(samples=self.per_prompt)
        # Evaluations ask as many prompts as there are responses, each once.
        self.generate_once = self.generate if self.per_prompt == 1 else generate()
        self.score = make_score(config, sharding)
        self.rollout, self.experience = self._data()

    @property
    def microbatch_counts(self) -> tuple[int, ...]:
        """See `RunShapes`."""
        return whole_row_counts(self.updated_rows, self.sharding.data)

    @property
    def updated_rows(self) -> int:
        """See `RunShapes`."""
        return self.config.train.minibatch

    def notes(self) -> list[str]:
        """See `RunShapes`."""
        return [
            f"prompts of {self.prompt_length} tokens, the longest bucket, and responses of "
            f"{self.config.sampling.max_new_tokens}"
        ]

    def _data(self) -> tuple[Any, Any]:
        """A rollout and its experience."""
        prompts = self.prompts(self.rows // self.per_prompt, self.prompt_length)
        rollout = jax.eval_shape(self.generate, self.policy.model, *prompts)
        rollout = self.with_rows(rollout, self.rows)
        experience, _ = jax.eval_shape(self.score, *self._score_arguments(rollout))
        return rollout, self.with_rows(experience, self.rows)

    def _score_arguments(self, rollout: Any) -> tuple[Any, ...]:
        critic = None if self.critic is None else self.critic.model
        moments = self.whole(jax.eval_shape(losses.RunningMoments.zeros))
        kl_coef = self.array((), jnp.float32, whole=True)
        return rollout, self.reference, self.reward_model, critic, moments, kl_coef

    def holdings(self) -> list[memory.Holding]:
        """See `RunShapes`."""
        held = self.lasting("policy", self.policy)
        if self.critic is not None:
            held += self.lasting("critic", self.critic)
        held.append(memory.frozen_holding("reference", self.reference, self.sharding))
        held.append(memory.frozen_holding("reward model", self.reward_model, self.sharding))
        where = jax.tree.map(lambda x: x.sharding, self.experience)
        held.append(memory.holding("experience buffer", self.experience, where))
        return held

    def programs(self) -> Iterator[Program]:
        """The start, every program of an iteration, and sampling from the reference."""
        name, state = ("critic", self.critic) if self.critic else ("policy", self.policy)
        yield self.create(name, state.model, self._optimizers[name])
        tokens = self.config.sampling.max_new_tokens
        traffic = self.sampled_traffic(self.policy.model, self.rows, self.prompt_length, tokens)
        sampling: tuple[tuple[str, Any, Any, int, int], ...] = (
            ("generate", self.generate, self.policy.model, self.per_prompt, 1),
            ("generate (reference)", self.generate_once, self.reference, 1, 0),
        )
        for name, generate, model, samples, calls in sampling:
            prompts = self.prompts(self.rows // samples, self.prompt_length)
            yield Program(name, generate, (model, *prompts), calls, traffic, steps=tokens - 1)
        yield Program("score", self.score, self._score_arguments(self.rollout), divided=True)
        minibatch = self.with_rows(self.experience, self.config.train.minibatch)
        yield Program(
            "policy step",
            self.policy_step,
            (self.policy, (minibatch, self._ptx()), self.array((), jnp.float32, whole=True)),
            self.updates,
            weights=tree_bytes(self.policy.model),
            divided=True,
        )
        if self.critic is not None:
            yield Program(
                "critic step",
                self.critic_step,
                (self.critic, (minibatch, None)),
                self.updates,
                weights=tree_bytes(self.critic.model),
                divided=True,
            )

    def _ptx(self) -> dict[str, Any] | None:
        if not self.config.ppo.ptx_coef:
            return None
        shape = (self.config.train.minibatch, self.ptx_length)
        return {
            "tokens": self.array(shape, jnp.int32),
            "segments": self.array(shape, jnp.int32),
            "loss_mask": self.array(shape, jnp.bool_),
        }
