"""Policies that were trained without sampling answer the prompts of PPO-max, beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from configs import common
from experiments import folders, stages
from experiments.settings import AnswersConfig, ModelOptions, PromptData
from rlhf_jax.data.batches import fixed_prompts
from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.evaluation.judges import Judge
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.answers import compiled_generate
from rlhf_jax.rollouts.conditioned import with_conditions
from rlhf_jax.rollouts.respond import Respondent
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task

# The experiments that make what reports compare with.
MADE_BY = {"PPO-max": "ppo_max", "DPO": "dpo"}


@dataclasses.dataclass(frozen=True)
class BatchedAnswersConfig(AnswersConfig):
    """Answers, `batch` prompts at a time."""

    batch: int

    def __post_init__(self):
        super().__post_init__()
        check(self, batch="[1, inf)")


class AnswersPrompts(Protocol):
    """Settings of an experiment whose policy answers prompts when it is measured."""

    @property
    def label(self) -> str:
        """What the report calls the policy."""
        ...

    @property
    def data(self) -> PromptData:
        """The prompts."""
        ...

    @property
    def model(self) -> ModelOptions:
        """How weights are held."""
        ...

    @property
    def sampling(self) -> SamplingConfig:
        """How answers are drawn."""
        ...

    @property
    def eval(self) -> BatchedAnswersConfig:
        """How many, and how otherwise."""
        ...


def make_respondents(
    settings: AnswersPrompts,
    task: Task,
    tokenizer: Any,
    judges: Mapping[str, Judge],
    reference: Transformer,
    scorer: ScalarModel | None,
    sharding: Sharding,
) -> dict[str, Respondent]:
    """Validation and test prompts to answer, the same as PPO-max's."""
    pad_id, longest = tokenizer.pad_token_id, settings.data.longest_prompt
    sampling = settings.eval.sampling.of(settings.sampling)
    generate = with_conditions(
        compiled_generate(sampling, eos_ids=stop_tokens(tokenizer), pad_id=pad_id)
    )
    return {
        split: Respondent(
            generate,
            batches=fixed_prompts(
                task.prompts(tokenizer, split, max_length=longest),
                settings.eval.batch,
                longest,
                pad_id,
                split,
            ),
            tokenizer=tokenizer,
            judges=judges,
            reference=reference,
            reward_model=scorer,
            sharding=sharding,
            temperature=sampling.policy_temperature,
            show=task.shown(tokenizer),
        )
        for split in ("validation", "test")
    }


def policies_to_compare(
    settings: AnswersPrompts,
    reference: Transformer,
    policy: Any,
    others: Mapping[str, str],
    sharding: Sharding,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """SFT, the policy of the run, and others that have been trained.

    Args:
      settings: of the run.
      reference: the SFT policy.
      policy: what the run has trained.
      others: a name of `MADE_BY` -> the folder of its model.
      sharding: where weights lie.

    Returns:
      The policies by name, and notes for the report on those that are missing.
    """
    policies, notes = {"SFT": reference, settings.label: policy}, []
    for name, folder in others.items():
        if folders.is_whole(folder):
            policies[name] = stages.load_policy(folder, settings.model, sharding, frozen=True)
            continue
        stage = MADE_BY[name]
        command = stages.command_of(stage, common.stage_argument(stage, settings))
        notes.append(f"{name} is not in this report: {folder} is missing; `{command}` makes it.")
    return policies, tuple(notes)
