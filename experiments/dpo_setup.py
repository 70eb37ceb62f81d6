"""What `dpo` needs around its loop: the loss by name, the reference's cache, the comparison."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import data, reward_model, stages
from experiments.responses import Respondent, make_generate
from rlhf_jax import losses
from rlhf_jax.data.schemas import EncodedPair
from rlhf_jax.evaluation.comparison import Interval, bootstrap_interval, paired_outcomes
from rlhf_jax.evaluation.judges import VaderJudge
from rlhf_jax.models.heads import ScalarModel, next_token_log_probs
from rlhf_jax.models.transformer import Transformer

OBJECTIVES = {"dpo": losses.dpo_loss, "ipo": losses.ipo_loss, "hinge": losses.dpo_hinge_loss}


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """The loss.

    Attributes:
      objective: One of `OBJECTIVES`.
      beta: β, the strength of the pull to the reference.
      label_smoothing: Share of labels that are thought to be flipped, below ½; for "dpo" only.
      sft_coef: Weight of -log π(y⁺|x), which keeps up the likelihood of chosen responses: the
        deck's L_total has this term and DPO's as its auxiliary one.
    """

    objective: str
    beta: float
    label_smoothing: float = 0.0
    sft_coef: float = 0.0

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"dpo.objective={self.objective!r} is unknown; use one of {sorted(OBJECTIVES)}"
            )
        if not self.beta > 0:
            raise ValueError(f"dpo.beta={self.beta} must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"dpo.label_smoothing={self.label_smoothing} must be at least 0 and below 0.5"
            )
        if self.label_smoothing and self.objective != "dpo":
            raise ValueError(
                f"dpo.label_smoothing={self.label_smoothing} is for dpo.objective='dpo', not "
                f"{self.objective!r}: set it to 0"
            )

    def loss(self, *log_probs: jax.Array) -> jax.Array:
        """`[B]`, of chosen and rejected `[B]` under the policy and under the reference."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.objective == "dpo" else {}
        return OBJECTIVES[self.objective](*log_probs, beta=self.beta, **smoothing)


class PairSet(NamedTuple):
    """Pairs of one split.

    Attributes:
      pairs: N pairs.
      batches: All of them once.
    """

    pairs: Sequence[EncodedPair]
    batches: list[dict]


def held_out_pairs(config: ConfigDict, tokenizer, split: str, count: int, devices: int) -> PairSet:
    """Pairs of a split that is not trained on."""
    pairs = data.preference_pairs(config, tokenizer, split, count)
    return PairSet(pairs, data.all_pairs(pairs, tokenizer, config.train, devices))


def sequence_log_probs(model: Transformer, batch: dict) -> jax.Array:
    """log π(y|x) of chosen and rejected, `[B, 2]` float32: both sides are rows of one forward."""
    pairs, _, width = batch["tokens"].shape
    tokens, segments, trained = (
        batch[name].reshape(-1, width) for name in ("tokens", "segments", "loss_mask")
    )
    log_probs, _ = next_token_log_probs(model, tokens, segments)
    return losses.sequence_log_prob(log_probs, where=trained[:, 1:]).reshape(pairs, 2)


_sequence_log_probs = jax.jit(sequence_log_probs)


def log_probs_of_pairs(
    model: Transformer, batches: Iterable[dict], count: int, sharding
) -> np.ndarray:
    """log π of both sides of all pairs, `[N, 2]` float32, in the order of the list of pairs.

    Args:
      model: The language model.
      batches: Every pair once, with its `index`.
      count: N.
      sharding: Where batches go.
    """
    log_probs = np.full((count, 2), np.nan, np.float32)
    for batch in batches:
        placed = sharding.put_batch({k: batch[k] for k in ("tokens", "segments", "loss_mask")})
        values = np.asarray(_sequence_log_probs(model, placed))
        log_probs[batch["index"][batch["valid"]]] = values[batch["valid"]]
    return log_probs


def reference_log_probs(
    reference: Transformer,
    path: Path,
    pairs: Sequence[EncodedPair],
    batches: Iterable[dict],
    *,
    sharding,
) -> np.ndarray:
    """`log_probs_of_pairs` of the reference, computed once: a resumed run reads `path`.

    Raises:
      ValueError: the file holds numbers of other pairs.
    """
    hashed = hashlib.sha256()
    for pair in pairs:
        hashed.update(pair.chosen.tokens.tobytes() + b"|" + pair.rejected.tokens.tobytes() + b"|")
    digest = hashed.hexdigest()
    if path.exists():
        saved = np.load(path)
        if str(saved["digest"]) != digest:
            raise ValueError(
                f"{path} holds log-probabilities of other pairs: the data has changed since the "
                "run began; choose another --config.workdir or remove the folder"
            )
        return saved["log_probs"]
    start = time.time()
    log_probs = log_probs_of_pairs(reference, batches, len(pairs), sharding)
    scratch = path.with_suffix(".tmp.npz")
    np.savez(scratch, log_probs=log_probs, digest=digest)
    os.replace(scratch, path)
    print(f"{path.name}: {len(pairs):,} pairs in {time.time() - start:.1f} s", flush=True)
    return log_probs


def load_reward_model(config: ConfigDict, sharding) -> ScalarModel | None:
    """The reward model of PPO-max, None where it was not made; DPO only reports its score."""
    folder = config.compare.reward_model
    if not (Path(folder) / "config.json").exists():
        return None
    return stages.load_scalar(folder, config, sharding, frozen=True)


def make_respondents(
    config: ConfigDict, tokenizer, reference: Transformer, scorer: ScalarModel | None, sharding
) -> dict[str, Respondent]:
    """Validation and test prompts to answer, as PPO-max has them."""
    generate, judge = make_generate(tokenizer, config), VaderJudge()
    return {
        split: Respondent(
            generate,
            batches=data.fixed_prompts(config, tokenizer, split, config.eval.batch),
            tokenizer=tokenizer,
            judge=judge,
            reference=reference,
            reward_model=scorer,
            sharding=sharding,
            temperature=config.sampling.temperature or 1.0,
            show=data.shown_prompt(config, tokenizer),
        )
        for split in ("validation", "test")
    }


def policies_to_compare(
    config: ConfigDict, reference: Transformer, policy: Transformer, sharding
) -> tuple[dict[str, Transformer], tuple[str, ...]]:
    """SFT, DPO and PPO-max where it has been trained; notes for the report say what is missing."""
    policies = {"SFT": reference, config.label: policy}
    if (Path(config.compare.ppo_max) / "config.json").exists():
        policies["PPO-max"] = stages.load_policy(
            config.compare.ppo_max, config, sharding, frozen=True
        )
        return policies, ()
    command = f"python -m experiments.ppo_max --config configs/ppo_max.py:{config.inputs.variant}"
    note = f"PPO-max is not in this report: {config.compare.ppo_max} is missing; `{command}`"
    return policies, (f"{note} makes it.",)


def compare_on_pairs(
    policies: Mapping[str, Transformer],
    held_out: PairSet,
    tokenizer,
    scorer: ScalarModel | None,
    sharding,
) -> dict[str, Interval]:
    """How often each policy's implicit reward ranks a pair as people did, ties one half.

    The first policy is the reference. The same for the reward model, the VADER rule, and the
    difference of the second policy and that rule, pair by pair; each with a 95% interval.
    """
    (_, reference), *others = policies.items()

    def log_probs(model: Transformer) -> np.ndarray:
        return log_probs_of_pairs(model, held_out.batches, len(held_out.pairs), sharding)

    under_reference = log_probs(reference)
    outcomes = {
        name: paired_outcomes(*(log_probs(model) - under_reference).T) for name, model in others
    }
    first = next(iter(outcomes))
    rule = paired_outcomes(*data.judge_pairs(held_out.pairs, tokenizer))
    outcomes["VADER"] = rule
    if scorer is not None:
        outcomes["reward model"] = paired_outcomes(
            *reward_model.score_pairs(scorer, held_out.batches, sharding)
        )
    outcomes[f"{first} minus VADER"] = outcomes[first] - rule
    return {name: bootstrap_interval(values) for name, values in outcomes.items()}


def tell_accuracy(accuracy: Mapping[str, Interval], count: int) -> str:
    """One line for the report."""
    parts = [f"{name} {a.value:.1%} [{a.low:.1%}, {a.high:.1%}]" for name, a in accuracy.items()]
    return f"Which of two reviews people rated higher, on {count:,} held-out pairs: " + ", ".join(
        parts
    )
