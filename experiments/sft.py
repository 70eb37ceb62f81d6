"""Supervised fine-tuning: next-token loss on responses, from scratch or from a pretrained model.

  python -m experiments.sft --config configs/sft.py:quickstart

Writes `model/` (a Hugging Face folder), metrics.jsonl, config.json and summary.json to the run
folder. Deck: "Models and Training Setup".
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import data, harness, stages
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.methods.reductions import reduction_weights, weighted_sum
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import create_state, make_train_step


def loss_fn(model: Transformer, batch: dict) -> tuple[jax.Array, dict]:
    """Mean negative log-likelihood of the trained tokens, in nats."""
    log_probs, _ = next_token_log_probs(model, batch["tokens"], batch["segments"])
    loss = -weighted_sum(log_probs, batch["weights"])
    return loss, {"loss/lm": loss}


def weigh(batch: dict) -> dict:
    """Adds each token's weight in the mean over the whole batch."""
    return {**batch, "weights": reduction_weights("token_mean", batch["loss_mask"][:, 1:])}


@jax.jit
def negative_log_likelihood(model: Transformer, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Sum over trained tokens, in nats, and their number."""
    log_probs, _ = next_token_log_probs(model, batch["tokens"], batch["segments"])
    where = batch["loss_mask"][:, 1:]
    return -jnp.sum(jnp.where(where, log_probs, 0.0)), where.sum()


def perplexity(model: Transformer, batches: list[dict], sharding) -> float:
    """exp of the mean negative log-likelihood over all batches."""
    sums = [negative_log_likelihood(model, sharding.put_whole(batch)) for batch in batches]
    return math.exp(sum(float(nll) for nll, _ in sums) / sum(int(count) for _, count in sums))


def starting_point(config: ConfigDict, sharding, texts: list[str]):
    """The tokenizer and the model to train: a pretrained one, or both from scratch.

    Raises:
      ValueError: adapters without a pretrained model.
    """
    if config.inputs.model:
        tokenizer = stages.load_tokenizer(config.inputs.model)
        return tokenizer, stages.load_policy(config.inputs.model, config, sharding)
    if config.lora.rank:
        raise ValueError(
            f"lora.rank={config.lora.rank} trains beside a model that is there: set inputs.model, "
            "or lora.rank=0"
        )
    tokenizer = train_bpe(texts, config.tokenizer.vocab_size)
    model_config = ModelConfig(vocab_size=len(tokenizer), **config.model)
    return tokenizer, jax.jit(functools.partial(Transformer, model_config))(
        jax.random.key(config.seed)
    )


def main(config: ConfigDict) -> None:
    """Trains, evaluates and saves; resumes where an earlier run of the same config stopped."""
    if stages.skip_if_finished(config, "SFT"):
        return
    train, sharding = config.train, stages.make_sharding(config)
    harness.positive("train.steps", train.steps)
    harness.positive("train.eval_every", train.eval_every)

    # 1. Text, tokenizer and model.
    tokenizer, model = starting_point(config, sharding, data.tokenizer_texts(config))
    tuning = stages.make_tuning(config, model)
    batches = data.sft_batches(
        config,
        tokenizer,
        rows=train.minibatch,
        length=train.row_length,
        max_length=config.data.max_length,
    ).share(sharding.local_rows)
    held_out = data.sft_documents(config, tokenizer, "validation")
    eval_batches = data.evaluation_batches(held_out, tokenizer, train)

    # 2. Optimizer and the compiled step.
    optimizer, schedule = make_optimizer(OptimizerConfig(**config.optimizer), train.steps)
    train_step = make_train_step(
        loss_fn,
        optimizer,
        sharding,
        microbatches=harness.divide("train.minibatch", train.minibatch, train.microbatch),
        prepare=weigh,
        trunk=tuning.trunk,
    )
    state = create_state(tuning.take(), optimizer, sharding)
    harness.banner(
        "Supervised fine-tuning",
        {
            "model": f"{stages.parameters_line(tuning, state.model)}, {len(tokenizer):,} tokens",
            "documents": f"{batches.count_text()} ({len(held_out):,} held out)",
            "tokens per update": f"{train.minibatch * train.row_length:,}",
            "updates": f"{train.steps:,} of {train.minibatch} rows in microbatches of "
            f"{train.microbatch}; {batches.epochs_text(train.steps)}",
            "devices": f"{sharding.mesh.size}, {sharding.mode}",
            "run folder": config.workdir,
        }
        | stages.memory_lines(
            sharding, {"model": state}, accumulated=train.microbatch < train.minibatch
        ),
    )

    # 3. Train.
    with harness.Run(
        config, total=train.steps, desc="SFT", show=("loss/lm", "eval/perplexity")
    ) as run:
        state = run.restore(state, batches)
        for step in run.steps():
            state, metrics = train_step(state, sharding.put_batch(next(batches)))
            metrics["optim/learning_rate"] = schedule(step)
            if (step + 1) % train.eval_every == 0 or step + 1 == train.steps:
                model = tuning.model(state.model)
                metrics["eval/perplexity"] = perplexity(model, eval_batches, sharding)
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 4. Save what the next stage loads.
    base = config.inputs.model
    model = stages.save_tuned(tuning, state.model, run.workdir, tokenizer, base=base)
    result = perplexity(model, eval_batches, sharding)
    run.finish({"perplexity": result})
    print(f"SFT: held-out perplexity {result:.1f}; model in {run.workdir / 'model'}")


if __name__ == "__main__":
    harness.cli(main, default="configs/sft.py:quickstart")
