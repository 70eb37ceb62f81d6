"""The groups of keys that configs of several experiments share, as dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.tasks import Task, TaskConfig, make_task
from rlhf_jax.training.run import CheckpointConfig, LogConfig, Run


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How weights are held, see `models.config.ModelConfig`."""

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"

    def keywords(self) -> dict[str, Any]:
        """Keywords for the loaders of models."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Devices and what is spread over them, see `runtime.sharding`."""

    devices: int = 0
    mode: str = "zero2"
    tensor: int = 1

    def make(self) -> Sharding:
        """The mesh, and the mode."""
        return Sharding(make_mesh(self.devices or None, tensor=self.tensor), self.mode)


@dataclasses.dataclass(frozen=True)
class EvalSampling:
    """How responses are drawn for measurements; a key at its default is as in `sampling`."""

    max_new_tokens: int = 0
    temperature: float = -1.0
    top_p: float = 0.0
    top_k: int = -1
    repetition_penalty: float = 0.0

    def of(self, sampling: SamplingConfig) -> SamplingConfig:
        """The settings of a run's own sampling with those that are given here instead."""
        unset = EvalSampling()
        given = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value != getattr(unset, name)
        }
        return dataclasses.replace(sampling, **given)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When and on what a run is measured.

    Attributes:
      every: steps between two measurements.
      prompts: validation prompts, for the curves.
      final_prompts: test prompts, for the report.
      samples: responses that the report shows.
      batch: prompts that are answered at a time.
      sampling: how responses are drawn, where not as in training.
    """

    every: int
    prompts: int = 0
    final_prompts: int = 0
    samples: int = 0
    batch: int = 0
    sampling: EvalSampling = dataclasses.field(default_factory=EvalSampling)

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"eval.every={self.every} must be at least 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads; each experiment has those of the keys that it needs, see configs/.

    Raises:
      ValueError: a length or number of examples below 1.
    """

    source: str
    domains: tuple[str, ...] = ()
    limit: int = 0
    instruction: str = ""
    max_length: int = 0
    min_gap: float = 1.0
    pairs: int = 0
    eval_pairs: int = 0
    validation_pairs: int = 0
    reference_texts: int = 0
    prompt_buckets: tuple[int, ...] = ()
    ptx_length: int = 0

    @property
    def longest_prompt(self) -> int:
        """The longest bucket, in tokens."""
        return max(self.prompt_buckets)

    def task(self, seed: int) -> Task:
        """What a policy is asked, and who may judge it."""
        return make_task(
            TaskConfig(
                source=self.source,
                domains=self.domains,
                limit=self.limit,
                instruction=self.instruction,
                min_gap=self.min_gap,
                seed=seed,
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """Keys that every experiment has."""

    seed: int
    workdir: str
    experiment: str
    scale: str
    variants: tuple[str, ...]
    label: str
    sharding: ShardingConfig
    model: ModelOptions
    lora: LoRAConfig
    log: LogConfig
    checkpoint: CheckpointConfig
    data: DataConfig

    def task(self) -> Task:
        """What the policy is asked, and who may judge it."""
        return self.data.task(self.seed)

    def run(self, total: int, desc: str, show: tuple[str, ...]) -> Run:
        """The run in its folder."""
        return Run(
            self.workdir,
            total=total,
            desc=desc,
            show=show,
            settings=dataclasses.asdict(self),
            log=self.log,
            checkpoint=self.checkpoint,
        )


def judge_names(named: tuple[str, ...], task: Any) -> tuple[str, ...]:
    """The judges that a config names, or else those of the task."""
    return named or task.judges
