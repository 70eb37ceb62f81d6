"""The groups of keys that configs of several experiments share, as dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from rlhf_jax.evaluation.collapse import CollapseMonitor
from rlhf_jax.models.config import ATTENTIONS, DTYPES, REMATS
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import MODES, Sharding, make_mesh
from rlhf_jax.tasks import Task, TaskConfig, make_task
from rlhf_jax.training.run import CheckpointConfig, LogConfig, OnStep, Run


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How weights are held, see `models.config.ModelConfig`."""

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self):
        check(self, dtype=DTYPES, remat=REMATS, attention=ATTENTIONS)

    def keywords(self) -> dict[str, Any]:
        """Keywords for the loaders of models."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Devices and what is spread over them, see `runtime.sharding`."""

    devices: int = 0
    mode: str = "zero2"
    tensor: int = 1

    def __post_init__(self):
        check(self, devices="[0, inf)", mode=MODES, tensor="[1, inf)")

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

    def __post_init__(self):
        check(
            self,
            max_new_tokens="[0, inf)",
            temperature="[-1, 100]",
            top_p="[0, 1]",
            top_k="[-1, inf)",
            repetition_penalty="[0, 100]",
        )

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
    """When a run is measured.

    Attributes:
      every: steps between two measurements.
    """

    every: int

    def __post_init__(self):
        check(self, every="[1, inf)")


@dataclasses.dataclass(frozen=True)
class AnswersConfig(EvalConfig):
    """When a policy answers held-out prompts, and how many.

    Attributes:
      prompts: Validation prompts, for the curves.
      final_prompts: Test prompts, for the report.
      samples: Responses that the report shows.
      sampling: How responses are drawn, where not as in training.
    """

    prompts: int
    final_prompts: int
    samples: int
    sampling: EvalSampling

    def __post_init__(self):
        super().__post_init__()
        check(self, prompts="[1, inf)", final_prompts="[1, inf)", samples="[0, inf)")
        if self.samples > self.final_prompts:
            raise ValueError(
                f"eval.samples={self.samples} must be at most eval.final_prompts="
                f"{self.final_prompts}: the report shows some of these"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads: the keys that every experiment has, see `rlhf_jax.tasks`."""

    source: str
    domains: tuple[str, ...] = ()
    half: str = ""
    limit: int = 0
    instruction: str = ""

    def __post_init__(self):
        check(self, limit="[0, inf)")

    def task(self, seed: int, **other: Any) -> Task:
        """What a policy learns from, is asked, and who may judge it.

        Args:
          seed: Of what is drawn.
          **other: Keys of a `TaskConfig` in place of those here.
        """
        names = {field.name for field in dataclasses.fields(TaskConfig)}
        keys = {name: value for name, value in vars(self).items() if name in names}
        return make_task(TaskConfig(**keys | other, seed=seed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairData(DataConfig):
    """Pairs of responses.

    Attributes:
      max_length: Tokens of a prompt with one response.
      min_gap: The least difference of two ratings that make a pair.
      pairs: To train on.
      validation_pairs: Held out, for the curves.
      eval_pairs: Held out, for the report.
    """

    max_length: int
    min_gap: float
    pairs: int
    validation_pairs: int
    eval_pairs: int

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            max_length="[1, inf)",
            min_gap="[0, 1e6]",
            pairs="[1, inf)",
            validation_pairs="[1, inf)",
            eval_pairs="[1, inf)",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData(DataConfig):
    """Prompts.

    Attributes:
      prompt_source: Where they come from; empty is `source`.
      prompt_buckets: Lengths to which they are padded.
    """

    prompt_source: str
    prompt_buckets: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        check(self, prompt_buckets="[1, inf)")

    @property
    def longest_prompt(self) -> int:
        """The longest bucket, in tokens."""
        return max(self.prompt_buckets)

    def prompt_task(self, seed: int) -> Task:
        """What a policy is asked, and who may judge it.

        Raises:
          ValueError: `prompt_source` names no task, see `make_task`.
        """
        if not self.prompt_source:
            return self.task(seed)
        try:
            # No pairs are drawn of it.
            return self.task(seed, source=self.prompt_source, min_gap=TaskConfig.min_gap)
        except ValueError as error:
            raise ValueError(f"data.prompt_source: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """Keys that every experiment has; folders are whole once `configs.common.resolve` is through.

    Those of `lora` are of experiments that train.

    Raises:
      ValueError: a seed below 0, or a source that names no task or has not what it is asked for.
    """

    seed: int
    root: str
    workdir: str
    experiment: str
    scale: str
    variants: tuple[str, ...]
    sharding: ShardingConfig
    model: ModelOptions
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    log: LogConfig
    checkpoint: CheckpointConfig
    data: DataConfig

    def __post_init__(self):
        check(self, seed="[0, inf)")
        self.task()

    def task(self) -> Task:
        """What the run learns from."""
        return self.data.task(self.seed)

    def run(
        self,
        total: int,
        desc: str,
        show: tuple[str, ...],
        inputs: Mapping[str, Any],
        monitor: CollapseMonitor | None = None,
        *,
        on_step: OnStep | None,
    ) -> Run:
        """The run in its folder; for `inputs` see `stages.inputs`."""
        return Run(
            self.workdir,
            total=total,
            desc=desc,
            show=show,
            settings=dataclasses.asdict(self),
            inputs=inputs,
            log=self.log,
            checkpoint=self.checkpoint,
            monitor=monitor,
            on_step=on_step,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering(Shared):
    """Keys of experiments whose policy answers prompts.

    Raises:
      ValueError: as for `Shared`, of the prompts as well.
    """

    data: PromptData

    def __post_init__(self):
        super().__post_init__()
        self.prompt_task()

    def prompt_task(self) -> Task:
        """What the policy is asked, and who may judge it."""
        return self.data.prompt_task(self.seed)


def sampled_lengths(data: PromptData, **sampling: SamplingConfig) -> dict[str, int]:
    """Tokens of the longest prompt with the longest response, by the keys that give them.

    Args:
      data: the prompts.
      **sampling: how responses are drawn; `eval_sampling` for `config.eval.sampling`.
    """
    return {
        f"max(data.prompt_buckets) + {name.replace('_', '.')}.max_new_tokens": data.longest_prompt
        + one.max_new_tokens
        for name, one in sampling.items()
    }


def check_label(label: str, others: Collection[str]) -> None:
    """Refuses a result that is called as one that the report has besides, or not at all."""
    if not label.strip() or label in others:
        raise ValueError(
            f"label={label!r} must be a name of its own: the report also has {', '.join(others)}"
        )


def judge_names(named: tuple[str, ...], task: Any) -> tuple[str, ...]:
    """The judges that a config names, or else those of the task."""
    return named or task.judges
