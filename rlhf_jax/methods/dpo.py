"""Direct preference optimisation: no reward model and no sampling, the policy is its own reward.

Training starts at the reference, whose log-probabilities of every pair are computed once and kept.
Chosen and rejected go through the policy in one forward pass.

Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import losses
from rlhf_jax.data.schemas import EncodedPair
from rlhf_jax.data.store import labels_of
from rlhf_jax.methods.pairwise import HARD, LABELS, SOFT, PairTrainConfig, pair_weights
from rlhf_jax.methods.reductions import weighted_sum
from rlhf_jax.models.heads import next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime.files import naming, put
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.step import make_train_step

OBJECTIVES: dict[str, Callable[..., jax.Array]] = {
    "dpo": losses.dpo_loss,
    "ipo": losses.ipo_loss,
    "hinge": losses.dpo_hinge_loss,
    "simpo": losses.simpo_loss,
    "kto": losses.kto_loss,
}


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """The loss.

    Attributes:
      objective: one of `OBJECTIVES`.
      beta: β, the strength of the pull to the reference.
      label_smoothing: assumed share of flipped labels, below ½; for "dpo" only.
      sft_coef: weight of -log π(y⁺|x), which keeps up the likelihood of chosen responses: the
        slides' L_total has this term and DPO's as its auxiliary one.
      labels: "hard", or "soft" where pairs hold the probability that the chosen is better; for
        "dpo" only.
      margin: γ, for "simpo" only.
      desirable_weight: λ_D of chosen responses, for "kto" only.
      undesirable_weight: λ_U of rejected ones, for "kto" only.
    """

    objective: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_coef: float = 0.0
    labels: str = HARD
    margin: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self):
        check(
            self,
            objective=OBJECTIVES,
            beta="(0, 1e6]",
            label_smoothing="[0, 0.5)",
            sft_coef="[0, 1e6]",
            labels=LABELS,
            margin="[0, 1e6]",
            desirable_weight="[0, 1e6]",
            undesirable_weight="[0, 1e6]",
        )
        if self.label_smoothing and self.objective != "dpo":
            raise ValueError(
                f"dpo.label_smoothing={self.label_smoothing} is for dpo.objective='dpo', not "
                f"{self.objective!r}: set it to 0"
            )

        if self.labels == SOFT and (self.objective != "dpo" or self.label_smoothing):
            raise ValueError(
                f"dpo.labels='soft' takes the probability of each pair, for dpo.objective='dpo' "
                f"(here {self.objective!r}) and dpo.label_smoothing=0 (here {self.label_smoothing})"
            )

    def loss(
        self,
        *log_probs: jax.Array,
        lengths: jax.Array,
        weights: jax.Array,
        p_chosen: jax.Array | None = None,
    ) -> jax.Array:
        """The loss of each pair, `[B]`; KTO's is the mean of its two responses.

        With soft labels p, L = p L(y⁺, y⁻) + (1 - p) L(y⁻, y⁺): `soft_preference_loss` of the
        implicit rewards. SimPO reads no reference. KTO's z is the mean log-ratio of all responses
        of the batch at their own prompts, or 0 if that is negative; the paper pairs prompts with
        the responses to others, which is the same where prompts are empty.

        Args:
          *log_probs: `[B]` each: chosen, rejected under the policy, then under the reference.
          lengths: tokens of chosen and rejected, `[B, 2]`.
          weights: of each pair in a mean over the batch, `[B]`.
          p_chosen: `[B]`, the probability that the chosen is better; read where labels are soft.
        """
        if self.labels == SOFT:
            assert p_chosen is not None
            chosen, rejected, ref_chosen, ref_rejected = log_probs
            swapped = losses.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=self.beta)
            straight = losses.dpo_loss(*log_probs, beta=self.beta)
            return p_chosen * straight + (1 - p_chosen) * swapped
        if self.objective == "dpo":
            return losses.dpo_loss(*log_probs, beta=self.beta, label_smoothing=self.label_smoothing)
        if self.objective == "simpo":
            tokens = jnp.maximum(lengths, 1)
            means = (log_probs[0] / tokens[:, 0], log_probs[1] / tokens[:, 1])
            return losses.simpo_loss(*means, beta=self.beta, margin=self.margin)
        if self.objective == "kto":
            return self._kto(*log_probs, weights=weights)
        return OBJECTIVES[self.objective](*log_probs, beta=self.beta)

    def _kto(
        self,
        chosen: jax.Array,
        rejected: jax.Array,
        ref_chosen: jax.Array,
        ref_rejected: jax.Array,
        *,
        weights: jax.Array,
    ) -> jax.Array:
        ratios = ((chosen - ref_chosen) + (rejected - ref_rejected)) / 2
        kl = jnp.maximum(weighted_sum(ratios, weights), 0.0) / jnp.maximum(weights.sum(), 1e-6)
        sides = ((chosen, ref_chosen, True), (rejected, ref_rejected, False))
        good, bad = (
            losses.kto_loss(
                log_prob,
                reference,
                jnp.full(log_prob.shape, wanted),
                jnp.broadcast_to(kl, log_prob.shape),
                beta=self.beta,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
            )
            for log_prob, reference, wanted in sides
        )
        return (good + bad) / 2


class PairSet(NamedTuple):
    """Pairs of one split.

    Attributes:
      pairs: N pairs.
      batches: all of them once.
    """

    pairs: Sequence[EncodedPair]
    batches: list[dict]


def loss_fn(
    model: Transformer, batch: dict[str, jax.Array], *, config: DPOConfig
) -> tuple[jax.Array, dict]:
    """L = -log σ(β log(π(y⁺)/π_ref(y⁺)) - β log(π(y⁻)/π_ref(y⁻))), or what `config` names.

    Args:
      model: the policy π.
      batch: tokens, segments and loss mask `[B, 2, T]`, chosen first, `ref_log_probs [B, 2]`,
        `p_chosen [B]`, and weights from `prepare`.
      config: the loss.
    """
    log_probs = sequence_log_probs(model, batch)
    metrics = pair_metrics(
        log_probs,
        batch["ref_log_probs"],
        batch["pair_weights"],
        batch["loss_mask"][..., 1:].sum(-1),
        batch["p_chosen"] if config.labels == SOFT else None,
        config=config,
    )
    if not config.sft_coef:
        return metrics["loss/dpo"], metrics
    imitation = -weighted_sum(log_probs[:, 0], batch["pair_weights"])
    return metrics["loss/dpo"] + config.sft_coef * imitation, metrics


def pair_metrics(
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    weights: jax.Array,
    lengths: jax.Array,
    p_chosen: jax.Array | None = None,
    *,
    config: DPOConfig,
) -> dict[str, jax.Array]:
    """Weighted sums over pairs: the loss, whichever it is, and what the policy thinks of them.

    Args:
      log_probs: `[B, 2]`, under the policy, chosen first; differentiated.
      ref_log_probs: `[B, 2]`, under the reference.
      weights: `[B]`, the weight of each pair.
      lengths: `[B, 2]`, tokens of each response.
      p_chosen: `[B]`, the probability that the chosen is better; read where labels are soft.
      config: the loss.
    """
    four = (*log_probs.T, *ref_log_probs.T)
    numbers = {
        "loss/dpo": config.loss(*four, lengths=lengths, weights=weights, p_chosen=p_chosen),
        **losses.dpo_diagnostics(*four, beta=config.beta),
    }
    return {name: weighted_sum(number, weights) for name, number in numbers.items()}


_pair_metrics = jax.jit(pair_metrics, static_argnames="config")


def prepare(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds each pair's weight in the mean over the whole batch."""
    return {**batch, "pair_weights": pair_weights(batch["valid"])}


def make_step(
    config: DPOConfig,
    train: PairTrainConfig,
    optimizer: optax.GradientTransformation,
    sharding: Sharding,
    *,
    trunk: Any = None,
) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)`, see `training.step.make_train_step`."""
    return make_train_step(
        functools.partial(loss_fn, config=config),
        optimizer,
        sharding,
        microbatches=train.microbatches,
        prepare=prepare,
        trunk=trunk,
    )


def evaluate(
    model: Transformer,
    held_out: PairSet,
    ref_log_probs: np.ndarray,
    config: DPOConfig,
    sharding: Sharding,
) -> dict[str, jax.Array]:
    """`pair_metrics` of held-out pairs under names that begin with `eval/`."""
    count = len(held_out.pairs)
    log_probs = log_probs_of_pairs(model, held_out.batches, count, sharding)
    weights = np.full(count, 1 / count, np.float32)
    sides = ((pair.chosen, pair.rejected) for pair in held_out.pairs)
    lengths = np.array([[side.loss_mask[1:].sum() for side in both] for both in sides])
    soft = config.labels == SOFT
    labels = labels_of(held_out.pairs).astype(np.float32) if soft else None
    metrics = _pair_metrics(log_probs, ref_log_probs, weights, lengths, labels, config=config)
    return {f"eval/{name}": value for name, value in metrics.items()}


def sequence_log_probs(model: Transformer, batch: dict[str, jax.Array]) -> jax.Array:
    """log π(y|x) of chosen and rejected, `[B, 2]` float32, both sides in one forward pass."""
    pairs, _, width = batch["tokens"].shape
    tokens, segments, trained = (
        batch[name].reshape(-1, width) for name in ("tokens", "segments", "loss_mask")
    )
    log_probs, _ = next_token_log_probs(model, tokens, segments)
    return losses.sequence_log_prob(log_probs, where=trained[:, 1:]).reshape(pairs, 2)


# For pairs that are read and not learned from; one program for each shape of a batch.
read_log_probs = jax.jit(sequence_log_probs)


def log_probs_of_pairs(
    model: Transformer, batches: Iterable[dict], count: int, sharding: Sharding
) -> np.ndarray:
    """log π of both sides of all pairs, `[N, 2]` float32, in the order of the list of pairs.

    Args:
      model: the language model.
      batches: every pair once, with its `index`.
      count: N.
      sharding: where batches go.
    """
    log_probs = np.full((count, 2), np.nan, np.float32)
    for batch in batches:
        placed = sharding.put_batch({k: batch[k] for k in ("tokens", "segments", "loss_mask")})
        values = np.asarray(read_log_probs(model, placed))
        log_probs[batch["index"][batch["valid"]]] = values[batch["valid"]]
    return log_probs


def reference_log_probs(
    reference: Transformer,
    path: Path,
    pairs: Sequence[EncodedPair],
    batches: Iterable[dict],
    *,
    sharding: Sharding,
) -> np.ndarray:
    """`log_probs_of_pairs` of the reference, computed once: a resumed run reads `path`.

    Raises:
      ValueError: the file holds numbers of other pairs.
    """
    hashed = hashlib.sha256()
    for pair in pairs:
        hashed.update(pair.chosen.tokens.tobytes() + b"|" + pair.rejected.tokens.tobytes() + b"|")
    digest = hashed.hexdigest()
    saved = _load_arrays(path)
    if saved is not None:
        if str(saved["digest"]) != digest:
            raise ValueError(
                f"{path} holds log-probabilities of other pairs: the data has changed since the "
                "run began; choose another --config.workdir or remove the folder"
            )
        return saved["log_probs"]
    start = time.time()
    log_probs = log_probs_of_pairs(reference, batches, len(pairs), sharding)
    scratch = path.with_suffix(".tmp.npz")
    with naming(path):
        np.savez(scratch, log_probs=log_probs, digest=digest)
        put(scratch, path)
    print(f"{path.name}: {len(pairs):,} pairs in {time.time() - start:.1f} s", flush=True)
    return log_probs


def _load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Both arrays of a cache; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        with np.load(path) as saved:
            return {name: saved[name] for name in ("log_probs", "digest")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"{path} is damaged ({error}): computing it again", flush=True)
        return None
