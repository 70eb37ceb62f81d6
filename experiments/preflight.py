"""Does a PPO run fit on machines that are not here? Memory, traffic and least time, from XLA.

  python -m experiments.preflight --config configs/ppo_max.py:paper_en --topology a100-80g:8
  python -m experiments.preflight --config configs/ppo_max.py:paper_en --topology a100-80g:8x8 \
      --scale_batch 8

Compiles every program of an iteration for the topology: no GPU, no driver, no weights. Writes JSON
beside the other runs and ends with exit status 1 when the run does not fit. Topologies: a100-80g:N,
h100-80g:N, either with NODESxN, and v5p:XxYxZ; needs the extra `preflight` (or `preflight-tpu`).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from experiments import harness, ppo_setup
from experiments.responses import jit_generate
from rlhf_jax import losses, memory
from rlhf_jax.experience import AdvantageConfig
from rlhf_jax.models import hf_weights
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.presets import PRESETS, preset
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.preflight import verdict as verdicts
from rlhf_jax.preflight.programs import Program, measure, placed
from rlhf_jax.preflight.topologies import Topology, make_devices, parse_topology
from rlhf_jax.preflight.verdict import Verdict
from rlhf_jax.sharding import Sharding, mesh_of
from rlhf_jax.train import create_state, state_shardings


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
    """

    def __init__(self, config: ConfigDict, sizes: ModelConfig, sharding: Sharding):
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
        self.policy_step, policy_optimizer, self.critic_step, critic_optimizer, _ = (
            ppo_setup.make_updates(config, sharding, config.train.iterations * self.updates)
        )
        self.policy = self._state(language, policy_optimizer)
        has_critic = config.train.critic_init != "none"
        self.critic = self._state(scalar, critic_optimizer) if has_critic else None
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
        """Every program of an iteration, and sampling from the reference, to compare with."""
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


def examine(config: ConfigDict, topology: Topology, model: str = "") -> Verdict:
    """Compiles all programs; prints each as it is done."""
    run = make_run(config, topology, model)
    measured = []
    for program in run.programs():
        measured.append(measure(program, topology))
        print(f"compiled {program.name} in {measured[-1].compile_seconds:.0f} s", flush=True)
    return Verdict(topology, run.sharding.mode, tuple(run.holdings()), tuple(measured), run.rows)


def make_run(config: ConfigDict, topology: Topology, model: str = "") -> Run:
    """The run on the devices of a topology."""
    if not topology.chip.target and config.model.attention == "cudnn":
        config.model.attention = "xla"
    mesh = mesh_of(make_devices(topology), tensor=config.sharding.tensor)
    return Run(config, model_sizes(config, model), Sharding(mesh, config.sharding.mode))


def remedies(config: ConfigDict, devices: int) -> Iterator[tuple[str, ConfigDict]]:
    """Changes that make a run smaller, each on top of those before it."""
    config = config.copy_and_resolve_references()
    if config.model.remat != "full":
        config.model.remat = "full"
        yield "config.model.remat=full", config
    while config.train.microbatch > devices:
        config.train.microbatch = max(config.train.microbatch // 2, devices)
        yield f"config.train.microbatch={config.train.microbatch}", config
    if config.sharding.mode in ("zero0", "zero1", "zero2"):
        config.sharding.mode = "zero3"
        yield "config.sharding.mode=zero3", config


def advise(config: ConfigDict, verdict: Verdict, model: str) -> Iterator[str]:
    """Tries the remedies on the program that decides until it fits; one line for each."""
    changes: list[str] = []
    for change, changed in remedies(config, verdict.topology.size):
        changes.append(f"--{change}")
        run = make_run(changed, verdict.topology, model)
        programs = [p for p in run.programs() if p.name == verdict.deciding.name]
        measured = tuple(measure(program, verdict.topology) for program in programs)
        smaller = Verdict(
            verdict.topology, run.sharding.mode, tuple(run.holdings()), measured, run.rows
        )
        yield f"with {' '.join(changes)}: {verdicts.summary(smaller)}"
        if smaller.missing <= 0:
            return
    yield "nothing tried makes it fit: use more devices, or fewer rows or tokens"


def scale_batch(config: ConfigDict, factor: int) -> None:
    """Multiplies the rows of an iteration and of an update: the same work for each device."""
    for key in ("prompts_per_iteration", "minibatch", "microbatch"):
        config.train[key] *= factor


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main(
    config: ConfigDict, topology: str, *, model: str = "", factor: int = 1, out: str = ""
) -> None:
    """Prints and saves the report; exits with status 1 when the run does not fit."""
    start = time.perf_counter()
    # Programs for other machines do not belong into this machine's cache.
    jax.config.update("jax_enable_compilation_cache", False)
    scale_batch(config, factor)
    verdict = examine(config, parse_topology(topology), model)
    print(verdicts.text(verdict, layers=model_sizes(config, model).num_layers))
    usage = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(harness.peak_memory_gib(), 2),
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
    }
    path = Path(out or f"{config.workdir}/preflight-{topology.replace(':', '-')}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**verdict.to_json(), "preflight": usage}, indent=2) + "\n")
    print(f"{path}; {usage['seconds']:.0f} s, {usage['peak_memory_gib']:.1f} GiB of host memory")
    if verdict.missing > 0:
        for line in advise(config, verdict, model):
            print(line, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    wanted = flags.DEFINE_string("topology", "a100-80g:8", "machines, such as a100-80g:2x8")
    named = flags.DEFINE_string("model", "", "folder or hub name with the sizes of the models")
    times = flags.DEFINE_integer("scale_batch", 1, "multiply the batch sizes by this")
    target = flags.DEFINE_string("out", "", "file for the JSON")
    # Whatever is plugged in here, this process only compiles.
    jax.config.update("jax_platforms", "cpu")
    harness.cli(
        lambda config: main(
            config,
            wanted.value,
            model=named.value,
            factor=times.value,
            out=target.value,
        ),
        default="configs/ppo_max.py:paper_en",
    )
