"""Fine-tuning on what a run has written itself: rounds of expert iteration, revised responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments import stages
from rlhf_jax.data.batches import packed_batches
from rlhf_jax.data.prepare import encode_rows
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.methods import sft
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.optimizers import make_optimizer
from rlhf_jax.training.step import create_state


def distil(
    settings: Any,
    start: Any,
    rows: Sequence[Row],
    tokenizer: Any,
    sharding: Sharding,
    number: int,
) -> tuple[Any, dict[str, float]]:
    """Fine-tunes on rows; returns the model, and what the last update measured.

    Without any row the model stays what it is.

    Args:
      settings: of the run, with `train`, `optimizer`, `lora`, `seed` and `data.max_length`.
      start: the model to begin with.
      rows: for supervised fine-tuning.
      tokenizer: of the model.
      sharding: where arrays live.
      number: of the round; sets batches and adapters of several rounds apart.
    """
    train = settings.train
    if not rows:
        print(f"round {number}: no attempt was kept, and the policy stays as it is")
        return start, {}
    documents = encode_rows(
        "sft", rows, tokenizer, max_length=settings.data.max_length, drops=DropCounts()
    )
    batches = packed_batches(
        documents,
        rows=train.minibatch,
        length=train.row_length,
        seed=settings.seed + number,
        pad_id=tokenizer.pad_token_id,
    )
    steps = train.updates(batches)
    optimizer, _ = make_optimizer(settings.optimizer, steps)
    tuning = stages.make_tuning(settings, start, name=f"round {number}")
    train_step = sft.make_step(train, optimizer, sharding, trunk=tuning.trunk)
    state = create_state(tuning.take(), optimizer, sharding)
    metrics: dict[str, Any] = {}
    for _ in range(steps):
        state, metrics = train_step(state, sharding.put_batch(next(batches)))
    told = {"loss/lm": float(metrics["loss/lm"]), "improve/updates": float(steps)}
    return tuning.merged(state.model), told
