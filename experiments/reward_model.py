"""Reward modelling: Bradley-Terry on pairs plus an LM loss on the chosen response, one trunk.

  python -m experiments.reward_model --config configs/reward_model.py:quickstart

Writes `model/`, figures of the score differences and of accuracy (the paper's Figures 2 and 3),
metrics.jsonl, config.json and summary.json to the run folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import common
from experiments import command, folders, reporting, stages
from experiments.settings import EvalConfig, Shared, judge_names
from rlhf_jax.data.batches import once_pairs, pair_batches
from rlhf_jax.data.endless import Batches
from rlhf_jax.data.schemas import EncodedPair
from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation.comparison import bootstrap_interval, pair_accuracy, paired_outcomes
from rlhf_jax.evaluation.judges import judge_pairs, make_judges
from rlhf_jax.methods import reward_model
from rlhf_jax.methods.pairwise import PairTrainConfig
from rlhf_jax.methods.reward_model import RewardModelConfig
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import create_state


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What training starts from; the first `layers` of it, or all where that is 0."""

    model: str
    layers: int
    build: bool


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The keys of `config.loss`, see `RewardModelConfig`."""

    lm_coef: float
    comparisons: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Every key of configs/reward_model.py."""

    inputs: Inputs
    train: PairTrainConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    eval: EvalConfig
    judges: tuple[str, ...]

    def method(self) -> RewardModelConfig:
        """What the model minimises."""
        return RewardModelConfig(self.loss.lm_coef, self.loss.comparisons, self.data.min_gap)


def training_batches(
    settings: Settings, task: Task, tokenizer: Any, devices: int
) -> tuple[Batches, np.ndarray | None]:
    """Endless pairs, and ratings `[n, 2]` where all texts of a batch are to be compared.

    Raises:
      ValueError: the task has no ratings that all texts could be compared by.
    """
    data, ratings = settings.data, None
    asked = {"max_length": data.max_length, "count": data.pairs}
    if settings.loss.comparisons == "batch":
        pairs, ratings = task.rated(tokenizer, "train", **asked)
    else:
        pairs = task.preferences(tokenizer, "train", **asked)
    batches = pair_batches(
        pairs,
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id,
        longest=data.max_length,
        **settings.train.batching(devices),
    )
    return batches, ratings


def draw_figures(workdir: Path, chosen: np.ndarray, rejected: np.ndarray) -> None:
    """The histogram of score differences and the accuracy curves."""
    plots.plot_reward_histogram(chosen, rejected, workdir / "reward_histogram.png")
    log = read_metrics(workdir)
    curves = {
        label: (log["step"][~np.isnan(log[name])], log[name][~np.isnan(log[name])])
        for label, name in (("train", "reward/accuracy"), ("held out", "eval/accuracy"))
    }
    plots.plot_accuracy(curves, workdir / "accuracy.png")


def main(config: ConfigDict) -> None:
    """Trains, normalises, evaluates and saves; resumes where an earlier run stopped."""
    settings = command.open_config("reward_model", config, Settings)
    if not folders.claim(settings, "reward model"):
        return
    train, sharding, task = settings.train, settings.sharding.make(), settings.task()
    method = settings.method()
    method.check_batches(train)

    # 1. The SFT model with a new scalar head, and pairs that people have ranked.
    inputs, data = settings.inputs, settings.data
    argument = common.stage_argument("sft", settings)
    folder = stages.require(inputs.model, stage="sft", argument=argument, build=inputs.build)
    tokenizer = stages.load_tokenizer(folder)
    key = jax.random.key(settings.seed)
    model = stages.load_scalar(folder, settings.model, sharding, key=key, layers=inputs.layers)
    tuning = stages.make_tuning(settings, model)
    batches, ratings = training_batches(settings, task, tokenizer, sharding.data)
    batches = batches.share(sharding.local_rows)
    held_out = task.preferences(
        tokenizer, "test", max_length=data.max_length, count=data.eval_pairs
    )
    batching = train.batching(sharding.data) | {"pad_id": tokenizer.pad_token_id}
    eval_batches = once_pairs(held_out, **batching)

    # 2. Optimizer and the compiled step.
    optimizer, schedule = make_optimizer(settings.optimizer, train.steps)
    train_step = reward_model.make_step(method, train, optimizer, sharding, trunk=tuning.trunk)
    state = create_state(tuning.take(), optimizer, sharding)
    reporting.banner(
        "Reward model",
        {
            "model": f"{stages.parameters_line(tuning, state.model)}, from {folder}",
            "pairs": f"{batches.count_text()} ({len(held_out):,} held out)",
            "pairs per update": f"{train.min_pairs} to {train.max_pairs}, "
            f"at most {train.max_tokens:,} tokens",
            "batches": batches.describe(),
            "updates": f"{train.steps:,} in {train.microbatches} microbatches; "
            f"{batches.epochs_text(train.steps)}",
            "devices": f"{sharding.mesh.size}, {sharding.mode}",
            "run folder": settings.workdir,
        }
        | stages.memory_lines(sharding, {"model": state}, accumulated=train.microbatches > 1),
    )

    # 3. Train.
    show = ("loss/bradley_terry", "reward/accuracy", "eval/accuracy")
    with settings.run(train.steps, "reward model", show=show) as run:
        state = run.restore(state, batches)
        for step in run.steps():
            batch = next(batches)
            if ratings is not None:
                batch["ratings"] = ratings[batch["index"]]
            state, metrics = train_step(state, sharding.put_batch(batch))
            metrics["optim/learning_rate"] = schedule(step)
            if run.is_due(step, settings.eval.every):
                current = tuning.model(state.model)
                metrics["eval/accuracy"] = reward_model.evaluate(current, eval_batches, sharding)
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 4. Normalise to mean 0 and std 1 on reference responses, save.
    texts = task.references(tokenizer, max_length=data.max_length, count=data.reference_texts)
    references = once_pairs([EncodedPair(text, text, 0.0) for text in texts], **batching)
    trained = tuning.model(state.model)
    normalized = reward_model.normalization(
        reward_model.score_side(trained, references, 0, sharding)
    )
    stages.save_tuned(tuning, normalized(state.model), run.workdir, tokenizer, base=folder)

    # 5. Compare with the judges on the same pairs, report.
    scores = reward_model.score_pairs(trained, eval_batches, sharding)
    chosen, rejected = (normalized(side) for side in scores)
    judges = make_judges(judge_names(settings.judges, task))
    accuracies = {
        name: pair_accuracy(*judge_pairs(judge, held_out, tokenizer))
        for name, judge in judges.items()
    }
    accuracy = pair_accuracy(chosen, rejected)
    if distributed.is_main():
        draw_figures(run.workdir, chosen, rejected)
    run.finish(
        {
            "accuracy": accuracy,
            "accuracy_interval": bootstrap_interval(paired_outcomes(chosen, rejected))[1:],
            "judges_accuracy": accuracies,
            "held_out_pairs": len(held_out),
        }
    )
    beside = [
        f"{judges[name].name} {share:.3f} on the same pairs ({accuracy - share:+.3f})"
        for name, share in accuracies.items()
    ]
    print(f"reward model: held-out pair accuracy {', '.join([f'{accuracy:.3f}', *beside])}")


if __name__ == "__main__":
    command.cli(main, default="configs/reward_model.py:quickstart")
