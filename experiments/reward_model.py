"""Reward modelling: Bradley-Terry on pairs plus an LM loss on the chosen response, one trunk.

  python -m experiments.reward_model --config configs/reward_model.py:quickstart

Writes `model/`, figures of the score differences and of accuracy (deck: Figures 2 and 3),
metrics.jsonl, config.json and summary.json to the run folder.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import data, harness, stages
from rlhf_jax.data.endless import Batches
from rlhf_jax.data.schemas import EncodedPair
from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation.comparison import bootstrap_interval, paired_outcomes
from rlhf_jax.losses import bradley_terry_loss, masked_mean, preference_accuracy
from rlhf_jax.methods.reductions import reduction_weights, weighted_sum
from rlhf_jax.models.heads import ScalarModel, hidden_at, last_real_index, log_probs_of
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import create_state, make_train_step


def all_comparisons(
    scores: jax.Array, ratings: jax.Array, valid: jax.Array, *, min_gap: float
) -> jax.Array:
    """Mean Bradley-Terry loss over every two texts of a batch that people rated apart.

    A forward pass over 2B texts then gives up to B (2B - 1) comparisons in place of B.

    Args:
      scores: `[B, 2]`.
      ratings: `[B, 2]`, of the same texts.
      valid: `[B]` bool, False on filler.
      min_gap: The least difference of two ratings.
    """
    scores, ratings, real = scores.reshape(-1), ratings.reshape(-1), jnp.repeat(valid, 2)
    # Mean ratings are fractions: 1e-5 forgives rounding, so that 1.9 and 0.9 are 1 apart.
    apart = ratings[:, None] - ratings[None, :] >= min_gap - 1e-5
    chosen, rejected = jnp.broadcast_arrays(scores[:, None], scores[None, :])
    return masked_mean(
        bradley_terry_loss(chosen, rejected), where=apart & real[:, None] & real[None, :]
    )


def loss_fn(
    model: ScalarModel, batch: dict, *, lm_coef: float, min_gap: float = 0.0
) -> tuple[jax.Array, dict]:
    """L = -log σ(r(x, y_w) - r(x, y_l)) - β log p_LM(y_w | x) (PAPER: eq 2, with its sign mended).

    Args:
      model: Trunk with a scalar head and an LM head.
      batch: Tokens and segments `[B, 2, T]`, chosen first, and weights from `weigh`; with
        `ratings` `[B, 2]` all texts of the batch are compared, not only those of a pair.
      lm_coef: β_rm.
      min_gap: The least difference of two ratings; read with `ratings` only.
    """
    pairs, _, width = batch["tokens"].shape
    tokens, segments = (batch[k].reshape(-1, width) for k in ("tokens", "segments"))
    hidden = model.trunk(tokens, segments)
    scores = model.read(hidden_at(hidden, last_real_index(segments > 0))).reshape(pairs, 2)
    chosen, rejected = scores[:, 0], scores[:, 1]
    if "ratings" in batch:
        ranking = all_comparisons(scores, batch["ratings"], batch["valid"], min_gap=min_gap)
    else:
        ranking = weighted_sum(bradley_terry_loss(chosen, rejected), batch["pair_weights"])
    metrics = {
        "loss/bradley_terry": ranking,
        "reward/accuracy": weighted_sum(
            preference_accuracy(chosen, rejected), batch["pair_weights"]
        ),
        "reward/margin": weighted_sum(chosen - rejected, batch["pair_weights"]),
    }
    if not lm_coef:
        return ranking, metrics
    chosen_hidden = hidden.reshape(pairs, 2, width, -1)[:, 0, :-1]
    log_probs, _ = log_probs_of(model.trunk, chosen_hidden, batch["tokens"][:, 0, 1:])
    metrics["loss/lm"] = -weighted_sum(log_probs, batch["lm_weights"])
    return ranking + lm_coef * metrics["loss/lm"], metrics


def weigh(batch: dict) -> dict:
    """Adds the weights of each pair and of each chosen token in the means over the whole batch."""
    valid = batch["valid"]
    trained = batch["loss_mask"][:, 0, 1:] & valid[:, None]
    return {
        **batch,
        "pair_weights": valid / jnp.maximum(valid.sum(), 1),
        "lm_weights": reduction_weights("token_mean", trained),
    }


@jax.jit
def score(model: ScalarModel, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Scores `[B]` of sequences `[B, T]`."""
    return model.scores(tokens, segments)


def score_pairs(model: ScalarModel, batches: list[dict], sharding) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all chosen and all rejected responses."""
    return tuple(score_side(model, batches, side, sharding) for side in (0, 1))  # type: ignore


def score_side(model: ScalarModel, batches: list[dict], side: int, sharding) -> np.ndarray:
    """Scores of all chosen (side 0) or all rejected responses (side 1)."""
    scores = []
    for batch in batches:
        placed = sharding.put_whole({k: batch[k][:, side] for k in ("tokens", "segments")})
        values = score(model, placed["tokens"], placed["segments"])
        scores.append(distributed.fetch(values)[batch["valid"]])
    return np.concatenate(scores)


def accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """Share of pairs that are ordered right, ties one half."""
    return float(paired_outcomes(chosen, rejected).mean())


def training_batches(
    config: ConfigDict, tokenizer: Any, devices: int
) -> tuple[Batches, np.ndarray | None]:
    """Endless pairs, and ratings `[n, 2]` where all texts of a batch are to be compared.

    Raises:
      ValueError: an unknown `loss.comparisons`, or microbatches, which would compare less.
    """
    comparisons = config.loss.comparisons
    if comparisons == "pairs":
        return data.training_pairs(config, tokenizer, devices), None
    if comparisons != "batch":
        raise ValueError(f"loss.comparisons={comparisons!r} must be 'pairs' or 'batch'")
    if config.train.microbatches != 1:
        raise ValueError(
            f"loss.comparisons='batch' compares all texts of a batch at once: "
            f"train.microbatches={config.train.microbatches} must be 1"
        )
    pairs, ratings = data.rated_pairs(config, tokenizer, "train", config.data.pairs)
    return data.pair_batches(pairs, tokenizer, config.train, config.seed, devices), ratings


def draw_figures(workdir, chosen: np.ndarray, rejected: np.ndarray) -> None:
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
    if stages.skip_if_finished(config, "reward model"):
        return
    train, sharding = config.train, stages.make_sharding(config)
    harness.positive("train.steps", train.steps)
    harness.positive("train.eval_every", train.eval_every)

    # 1. The SFT model with a new scalar head, and pairs that people have ranked.
    inputs = config.inputs
    folder = stages.require(inputs.model, stage="sft", variant=inputs.variant, build=inputs.build)
    tokenizer = stages.load_tokenizer(folder)
    key = jax.random.key(config.seed)
    model = stages.load_scalar(folder, config, sharding, key=key, layers=inputs.layers)
    tuning = stages.make_tuning(config, model)
    batches, ratings = training_batches(config, tokenizer, sharding.data)
    batches = batches.share(sharding.local_rows)
    held_out = data.preference_pairs(config, tokenizer, "test", config.data.eval_pairs)
    eval_batches = data.all_pairs(held_out, tokenizer, train, sharding.data)

    # 2. Optimizer and the compiled step.
    optimizer, schedule = make_optimizer(OptimizerConfig(**config.optimizer), train.steps)
    train_step = make_train_step(
        functools.partial(loss_fn, lm_coef=config.loss.lm_coef, min_gap=config.data.min_gap),
        optimizer,
        sharding,
        microbatches=train.microbatches,
        prepare=weigh,
        trunk=tuning.trunk,
    )
    state = create_state(tuning.take(), optimizer, sharding)
    harness.banner(
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
            "run folder": config.workdir,
        }
        | stages.memory_lines(sharding, {"model": state}, accumulated=train.microbatches > 1),
    )

    # 3. Train.
    show = ("loss/bradley_terry", "reward/accuracy", "eval/accuracy")
    with harness.Run(config, total=train.steps, desc="reward model", show=show) as run:
        state = run.restore(state, batches)
        scored = None
        for step in run.steps():
            batch = next(batches)
            if ratings is not None:
                batch["ratings"] = ratings[batch["index"]]
            state, metrics = train_step(state, sharding.put_batch(batch))
            metrics["optim/learning_rate"] = schedule(step)
            if (step + 1) % train.eval_every == 0 or step + 1 == train.steps:
                scored = score_pairs(tuning.model(state.model), eval_batches, sharding)
                metrics["eval/accuracy"] = accuracy(*scored)
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 4. Normalise to mean 0 and std 1 on reference responses, save, compare with the judge.
    references = [
        EncodedPair(document, document, 0.0)
        for document in data.reference_documents(config, tokenizer)
    ]
    reference_batches = data.all_pairs(references, tokenizer, train, sharding.data)
    scores = score_side(tuning.model(state.model), reference_batches, 0, sharding)
    trained = state.model.normalized(scores.mean(), scores.std())
    stages.save_tuned(tuning, trained, run.workdir, tokenizer, base=folder)
    scored = scored or score_pairs(tuning.model(state.model), eval_batches, sharding)
    chosen, rejected = ((side - scores.mean()) / scores.std() for side in scored)
    judged = data.judge_pairs(held_out, tokenizer)
    summary = {
        "accuracy": accuracy(chosen, rejected),
        "accuracy_interval": bootstrap_interval(paired_outcomes(chosen, rejected))[1:],
        "vader_accuracy": accuracy(*judged),
        "held_out_pairs": len(held_out),
    }

    # 5. Report.
    if distributed.is_main():
        draw_figures(run.workdir, chosen, rejected)
    run.finish(summary)
    gap = summary["accuracy"] - summary["vader_accuracy"]
    print(
        f"reward model: held-out pair accuracy {summary['accuracy']:.3f}, the VADER rule "
        f"{summary['vader_accuracy']:.3f} on the same pairs ({gap:+.3f})"
    )


if __name__ == "__main__":
    harness.cli(main, default="configs/reward_model.py:quickstart")
