"""The paper's claims, each with a metric and a bound that was fixed before its runs were made.

A claim is a number of each seed and a bound. It is 'reproduced' where every seed keeps the bound
and so does the interval of their mean; 'not reproduced' where no seed keeps it; 'undecided'
otherwise, and where a run is missing. A run that failed keeps no bound.

Where the number is one of win rates, another draw of prompts would have given another: the interval
is then a bootstrap over seeds, and over the prompts of each.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation.comparison import Interval, bootstrap_interval
from rlhf_jax.runtime.metrics import logged

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"
# The judge of the claims: it is trained on nothing here, and word salad does not fool it.
WIN_RATE = "win_rate/language_model"
# Iterations at either end of a run over which a curve is averaged.
ENDS = 10
# Percent of an iteration's responses whose reward is lower, as they are logged.
QUANTILES = ("reward/q05", "reward/q25", "reward/q50", "reward/q75", "reward/q95")
# Draws of the prompts of a seed, of which a resample takes one.
REDRAWS = 500


@dataclasses.dataclass(frozen=True)
class Curves:
    """What a claim may ask of one run.

    Attributes:
      log: metric -> values [S], NaN where a step logged none; `step` [S].
      iterations: of the run.
      collapses: iterations, from 0, at which the policy collapsed.
      win_rates: judge -> shares of test prompts against SFT at the end; empty for a reward model.
      differences: preferred minus dispreferred score of held-out pairs [N]; empty but for one.
      eval_prompts: validation prompts behind each win rate of the log; 0 where not known.
    """

    log: Mapping[str, np.ndarray]
    iterations: int
    collapses: Sequence[int]
    win_rates: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    differences: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    eval_prompts: int = 0

    def redrawn(self, random: np.random.Generator) -> Curves:
        """The run with the win rates that as many prompts drawn from its own would give.

        At the end a judge's wins, ties and losses are drawn, from their shares. The log has the win
        rate alone: it is drawn as if there had been no tie, which varies at least as much. Prompts
        that several runs, or several steps of one, have answered are drawn anew for each.
        """
        log, rates = dict(self.log), {}
        for name, values in self.log.items():
            if self.eval_prompts and name.startswith("win_rate/"):
                there, count = np.isfinite(values), self.eval_prompts
                log[name] = np.array(values, np.float64)
                log[name][there] = random.binomial(count, values[there]) / count
        for name, rate in self.win_rates.items():
            count, shares = int(rate.get("num_prompts", 0)), [rate["win"], rate["tie"]]
            if count:
                won, tied, _ = random.multinomial(count, [*shares, max(0.0, 1 - sum(shares))])
                rates[name] = {**rate, "win_rate": (won + tied / 2) / count}
        return dataclasses.replace(self, log=log, win_rates={**self.win_rates, **rates})

    def values(self, metric: str) -> np.ndarray:
        """The values of a metric where it was logged; empty where it never was."""
        return logged(self.log, metric)

    def first(self, metric: str, count: int = ENDS) -> float:
        """Mean over the first iterations that logged it; NaN where none did."""
        values = self.values(metric)[:count]
        return float(values.mean()) if values.size else math.nan

    def last(self, metric: str, count: int = ENDS) -> float:
        """Mean over the last iterations that logged it; NaN where none did."""
        values = self.values(metric)[-count:]
        return float(values.mean()) if values.size else math.nan

    def peak(self, metric: str) -> float:
        """The largest value; NaN where there is none."""
        values = self.values(metric)
        return float(values.max()) if values.size else math.nan

    def with_policy(self, metric: str, count: int) -> float:
        """Mean of a metric over the first iterations in which the policy trains."""
        trains = np.isfinite(np.asarray(self.log["loss/policy"], np.float64))
        return float(np.asarray(self.log[metric], np.float64)[trains][:count].mean())

    def until(self, share: float, metric: str) -> np.ndarray:
        """The values in the first `share` of the iterations."""
        early = self.log["step"] < share * self.iterations
        return logged({name: values[early] for name, values in self.log.items()}, metric)

    @property
    def collapse(self) -> int:
        """The first collapse, counted from 1; one after the end where there is none."""
        return self.collapses[0] + 1 if self.collapses else self.iterations + 1


# What a claim is computed from: label of the series -> the run of one seed.
Seed = Mapping[str, Curves]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and what would show it.

    Attributes:
      figure: whose runs it needs.
      sentence: the claim.
      source: where it stands.
      metric: the number, in words.
      value: the number of a seed.
      series: labels that `value` reads.
      at_least: lower bound; None where it is not bounded so.
      at_most: upper bound.
      of_win_rates: whether `value` is made of win rates on prompts.
    """

    figure: str
    sentence: str
    source: str
    metric: str
    value: Callable[[Seed], float]
    series: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None
    of_win_rates: bool = False

    @property
    def threshold(self) -> str:
        """The bound, in words."""
        parts = []
        if self.at_least is not None:
            parts.append(f"at least {self.at_least:g}")
        if self.at_most is not None:
            parts.append(f"at most {self.at_most:g}")
        return ", ".join(parts)

    def keeps(self, value: float) -> bool:
        """Whether a number keeps the bound; NaN does not."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= value <= high


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim, tried.

    Attributes:
      claim: which.
      values: seed -> its number; NaN where the run failed.
      low: lower end of the 95% interval of the mean, by a bootstrap over seeds, and over prompts
        for a claim `of_win_rates`; NaN for one seed.
      high: upper end.
      verdict: one of the three words.
    """

    claim: Claim
    values: Mapping[int, float]
    low: float
    high: float
    verdict: str


def judge(claim: Claim, seeds: Mapping[int, Seed], *, failed: Sequence[int] = ()) -> Verdict:
    """Tries a claim.

    Args:
      claim: which.
      seeds: seed -> label -> run, for seeds whose runs are there.
      failed: seeds of which a run failed.
    """
    values = {
        seed: claim.value(runs)
        for seed, runs in seeds.items()
        if all(name in runs for name in claim.series)
    }
    values |= {seed: math.nan for seed in failed}
    values = dict(sorted(values.items()))
    numbers = np.array(list(values.values()))
    low = high = math.nan
    if len(numbers) > 1 and np.isfinite(numbers).all():
        _, low, high = interval(claim, [seeds[seed] for seed in values], numbers)
    kept = [claim.keeps(value) for value in numbers]
    if not kept:
        verdict = UNDECIDED
    elif not any(kept):
        verdict = NOT_REPRODUCED
    elif all(kept) and len(kept) > 1 and claim.keeps(low) and claim.keeps(high):
        verdict = REPRODUCED
    else:
        verdict = UNDECIDED
    return Verdict(claim, values, low, high, verdict)


def interval(claim: Claim, seeds: Sequence[Seed], values: np.ndarray) -> Interval:
    """The mean over seeds with a 95% interval.

    For win rates it is a bootstrap in two stages: seeds are drawn with replacement, and for each
    that is drawn its prompts. What the draws of prompts move on average is taken off: the best of
    several win rates rises by it, and here their spread alone is asked for.

    Args:
      claim: its value is taken of each draw.
      seeds: the runs of S seeds.
      values: [S], the value of each.
    """
    if not claim.of_win_rates:
        return bootstrap_interval(values)
    random = np.random.default_rng(0)
    drawn = np.array(
        [[claim.value(_redrawn(seed, random)) for _ in range(REDRAWS)] for seed in seeds]
    )
    drawn += (values - drawn.mean(axis=1))[:, None]

    def mean(seeds_drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = seeds_drawn.astype(np.int64)
        return drawn[rows, random.integers(REDRAWS, size=rows.shape)].mean(axis)

    _, low, high = bootstrap_interval(np.arange(len(seeds)), mean)
    return Interval(float(values.mean()), low, high)


def _redrawn(seed: Seed, random: np.random.Generator) -> Seed:
    return {label: run.redrawn(random) for label, run in seed.items()}


def _last_win(run: Curves) -> float:
    """The last win rate against SFT by the language model, a share."""
    return run.last(WIN_RATE, 1)


def _lost(run: Curves) -> float:
    """From the best win rate to the last, points."""
    return 100 * (run.peak(WIN_RATE) - _last_win(run))


def _lost_as_reward_rose(run: Curves) -> float:
    rose = run.last("reward/mean") > run.first("reward/mean")
    return _lost(run) if rose else -math.inf


def _moved(label: str) -> Callable[[Seed], float]:
    """How many of KL, perplexity and length have moved at the end."""

    def value(seed: Seed) -> float:
        run = seed[label]
        perplexity = run.last("policy/perplexity") / run.first("policy/perplexity")
        length = run.last("response/length") / run.first("response/length")
        return float(
            sum(
                (
                    run.last("policy/kl_ref_sequence") >= 10,
                    not 0.5 < perplexity < 2,
                    not 0.75 < length < 1.25,
                )
            )
        )

    return value


def _later(label: str) -> Callable[[Seed], float]:
    return lambda seed: seed[label].collapse / seed["vanilla"].collapse


def _collapse(figure: str, sentence: str, source: str, label: str, *, comes: bool) -> Claim:
    """That a series collapses, or that it does not."""
    return Claim(
        figure,
        sentence,
        source,
        "1 where the monitor reports a collapse",
        lambda seed: float(bool(seed[label].collapses)),
        (label,),
        at_least=1 if comes else None,
        at_most=None if comes else 0,
    )


def _in_order(*labels: str) -> Callable[[Seed], float]:
    """1 where the first collapses before the second, and so on; of which the last need not."""

    def value(seed: Seed) -> float:
        steps = [seed[label].collapse for label in labels]
        return float(all(a < b for a, b in itertools.pairwise(steps)))

    return value


def _early(label: str) -> Callable[[Seed], float]:
    """The largest move of length or perplexity in the first quarter, as a share of the start."""

    def value(seed: Seed) -> float:
        run, moves = seed[label], []
        for metric in ("response/length", "policy/perplexity"):
            early = run.until(0.25, metric)
            if early.size > ENDS:
                late = float(early[-ENDS:].mean())
                moves.append(abs(late / run.first(metric, 5) - 1))
        return max(moves, default=math.nan)

    return value


def _spread(run: Curves, at: Callable[..., float]) -> float:
    """Between the 5% and the 95% quantile of the rewards of an iteration."""
    low, high = QUANTILES[0], QUANTILES[-1]
    return at(run, high) - at(run, low)


REPARAMETERISED = (
    "reward_scale",
    "reward_norm_0.3",
    "reward_norm_0.8",
    "adv_norm_0.5",
    "adv_norm_0.12",
)
CONSTRAINED = ("kl", "entropy", "importance_sample", "kl_importance_sample")

CLAIMS = (
    Claim(
        "2",
        "Preferred and dispreferred responses overlap: the differences centre near zero.",
        "Figure 2 (English), section 4.2",
        "share of held-out pairs whose preferred response scores higher, percent",
        lambda seed: 100 * float((seed["reward model"].differences > 0).mean()),
        ("reward model",),
        at_least=60,
        at_most=85,
    ),
    Claim(
        "3",
        "Accuracy on held-out pairs rises from chance.",
        "Figure 3, section 4.2",
        "last accuracy on held-out pairs, percent",
        lambda seed: 100 * seed["reward model"].last("eval/accuracy", 1),
        ("reward model",),
        at_least=65,
    ),
    Claim(
        "3",
        "Accuracy on held-out pairs stays behind that on training pairs.",
        "Figure 3, section 4.2",
        "accuracy on the last 50 batches minus the last one on held-out pairs, points",
        lambda seed: (
            100
            * (
                seed["reward model"].last("reward/accuracy", 50)
                - seed["reward model"].last("eval/accuracy", 1)
            )
        ),
        ("reward model",),
        at_least=3,
    ),
    Claim(
        "4",
        "The reward rises while the judge falls.",
        "Figure 4, section 5.2",
        "best win rate against SFT by the language model minus the last, points; -inf where the "
        "reward did not rise",
        lambda seed: _lost_as_reward_rose(seed["vanilla"]),
        ("vanilla",),
        at_least=10,
        of_win_rates=True,
    ),
    Claim(
        "4",
        "KL, perplexity and response length move when reward and judge part.",
        "Figure 4, section 5.2",
        "how many of: KL at least 10 nats a response, perplexity halved or doubled, length changed "
        "by a quarter",
        _moved("vanilla"),
        ("vanilla",),
        at_least=3,
    ),
    _collapse(
        "4",
        "Vanilla PPO collapses.",
        "Figure 4, section 5.2",
        "vanilla",
        comes=True,
    ),
    *(
        Claim(
            "6",
            f"{name} delays or prevents the collapse of vanilla PPO.",
            "Figure 6, section 5.3.1",
            "iteration of its collapse (the length of the run where there is none) over vanilla's",
            _later(name),
            (name, "vanilla"),
            at_least=1.25,
        )
        for name in REPARAMETERISED
    ),
    *(
        _collapse(
            "6",
            f"{name} does not collapse.",
            "Figure 6, section 5.3.1",
            name,
            comes=False,
        )
        for name in ("reward_norm_0.3", "adv_norm_0.12")
    ),
    Claim(
        "6",
        "Reward scaling collapses first, then advantages clipped at 0.5, then rewards at 0.8.",
        "Figure 6, section 5.3.1",
        "1 where the collapses come in this order",
        _in_order("reward_scale", "adv_norm_0.5", "reward_norm_0.8"),
        ("reward_scale", "adv_norm_0.5", "reward_norm_0.8"),
        at_least=1,
    ),
    *(
        _collapse(
            "7",
            f"{name} keeps vanilla PPO from collapsing.",
            "Figure 7, section 5.3.2",
            name,
            comes=False,
        )
        for name in ("kl", "entropy", "kl_importance_sample")
    ),
    Claim(
        "7",
        "Importance sampling alone lets the policy drift further than a KL penalty.",
        "Figure 7, section 5.3.2",
        "last KL to SFT per response over that with the penalty",
        lambda seed: (
            seed["importance_sample"].last("policy/kl_ref_sequence")
            / seed["kl"].last("policy/kl_ref_sequence")
        ),
        ("importance_sample", "kl"),
        at_least=2,
    ),
    *(
        Claim(
            "7",
            f"With {name}, length or perplexity moves early.",
            "Figure 7, section 5.3.2",
            "largest change of either in the first quarter of the run, as a share",
            _early(name),
            (name,),
            at_least=0.2,
        )
        for name in CONSTRAINED
    ),
    Claim(
        "8",
        "A policy that begins without SFT fails.",
        "Figure 8, section 5.3.3",
        "last win rate against SFT by the language model, percent",
        lambda seed: 100 * _last_win(seed["policy_pretrained"]),
        ("policy_pretrained",),
        at_most=20,
        of_win_rates=True,
    ),
    Claim(
        "8",
        "What the critic begins as does not matter at the end.",
        "Figure 8, section 5.3.3",
        "last win rate with the critic from SFT minus PPO-max's, points",
        lambda seed: 100 * (_last_win(seed["critic_sft"]) - _last_win(seed["PPO-max"])),
        ("critic_sft", "PPO-max"),
        at_least=-10,
        at_most=10,
        of_win_rates=True,
    ),
    Claim(
        "8",
        "A critic that is trained before PPO begins with nearly no value loss.",
        "Figure 8, section 5.3.3",
        "value loss of the first iterations that train the policy over vanilla's first ones",
        lambda seed: (
            seed["critic_pretrain"].with_policy("loss/value", 5)
            / seed["vanilla"].with_policy("loss/value", 5)
        ),
        ("critic_pretrain", "vanilla"),
        at_most=0.25,
    ),
    _collapse(
        "8",
        "Training the critic before does not keep vanilla PPO from collapsing.",
        "Figure 8, section 5.3.3",
        "critic_pretrain",
        comes=True,
    ),
    _collapse(
        "9",
        "PPO-max is stable over ten times the steps.",
        "Figure 9, section 5.4",
        "PPO-max, long",
        comes=False,
    ),
    Claim(
        "9",
        "PPO-max keeps what it has won over ten times the steps.",
        "Figure 9, section 5.4",
        "best win rate against SFT by the language model minus the last, points",
        lambda seed: _lost(seed["PPO-max, long"]),
        ("PPO-max, long",),
        at_most=10,
        of_win_rates=True,
    ),
    Claim(
        "10",
        "RLHF wins against SFT.",
        "Figure 10, section 6.1",
        "win rate of PPO-max against SFT on test prompts by the language model, percent",
        lambda seed: 100 * seed["PPO-max"].win_rates["language_model"]["win_rate"],
        ("PPO-max",),
        at_least=55,
        of_win_rates=True,
    ),
    Claim(
        "13",
        "The rewards of vanilla PPO get a long tail.",
        "Figure 13, appendix",
        "between the 5% and the 95% quantile of an iteration's rewards, last over first",
        lambda seed: _spread(seed["vanilla"], Curves.last) / _spread(seed["vanilla"], Curves.first),
        ("vanilla",),
        at_least=1.5,
    ),
    _collapse(
        "14",
        "Normalised, clipped rewards and value clipping without a KL penalty collapse.",
        "Figure 14, appendix",
        "reward norm 0.8, value clip",
        comes=True,
    ),
    _collapse(
        "19",
        "GAE with lambda 0 collapses.",
        "Figure 19, appendix",
        "lambda 0",
        comes=True,
    ),
)


def of_figure(figure: str) -> list[Claim]:
    """The claims that need the runs of a figure."""
    return [claim for claim in CLAIMS if claim.figure == figure]


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """For JSON: the sentence, the metric, the threshold, the numbers, the verdict."""
    claim = verdict.claim
    return {
        "sentence": claim.sentence,
        "source": claim.source,
        "metric": claim.metric,
        "threshold": claim.threshold,
        "values": {str(seed): value for seed, value in verdict.values.items()},
        "interval": [verdict.low, verdict.high],
        "interval_over": ["seeds", "prompts"] if claim.of_win_rates else ["seeds"],
        "verdict": verdict.verdict,
    }
