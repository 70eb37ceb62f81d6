"""Direct preference optimisation: no reward model and no sampling, the policy is its own reward.

  python -m experiments.dpo --config configs/dpo.py:quickstart

Training starts at the reference, the SFT policy, whose log-probabilities of every pair are computed
once and kept. Chosen and rejected go through the policy in one forward pass.

Pairs of reviews have an empty prompt: DPO learns which whole reviews are better than others. The
evaluation asks for something else: to continue the opening words of a review that no stage has
seen, on the prompts of PPO-max and with its keys. DPO never sees the texts that it is judged by.

Writes `model/`, report.md with figures, metrics.jsonl, config.json, summary.json and the cached
`reference_*.npz` to the run folder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import common
from experiments import command, folders, judging, reporting, stages
from experiments.answering import BatchedAnswersConfig, make_respondents, policies_to_compare
from experiments.settings import (
    Answering,
    PairData,
    PromptData,
    check_label,
    judge_names,
    sampled_lengths,
)
from rlhf_jax.data.batches import PairBatches, once_pairs
from rlhf_jax.data.store import margins_of
from rlhf_jax.evaluation.comparison import Interval, bootstrap_interval, paired_outcomes
from rlhf_jax.evaluation.judges import Judge, judge_pairs
from rlhf_jax.evaluation.panels import ANSWER_PANELS, DPO_PANELS
from rlhf_jax.evaluation.plots import plot_dpo
from rlhf_jax.methods import dpo, reward_model
from rlhf_jax.methods.dpo import DPOConfig, PairSet
from rlhf_jax.methods.pairwise import PairTrainConfig
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.respond import AgainstBaseline
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.run import OnStep
from rlhf_jax.training.step import create_state

PANELS = (*DPO_PANELS, *ANSWER_PANELS)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The SFT policy: training starts there, and it is the reference."""

    model: str
    build: bool


@dataclasses.dataclass(frozen=True)
class Compare:
    """Folders of what the report compares with."""

    ppo_max: str
    reward_model: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsAndPrompts(PairData, PromptData):
    """Pairs to learn from and to draw curves with, and prompts to answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Answering):
    """Every key of configs/dpo.py."""

    label: str
    inputs: Inputs
    data: PairsAndPrompts
    compare: Compare
    train: PairTrainConfig
    dpo: DPOConfig
    sampling: SamplingConfig
    optimizer: OptimizerConfig
    eval: BatchedAnswersConfig
    judges: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        check_label(self.label, ("SFT", "PPO-max"))
        if self.dpo.objective == "kto" and self.train.microbatches > 1:
            raise ValueError(
                f"train.microbatches={self.train.microbatches} must be 1 for dpo.objective='kto': "
                "its reference point is a mean over the whole update"
            )

    def sampled(self) -> dict[str, int]:
        """Tokens of the longest answer with its prompt, by the keys that set them."""
        return sampled_lengths(self.data, eval_sampling=self.eval.sampling.of(self.sampling))


def pair_set(
    settings: Settings, task: Task, tokenizer: Any, split: str, count: int, devices: int
) -> PairSet:
    """Pairs of a split, and all of them once in batches."""
    pairs = task.preferences(tokenizer, split, max_length=settings.data.max_length, count=count)
    batching = settings.train.batching(devices)
    return PairSet(pairs, once_pairs(pairs, pad_id=tokenizer.pad_token_id, **batching))


def compare_on_pairs(
    policies: Mapping[str, Transformer],
    held_out: PairSet,
    tokenizer: Any,
    scorer: ScalarModel | None,
    judges: Mapping[str, Judge],
    sharding: Sharding,
) -> dict[str, Interval]:
    """How often each policy's implicit reward ranks a pair as people did; a tie counts one half.

    The first policy is the reference. The same for the reward model, the judges, and the
    difference of the second policy and each judge, pair by pair; each with a 95% interval.
    """
    (_, reference), *others = policies.items()
    under_reference = dpo.log_probs_of_pairs(
        reference, held_out.batches, len(held_out.pairs), sharding
    )
    outcomes = {}
    for name, model in others:
        log_probs = dpo.log_probs_of_pairs(model, held_out.batches, len(held_out.pairs), sharding)
        outcomes[name] = paired_outcomes(*(log_probs - under_reference).T)
    first = next(iter(outcomes))
    if scorer is not None:
        scores = reward_model.score_pairs(scorer, held_out.batches, sharding)
        outcomes["reward model"] = paired_outcomes(*scores)
    for judge in judges.values():
        judged = paired_outcomes(*judge_pairs(judge, held_out.pairs, tokenizer))
        outcomes[judge.name] = judged
        outcomes[f"{first} minus {judge.name}"] = outcomes[first] - judged
    return {name: bootstrap_interval(values) for name, values in outcomes.items()}


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Trains, compares with SFT and PPO-max and reports; resumes where an earlier run stopped."""
    distributed.require_one("DPO")
    settings = command.open_config("dpo", config, Settings)
    if not folders.claim(settings, "DPO"):
        return
    train, data, sharding = settings.train, settings.data, settings.sharding.make()
    task, asked, devices = settings.task(), settings.prompt_task(), sharding.mesh.size
    judges = judging.load_judges(judge_names(settings.judges, task), settings)

    # 1. The SFT policy, frozen and to be trained; with adapters one copy serves as both.
    folder = stages.require(
        settings.inputs.model,
        stage="sft",
        argument=common.stage_argument("sft", settings),
        build=settings.inputs.build,
    )
    stages.check_lengths({"data.max_length": data.max_length}, folder, sampled=settings.sampled())
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, date=date)
    policy = stages.make_tuning(settings, stages.load_policy(folder, settings.model, sharding))
    reference = policy.trunk or stages.load_policy(folder, settings.model, sharding, frozen=True)

    # 2. Pairs that people have ranked; pairs and prompts to measure with.
    # The reference's numbers are kept by pair, so pairs of a stream are read to their end first.
    pairs = task.preferences(
        tokenizer, "train", max_length=data.max_length, count=data.pairs
    ).loaded()
    batches = PairBatches(
        pairs,
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id,
        num_buckets=3,
        **train.batching(devices),
    )
    validation, test = (
        pair_set(settings, task, tokenizer, split, count, devices)
        for split, count in (("validation", data.validation_pairs), ("test", data.eval_pairs))
    )
    scorer = None
    if folders.is_whole(settings.compare.reward_model):
        scorer = stages.load_scalar(
            settings.compare.reward_model, settings.model, sharding, frozen=True
        )
    respond = make_respondents(settings, asked, tokenizer, judges, reference, scorer, sharding)

    # 3. Optimizer and the compiled step.
    optimizer, schedule = make_optimizer(settings.optimizer, train.steps)
    train_step = dpo.make_step(settings.dpo, train, optimizer, sharding, trunk=policy.trunk)
    state = create_state(policy.take(), optimizer, sharding)
    reporting.banner(
        "DPO",
        {
            "policy": f"{stages.parameters_line(policy, state.model)}, from {folder}",
            "pairs": f"{len(pairs):,} ({len(validation.pairs):,} and {len(test.pairs):,} held out)",
            "pairs per update": f"{train.min_pairs} to {train.max_pairs}, "
            f"at most {train.max_tokens:,} tokens",
            "batches": batches.describe(),
            "margins": f"{np.count_nonzero(margins_of(pairs)):,} pairs have one; DPO reads none",
            "updates": f"{train.steps:,}, {train.steps / batches.steps_per_epoch:.2f} epochs",
            "devices": f"{devices}, {sharding.mode}",
            "run folder": settings.workdir,
        },
    )
    # The same key as in ppo_max, so that SFT gives the same responses there and here.
    _, eval_key = jax.random.split(jax.random.key(settings.seed))
    compare = AgainstBaseline(respond["validation"], reference, eval_key, settings.eval.prompts)

    show = ("loss/dpo", "dpo/accuracy", *(f"win_rate/{name}" for name in judges))
    inputs = stages.inputs(tokenizer, task, asked, date=date, models={"inputs.model": folder})
    with settings.run(train.steps, "DPO", show, inputs, on_step=on_step) as run:
        # 4. log π_ref of both sides of every pair, once.
        cache = functools.partial(dpo.reference_log_probs, reference, sharding=sharding)
        ref_train = cache(run.workdir / "reference_train.npz", pairs, batches.once())
        ref_valid = cache(run.workdir / "reference_validation.npz", *validation)

        # 5. Train.
        state = run.restore(state, batches)
        for step in run.steps():
            batch = next(batches)
            batch["ref_log_probs"] = ref_train[batch["index"]]
            state, metrics = train_step(state, sharding.put_batch(batch))
            metrics["optim/learning_rate"] = schedule(step)
            if run.is_due(step, settings.eval.every):
                model = policy.sampling_model(state.model)
                metrics |= dpo.evaluate(model, validation, ref_valid, settings.dpo, sharding)
                metrics |= compare(model)
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 6. Save, compare on prompts and pairs that no stage has seen, report.
    trained = stages.save_tuned(policy, state.model, run.workdir, tokenizer, base=folder)
    policies, notes = policies_to_compare(
        settings, reference, trained, {"PPO-max": settings.compare.ppo_max}, sharding
    )
    answers = {
        name: respond["test"](model, eval_key, settings.eval.final_prompts)
        for name, model in policies.items()
    }
    accuracy = compare_on_pairs(policies, test, tokenizer, scorer, judges, sharding)
    for name in set(answers) & set(accuracy):
        answers[name].statistics["pairs/accuracy"] = accuracy[name].value
    reporting.write(
        settings,
        run,
        answers,
        judges,
        plot=functools.partial(plot_dpo, panels=PANELS),
        notes=(reporting.accuracy_line(accuracy, len(test.pairs)), *notes),
        summary={"pair_accuracy": accuracy, "held_out_pairs": len(test.pairs)},
    )


if __name__ == "__main__":
    command.cli(main, default="configs/dpo.py:quickstart")
