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
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.preflight.programs import Program, placed
from rlhf_jax.rollouts.rollout import make_generate
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training import memory
from rlhf_jax.training.step import create_state, make_create_state, state_shardings


class PPORun:
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

    def __init__(
        self,
        config: PPOMaxConfig,
        sizes: ModelConfig,
        sharding: Sharding,
        *,
        prompt_length: int,
        ptx_length: int,
    ):
        config.check_devices(sharding.data)
        self.config, self.sizes, self.sharding = config, sizes, sharding
        self.prompt_length, self.ptx_length = prompt_length, ptx_length
        self.rows, self.updates = config.train.rollout_batch, config.train.updates_per_iteration
        language = jax.eval_shape(lambda: Transformer(sizes, jax.random.key(0)))
        scalar = jax.eval_shape(
            lambda: ScalarModel(Transformer(sizes, jax.random.key(0)), jax.random.key(0))
        )
        self.reference = placed(language, sharding.frozen(language))
        self.reward_model = placed(scalar, sharding.frozen(scalar))
        optimizers, _ = make_optimizers(config)
        self.policy_step, self.critic_step = make_updates(config, sharding, optimizers)
        self._optimizers = dict(zip(("policy", "critic"), optimizers, strict=True))
        self.policy = self._state(language, optimizers[0])
        has_critic = config.train.critic_init != "none"
        self.critic = self._state(scalar, optimizers[1]) if has_critic else None
        generate = functools.partial(
            make_generate, config.sampling, eos_ids=(2,), pad_id=0, sharding=sharding
        )
        self.samples = config.train.samples_per_prompt
        self.generate = generate(samples=self.samples)
        # Evaluations ask as many prompts as there are responses, each once.
        self.generate_once = self.generate if self.samples == 1 else generate()
        self.score = make_score(config, sharding)
        self.rollout, self.experience = self._data()

    def _state(self, model: Any, optimizer: Any) -> Any:
        state = jax.eval_shape(lambda m: create_state(m, optimizer, self.sharding), model)
        return placed(state, state_shardings(state, self.sharding))

    def _array(self, shape: tuple[int, ...], dtype: Any, *, whole: bool = False):
        where = self.sharding.replicated if whole else self.sharding.batch
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def _rows(self, tree: Any, rows: int) -> Any:
        """The tree with another number of rows, split over `data`."""
        return jax.tree.map(lambda x: self._array((rows, *x.shape[1:]), x.dtype), tree)

    def _whole(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: self._array(x.shape, x.dtype, whole=True), tree)

    def _prompts(self, samples: int = 1) -> tuple[Any, ...]:
        shape = (self.rows // samples, self.prompt_length)
        key = self._whole(jax.eval_shape(lambda: jax.random.key(0)))
        return self._array(shape, jnp.int32), self._array(shape, jnp.bool_), key

    def _data(self) -> tuple[Any, Any]:
        """A rollout and its experience."""
        rollout = jax.eval_shape(self.generate, self.policy.model, *self._prompts(self.samples))
        rollout = self._rows(rollout, self.rows)
        experience, _ = jax.eval_shape(self.score, *self._score_arguments(rollout))
        return rollout, self._rows(experience, self.rows)

    def _score_arguments(self, rollout: Any) -> tuple[Any, ...]:
        critic = None if self.critic is None else self.critic.model
        moments = self._whole(jax.eval_shape(losses.RunningMoments.zeros))
        kl_coef = self._array((), jnp.float32, whole=True)
        return rollout, self.reference, self.reward_model, critic, moments, kl_coef

    def holdings(self) -> list[memory.Holding]:
        """Trees that stay on the devices from one program to the next."""
        held = []
        for name, state in (("policy", self.policy), ("critic", self.critic)):
            if state is not None:
                held += memory.state_holdings(name, state, self.sharding)
        held = [item for item in held if not item.name.endswith("/gradients")]
        held.append(memory.frozen_holding("reference", self.reference, self.sharding))
        held.append(memory.frozen_holding("reward model", self.reward_model, self.sharding))
        where = jax.tree.map(lambda x: x.sharding, self.experience)
        held.append(memory.holding("experience buffer", self.experience, where))
        return held

    def programs(self) -> Iterator[Program]:
        """The start, every program of an iteration, and sampling from the reference."""
        yield self._start()
        tokens = self.config.sampling.max_new_tokens
        for name, generate, model, samples, calls in (
            ("generate", self.generate, self.policy.model, self.samples, 1),
            ("generate (reference)", self.generate_once, self.reference, 1, 0),
        ):
            arguments = (model, *self._prompts(samples))
            yield Program(
                name, generate, arguments, calls, self._decode_traffic(), steps=tokens - 1
            )
        yield Program("score", self.score, self._score_arguments(self.rollout))
        minibatch = self._rows(self.experience, self.config.train.minibatch)
        yield Program(
            "policy step",
            self.policy_step,
            (self.policy, (minibatch, self._ptx()), self._array((), jnp.float32, whole=True)),
            self.updates,
            weights=_bytes(self.policy.model),
        )
        if self.critic is not None:
            yield Program(
                "critic step",
                self.critic_step,
                (self.critic, (minibatch, None)),
                self.updates,
                weights=_bytes(self.critic.model),
            )

    def _start(self) -> Program:
        """Makes the last state from a loaded model, which is then freed; all else is there."""
        name, state = ("critic", self.critic) if self.critic else ("policy", self.policy)
        create = make_create_state(state.model, self._optimizers[name], self.sharding)
        return Program(f"create {name}", create, (state.model,), calls=0, creates=True)

    def _ptx(self) -> dict[str, Any] | None:
        if not self.config.ppo.ptx_coef:
            return None
        shape = (self.config.train.minibatch, self.ptx_length)
        return {
            "tokens": self._array(shape, jnp.int32),
            "segments": self._array(shape, jnp.int32),
            "loss_mask": self._array(shape, jnp.bool_),
        }

    def _decode_traffic(self) -> float:
        """Bytes that a device reads to sample: all its weights for each token, and its cache."""
        sizes, tokens = self.sizes, self.config.sampling.max_new_tokens
        weights = _bytes(self.policy.model) / self.sharding.tensor
        size = jnp.dtype(sizes.dtype).itemsize / self.sharding.tensor
        per_token = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * size
        seen = self.prompt_length + tokens / 2
        return tokens * (weights + self.rows / self.sharding.data * seen * per_token)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
