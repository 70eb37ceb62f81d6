"""Reward modelling: Bradley-Terry on pairs plus an LM loss on the chosen response, one trunk.

  python -m experiments.reward_model --config configs/reward_model.py:quickstart

Writes `model/` (in other tools its scores lack the `score_bias` of summary.json, see docs/run.md),
figures of the score differences and of accuracy (the paper's Figures 2 and 3), metrics.jsonl,
config.json and summary.json to the run folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats
from ml_collections import ConfigDict

from configs import common
from configs.reward_model import labels_variants
from experiments import command, folders, judging, reporting, stages
from experiments.settings import EvalConfig, PairData, Shared, judge_names
from rlhf_jax.data.batches import PairBatches, once_pairs, pair_batches
from rlhf_jax.data.candidates import CandidateBatches
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.schemas import Encoded, EncodedPair
from rlhf_jax.data.store import margins_of
from rlhf_jax.data.streaming import StreamedBatches
from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation.comparison import (
    Interval,
    bootstrap_interval,
    calibration_error,
    pair_accuracy,
    paired_outcomes,
)
from rlhf_jax.evaluation.judges import Judge, judge_pairs
from rlhf_jax.methods import ranked as ranked_responses
from rlhf_jax.methods import reward_model
from rlhf_jax.methods.pairwise import LABELS, PairTrainConfig
from rlhf_jax.methods.reward_model import COMPARISONS, RANKED, RewardModelConfig
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.files import naming
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.run import OnStep
from rlhf_jax.training.step import create_state


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The model that training starts from, and how many of its first layers (0 is all).

    `labels` is a folder of pairs that a language model labelled; empty takes the data's own.
    """

    model: str
    labels: str
    layers: int
    build: bool

    def __post_init__(self):
        check(self, layers="[0, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(PairData):
    """What to learn from, and the responses whose scores get mean 0 and std 1.

    Attributes:
      responses: Of a group, where scores or orders are learned.
      votes: Whether the soft label of a pair is the share of single raters.
      reference_texts: Responses for the normalisation.
    """

    responses: int
    votes: bool
    reference_texts: int

    def __post_init__(self):
        super().__post_init__()
        # One reference has no deviation, and one response no order.
        check(self, reference_texts="[2, inf)", responses="[2, inf)")

    @property
    def groups(self) -> int:
        """Groups that hold as many texts as the pairs."""
        return max(1, 2 * self.pairs // self.responses)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The keys of `config.loss`, see `RewardModelConfig`."""

    lm_coef: float
    comparisons: str
    margin_coef: float
    labels: str

    def __post_init__(self):
        check(self, lm_coef="[0, 1e6]", comparisons=COMPARISONS, margin_coef="[0, 1e6]")
        check(self, labels=LABELS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Every key of configs/reward_model.py."""

    inputs: Inputs
    data: Pairs
    train: PairTrainConfig
    loss: LossConfig
    normalize_scores: bool
    optimizer: OptimizerConfig
    eval: EvalConfig
    judges: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        self.method().check_batches(self.train)
        if self.loss.comparisons == "batch":
            self.pairs_task().check_ratings()

    def pairs_task(self) -> Task:
        """Where pairs come from: the task, or what a language model labelled in its place."""
        if not self.inputs.labels:
            return self.task()
        return self.data.task(self.seed, source=f"jsonl:{self.inputs.labels}")

    def method(self) -> RewardModelConfig:
        """What the model minimises."""
        return RewardModelConfig(min_gap=self.data.min_gap, **dataclasses.asdict(self.loss))


@dataclasses.dataclass(frozen=True)
class Material:
    """What is learned, endlessly.

    Attributes:
      batches: of pairs, or of groups of texts.
      ratings: `[n, 2]` of the pairs, where all texts of a batch are to be compared.
      margins: about those of the pairs, for the banner.
      of: what an example is.
    """

    batches: PairBatches | StreamedBatches
    ratings: np.ndarray | None = None
    margins: str = "none: no pairs"
    of: str = "pairs"


def read_material(
    settings: Settings, task: Task, held_out: Examples[EncodedPair], tokenizer: Any, devices: int
) -> Material:
    """Pairs, or where scores or orders are learned, groups of texts.

    Args:
      settings: those of the run.
      task: has them.
      held_out: pairs of the same source.
      tokenizer: of the model.
      devices: over which batches are spread.
    """
    if settings.loss.comparisons not in RANKED:
        pairs, ratings = training_pairs(settings, task, tokenizer)
        batches = training_batches(settings, pairs, tokenizer, devices)
        return Material(batches, ratings, margins_line(settings, pairs, held_out))
    data = settings.data
    groups = task.ranked(
        tokenizer,
        "train",
        max_length=data.max_length,
        count=data.groups,
        responses=data.responses,
    )
    batching = settings.train.batching(devices)
    for bound in ("min_pairs", "max_pairs"):  # as many texts as those of so many pairs
        batching[bound] = max(1, 2 * batching[bound] // data.responses)
    batches = CandidateBatches(
        groups, seed=settings.seed, pad_id=tokenizer.pad_token_id, num_buckets=3, **batching
    )
    return Material(batches, of=f"groups of {data.responses}")


def training_pairs(
    settings: Settings, task: Task, tokenizer: Any
) -> tuple[Examples[EncodedPair], np.ndarray | None]:
    """Pairs, and ratings `[n, 2]` where all texts of a batch are to be compared."""
    data = settings.data
    asked: dict[str, int] = {"max_length": data.max_length, "count": data.pairs}
    if settings.loss.comparisons == "batch":
        pairs, ratings = task.rated(tokenizer, "train", **asked)
        return Examples(pairs), ratings
    return task.preferences(tokenizer, "train", **asked), None


def training_batches(
    settings: Settings, pairs: Examples[EncodedPair], tokenizer: Any, devices: int
) -> PairBatches | StreamedBatches:
    """Endless pairs."""
    return pair_batches(
        pairs,
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id,
        longest=settings.data.max_length,
        **settings.train.batching(devices),
    )


def margins_line(
    settings: Settings, pairs: Examples[EncodedPair], held_out: Examples[EncodedPair]
) -> str:
    """For the banner: how many pairs have a margin, and what the loss makes of it.

    Args:
      settings: those of the run.
      pairs: to train on; where they are streamed, those held out speak for them.
      held_out: pairs of the same source.

    Raises:
      ValueError: margins are asked for, and no pair has one.
    """
    margins = margins_of(held_out if pairs.streamed else pairs)
    found, where = int(np.count_nonzero(margins)), " held out" if pairs.streamed else ""
    if settings.loss.margin_coef:
        if not found:
            raise ValueError(
                f"loss.margin_coef={settings.loss.margin_coef} needs pairs with a margin, and none "
                f"of the {len(margins):,}{where} of data.source={settings.data.source!r} has one: "
                "give the rows a column margin that is not 0, or set loss.margin_coef=0.0"
            )
        used = f"times {settings.loss.margin_coef:g} in the loss"
    else:
        used = "not in the loss: loss.margin_coef is 0"
    return f"{found:,} of {len(margins):,} pairs{where} have one, {used}" if found else "none"


def reference_texts(settings: Settings, task: Task, tokenizer: Any) -> list[Encoded]:
    """Responses whose scores get mean 0 and std 1; none where scores stay as they are.

    Raises:
      ValueError: there is one at most, which has no deviation.
    """
    if not settings.normalize_scores:
        return []
    data = settings.data
    found = task.references(tokenizer, max_length=data.max_length, count=data.reference_texts)
    if len(found) < 2:
        raise ValueError(
            f"data.source={data.source!r} gives {len(found)} reference responses of at most "
            f"data.max_length={data.max_length} tokens, and the scores of at least 2 have a "
            "deviation: give it more rows, or set normalize_scores=False"
        )
    return found


def require_labels(settings: Settings) -> None:
    """Finds or makes the pairs that a language model labels, where it is to."""
    inputs = settings.inputs
    if inputs.labels:
        variants = labels_variants(settings.variants)
        argument = common.stage_argument("ai_labels", settings, *variants)
        stages.require(inputs.labels, stage="ai_labels", argument=argument, build=inputs.build)


def accuracy_on_people(
    settings: Settings, task: Task, tokenizer: Any, model: ScalarModel, sharding: Sharding
) -> Interval | None:
    """How often a model that learned from a judge orders held-out pairs as people do.

    None for one that learned from people, and where the source has no pairs of theirs.
    """
    if not settings.inputs.labels:
        return None
    data = settings.data
    try:
        pairs = task.preferences(
            tokenizer, "test", max_length=data.max_length, count=data.eval_pairs
        )
    except ValueError as error:
        print(f"note: nobody ranked pairs of {data.source}: {error}")
        return None
    batching = settings.train.batching(sharding.data) | {"pad_id": tokenizer.pad_token_id}
    scores = reward_model.score_pairs(model, once_pairs(pairs, **batching), sharding)
    return bootstrap_interval(paired_outcomes(*scores))


def held_out_numbers(
    settings: Settings,
    task: Task,
    tokenizer: Any,
    model: ScalarModel,
    scores: tuple[np.ndarray, np.ndarray],
    pairs: Sequence[EncodedPair],
    batches: Sequence[dict],
    sharding: Sharding,
) -> dict[str, float]:
    """What a reward model is worth besides the accuracy on pairs.

    Args:
      settings: those of the run.
      task: has held-out texts that people rated; where it has none, there is no rank correlation.
      tokenizer: of the model.
      model: as it was trained: its scores are log-odds.
      scores: of both sides of the held-out pairs, in the order of the batches, by the same model.
      pairs: these pairs, in any order.
      batches: of them.
      sharding: where batches go.
    """
    chosen, rejected = scores
    chances = 1 / (1 + np.exp(-(chosen - rejected).astype(np.float64)))
    order = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    longer = np.array(
        [np.sign(len(pairs[i].chosen.tokens) - len(pairs[i].rejected.tokens)) for i in order]
    )
    numbers = {
        "calibration error": calibration_error(chosen, rejected),
        "Brier score": float(np.mean((1 - chances) ** 2)),
    }
    if longer.any():
        agrees = (chances > 0.5) == (longer > 0)
        numbers["prefers the longer"] = float(np.mean(agrees[longer != 0]))
        numbers["people prefer the longer"] = float(np.mean(longer[longer != 0] > 0))
    data = settings.data
    try:
        groups = task.ranked(
            tokenizer, "test", max_length=data.max_length, count=data.eval_pairs, responses=2
        )
    except ValueError:
        return numbers
    rated = {
        document.tokens.tobytes(): (document, score)
        for one in groups
        for document, score in zip(one.documents, one.scores, strict=True)
    }
    texts = [EncodedPair(document, document, 0.0) for document, _ in rated.values()]
    batching = settings.train.batching(sharding.data) | {"pad_id": tokenizer.pad_token_id}
    placed = once_pairs(texts, **batching)
    mine = reward_model.score_side(model, placed, 0, sharding)
    place = np.concatenate([batch["index"][batch["valid"]] for batch in placed])
    theirs = np.array([score for _, score in rated.values()])[place]
    return numbers | {"Spearman with people": float(scipy.stats.spearmanr(mine, theirs).statistic)}


def require_sft(settings: Settings) -> str:
    """The folder of the model that training starts from, once it is there."""
    folder = stages.require(
        settings.inputs.model,
        stage="sft",
        argument=common.stage_argument("sft", settings),
        build=settings.inputs.build,
    )
    stages.check_lengths({"data.max_length": settings.data.max_length}, folder)
    return folder


def save_scores(
    path: Path,
    pairs: Sequence[EncodedPair],
    batches: Sequence[dict],
    scores: tuple[np.ndarray, np.ndarray],
    scale: float,
) -> None:
    """Writes the scores of held-out pairs with their lengths and gaps, for `experiments.diagnose`.

    Args:
      path: .npz file.
      pairs: in any order.
      batches: of these pairs.
      scores: of both sides, in the order of the batches.
      scale: by which they were divided to be normalised.
    """
    order = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    chosen, rejected = scores
    with naming(path):
        np.savez(
            path,
            chosen=chosen,
            rejected=rejected,
            scale=scale,
            chosen_length=np.array([len(pairs[i].chosen.tokens) for i in order]),
            rejected_length=np.array([len(pairs[i].rejected.tokens) for i in order]),
            gap=np.array([pairs[i].margin for i in order], np.float32),
        )


def draw_figures(workdir: Path, chosen: np.ndarray, rejected: np.ndarray) -> None:
    """The histogram of score differences and the accuracy curves."""
    plots.plot_reward_histogram(chosen, rejected, workdir / "reward_histogram.png")
    log = read_metrics(workdir)
    curves = {
        label: (log["step"][~np.isnan(log[name])], log[name][~np.isnan(log[name])])
        for label, name in (("train", "reward/accuracy"), ("held out", "eval/accuracy"))
    }
    plots.plot_accuracy(curves, workdir / "accuracy.png")


def conclude(
    workdir: Path,
    accuracy: float,
    accuracies: Mapping[str, float],
    judges: Mapping[str, Judge],
    on_people: Interval | None,
    score_bias: float,
) -> None:
    """Says what came out."""
    beside = [
        f"{judges[name].name} {share:.3f} on the same pairs ({accuracy - share:+.3f})"
        for name, share in accuracies.items()
    ]
    print(f"reward model: held-out pair accuracy {', '.join([f'{accuracy:.3f}', *beside])}")
    if on_people is not None:
        print(f"on pairs that people ranked: {on_people.value:.3f} {on_people[1:]}")
    print(
        f"model in {workdir / 'model'}; other tools leave out its score_bias, "
        f"{score_bias:+.4f} (docs/run.md)"
    )


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Trains, normalises, evaluates and saves; resumes where an earlier run stopped."""
    settings = command.open_config("reward_model", config, Settings)
    if not folders.claim(settings, "reward model"):
        return
    train, sharding, task = settings.train, settings.sharding.make(), settings.task()
    method = settings.method()
    judges = judging.load_judges(judge_names(settings.judges, task), settings)

    # 1. The SFT model with a new scalar head, and pairs that people, or a judge, have ranked.
    inputs, data = settings.inputs, settings.data
    folder = require_sft(settings)
    require_labels(settings)
    ranked = settings.pairs_task()
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, date=date)
    key = jax.random.key(settings.seed)
    model = stages.load_scalar(folder, settings.model, sharding, key=key, layers=inputs.layers)
    tuning = stages.make_tuning(settings, model)
    references = reference_texts(settings, ranked, tokenizer)
    validation, test = (
        ranked.preferences(tokenizer, split, max_length=data.max_length, count=count)
        for split, count in (("validation", data.validation_pairs), ("test", data.eval_pairs))
    )
    material = read_material(settings, ranked, validation, tokenizer, sharding.data)
    batches = material.batches
    batches.share(sharding.local_rows)
    batching = train.batching(sharding.data) | {"pad_id": tokenizer.pad_token_id}
    validation_batches = once_pairs(validation, **batching)

    # 2. Optimizer and the compiled step.
    optimizer, schedule = make_optimizer(settings.optimizer, train.steps)
    make_step = (
        ranked_responses.make_step if method.comparisons in RANKED else reward_model.make_step
    )
    train_step = make_step(method, train, optimizer, sharding, trunk=tuning.trunk)
    state = create_state(tuning.take(), optimizer, sharding)
    reporting.banner(
        "Reward model",
        {
            "model": f"{stages.parameters_line(tuning, state.model)}, from {folder}",
            material.of: batches.count_text(),
            "pairs held out": f"{len(validation):,} and {len(test):,}",
            "texts per update": f"{2 * train.min_pairs} to {2 * train.max_pairs}, "
            f"at most {train.max_tokens:,} tokens",
            "batches": batches.describe(),
            "margins": material.margins,
            "updates": f"{train.steps:,} in {train.microbatches} microbatches; "
            f"{batches.epochs_text(train.steps)}",
            "devices": f"{sharding.mesh.size}, {sharding.mode}",
            "run folder": settings.workdir,
        }
        | stages.memory_lines(sharding, {"model": state}, accumulated=train.microbatches > 1),
    )

    # 3. Train.
    show = ("loss/bradley_terry", "loss/ranked", "reward/accuracy", "eval/accuracy")
    pinned = stages.inputs(tokenizer, ranked, date=date, models={"inputs.model": folder})
    with settings.run(train.steps, "reward model", show, pinned, on_step=on_step) as run:
        state = run.restore(state, batches)
        for step in run.steps():
            batch = next(batches)
            if material.ratings is not None:
                batch["ratings"] = material.ratings[batch["index"]]
            state, metrics = train_step(state, sharding.put_batch(batch))
            metrics["optim/learning_rate"] = schedule(step)
            if run.is_due(step, settings.eval.every):
                current = tuning.model(state.model)
                metrics["eval/accuracy"] = reward_model.evaluate(
                    current, validation_batches, sharding
                )
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 4. Normalise to mean 0 and std 1 on reference responses, save.
    trained, normalized = tuning.model(state.model), lambda scores: scores
    if references:
        texts = once_pairs([EncodedPair(text, text, 0.0) for text in references], **batching)
        normalized = reward_model.normalization(
            reward_model.score_side(trained, texts, 0, sharding)
        )
    saved = stages.save_tuned(tuning, normalized(state.model), run.workdir, tokenizer, base=folder)
    score_bias = float(distributed.fetch(saved.bias[...]))

    # 5. Compare with the judges on the same pairs, report.
    test_batches = once_pairs(test, **batching)
    scores = reward_model.score_pairs(trained, test_batches, sharding)
    chosen, rejected = (normalized(side) for side in scores)
    accuracies = {
        name: pair_accuracy(*judge_pairs(judge, test, tokenizer)) for name, judge in judges.items()
    }
    accuracy = pair_accuracy(chosen, rejected)
    on_people = accuracy_on_people(settings, task, tokenizer, trained, sharding)
    numbers = held_out_numbers(
        settings, ranked, tokenizer, trained, scores, test, test_batches, sharding
    )
    if distributed.is_main():
        draw_figures(run.workdir, chosen, rejected)
        scale = float(np.std(scores) / np.std([chosen, rejected]))
        path = run.workdir / reporting.HELD_OUT
        save_scores(path, test, test_batches, (chosen, rejected), scale)
    run.finish(
        {
            "accuracy": accuracy,
            "accuracy_interval": bootstrap_interval(paired_outcomes(chosen, rejected))[1:],
            "judges_accuracy": accuracies,
            "people_accuracy": on_people,
            "numbers": numbers,
            "held_out_pairs": len(test),
            "score_bias": score_bias,
        }
    )
    conclude(run.workdir, accuracy, accuracies, judges, on_people, score_bias)


if __name__ == "__main__":
    command.cli(main, default="configs/reward_model.py:quickstart")
