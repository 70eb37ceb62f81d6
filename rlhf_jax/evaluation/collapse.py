"""Collapse of a policy: defined, watched while a run trains, found in the log of a finished one.

The paper watches perplexity, response length and KL to the reference beside the reward, since the
reward goes on rising when the policy gives way (Zheng et al. 2023, section 5.2, Figure 4). Here
five kinds of evidence are watched, and a policy has collapsed when at least two kinds that differ
speak at once, several iterations in a row. Bounds are relative to the start of the run, where the
policy is the SFT model: no number of a model, a task or a length stands in them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.runtime.settings import check

OFF, LOG, STOP, ROLLBACK = "off", "log", "stop", "rollback"
ACTIONS = (OFF, LOG, STOP, ROLLBACK)
EVENT, WITNESSES = "collapse/event", "collapse/witnesses"


@dataclasses.dataclass(frozen=True)
class CollapseConfig:
    """What counts as a collapse, and what follows.

    Attributes:
      action: "off"; "log" says so in the log and the report; "stop" ends the run as well, saved;
        "rollback" goes on from the last checkpoint before, with half the learning rate.
      retries: how often "rollback" tries; after that it stops.
      start: iterations at the beginning whose median is the start of each metric.
      kinds: how many different kinds of evidence must speak at once.
      patience: iterations in a row for which they must.
    """

    action: str = LOG
    retries: int = 2
    start: int = 5
    kinds: int = 2
    patience: int = 2

    def __post_init__(self):
        most = len({bound.kind for bound in BOUNDS})
        check(self, action=ACTIONS, retries="[0, inf)", start="[1, inf)", patience="[1, inf)")
        check(self, kinds=f"[1, {most}]")


@dataclasses.dataclass(frozen=True)
class Bound:
    """A metric beyond which a policy is suspicious.

    Attributes:
      metric: its name in the log.
      kind: of evidence; bounds of one kind speak for the same thing.
      times: the bound is so many times the start.
      of: the metric whose start is meant; empty is `metric` itself.
      plus: added to that multiple.
      above: whether values above the bound are beyond it, instead of those below.
    """

    metric: str
    kind: str
    times: float
    of: str = ""
    plus: float = 0.0
    above: bool = False

    def limit(self, start: Mapping[str, float]) -> float:
        """The bound in the metric's own unit; NaN, which nothing passes, without a start."""
        return self.times * start.get(self.of or self.metric, float("nan")) + self.plus

    def passed(self, value: float, start: Mapping[str, float]) -> bool:
        """Whether a value is beyond the bound."""
        limit = self.limit(start)
        return value > limit if self.above else value < limit


BOUNDS = (
    # Variety: one sentence for every prompt, or a phrase over and over.
    Bound("response/distinct_2", "variety", times=0.6),
    Bound("response/repetition_4", "variety", times=1.0, plus=0.1, above=True),
    # Certainty: of its own words the policy is nearly sure; or it has become noise.
    Bound("policy/perplexity", "certainty", times=1 / 4),
    Bound("policy/perplexity", "certainty", times=4.0, above=True),
    Bound("policy/entropy", "certainty", times=0.5),
    # Distance: nats per token to the reference, against the nats that a token had at the start.
    Bound("policy/kl_ref", "distance", times=0.25, of="policy/entropy", above=True),
    # Shape: responses that run into the limit, or hardly begin.
    Bound("response/length", "shape", times=2.0, above=True),
    Bound("response/length", "shape", times=1 / 3),
    Bound("response/eos_rate", "shape", times=0.5),
    # Optimisation: most of a minibatch leaves the trust region. A ratio to the reference, as in the
    # paper's importance sampling, has a fifth outside from the beginning.
    Bound("policy/clip_fraction", "optimisation", times=3.0, plus=0.2, above=True),
)
# Logged beside the evidence, though no bound holds for every run.
ALSO = ("reward/mean", "critic/explained_variance")


@dataclasses.dataclass(frozen=True)
class Witness:
    """A metric that is beyond its bound: its value, the bound, and where the run began."""

    metric: str
    kind: str
    value: float
    bound: float
    start: float

    def text(self) -> str:
        """For people: `response/distinct_2 0.21 (0.91 at the start)`."""
        return f"{self.metric} {self.value:.3g} ({self.start:.3g} at the start)"


@dataclasses.dataclass(frozen=True)
class Collapse:
    """A collapse and the metrics that gave it away.

    Attributes:
      step: iteration in which it was noticed, from 0.
      since: first of the iterations in a row.
      witnesses: metrics beyond their bounds at `step`.
      also: reward and explained variance at `step`, where they are logged.
    """

    step: int
    since: int
    witnesses: tuple[Witness, ...]
    also: Mapping[str, float]

    def text(self) -> str:
        """One line for people."""
        told = ", ".join(witness.text() for witness in self.witnesses)
        return f"COLLAPSE at step {self.step + 1}: {told}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Collapse:
        """What `as_dict` gave."""
        # JSON has no NaN: where a metric did not begin with the run, its start is a name.
        witnesses = tuple(
            Witness(
                one["metric"],
                one["kind"],
                float(one["value"]),
                float(one["bound"]),
                float(one["start"]),
            )
            for one in content["witnesses"]
        )
        also = {name: float(value) for name, value in content["also"].items()}
        return cls(content["step"], content["since"], witnesses, also)


class CollapseMonitor:
    """Sees the metrics of each iteration in order, and says when the policy collapses.

    An iteration without the metrics (an evaluation, another method) says nothing. One collapse is
    one event: the next can be reported once the evidence was gone for `patience` iterations.
    """

    def __init__(self, config: CollapseConfig = CollapseConfig()):  # frozen
        self.config = config
        self._first: dict[str, list[float]] = {}
        self._seen = 0
        self._in_a_row = self._calm = 0
        self._collapsed = False
        self.events: list[Collapse] = []
        self.num_witnesses = 0

    @property
    def start(self) -> dict[str, float]:
        """Median of each metric over the first iterations; empty until these are there."""
        if self._seen < self.config.start:
            return {}
        return {name: statistics.median(values) for name, values in self._first.items()}

    def see(self, step: int, metrics: Mapping[str, float]) -> Collapse | None:
        """Takes the metrics of an iteration.

        Args:
          step: from 0; steps may be left out.
          metrics: as they are logged.

        Returns:
          The collapse, if this iteration shows it for the first time.
        """
        watched = {bound.metric for bound in BOUNDS} & metrics.keys()
        if not watched:
            return None
        start = self.start
        if not start:
            for name in watched:
                self._first.setdefault(name, []).append(float(metrics[name]))
            self._seen += 1
            return None
        witnesses = tuple(
            Witness(
                bound.metric,
                bound.kind,
                float(metrics[bound.metric]),
                bound.limit(start),
                start.get(bound.metric, float("nan")),
            )
            for bound in BOUNDS
            if bound.metric in watched and bound.passed(float(metrics[bound.metric]), start)
        )
        self.num_witnesses = len({witness.kind for witness in witnesses})
        if self.num_witnesses < self.config.kinds:
            self._in_a_row, self._calm = 0, self._calm + 1
            self._collapsed = self._collapsed and self._calm < self.config.patience
            return None
        self._in_a_row, self._calm = self._in_a_row + 1, 0
        if self._collapsed or self._in_a_row < self.config.patience:
            return None
        self._collapsed = True
        also = {name: float(metrics[name]) for name in ALSO if name in metrics}
        event = Collapse(step, step + 1 - self._in_a_row, witnesses, also)
        self.events.append(event)
        return event

    def see_log(self, log: Mapping[str, np.ndarray]) -> None:
        """Takes the iterations of a log; see `find_collapses`."""
        for row, step in enumerate(log["step"]):
            numbers = {name: float(values[row]) for name, values in log.items()}
            seen = {name: value for name, value in numbers.items() if not math.isnan(value)}
            self.see(int(step), seen)


def find_collapses(
    log: Mapping[str, np.ndarray],
    config: CollapseConfig = CollapseConfig(),  # frozen
) -> list[Collapse]:
    """Collapses in the log of a finished run.

    Args:
      log: metrics.jsonl as `read_metrics` gives it: `step` and metrics, [S] each, NaN where a step
        logged none.
      config: what counts as one; `action` is not asked.

    Returns:
      All of them, in order.
    """
    monitor = CollapseMonitor(config)
    monitor.see_log(log)
    return monitor.events
