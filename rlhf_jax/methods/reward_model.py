"""Reward modelling: Bradley-Terry on comparisons plus an LM loss on the chosen, one trunk.

Source: Zheng et al. 2023 (arXiv 2307.04964), section 3 and equation 2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.evaluation.comparison import pair_accuracy
from rlhf_jax.losses import (
    bradley_terry_loss,
    language_model_loss,
    masked_mean,
    preference_accuracy,
    soft_preference_loss,
)
from rlhf_jax.methods.pairwise import HARD, LABELS, SOFT, PairTrainConfig, pair_weights
from rlhf_jax.methods.reductions import reduction_weights, weighted_sum
from rlhf_jax.models.heads import ScalarModel, hidden_at, last_real_index, log_probs_of
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.step import make_train_step

# What is learned: pairs, all comparisons of a batch, or several responses of a prompt at once, by
# their scores or by their order (`methods.ranked`).
POINTWISE, LISTWISE, PLACKETT_LUCE = "pointwise", "listwise", "plackett_luce"
RANKED = (POINTWISE, LISTWISE, PLACKETT_LUCE)
COMPARISONS = ("pairs", "batch", *RANKED)


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """What a reward model minimises.

    Attributes:
      lm_coef: β_rm, weight of the language-model loss on the chosen response; 0 is off.
      comparisons: "pairs" compares the two texts of each pair; "batch" compares every two texts of
        a batch whose ratings differ by at least `min_gap`; "pointwise", "listwise" and
        "plackett_luce" learn from several responses to a prompt, see `methods.ranked`.
      min_gap: the least difference between two ratings; for "batch" only.
      margin_coef: weight of the margin by which the chosen should score higher: that of the pair,
        or for "batch" the difference of the ratings; 0 is off.
      labels: "hard", the chosen of a pair is better; or "soft", with the probability that the pair
        holds, as AI feedback gives it. For "pairs" without margins.

    Raises:
      ValueError: a field out of range, soft labels with margins or ratings, or margins of rankings.
    """

    lm_coef: float = 0.0
    comparisons: str = "pairs"
    min_gap: float = 0.0
    margin_coef: float = 0.0
    labels: str = HARD

    def __post_init__(self):
        check(
            self,
            lm_coef="[0, 1e6]",
            comparisons=COMPARISONS,
            min_gap="[0, 1e6]",
            margin_coef="[0, 1e6]",
            labels=LABELS,
        )
        if self.labels == SOFT and (self.margin_coef or self.comparisons != "pairs"):
            raise ValueError(
                f"loss.labels='soft' takes the probability of each pair: loss.margin_coef="
                f"{self.margin_coef} must be 0 and loss.comparisons={self.comparisons!r} 'pairs'"
            )

        if self.margin_coef and self.comparisons in RANKED:
            raise ValueError(
                f"loss.margin_coef={self.margin_coef} is of pairs: it must be 0 with "
                f"loss.comparisons={self.comparisons!r}"
            )

    def check_batches(self, train: PairTrainConfig) -> None:
        """Checks that a loss which compares all texts of a batch gets them at once.

        Raises:
          ValueError: there are several microbatches.
        """
        if self.comparisons == "batch" and train.microbatches != 1:
            raise ValueError(
                f"loss.comparisons='batch' compares all texts of a batch at once: "
                f"train.microbatches={train.microbatches} must be 1"
            )


def all_comparisons(
    scores: jax.Array,
    ratings: jax.Array,
    valid: jax.Array,
    *,
    min_gap: float,
    margin_coef: float = 0.0,
) -> jax.Array:
    """Mean Bradley-Terry loss over every two texts of a batch whose ratings differ enough.

    A forward pass over 2B texts then gives up to B (2B - 1) comparisons in place of B.

    Args:
      scores: `[B, 2]`.
      ratings: `[B, 2]`, of the same texts.
      valid: `[B]` bool, False on filler.
      min_gap: the least difference between two ratings.
      margin_coef: weight of that difference as the margin of two texts; 0 is none.
    """
    scores, ratings, real = scores.reshape(-1), ratings.reshape(-1), jnp.repeat(valid, 2)
    # Mean ratings are fractions: 1e-5 forgives rounding, so that 1.9 and 0.9 are 1 apart.
    gaps = ratings[:, None] - ratings[None, :]
    apart = (gaps >= min_gap - 1e-5) & real[:, None] & real[None, :]
    chosen, rejected = jnp.broadcast_arrays(scores[:, None], scores[None, :])
    margin = margin_coef * gaps if margin_coef else 0.0
    return masked_mean(bradley_terry_loss(chosen, rejected, margin=margin), where=apart)


def loss_fn(
    model: ScalarModel, batch: dict[str, jax.Array], *, config: RewardModelConfig
) -> tuple[jax.Array, dict]:
    """L = -log σ(r(x, y_w) - r(x, y_l) - c m) - β log p_LM(y_w | x) (equation 2, sign corrected).

    The margin m of a pair and its weight c = `margin_coef` are those of Llama 2 (arXiv 2307.09288),
    equation 2; the paper has none. With soft labels p the first term is the loss of AI feedback,
    -[p log σ(r_w - r_l) + (1 - p) log σ(r_l - r_w)] (Lee et al. 2023, arXiv 2309.00267).

    Args:
      model: trunk with a scalar head and an LM head.
      batch: tokens and segments `[B, 2, T]`, chosen first, and weights from `prepare`; where
        margins count, `margin` `[B]` in the units of the ratings; where labels are soft, `p_chosen`
        `[B]`; with `ratings` `[B, 2]` all texts of the batch are compared, not only those of a
        pair.
      config: the loss.
    """
    pairs, _, width = batch["tokens"].shape
    tokens, segments = (batch[k].reshape(-1, width) for k in ("tokens", "segments"))
    hidden = model.trunk(tokens, segments)
    scores = model.read(hidden_at(hidden, last_real_index(segments > 0))).reshape(pairs, 2)
    chosen, rejected = scores[:, 0], scores[:, 1]
    if config.comparisons == "batch":
        ranking = all_comparisons(
            scores,
            batch["ratings"],
            batch["valid"],
            min_gap=config.min_gap,
            margin_coef=config.margin_coef,
        )
    elif config.labels == SOFT:
        soft = soft_preference_loss(chosen, rejected, batch["p_chosen"])
        ranking = weighted_sum(soft, batch["pair_weights"])
    else:
        margin = config.margin_coef * batch["margin"] if config.margin_coef else 0.0
        ranking = weighted_sum(
            bradley_terry_loss(chosen, rejected, margin=margin), batch["pair_weights"]
        )
    metrics = {
        "loss/bradley_terry": ranking,
        "reward/accuracy": weighted_sum(
            preference_accuracy(chosen, rejected), batch["pair_weights"]
        ),
        "reward/margin": weighted_sum(chosen - rejected, batch["pair_weights"]),
    }
    if not config.lm_coef:
        return ranking, metrics
    chosen_hidden = hidden.reshape(pairs, 2, width, -1)[:, 0, :-1]
    log_probs, _ = log_probs_of(model.trunk, chosen_hidden, batch["tokens"][:, 0, 1:])
    trained = batch["loss_mask"][:, 0, 1:] & batch["valid"][:, None]
    nll = language_model_loss(log_probs, where=trained, per_token=True)
    metrics["loss/lm"] = weighted_sum(nll, batch["lm_weights"])
    return ranking + config.lm_coef * metrics["loss/lm"], metrics


def prepare(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds the weights of each pair and of each chosen token in the means over the whole batch."""
    trained = batch["loss_mask"][:, 0, 1:] & batch["valid"][:, None]
    return {
        **batch,
        "pair_weights": pair_weights(batch["valid"]),
        "lm_weights": reduction_weights("token_mean", trained),
    }


def make_step(
    config: RewardModelConfig,
    train: PairTrainConfig,
    optimizer: optax.GradientTransformation,
    sharding: Sharding,
    *,
    trunk: Any = None,
) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)`, see `training.step.make_train_step`."""
    config.check_batches(train)
    return make_train_step(
        functools.partial(loss_fn, config=config),
        optimizer,
        sharding,
        microbatches=train.microbatches,
        prepare=prepare,
        trunk=trunk,
    )


@jax.jit
def score(model: ScalarModel, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Scores `[B]` of sequences `[B, T]`."""
    return model.scores(tokens, segments)


def score_side(
    model: ScalarModel, batches: Sequence[dict], side: int, sharding: Sharding
) -> np.ndarray:
    """Scores `[N]` of all chosen (side 0) or all rejected responses (side 1)."""
    scores = []
    for batch in batches:
        placed = sharding.put_whole({k: batch[k][:, side] for k in ("tokens", "segments")})
        values = score(model, placed["tokens"], placed["segments"])
        scores.append(distributed.fetch(values)[batch["valid"]])
    return np.concatenate(scores)


def score_pairs(
    model: ScalarModel, batches: Sequence[dict], sharding: Sharding
) -> tuple[np.ndarray, np.ndarray]:
    """Scores `[N]` of all chosen and of all rejected responses."""
    chosen, rejected = (score_side(model, batches, side, sharding) for side in (0, 1))
    return chosen, rejected


def evaluate(model: ScalarModel, batches: Sequence[dict], sharding: Sharding) -> float:
    """Share of pairs that the model orders as people do, ties one half."""
    return pair_accuracy(*score_pairs(model, batches, sharding))


def normalization(scores: np.ndarray) -> Callable[[Any], Any]:
    """Returns the map that gives these scores mean 0 and std 1: for arrays, or a `ScalarModel`.

    Args:
      scores: `[N]`, those of reference responses.

    Raises:
      ValueError: a score is not finite, or all are equal up to rounding, as one alone is.
    """
    mean, std = scores.mean(), scores.std()
    if not np.isfinite(std):
        raise ValueError("a reference response has a score that is not finite: train it otherwise")
    if not std > np.finfo(np.float32).eps * np.abs(scores).max(initial=0.0):
        raise ValueError(
            f"all of {len(scores)} reference responses have the score {mean:.3g}, so their "
            "standard deviation cannot become 1: take more of them, train the model further, or "
            "set normalize_scores=False"
        )

    def normalized(one: Any) -> Any:
        return (one - mean) / std if isinstance(one, np.ndarray) else one.normalized(mean, std)

    return normalized
