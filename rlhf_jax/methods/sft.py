"""Supervised fine-tuning: the next-token loss on what the assistant says.

Source: Zheng et al. 2023 (arXiv 2307.04964), "Models and Training Setup".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from rlhf_jax.losses import language_model_loss
from rlhf_jax.methods.reductions import reduction_weights, weighted_sum
from rlhf_jax.models.heads import next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.step import divide, make_train_step


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Batches of a run, all global.

    Attributes:
      minibatch: rows of an update.
      row_length: tokens of a row, into which documents are packed.
      steps: updates; 0 where `epochs` says how long.
      epochs: how often every document is read; 0 where `steps` says how long.
      microbatches: parts of a minibatch whose gradients are computed one after the other.
    """

    minibatch: int
    row_length: int
    steps: int = 0
    epochs: float = 0.0
    microbatches: int = 1

    def __post_init__(self):
        check(
            self,
            minibatch="[1, inf)",
            row_length="[1, inf)",
            microbatches="[1, inf)",
            steps="[0, inf)",
            epochs="[0, inf)",
        )
        if bool(self.steps) == bool(self.epochs):
            raise ValueError(
                f"train.steps={self.steps}, train.epochs={self.epochs}: one says how long, the "
                "other must be 0"
            )
        divide("train.minibatch", self.minibatch, self.microbatches)

    def updates(self, batches: Any) -> int:
        """Updates of a run on these batches, at least 1.

        Raises:
          ValueError: epochs of streamed data, whose length nobody knows.
        """
        if self.steps:
            return self.steps
        if not hasattr(batches, "steps_per_epoch"):
            raise ValueError(
                f"train.epochs={self.epochs}: an epoch of streamed data has no known length; set "
                "train.steps and train.epochs=0"
            )
        return max(1, round(self.epochs * batches.steps_per_epoch))


def loss_fn(model: Transformer, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
    """L = -Σ_t log π(y_t | x, y_{<t}) averaged over the trained tokens, in nats.

    Args:
      model: the policy.
      batch: tokens and segments `[B, T]`, and the weights of `prepare`.
    """
    log_probs, _ = next_token_log_probs(model, batch["tokens"], batch["segments"])
    nll = language_model_loss(log_probs, where=batch["loss_mask"][:, 1:], per_token=True)
    loss = weighted_sum(nll, batch["weights"])
    return loss, {"loss/lm": loss}


def prepare(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds each token's weight in the mean over the whole batch."""
    return {**batch, "weights": reduction_weights("token_mean", batch["loss_mask"][:, 1:])}


def make_step(
    config: SFTConfig,
    optimizer: optax.GradientTransformation,
    sharding: Sharding,
    *,
    trunk: Any = None,
) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)`, see `training.step.make_train_step`."""
    return make_train_step(
        loss_fn,
        optimizer,
        sharding,
        microbatches=config.microbatches,
        prepare=prepare,
        trunk=trunk,
    )


@jax.jit
def negative_log_likelihood(
    model: Transformer, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Summed over trained tokens, in nats, and their number."""
    log_probs, _ = next_token_log_probs(model, batch["tokens"], batch["segments"])
    where = batch["loss_mask"][:, 1:]
    return language_model_loss(log_probs, where=where).sum(), where.sum()


def evaluate(model: Transformer, batches: Sequence[dict], sharding: Sharding) -> float:
    """Perplexity: exp of the mean negative log-likelihood of trained tokens over all batches."""
    sums = [negative_log_likelihood(model, sharding.put_whole(batch)) for batch in batches]
    return math.exp(sum(float(nll) for nll, _ in sums) / sum(int(count) for _, count in sums))
