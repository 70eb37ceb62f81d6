"""Which stage is bad? What the folders of SFT, reward model and PPO say when RLHF fails.

A failed run of PPO is often a failed stage before it: an SFT model that does not end its answers,
a reward model that counts words. Each function here reads what one stage left, and returns
findings, each with its evidence and what to change first. Nothing is computed by a model: the logs
and the scores of held-out pairs are enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.evaluation.collapse import find_collapses
from rlhf_jax.evaluation.comparison import calibration_error, pair_accuracy
from rlhf_jax.runtime.metrics import logged

FAULT, WARNING, FINE = "fault", "warning", "fine"
LEVELS = (FAULT, WARNING, FINE)
STAGES = ("SFT", "reward model", "PPO")
Log = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      stage: one of `STAGES`.
      level: "fault": the stages after it cannot be good; "warning": look at it; "fine".
      what: the finding, in words.
      evidence: the numbers.
      advice: what to change first; empty where all is fine.
    """

    stage: str
    level: str
    what: str
    evidence: str
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class HeldOutPairs:
    """What a reward model made of pairs that it was not trained on.

    Attributes:
      chosen: score of the preferred response, [N], in the units that PPO sees.
      rejected: of the other, [N].
      scale: by which scores were divided when they were normalised; log-odds are `scale` times a
        difference.
      chosen_length: tokens of the preferred sequence, [N].
      rejected_length: of the other, [N].
      gap: by how much people preferred it, [N]; 0 where nobody said.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    scale: float
    chosen_length: np.ndarray
    rejected_length: np.ndarray
    gap: np.ndarray


class _Wrong(NamedTuple):
    """What may be wrong: whether it is, how it reads, what to change first."""

    holds: bool
    what: str
    advice: str
    level: str = WARNING


def _finding(stage: str, evidence: str, fine: str, *wrong: _Wrong) -> Finding:
    """The first thing that is wrong, or that all is fine."""
    for one in wrong:
        if one.holds:
            return Finding(stage, one.level, one.what, evidence, one.advice)
    return Finding(stage, FINE, fine, evidence)


def _last(log: Log, name: str, count: int = 10) -> float:
    values = logged(log, name)[-count:]
    return float(values.mean()) if values.size else float("nan")


def diagnose_sft(
    log: Log, summary: Mapping[str, Any], answers: Mapping[str, float]
) -> list[Finding]:
    """Findings on supervised fine-tuning.

    Args:
      log: of the SFT run, as `read_metrics` gives it; empty where the model is not of a run here.
      summary: its summary.json.
      answers: statistics of the SFT policy's held-out responses, from the summary of PPO; may be
        empty.

    Returns:
      At least one.
    """
    found = []
    perplexity = logged(log, "eval/perplexity")
    if perplexity.size:
        best, last = perplexity.min(), perplexity[-1]
        evidence = (
            f"held-out perplexity {perplexity[0]:.1f} at first, {best:.1f} at best, {last:.1f} last"
        )
        over = _Wrong(
            last > 1.05 * best, "it overfits", "train.epochs or train.steps: stop where it was best"
        )
        under = _Wrong(
            perplexity.size > 2 and last < 0.9 * perplexity[-2],
            "it has not learned enough",
            "train.steps: the loss still falls fast",
        )
        found.append(_finding("SFT", evidence, "it has learned the text", over, under))
    if "trained_share" in summary:
        share = summary["trained_share"]
        evidence = f"{share:.1%} of the tokens are trained on, the rest are prompts and padding"
        few = _Wrong(
            share < 0.05,
            "the loss mask",
            "data.max_length, train.row_length: rows of few responses",
        )
        found.append(_finding("SFT", evidence, "the loss mask", few))
    if "response/eos_rate" in answers:
        share = answers["response/eos_rate"]
        evidence = f"{share:.0%} of its held-out responses end by themselves"
        endless = _Wrong(
            share < 0.3,
            "it does not end its responses",
            "sampling.max_new_tokens is too small, or no document ends with a stop token",
            FAULT,
        )
        found.append(_finding("SFT", evidence, "it ends its responses", endless))
    if not found:
        found.append(Finding("SFT", FINE, "a model that no run here has made", "no log"))
    return found


def diagnose_reward_model(
    log: Log, summary: Mapping[str, Any], pairs: HeldOutPairs | None
) -> list[Finding]:
    """Findings on the reward model.

    Args:
      log: of its run.
      summary: its summary.json.
      pairs: held-out pairs with their scores; None where the run left none.

    Returns:
      At least one.
    """
    stage, found = "reward model", []
    if "accuracy" in summary:
        accuracy, (low, _) = summary["accuracy"], summary.get("accuracy_interval", (0.0, 1.0))
        beside = summary.get("judges_accuracy", {})
        told = "".join(f", {name} {share:.1%}" for name, share in beside.items())
        evidence = f"it orders {accuracy:.1%} of the held-out pairs as people do{told}"
        chance = _Wrong(
            low <= 0.55,
            "it hardly knows what people prefer",
            "more pairs (data.pairs), more steps, or a larger data.min_gap",
            FAULT,
        )
        worse = _Wrong(
            accuracy < max(beside.values(), default=accuracy),
            "a judge knows it better",
            "a rule knows more: more pairs, or start from a better model",
        )
        found.append(_finding(stage, evidence, "it knows what people prefer", chance, worse))
    train, held_out = _last(log, "reward/accuracy", 20), _last(log, "eval/accuracy", 1)
    if np.isfinite(train) and np.isfinite(held_out):
        evidence = f"accuracy {train:.1%} in training, {held_out:.1%} held out"
        over = _Wrong(
            train - held_out > 0.15, "it overfits", "fewer steps, or a larger loss.lm_coef"
        )
        found.append(_finding(stage, evidence, "it generalises", over))
    if pairs is not None:
        found += [_calibration(pairs), _length_bias(pairs), *_by_gap(pairs)]
    return found or [Finding(stage, FINE, "a model that no run here has made", "no log")]


def _calibration(pairs: HeldOutPairs) -> Finding:
    error = calibration_error(pairs.scale * pairs.chosen, pairs.scale * pairs.rejected)
    evidence = f"expected calibration error {error:.3f} of its pair probabilities"
    sure = _Wrong(
        error > 0.1,
        "its margins say too much",
        "fewer steps, or a smaller learning rate: it is surer than it is right",
    )
    return _finding("reward model", evidence, "its margins mean what they say", sure)


def _length_bias(pairs: HeldOutPairs) -> Finding:
    """How much oftener the model prefers the longer one than people do."""
    differ = pairs.chosen_length != pairs.rejected_length
    if differ.sum() < 30:
        return Finding("reward model", FINE, "its taste for length", "few pairs differ in length")
    longer = pairs.chosen_length > pairs.rejected_length
    model = np.where(longer, pairs.chosen > pairs.rejected, pairs.rejected > pairs.chosen)
    people, own = float(longer[differ].mean()), float(model[differ].mean())
    evidence = f"people prefer the longer one in {people:.0%} of pairs, the model in {own:.0%}"
    biased = _Wrong(
        own - people > 0.1,
        "it likes length",
        "pairs of equal lengths, or a penalty on length: PPO will find it",
    )
    return _finding("reward model", evidence, "it does not like length more than people", biased)


def _by_gap(pairs: HeldOutPairs) -> list[Finding]:
    """Accuracy on pairs that people rate close, and far apart."""
    if np.unique(pairs.gap).size < 3:
        return []
    low, high = np.quantile(pairs.gap, [1 / 3, 2 / 3])
    near, far = pairs.gap <= low, pairs.gap >= high
    close, apart = (pair_accuracy(pairs.chosen[keep], pairs.rejected[keep]) for keep in (near, far))
    evidence = f"accuracy {close:.1%} on the closest third of pairs, {apart:.1%} on the farthest"
    flat = _Wrong(
        apart < close + 0.02,
        "clear pairs are no easier",
        "look at the ratings: pairs that people tell apart easily should be easy",
    )
    return [_finding("reward model", evidence, "clear pairs are easier", flat)]


def diagnose_ppo(log: Log, pairs: HeldOutPairs | None) -> list[Finding]:
    """Findings on PPO itself.

    Args:
      log: of its run, finished or not.
      pairs: of its reward model; None where there are none.

    Returns:
      At least one.
    """
    found = [*_on_policy(log), *_critic(log), *_drift(log), *_truncation(log)]
    found += _over_optimised(log, pairs)
    events = find_collapses(log)
    if events:
        advice = "collapse.action=rollback, a larger kl.coef, or stop before that step"
        found.append(Finding("PPO", FAULT, "the policy collapses", events[0].text(), advice))
    else:
        found.append(Finding("PPO", FINE, "the policy does not collapse", "no COLLAPSE in its log"))
    return found + _judged(log)


def _on_policy(log: Log) -> list[Finding]:
    high, low = logged(log, "policy/ratio_max_first"), logged(log, "policy/ratio_min_first")
    if not high.size or not low.size:
        return []
    far = max(float(high.max()) - 1, 1 - float(low.min()))
    evidence = f"the ratio of a first minibatch leaves 1 by {far:.2g} at most"
    off = _Wrong(
        far > 1e-2,
        "the first update is off policy",
        "the sampler and the loss see different policies: temperature, top-p, dtype, or "
        "ppo.ratio_denominator=reference",
        FAULT,
    )
    return [_finding("PPO", evidence, "the first update is on policy", off)]


def _critic(log: Log) -> list[Finding]:
    explained = _last(log, "critic/explained_variance")
    if not np.isfinite(explained):
        return []
    evidence = f"it explains {explained:.0%} of the variance of returns at the end"
    poor = _Wrong(
        explained < 0.1,
        "the critic knows little",
        "train.critic_pretrain_iterations, critic_optimizer.learning_rate",
    )
    return [_finding("PPO", evidence, "the critic has learned", poor)]


def _drift(log: Log) -> list[Finding]:
    kl = _last(log, "policy/kl_ref_sequence")
    if not np.isfinite(kl):
        return []
    evidence = f"{kl:.1f} nats a response from the reference at the end"
    far = _Wrong(kl > 20, "the policy is far away", "a larger kl.coef")
    still = _Wrong(
        abs(kl) < 0.05,
        "the policy has hardly moved",
        "optimizer.learning_rate, train.iterations: it has not moved",
    )
    return [_finding("PPO", evidence, "the policy keeps near the reference", far, still)]


def _truncation(log: Log) -> list[Finding]:
    ends = _last(log, "response/eos_rate")
    if not np.isfinite(ends):
        return []
    evidence = f"{1 - ends:.0%} of responses are cut at the limit at the end"
    cut = _Wrong(
        ends < 0.5,
        "most responses are cut",
        "reward.missing_eos_penalty, or a larger sampling.max_new_tokens",
    )
    return [_finding("PPO", evidence, "responses end by themselves", cut)]


def _over_optimised(log: Log, pairs: HeldOutPairs | None) -> list[Finding]:
    reward = _last(log, "reward/mean")
    if pairs is None or not np.isfinite(reward):
        return []
    limit = float(np.quantile(pairs.chosen, 0.95))
    evidence = (
        f"mean reward {reward:.2f} at the end; of people's preferred responses 5% have more than "
        f"{limit:.2f}"
    )
    over = _Wrong(
        reward > limit,
        "the reward is over-optimised",
        "a larger kl.coef: these scores are outside of what the reward model has seen",
    )
    return [_finding("PPO", evidence, "rewards are those of real text", over)]


def _judged(log: Log) -> list[Finding]:
    found = []
    for name in log:
        wins = logged(log, name)
        if not name.startswith("win_rate/") or wins.size < 2:
            continue
        judge, fell = name.removeprefix("win_rate/"), 100 * (wins.max() - wins[-1])
        evidence = f"win rate by {judge} {wins.max():.0%} at best, {wins[-1]:.0%} last"
        before = _Wrong(
            fell >= 5,
            f"{judge} liked it better before",
            "stop earlier, or a larger kl.coef: the reward is no longer the aim",
        )
        never = _Wrong(
            wins[-1] <= 0.5,
            f"{judge} prefers SFT",
            "read the samples; does the reward rise at all?",
        )
        found.append(_finding("PPO", evidence, f"{judge} prefers it to SFT", before, never))
    return found


def page(findings: Sequence[Finding]) -> str:
    """One page: what to look at first, then each stage, the worst first.

    Returns:
      Text, with a line for each finding.
    """
    marks = {FAULT: "FAULT  ", WARNING: "warning", FINE: "fine   "}
    worst = sorted(
        (one for one in findings if one.level != FINE),
        key=lambda one: (LEVELS.index(one.level), STAGES.index(one.stage)),
    )
    lines = ["Nothing stands out: read the samples in report.md."]
    if worst:
        first = worst[0]
        lines = [f"Look first at {first.stage}: {first.what}.", f"Change first: {first.advice}."]
    for stage in STAGES:
        mine = [one for one in findings if one.stage == stage]
        if mine:
            lines += ["", stage]
        for one in sorted(mine, key=lambda one: LEVELS.index(one.level)):
            lines.append(f"  {marks[one.level]}  {one.what}: {one.evidence}")
            if one.advice and one is not (worst[0] if worst else None):
                lines.append(f"           change: {one.advice}")
    return "\n".join(lines)
