"""A PPO run as shapes, to compile elsewhere: what it holds, and its programs."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import ppo_setup
from experiments.responses import jit_generate
from rlhf_jax import losses
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.presets import PRESETS, preset
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.preflight.programs import Program, placed
from rlhf_jax.rollouts.experience import AdvantageConfig
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training import memory
from rlhf_jax.training.step import create_state, make_create_state, state_shardings


def model_sizes(config: ConfigDict, name: str = "") -> ModelConfig:
    """Sizes of the run's models: from `name`, from the SFT model's files, or from its stage.

    Raises:
      ValueError: they can be found nowhere; says what to pass.
    """
    settings = dict(config.model)
    folder = Path(config.inputs.reference)
    stage = None if name else _sft_config(config.inputs.variant)
    if not name and (folder / "config.json").exists():
        return dataclasses.replace(hf_weights.load_config(folder), **settings)
    if not name and stage is not None and not stage.inputs.model:
        return ModelConfig(vocab_size=stage.tokenizer.vocab_size, **dict(stage.model), **settings)
    name = name or (stage.inputs.model if stage is not None else "")
    found = preset(name, **settings)
    if found is not None:
        return found
    if (Path(name) / "config.json").exists():
        return dataclasses.replace(hf_weights.load_config(name), **settings)
    raise ValueError(
        f"the sizes of {name or folder} are not known here: pass --model with a folder or one of "
        f"{', '.join(PRESETS)}"
    )


def _sft_config(variant: str) -> ConfigDict | None:
    """The config of the stage that makes the models; None where it has no such variant."""
    try:
        return importlib.import_module("configs.sft").get_config(variant)
    except ValueError:
        return None


class Run:
    """A PPO run as shapes: its trees, where they lie, and its programs.

    Args:
      config: Of `ppo_max`.
      sizes: Of its models.
      sharding: Mesh of abstract devices, and mode.

    Raises:
      ValueError: the run trains adapters, or its sizes do not divide.
    """

    def __init__(self, config: ConfigDict, sizes: ModelConfig, sharding: Sharding):
        if config.lora.rank:
            raise ValueError(
                f"lora.rank={config.lora.rank}: the preflight compiles runs that train every "
                "weight; pass --config.lora.rank=0 for an upper bound"
            )
        self.config, self.sizes, self.sharding = config, sizes, sharding
        self.advantage = AdvantageConfig(
            samples_per_prompt=config.train.samples_per_prompt, **config.advantage
        )
        ppo_setup.check(config, self.advantage, sharding.data)
        self.rows = ppo_setup.rollout_batch(config)
        self.updates = config.train.epochs * self.rows // config.train.minibatch
        language = jax.eval_shape(lambda: Transformer(sizes, jax.random.key(0)))
        scalar = jax.eval_shape(
            lambda: ScalarModel(Transformer(sizes, jax.random.key(0)), jax.random.key(0))
        )
        self.reference = placed(language, sharding.frozen(language))
        self.reward_model = placed(scalar, sharding.frozen(scalar))
        optimizers, _ = ppo_setup.make_optimizers(config, config.train.iterations * self.updates)
        self.policy_step, self.critic_step = ppo_setup.make_updates(config, sharding, optimizers)
        self._optimizers = dict(zip(("policy", "critic"), optimizers, strict=True))
        self.policy = self._state(language, optimizers[0])
        has_critic = config.train.critic_init != "none"
        self.critic = self._state(scalar, optimizers[1]) if has_critic else None
        self.generate = jit_generate(config, (2,), 0, sharding)
        self.score = ppo_setup.make_score(config, self.advantage, sharding)
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

    def _prompts(self) -> tuple[Any, ...]:
        shape = (self.rows, max(self.config.data.prompt_buckets))
        key = self._whole(jax.eval_shape(lambda: jax.random.key(0)))
        return self._array(shape, jnp.int32), self._array(shape, jnp.bool_), key

    def _data(self) -> tuple[Any, Any]:
        """A rollout and its experience."""
        rollout = jax.eval_shape(self.generate, self.policy.model, *self._prompts())
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
        for name, model, calls in (
            ("generate", self.policy.model, 1),
            ("generate (reference)", self.reference, 0),
        ):
            arguments = (model, *self._prompts())
            yield Program(
                name, self.generate, arguments, calls, self._decode_traffic(), steps=tokens - 1
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
        """The last state is made, from a loaded model that goes afterwards; all else is there."""
        name, state = ("critic", self.critic) if self.critic else ("policy", self.policy)
        create = make_create_state(state.model, self._optimizers[name], self.sharding)
        return Program(f"create {name}", create, (state.model,), calls=0, creates=True)

    def _ptx(self) -> dict[str, Any] | None:
        if not self.config.ppo.ptx_coef:
            return None
        shape = (self.config.train.minibatch, self.config.data.ptx_length)
        return {
            "tokens": self._array(shape, jnp.int32),
            "segments": self._array(shape, jnp.int32),
            "loss_mask": self._array(shape, jnp.bool_),
        }

    def _decode_traffic(self) -> float:
        """Bytes that a device reads to sample: all its weights for each token, and its cache."""
        sizes, tokens = self.sizes, self.config.sampling.max_new_tokens
        weights = _bytes(self.policy.model) / self.sharding.tensor
        per_token = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim
        per_token *= jnp.dtype(sizes.dtype).itemsize / self.sharding.tensor
        seen = max(self.config.data.prompt_buckets) + tokens / 2
        return tokens * (weights + self.rows / self.sharding.data * seen * per_token)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
