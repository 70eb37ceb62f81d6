"""Runs of SFT, reward model and DPO as shapes: one train step, and what measures the model.

Batches are those that the run's own batchers make of one document, or pair, of the longest length.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.batches import PackedBatches, PairBatches
from rlhf_jax.data.packing import Arrays
from rlhf_jax.data.schemas import Encoded, EncodedPair
from rlhf_jax.methods import dpo, reward_model, sft
from rlhf_jax.methods.dpo import DPOConfig
from rlhf_jax.methods.pairwise import PairTrainConfig
from rlhf_jax.methods.reward_model import RewardModelConfig
from rlhf_jax.methods.sft import SFTConfig
from rlhf_jax.models import lora
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.lora import LoRAConfig, Tuning
from rlhf_jax.preflight.programs import Program
from rlhf_jax.preflight.run_shapes import (
    RunShapes,
    language_shapes,
    scalar_shapes,
    tree_bytes,
    whole_row_counts,
)
from rlhf_jax.rollouts.respond import make_evaluate
from rlhf_jax.rollouts.rollout import SamplingConfig, make_generate
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training import memory
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer

# Batchers choose lengths that are multiples of it, see `data.packing.bucket_lengths`.
_MULTIPLE = 16


class TuningRun(RunShapes):
    """A run whose updates are one kind of step on batches of one kind.

    Args:
      name: of the model, for the report.
      model: what is loaded, as shapes that lie nowhere.
      sizes: the sizes of the model.
      sharding: mesh of abstract devices, and mode.
      adapters: rank, α and targets; rank 0 trains every weight.
      optimizer: its settings.
      batches: those that the step is compiled for; the first is that of the longest texts.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        sizes: ModelConfig,
        sharding: Sharding,
        *,
        adapters: LoRAConfig,
        optimizer: OptimizerConfig,
        batches: list[Arrays],
    ):
        super().__init__(sizes, sharding)
        self.name, self.batches = name, [self.batch(one) for one in batches]
        self.rows = len(batches[0]["tokens"])
        key = jax.random.key(0)
        started = jax.eval_shape(lambda m: lora.make_tuning(m, adapters, key).start, model)
        loaded, trunk = self.trained(model), None
        if adapters.rank:
            trunk = loaded.trunk if isinstance(loaded, ScalarModel) else loaded
        self.tuning = Tuning(self.trained(started), trunk)
        # The number of steps decides the schedule, and no shape.
        self.optimizer, _ = make_optimizer(optimizer, total_steps=1)
        self._state = self.state(started, self.optimizer)
        self.model = self.tuning.model(self._state.model)

    @property
    @abc.abstractmethod
    def step(self) -> Any:
        """The train step of the run."""

    @abc.abstractmethod
    def readings(self) -> Iterator[Program]:
        """Programs that read batches and change nothing."""

    def frozen_holdings(self) -> list[memory.Holding]:
        """Models that do not train, beside the trunk of adapters."""
        return []

    @property
    def merged(self) -> int:
        """Bytes of a device that a model with its adapters added into the matrices takes more."""
        if self.tuning.trunk is None:
            return 0
        _, lowered = lora.make_merge(self.model)
        bases = [weight.base for weight in lowered.values()]
        where = jax.tree.map(lambda x: x.sharding, bases)
        return memory.holding("merged", bases, where).per_device

    def holdings(self) -> list[memory.Holding]:
        """See `RunShapes`."""
        held = self.lasting(self.name, self._state)
        trunk = self.tuning.trunk
        if trunk is not None:
            where = self.sharding.params(trunk)
            reason = f"mode {self.sharding.mode} keeps weights that have adapters whole"
            spread = self.sharding.spreads("parameters")
            name = f"{self.name}/frozen weights"
            held.append(memory.holding(name, trunk, where, reason="" if spread else reason))
        held += self.frozen_holdings()
        batch = self.batches[0]
        where = jax.tree.map(lambda x: x.sharding, batch)
        held.append(memory.holding("batch", batch, where))
        return held

    def programs(self) -> Iterator[Program]:
        """The start, the step for each shape of a batch, and what measures the model."""
        yield self.create(self.name, self.tuning.start, self.optimizer)
        yield from self.before()
        for number, batch in enumerate(self.batches):
            yield Program(
                self.shape_name("train step", number),
                self.step,
                (self._state, batch),
                # The work of an update is that of the longest batch.
                calls=int(number == 0),
                weights=tree_bytes(self._state.model),
                divided=True,
            )
        yield from self.readings()
        if self.tuning.trunk is not None:
            merge, lowered = lora.make_merge(self.model)
            yield Program("merge adapters", merge, (lowered,), calls=0)

    def before(self) -> Iterator[Program]:
        """Programs that run once, before the first update."""
        yield from ()

    def shape_name(self, name: str, number: int) -> str:
        """What a report calls a program for one of the batches."""
        if number == 0:
            return name
        rows, *_, length = self.batches[number]["tokens"].shape
        return f"{name} ({rows} x {length})"


class SFTRun(TuningRun):
    """A run of `methods.sft`.

    Args:
      config: batches of the run.
      sizes: the sizes of the model.
      sharding: mesh of abstract devices, and mode.
      adapters: see `TuningRun`.
      optimizer: its settings.
    """

    def __init__(
        self,
        config: SFTConfig,
        sizes: ModelConfig,
        sharding: Sharding,
        *,
        adapters: LoRAConfig,
        optimizer: OptimizerConfig,
    ):
        self.config = config
        super().__init__(
            "model",
            language_shapes(sizes),
            sizes,
            sharding,
            adapters=adapters,
            optimizer=optimizer,
            batches=[packed_batch(config)],
        )

    @property
    def updated_rows(self) -> int:
        """See `RunShapes`."""
        return self.config.minibatch

    @property
    def microbatch_counts(self) -> tuple[int, ...]:
        """See `RunShapes`."""
        return whole_row_counts(self.updated_rows, self.sharding.data)

    @property
    def step(self) -> Any:
        """See `TuningRun`."""
        return sft.make_step(self.config, self.optimizer, self.sharding, trunk=self.tuning.trunk)

    def readings(self) -> Iterator[Program]:
        """Held-out rows, all rows of a minibatch at once; at the end beside a merged model."""
        arguments = (self.model, self.batches[0])
        yield Program(
            "evaluation", sft.negative_log_likelihood, arguments, calls=0, beside=self.merged
        )

    def notes(self) -> list[str]:
        """See `RunShapes`."""
        return [
            f"every batch has {self.config.minibatch} rows of {self.config.row_length} tokens; "
            "the evaluation reads as many at once"
        ]


class PairRun(TuningRun):
    """A run on pairs: the reward model's, or DPO's.

    Args:
      name: see `TuningRun`, as are all that are not named here.
      model: as there.
      sizes: as there.
      sharding: as there.
      train: batches of the run.
      longest: the most tokens of a side.
      devices: the rows of a batch are a multiple of it, as the run counts them.
      adapters: as there.
      optimizer: as there.
    """

    samples = "pairs"

    def __init__(
        self,
        name: str,
        model: Any,
        sizes: ModelConfig,
        sharding: Sharding,
        *,
        train: PairTrainConfig,
        longest: int,
        devices: int,
        adapters: LoRAConfig,
        optimizer: OptimizerConfig,
    ):
        self.train = train
        undivided = dataclasses.replace(train, microbatches=1)
        self._undivided = len(largest_pairs(undivided, longest, devices)[0]["valid"])
        super().__init__(
            name,
            model,
            sizes,
            sharding,
            adapters=adapters,
            optimizer=optimizer,
            batches=[self.complete(one) for one in largest_pairs(train, longest, devices)],
        )

    def complete(self, batch: Arrays) -> Arrays:
        """The batch with what the run adds to it."""
        return batch

    @property
    def updated_rows(self) -> int:
        """See `RunShapes`."""
        return self.batches[0]["valid"].shape[0]

    @property
    def microbatch_counts(self) -> tuple[int, ...]:
        """See `RunShapes`; these need no filler."""
        return whole_row_counts(self._undivided, self.sharding.data)

    def notes(self) -> list[str]:
        """See `RunShapes`."""
        shapes = [one["tokens"].shape for one in self.batches]
        text = " and ".join(f"{rows} x 2 x {length}" for rows, _, length in shapes)
        which = "the longest pairs" if len(shapes) == 1 else "the longest pairs, and of most tokens"
        return [
            f"batches of {text} (pairs x sides x tokens), {which}: the largest that "
            "data.max_length and train allow; a run whose pairs are shorter takes less"
        ]


class RewardModelRun(PairRun):
    """A run of `methods.reward_model`.

    Args:
      config: what the model minimises.
      sizes: the sizes of the language model that it begins with.
      sharding: mesh of abstract devices, and mode.
      train: batches of the run.
      longest: the most tokens of a prompt with one response.
      layers: how many of the first layers are kept; 0 is all.
      adapters: see `TuningRun`.
      optimizer: its settings.
    """

    def __init__(
        self,
        config: RewardModelConfig,
        sizes: ModelConfig,
        sharding: Sharding,
        *,
        train: PairTrainConfig,
        longest: int,
        layers: int,
        adapters: LoRAConfig,
        optimizer: OptimizerConfig,
    ):
        self.config = config
        model = scalar_shapes(sizes, layers)
        super().__init__(
            "model",
            model,
            model.trunk.config,
            sharding,
            train=train,
            longest=longest,
            devices=sharding.data,
            adapters=adapters,
            optimizer=optimizer,
        )

    def complete(self, batch: Arrays) -> Arrays:
        """With ratings of both sides, where all texts of a batch are compared."""
        if self.config.comparisons != "batch":
            return batch
        return batch | {"ratings": np.zeros((len(batch["valid"]), 2), np.float32)}

    @property
    def microbatch_counts(self) -> tuple[int, ...]:
        """See `RunShapes`; texts that are all compared go through in one part."""
        return (1,) if self.config.comparisons == "batch" else super().microbatch_counts

    @property
    def step(self) -> Any:
        """See `TuningRun`."""
        return reward_model.make_step(
            self.config, self.train, self.optimizer, self.sharding, trunk=self.tuning.trunk
        )

    def readings(self) -> Iterator[Program]:
        """Scores of one side of held-out pairs; at the end beside a merged model."""
        for number, batch in enumerate(self.batches):
            tokens, segments = (
                self.array((batch[key].shape[0], batch[key].shape[-1]), batch[key].dtype)
                for key in ("tokens", "segments")
            )
            yield Program(
                self.shape_name("evaluation", number),
                reward_model.score,
                (self.model, tokens, segments),
                calls=0,
                beside=self.merged,
            )


class DPORun(PairRun):
    """A run of `methods.dpo`.

    Args:
      config: the loss.
      sizes: the sizes of the policy, and of what the report compares it with.
      sharding: mesh of abstract devices, and mode.
      train: batches of the run.
      longest: the most tokens of a prompt with one response.
      adapters: see `TuningRun`; where there are any, their trunk is the reference.
      optimizer: its settings.
      sampling: how prompts are answered for the curves and for the report.
      prompt_length: tokens of the longest bucket of prompts.
      answered: prompts that are answered at a time.
    """

    def __init__(
        self,
        config: DPOConfig,
        sizes: ModelConfig,
        sharding: Sharding,
        *,
        train: PairTrainConfig,
        longest: int,
        adapters: LoRAConfig,
        optimizer: OptimizerConfig,
        sampling: SamplingConfig,
        prompt_length: int,
        answered: int,
    ):
        self.config, self.sampling = config, sampling
        self.prompt_length, self.answered = prompt_length, answered
        super().__init__(
            "policy",
            language_shapes(sizes),
            sizes,
            sharding,
            train=train,
            longest=longest,
            devices=sharding.mesh.size,
            adapters=adapters,
            optimizer=optimizer,
        )
        self.reference = self.tuning.trunk or self.frozen(language_shapes(self.sizes))
        self.reward_model = self.frozen(scalar_shapes(self.sizes))

    def complete(self, batch: Arrays) -> Arrays:
        """With the reference's log-probabilities of both sides."""
        return batch | {"ref_log_probs": np.zeros((len(batch["valid"]), 2), np.float32)}

    @property
    def step(self) -> Any:
        """See `TuningRun`."""
        return dpo.make_step(
            self.config, self.train, self.optimizer, self.sharding, trunk=self.tuning.trunk
        )

    def frozen_holdings(self) -> list[memory.Holding]:
        """The reference, where it is a copy of its own, and the reward model of the report."""
        held = []
        if self.tuning.trunk is None:
            held.append(memory.frozen_holding("reference", self.reference, self.sharding))
        held.append(
            memory.frozen_holding("reward model (report)", self.reward_model, self.sharding)
        )
        return held

    def before(self) -> Iterator[Program]:
        """The reference's log-probabilities of every pair."""
        yield from self._read("reference log-probs", self.reference)

    def readings(self) -> Iterator[Program]:
        """Held-out pairs under the policy; answers to prompts, and what is measured of them.

        At the end these are made beside a merged model, and beside PPO-max's policy.
        """
        model = self.model
        if self.tuning.trunk is not None and self.sizes.dtype == "float32":
            model = self.tuning.trunk  # the shapes of a merged model, see `Tuning.sampling_model`
        ppo_max = memory.frozen_holding(
            "PPO-max", self.frozen(language_shapes(self.sizes)), self.sharding
        )
        beside = self.merged + ppo_max.per_device
        yield from self._read("evaluation", model, beside)
        generate = make_generate(self.sampling, eos_ids=(2,), pad_id=0)
        prompts = self.prompts(self.answered, self.prompt_length)
        tokens = self.sampling.max_new_tokens
        yield Program(
            "generate (evaluation)",
            generate,
            (model, *prompts),
            calls=0,
            traffic=self.sampled_traffic(model, self.answered, self.prompt_length, tokens),
            steps=tokens - 1,
            beside=beside,
        )
        rollout = self.with_rows(jax.eval_shape(generate, model, *prompts), self.answered)
        yield Program(
            "score (evaluation)",
            make_evaluate(self.sharding, self.sampling.policy_temperature),
            (rollout, self.reference, self.reward_model),
            calls=0,
            beside=beside,
        )

    def _read(self, name: str, model: Any, beside: int = 0) -> Iterator[Program]:
        for number, batch in enumerate(self.batches):
            read = {key: batch[key] for key in ("tokens", "segments", "loss_mask")}
            yield Program(
                self.shape_name(name, number),
                dpo.read_log_probs,
                (model, read),
                calls=0,
                beside=beside,
            )

    def notes(self) -> list[str]:
        """See `RunShapes`."""
        return [
            *super().notes(),
            f"answers: {self.answered} prompts of {self.prompt_length} tokens at a time, up to "
            f"{self.sampling.max_new_tokens} new ones",
            "the reward model that the report asks is held all the time and PPO-max's policy at "
            "the end, as where compare.reward_model and compare.ppo_max are there, at the sizes "
            "of the policy",
        ]


def packed_batch(config: SFTConfig) -> Arrays:
    """A batch of SFT; all have one shape."""
    batches = PackedBatches(
        [_document(1)], batch_size=config.minibatch, length=config.row_length, seed=0
    )
    return next(batches)


def largest_pairs(train: PairTrainConfig, longest: int, devices: int) -> list[Arrays]:
    """The batch of the longest pairs, and the one of most tokens where that is another.

    Short pairs come in larger batches, and rounding may leave these more tokens.

    Args:
      train: batches of the run.
      longest: the most tokens of a side; rounded up as buckets are.
      devices: the rows of a batch are a multiple of it.

    Raises:
      ValueError: the fewest pairs of the longest do not fit into a batch, see `PairBatches`.
    """

    def batch(length: int) -> Arrays:
        pair = EncodedPair(_document(length), _document(length), 0.0)
        return next(PairBatches([pair], seed=0, num_buckets=1, **train.batching(devices)))

    whole = -(-longest // _MULTIPLE) * _MULTIPLE
    long = batch(whole)
    most = max((batch(n) for n in range(whole, 0, -_MULTIPLE)), key=lambda b: b["tokens"].size)
    return [long, most] if most["tokens"].size > long["tokens"].size else [long]


def _document(length: int) -> Encoded:
    return Encoded(np.zeros(length, np.int32), np.ones(length, bool))
