"""Alignment data from samples: which answers of a policy are kept, and how far they are from it.

  best_of_n   of each prompt the answer with the best score: to be fine-tuned on (RAFT, best-of-N)
  threshold   every answer whose score reaches a threshold: rejection sampling
  quantiles   all answers, with the quantile of each score among all of them: for Quark
  rankings    all answers of a prompt in the order of their scores: for RRHF and PRO, and as pairs
              of the best and the worst for reward models and DPO

Whatever the rule, prompts that are held out, answers that were cut or say nothing, and near
duplicates are dropped, and counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.data.near_duplicates import near_duplicates
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.data.splits import normalise
from rlhf_jax.evaluation.best_of_n import best_of_n_kl
from rlhf_jax.methods.supervised import quantile_classes
from rlhf_jax.runtime.settings import check

BEST_OF_N, THRESHOLD, QUANTILES, RANKINGS = "best_of_n", "threshold", "quantiles", "rankings"
RULES = (BEST_OF_N, THRESHOLD, QUANTILES, RANKINGS)
HELD_OUT, CUT, EMPTY = "prompt is held out", "was cut", "empty response"
NEAR, LOWER, ALONE = "near duplicate", "lower score", "nothing to compare with"


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """What is kept.

    Attributes:
      rule: one of `RULES`.
      threshold: the least score, for "threshold".
      quantiles: how many, for "quantiles".
      cut: whether answers that did not end are kept; their rows say so.
      similarity: prompts with answers that are as similar as this to one that was kept before are
        dropped, see `data.near_duplicates`.
    """

    rule: str
    threshold: float
    quantiles: int
    cut: bool
    similarity: float

    def __post_init__(self):
        check(
            self,
            rule=RULES,
            threshold="[-1e6, 1e6]",
            quantiles="[2, inf)",
            similarity="(0, 1]",
        )


class Kept(NamedTuple):
    """What is kept of the answers to one prompt.

    Attributes:
      row: the candidates, see `data.candidates`.
      places: of the answers that are kept, the best first.
      usable: how many answers the rule could choose from.
    """

    row: Row
    places: tuple[int, ...]
    usable: int


def prompt_text(row: Row) -> str:
    """The words of a prompt with those with which the answer has begun."""
    prompt = row["prompt"]
    said = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
    return f"{said} {row.get('opening', '')}"


def held_out_prompts(rows: Collection[Row]) -> set[str]:
    """What `keep` compares prompts with."""
    return {normalise(prompt_text(row)) for row in rows}


def keep(
    config: CurationConfig, rows: Sequence[Row], held_out: Collection[str], drops: DropCounts
) -> list[Kept]:
    """The answers that a rule keeps, prompt by prompt; prompts of which none is kept are left out.

    Args:
      config: the rule.
      rows: candidates.
      held_out: prompts of other splits, from `held_out_prompts`.
      drops: counts answers.

    Raises:
      ValueError: nothing is kept; says what was dropped.
    """
    chosen = []
    for row in rows:
        usable = _usable(config, row, held_out, drops)
        places = sorted(usable, key=lambda place: -row["scores"][place])
        if config.rule == BEST_OF_N:
            places = places[:1]
        if config.rule == THRESHOLD:
            places = [place for place in places if row["scores"][place] >= config.threshold]
        drops.drop(LOWER, len(usable) - len(places))
        chosen.append(Kept(row, tuple(places), len(usable)))
    chosen = _without_repetition(chosen, config.similarity, drops)
    if config.rule == RANKINGS:
        chosen = [_comparable(one, drops) for one in chosen]
    found = [one for one in chosen if one.places]
    drops.keep(sum(len(one.places) for one in found))
    if not found:
        raise ValueError(f"keep.rule={config.rule!r} keeps no answer: {drops.summary()}")
    return found


def _usable(
    config: CurationConfig, row: Row, held_out: Collection[str], drops: DropCounts
) -> list[int]:
    """Places of answers that may be kept at all."""
    if normalise(prompt_text(row)) in held_out:
        drops.drop(HELD_OUT, len(row["responses"]))
        return []
    found = []
    ended = row.get("ended", [True] * len(row["responses"]))
    for place, response in enumerate(row["responses"]):
        if not response.strip():
            drops.drop(EMPTY)
        elif not ended[place] and not config.cut:
            drops.drop(CUT)
        else:
            found.append(place)
    return found


def _without_repetition(chosen: Sequence[Kept], similarity: float, drops: DropCounts) -> list[Kept]:
    """The same without answers that nearly repeat one before, of any prompt."""
    texts = [
        prompt_text(one.row) + one.row["responses"][place] for one in chosen for place in one.places
    ]
    repeated = iter(near_duplicates(texts, similarity))
    found = []
    for one in chosen:
        places = tuple(place for place in one.places if next(repeated) < 0)
        drops.drop(NEAR, len(one.places) - len(places))
        found.append(one._replace(places=places))
    return found


def _comparable(one: Kept, drops: DropCounts) -> Kept:
    """Nothing of a prompt whose answers are worth the same, or of which one is left."""
    scores = [one.row["scores"][place] for place in one.places]
    if scores and scores[0] > scores[-1]:
        return one
    drops.drop(ALONE, len(scores))
    return one._replace(places=())


def moved(config: CurationConfig, kept: Sequence[Kept]) -> float:
    """KL of what is kept from the sampler, nats per answer given its prompt; a mean over answers.

    Of N answers m may be kept and k are. Keeping those above a threshold, or those that ended, is
    the sampler under a condition that k of N meet: log(N/k). The best of m is farther than that
    condition by log m − (m − 1)/m. Estimated from these answers, and nothing of how prompts are
    chosen.

    Args:
      config: the rule.
      kept: from `keep`.
    """

    def of(one: Kept) -> float:
        total = len(one.row["responses"])
        if config.rule == BEST_OF_N:
            return math.log(total / one.usable) + best_of_n_kl(one.usable)
        return math.log(total / len(one.places))

    each = [of(one) for one in kept for _ in one.places]
    return float(np.mean(each))


def as_rows(config: CurationConfig, kept: Sequence[Kept]) -> list[Row]:
    """Rows that the stages read.

    Best-of-N and threshold: {"prompt", "response", "score"}, for SFT. Rankings and quantiles:
    {"prompt", "responses", "scores", "ended"}, for `experiments.supervised`; rankings also
    {"chosen", "rejected", "margin"}, for reward models and DPO; quantiles also "quantiles" and
    "response", the best one. Where the assistant had begun, a response, chosen or rejected begins
    with its words.

    Args:
      config: the rule.
      kept: from `keep`.

    Raises:
      ValueError: fewer answers than quantiles, or all scores are equal.
    """
    if config.rule in (BEST_OF_N, THRESHOLD):
        return [
            {
                "prompt": one.row["prompt"],
                "response": _whole(one.row, place),
                "score": one.row["scores"][place],
            }
            for one in kept
            for place in one.places
        ]
    rows = []
    for one in kept:
        row: Row = {name: one.row[name] for name in ("prompt", "opening") if name in one.row}
        for name in ("responses", "scores", "ended"):
            if name in one.row:
                row[name] = [one.row[name][place] for place in one.places]
        if config.rule == RANKINGS:
            best, worst = one.places[0], one.places[-1]
            row |= {"chosen": _whole(one.row, best), "rejected": _whole(one.row, worst)}
            row["margin"] = one.row["scores"][best] - one.row["scores"][worst]
        else:
            row["response"] = _whole(one.row, one.places[0])
        rows.append(row)
    if config.rule == QUANTILES:
        scores = [score for row in rows for score in row["scores"]]
        classes = iter(quantile_classes(scores, config.quantiles).tolist())
        for row in rows:
            row["quantiles"] = [next(classes) for _ in row["scores"]]
    return rows


def _whole(row: Row, place: int) -> str:
    """An answer with the words with which it had begun."""
    return str(row.get("opening", "")) + str(row["responses"][place])


def statistics(kept: Sequence[Kept]) -> dict[str, float]:
    """Means over the answers that are kept.

    Returns:
      curate/answers, curate/prompts, curate/reward, curate/reward_std, curate/length (tokens),
      curate/ended, curate/log_prob (nats per token under the sampler).
    """
    places = [(one.row, place) for one in kept for place in one.places]
    scores = np.array([row["scores"][place] for row, place in places])
    lengths = np.array([len(row["tokens"][place]) for row, place in places])
    log_probs = np.array([row["log_probs"][place] for row, place in places])
    return {
        "curate/answers": float(len(places)),
        "curate/prompts": float(len(kept)),
        "curate/reward": float(scores.mean()),
        "curate/reward_std": float(scores.std()),
        "curate/length": float(lengths.mean()),
        "curate/ended": float(np.mean([row["ended"][place] for row, place in places])),
        "curate/log_prob": float(log_probs.sum() / lengths.sum()),
    }
