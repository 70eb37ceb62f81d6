"""What reward models and DPO share: batches of pairs, and the mean over the pairs of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.runtime.settings import check

# What a loss takes for the label of a pair: "hard", the chosen is better, or "soft", its p_chosen.
HARD, SOFT = "hard", "soft"
LABELS = (HARD, SOFT)


@dataclasses.dataclass(frozen=True)
class PairTrainConfig:
    """Token-balanced batches, all global: a step takes as many pairs as fit.

    Attributes:
      steps: updates.
      max_tokens: the most tokens of a batch, padding included.
      min_pairs: the fewest pairs of a batch.
      max_pairs: the most pairs of a batch.
      microbatches: parts of a batch whose gradients are computed one after the other.
    """

    steps: int
    max_tokens: int
    min_pairs: int
    max_pairs: int
    microbatches: int = 1

    def __post_init__(self):
        check(self, **{field.name: "[1, inf)" for field in dataclasses.fields(self)})
        if self.min_pairs > self.max_pairs:
            raise ValueError(
                f"train.min_pairs={self.min_pairs} must be at most train.max_pairs={self.max_pairs}"
            )

    def batching(self, devices: int) -> dict[str, Any]:
        """The keywords of `data.batches.PairBatches` that these settings decide."""
        return {
            "max_tokens": self.max_tokens,
            "min_pairs": self.min_pairs,
            "max_pairs": self.max_pairs,
            "multiple_of": devices,
            "parts": self.microbatches,
        }


def pair_weights(valid: jax.Array) -> jax.Array:
    """Each pair's weight `[B]` in the mean over the pairs of a whole batch; filler weighs 0."""
    return valid / jnp.maximum(valid.sum(), 1)
