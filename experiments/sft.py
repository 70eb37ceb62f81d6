"""Supervised fine-tuning: next-token loss on responses, from scratch or from a pretrained model.

  python -m experiments.sft --config configs/sft.py:quickstart

Writes `model/` (a Hugging Face folder), metrics.jsonl, config.json and summary.json to the run
folder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import command, folders, reporting, stages
from experiments.settings import DataConfig, EvalConfig, Shared
from rlhf_jax.data.batches import once_packed, packed_batches
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.methods import sft
from rlhf_jax.methods.sft import SFTConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.run import OnStep
from rlhf_jax.training.step import create_state


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The model that training starts from; empty trains one from scratch."""

    model: str


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a model from scratch, see `models.config.ModelConfig`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_length: int

    def __post_init__(self):
        check(self, **{field.name: "[1, inf)" for field in dataclasses.fields(self)})
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"sizes.hidden_size={self.hidden_size} must be divisible by 2 x sizes.num_heads="
                f"{2 * self.num_heads}: every head has an even width"
            )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Settings of a tokenizer from scratch."""

    vocab_size: int

    def __post_init__(self):
        check(self, vocab_size="[259, inf)")  # bytes and special tokens, see `train_bpe`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents(DataConfig):
    """Documents to learn from, of at most `max_length` tokens."""

    max_length: int

    def __post_init__(self):
        super().__post_init__()
        check(self, max_length="[1, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Every key of configs/sft.py."""

    inputs: Inputs
    data: Documents
    sizes: Sizes
    tokenizer: TokenizerConfig
    train: SFTConfig
    optimizer: OptimizerConfig
    eval: EvalConfig

    def __post_init__(self):
        super().__post_init__()
        if self.lora.rank and not self.inputs.model:
            raise ValueError(
                f"lora.rank={self.lora.rank} needs a model to adapt: set "
                "inputs.model, or lora.rank=0"
            )
        if not self.inputs.model and self.data.max_length > self.sizes.max_length:
            raise ValueError(
                f"data.max_length={self.data.max_length} must be at most sizes.max_length="
                f"{self.sizes.max_length}, the longest text that the model reads"
            )


def starting_point(
    settings: Settings, task: Task, sharding: Sharding, date: str
) -> tuple[Any, Transformer]:
    """The tokenizer and the model to train: a pretrained one, or both from scratch."""
    folder, options = settings.inputs.model, settings.model
    if folder:
        stages.check_lengths({"data.max_length": settings.data.max_length}, folder)
        tokenizer = stages.load_tokenizer(folder, date=date)
        return tokenizer, stages.load_policy(folder, options, sharding)
    tokenizer = train_bpe(task.texts(), settings.tokenizer.vocab_size)
    sizes = dataclasses.asdict(settings.sizes) | options.keywords()
    model_config = ModelConfig(vocab_size=len(tokenizer), **sizes)
    return tokenizer, jax.jit(functools.partial(Transformer, model_config))(
        jax.random.key(settings.seed)
    )


def documents_line(documents: Examples, batches: Any) -> str:
    """For the banner: rows hold several documents, so their number is not that of the rows."""
    if documents.streamed:
        return "not known of a stream"
    return f"about {len(documents) / batches.steps_per_epoch:,.0f}"


def trained_share(batches: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Tokens that are trained on, over all tokens of rows, padding included."""
    trained = sum(int(batch["loss_mask"].sum()) for batch in batches)
    return trained / sum(batch["tokens"].size for batch in batches)


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Trains, evaluates and saves; resumes where an earlier run of the same config stopped."""
    settings = command.open_config("sft", config, Settings)
    if not folders.claim(settings, "SFT"):
        return
    train, sharding, task = settings.train, settings.sharding.make(), settings.task()

    # 1. Text, tokenizer and model.
    folder = settings.inputs.model
    if folder:
        stages.require(folder)
    date = folders.date(settings.workdir)
    tokenizer, model = starting_point(settings, task, sharding, date)
    tuning = stages.make_tuning(settings, model)
    longest = settings.data.max_length
    documents = task.documents(tokenizer, "train", max_length=longest)
    batches = packed_batches(
        documents,
        rows=train.minibatch,
        length=train.row_length,
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id,
    ).share(sharding.local_rows)
    held_out = task.documents(tokenizer, "validation", max_length=longest)
    eval_batches = once_packed(
        held_out,
        rows=train.minibatch,
        length=train.row_length,
        pad_id=tokenizer.pad_token_id,
    )

    # 2. Optimizer and the compiled step.
    steps = train.updates(batches)
    optimizer, schedule = make_optimizer(settings.optimizer, steps)
    train_step = sft.make_step(train, optimizer, sharding, trunk=tuning.trunk)
    state = create_state(tuning.take(), optimizer, sharding)
    reporting.banner(
        "Supervised fine-tuning",
        {
            "model": f"{stages.parameters_line(tuning, state.model)}, {len(tokenizer):,} tokens",
            "documents": f"{batches.count_text()} ({len(held_out):,} held out)",
            "tokens per update": f"{train.minibatch * train.row_length:,}",
            "documents per update": documents_line(documents, batches),
            "updates": f"{steps:,} of {train.minibatch} rows in {train.microbatches} "
            f"microbatches; {batches.epochs_text(steps)}",
            "devices": f"{sharding.mesh.size}, {sharding.mode}",
            "run folder": settings.workdir,
        }
        | stages.memory_lines(sharding, {"model": state}, accumulated=train.microbatches > 1),
    )

    # 3. Train.
    inputs = stages.inputs(tokenizer, task, date=date, models={"inputs.model": folder})
    with settings.run(steps, "SFT", ("loss/lm", "eval/perplexity"), inputs, on_step=on_step) as run:
        state = run.restore(state, batches)
        for step in run.steps():
            state, metrics = train_step(state, sharding.put_batch(next(batches)))
            metrics["optim/learning_rate"] = schedule(step)
            if run.is_due(step, settings.eval.every):
                model = tuning.model(state.model)
                metrics["eval/perplexity"] = sft.evaluate(model, eval_batches, sharding)
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 4. Save what the next stage loads.
    model = stages.save_tuned(tuning, state.model, run.workdir, tokenizer, base=folder)
    result = sft.evaluate(model, eval_batches, sharding)
    run.finish({"perplexity": result, "trained_share": trained_share(eval_batches)})
    print(f"SFT: held-out perplexity {result:.1f}; model in {run.workdir / 'model'}")


if __name__ == "__main__":
    command.cli(main, default="configs/sft.py:quickstart")
