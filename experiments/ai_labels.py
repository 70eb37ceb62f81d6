"""AI feedback: a language model labels pairs of responses, softly, in place of people.

  python -m experiments.ai_labels --config configs/ai_labels.py:quickstart

Writes `labels/` with train.jsonl, validation.jsonl and test.jsonl, which the reward model and DPO
read as `data.source=jsonl:RUN/labels` (with `loss.labels=soft` and `dpo.labels=soft`), report.md,
metrics.jsonl, config.json and summary.json to the run folder. Where people ranked pairs of the
source, the judge is asked about some of them, held out, and the report says how far it agrees.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from configs import common
from configs.ai_labels import policy_stage
from experiments import asking, command, folders, reporting, solving, stages
from experiments.settings import DataConfig, Shared
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.evaluation.agreement import cohen_kappa
from rlhf_jax.evaluation.comparison import Interval, bootstrap_interval
from rlhf_jax.evaluation.language_model import short_name
from rlhf_jax.evaluation.report import escape_markdown
from rlhf_jax.methods import ai_feedback
from rlhf_jax.methods.ai_feedback import Chain, Compared, Comparison, FeedbackModel, Template
from rlhf_jax.methods.constitution import Principle, load_constitution
from rlhf_jax.rollouts.answers import sample_answers
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import digests, distributed
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.training.run import OnStep

SPLITS = ("train", "validation", "test")
SAMPLES, PAIRS = "samples", "pairs"
THIRDS = 3  # of the pairs that people ranked, by how far apart they are


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Folders of the policy whose samples are labelled, and of the judge."""

    policy: str
    judge: str
    build: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsToLabel(DataConfig):
    """How many pairs of each split.

    Attributes:
      max_length: Tokens of a prompt with one sample.
      pairs: To train on.
      validation_pairs: Held out, for curves.
      eval_pairs: Held out, for the report.
    """

    max_length: int
    pairs: int
    validation_pairs: int
    eval_pairs: int

    def __post_init__(self):
        super().__post_init__()
        names = ("max_length", "pairs", "validation_pairs", "eval_pairs")
        check(self, **dict.fromkeys(names, "[1, inf)"))

    def counts(self) -> dict[str, int]:
        """Pairs by split."""
        return dict(zip(SPLITS, (self.pairs, self.validation_pairs, self.eval_pairs), strict=True))


@dataclasses.dataclass(frozen=True)
class LabelsConfig:
    """What the judge is asked, and of what.

    Attributes:
      of: "samples" of the policy, or the "pairs" of the data.
      template: See `ai_feedback.load_template`.
      constitution: Whose principles it is asked by, one drawn for each pair; empty for none.
      reasons: Whether it gives reasons first.
      max_new_tokens: Of the reasons.
      clamp: Labels stay within ½ ± clamp.
      max_length: Tokens of its longest prompt.
      batch_tokens: That it reads at a time, about.
    """

    of: str
    template: str
    constitution: str
    reasons: bool
    max_new_tokens: int
    clamp: float
    max_length: int
    batch_tokens: int

    def __post_init__(self):
        whole = ("max_new_tokens", "max_length", "batch_tokens")
        check(self, of=(SAMPLES, PAIRS), clamp="(0, 0.5]", **dict.fromkeys(whole, "[1, inf)"))
        try:
            template = ai_feedback.load_template(self.template)
        except ValueError as error:
            raise ValueError(f"labels.template: {error}") from None
        if self.reasons and not template.rationale:
            raise ValueError(
                f"labels.reasons=True needs a template that asks for reasons, and labels.template="
                f"{self.template!r} does not: it has no rationale"
            )
        if ("{question}" in template.prompt) != bool(self.constitution):
            raise ValueError(
                f"labels.template={self.template!r} and labels.constitution={self.constitution!r} "
                "do not go together: a template with the field {question} needs a constitution, "
                "and no other takes one"
            )
        self.principles()

    def principles(self) -> tuple[Principle, ...]:
        """Those of the constitution; none without one."""
        if not self.constitution:
            return ()
        try:
            return load_constitution(self.constitution).principles
        except ValueError as error:
            raise ValueError(f"labels.constitution: {error}") from None


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """The most responses that are drawn at a time."""

    rows: int

    def __post_init__(self):
        check(self, rows="[2, inf)")


@dataclasses.dataclass(frozen=True)
class PeopleConfig:
    """Pairs that people ranked, to measure the judge by, and pairs that the report shows."""

    people: int
    samples: int

    def __post_init__(self):
        check(self, people="[0, inf)", samples="[0, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Every key of configs/ai_labels.py."""

    inputs: Inputs
    data: PairsToLabel
    labels: LabelsConfig
    samples: RowsConfig
    sampling: SamplingConfig
    eval: PeopleConfig

    def __post_init__(self):
        super().__post_init__()
        room = self.data.max_length - self.sampling.max_new_tokens
        if self.labels.of == SAMPLES and room < 1:
            raise ValueError(
                f"data.max_length={self.data.max_length} leaves no room for a prompt: it must be "
                f"above sampling.max_new_tokens={self.sampling.max_new_tokens}"
            )


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt.

    Attributes:
      row: the prompt as a row has it: "prompt", and "opening" where the assistant has begun.
      sides: the two responses, as they go on after the prompt or the opening.
      margin: how much higher people rated the first; 0 where nobody did.
    """

    row: Row
    sides: tuple[str, str]
    margin: float = 0.0

    def asked(self) -> Comparison:
        """As a judge is asked: of a turn that has begun it sees the words, not the instruction."""
        return Comparison(self.row.get("opening") or self.row["prompt"], *self.sides)

    def turn(self, side: int) -> str:
        """A response as the whole turn of the assistant."""
        return self.row.get("opening", "") + self.sides[side]


class Labeller:
    """A judge with what it is asked.

    Args:
      judge: the language model.
      settings: of the run.
    """

    def __init__(self, judge: FeedbackModel, settings: Settings):
        self._judge, self._settings = judge, settings
        self.template: Template = ai_feedback.load_template(settings.labels.template)

    def __call__(self, pairs: Sequence[Pair], name: str) -> Compared:
        """Labels pairs; `name` sets the draws of reasons apart."""
        labels = self._settings.labels
        chain = None
        if labels.reasons:
            key = jax.random.fold_in(jax.random.key(self._settings.seed), len(name))
            chain = Chain(key, labels.max_new_tokens)
        questions, principles = None, labels.principles()
        if principles:
            rng = np.random.default_rng([self._settings.seed, len(name)])
            picked = rng.integers(len(principles), size=len(pairs))
            questions = [principles[int(i)].comparison for i in picked]
        return ai_feedback.label(
            self._judge,
            [pair.asked() for pair in pairs],
            self.template,
            questions=questions,
            chain=chain,
            clamp=(0.5 - labels.clamp, 0.5 + labels.clamp),
        )


def sampled_pairs(
    settings: Settings, task: Task, split: str, policy: Any, tokenizer: Any, sharding: Sharding
) -> tuple[list[Pair], DropCounts]:
    """Two samples of the policy to each prompt; equal and empty ones are dropped and counted."""
    drops, count = DropCounts(), settings.data.counts()[split]
    room = settings.data.max_length - settings.sampling.max_new_tokens
    rows, prompts = asking.prompts_of(task, tokenizer, split, count, room)
    drawn = sample_answers(
        policy,
        prompts,
        tokenizer,
        samples=2,
        sampling=settings.sampling,
        key=jax.random.fold_in(jax.random.key(settings.seed), SPLITS.index(split)),
        rows=settings.samples.rows,
        sharding=sharding,
    )
    found = []
    for row, (first, second) in zip(rows, drawn, strict=True):
        if not (first.text.strip() and second.text.strip()):
            drops.drop("empty response")
        elif first.text.strip() == second.text.strip():
            drops.drop("equal responses")
        else:
            drops.keep()
            found.append(Pair(row, (first.text, second.text)))
    return found, drops


def pairs_of_people(
    settings: Settings, task: Task, split: str, count: int, *, apart: bool = False
) -> list[Pair]:
    """Pairs of the source, which people ranked, each side first in about one half.

    Args:
      settings: of the run.
      task: has the pairs.
      split: of them.
      count: the most.
      apart: whether no two of them may share a text, as intervals over pairs suppose.
    """
    rng = np.random.default_rng([settings.seed, SPLITS.index(split)])
    found: list[Pair] = []
    seen: set[str] = set()
    asked = 4 * count if apart else count
    for row in itertools.islice(task.rows("preference", split, DropCounts(), count=asked), asked):
        sides, margin = (row["chosen"], row["rejected"]), float(row.get("margin", 0.0))
        if len(found) == count or (apart and seen & set(sides)):
            continue
        seen |= set(sides)
        if rng.random() < 0.5:
            found.append(Pair({"prompt": row["prompt"]}, sides, margin or 1.0))
        else:
            found.append(Pair({"prompt": row["prompt"]}, sides[::-1], -(margin or 1.0)))
    return found


def as_row(pair: Pair, labels: Compared, number: int) -> dict[str, Any]:
    """A labelled pair as a line: the side that the judge prefers is chosen, with its p."""
    p = float(labels.p[number])
    better = 0 if p >= 0.5 else 1
    row = {
        "prompt": pair.row["prompt"],
        "chosen": pair.turn(better),
        "rejected": pair.turn(1 - better),
        "p_chosen": round(max(p, 1 - p), 6),
        "chosen_was_first": better == 0,
        "flipped": bool(labels.flips[number]),
    }
    if pair.margin:
        row["people_gap"] = pair.margin if better == 0 else -pair.margin
    if labels.rationales:
        row["rationales"] = list(labels.rationales[number])
    return row


def longer_preferred(pairs: Sequence[Pair], labels: Compared) -> float:
    """Share of pairs of different lengths in which the longer one is preferred; ties one half."""
    lengths = np.array([[len(side) for side in pair.sides] for pair in pairs]).reshape(-1, 2)
    differ = lengths[:, 0] != lengths[:, 1]
    if not differ.any():
        return 0.5
    of_longer = np.where(lengths[:, 0] > lengths[:, 1], labels.p, 1 - labels.p)[differ]
    return float(np.mean(np.where(of_longer == 0.5, 0.5, of_longer > 0.5)))


@dataclasses.dataclass(frozen=True)
class WithPeople:
    """How far labels agree with how people ranked the same pairs.

    Attributes:
      share: of pairs in people's order, ties one half.
      kappa: Cohen's, of who is better.
      by_gap: the share by the gap of people's ratings: label, share, pairs.
      num_pairs: no two of them share a text.
    """

    share: Interval
    kappa: Interval
    by_gap: tuple[tuple[str, Interval, int], ...]
    num_pairs: int

    def line(self) -> str:
        """One line for the report."""
        return (
            f"The judge orders {_percent(self.share)} of {self.num_pairs} held-out pairs as "
            f"people do; Cohen's kappa {self.kappa.value:.2f} [{self.kappa.low:.2f}, "
            f"{self.kappa.high:.2f}]"
        )


def agreement_with_people(pairs: Sequence[Pair], labels: Compared) -> WithPeople:
    """Compares labels with people's order; intervals are bootstraps over pairs.

    Args:
      pairs: whose margins say which side people rated higher.
      labels: of the same pairs.
    """
    margins = np.array([pair.margin for pair in pairs])
    judged = np.where(labels.p == 0.5, 0.5, labels.p > 0.5)
    people = (margins > 0).astype(float)
    right = np.where(judged == 0.5, 0.5, judged == people)
    gaps = np.abs(margins)
    edges = np.unique(np.quantile(gaps, np.linspace(0, 1, THIRDS + 1)))
    by_gap = []
    for low, high in itertools.pairwise(edges):
        last = high == edges[-1]
        members = (gaps >= low) & ((gaps <= high) if last else (gaps < high))
        if members.any():
            end = "]" if last else ")"
            interval = bootstrap_interval(right[members])
            by_gap.append((f"[{low:.2f}, {high:.2f}{end}", interval, int(members.sum())))
    return WithPeople(
        bootstrap_interval(right), cohen_kappa(judged, people), tuple(by_gap), len(pairs)
    )


def people_of(settings: Settings, task: Task) -> list[Pair]:
    """Held-out pairs that people ranked; none where the source has none, or none are wanted."""
    if not settings.eval.people:
        return []
    try:
        return pairs_of_people(settings, task, "test", settings.eval.people, apart=True)
    except ValueError as error:
        print(f"note: nobody ranked pairs of {settings.data.source}: {error}")
        return []


def write_report(
    settings: Settings,
    path: Path,
    measured: Mapping[str, Mapping[str, float]],
    agreed: WithPeople | None,
    rows: Sequence[Mapping[str, Any]],
    judge: str,
) -> None:
    """What the judge was asked, its habits by split, its agreement with people, some pairs."""
    labels = settings.labels
    reasons = ", after reasons" if labels.reasons else ""
    names = sorted({name for numbers in measured.values() for name in numbers})
    table = tabulate(
        [
            [name, *(f"{one[name]:.3f}" if name in one else "" for one in measured.values())]
            for name in names
        ],
        ["", *measured],
        "github",
        disable_numparse=True,
    )
    parts = [f"# AI labels\n\nBy {judge}, template `{labels.template}`{reasons}.\n\n{table}\n"]
    if agreed is not None:
        by_gap = tabulate(
            [[gap, _percent(share), count] for gap, share, count in agreed.by_gap],
            ["gap of the ratings", "in people's order", "pairs"],
            "github",
            disable_numparse=True,
        )
        parts.append(f"\n## Agreement with people\n\n{agreed.line()}.\n\n{by_gap}\n")
    parts.append("\n## Pairs\n" if rows else "")
    for row in rows:
        parts.append(f"\np = {row['p_chosen']:.3f}\n")
        for name in ("prompt", "chosen", "rejected"):
            parts.append(f"\n- {name}: {escape_markdown(str(row[name]))}")
        parts.append("\n")
    write_whole(path, "".join(parts))


def _percent(one: Interval) -> str:
    return f"{one.value:.1%} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Samples, labels, measures the judge; resumes after the last split that was finished."""
    distributed.require_one("labelling")
    settings = command.open_config("ai_labels", config, Settings)
    if not folders.claim(settings, "AI labels"):
        return
    data, inputs, sharding, task = (
        settings.data,
        settings.inputs,
        settings.sharding.make(),
        settings.task(),
    )
    labels, of_samples = settings.labels, settings.labels.of == SAMPLES

    # 1. The policy, and the judge, which may be the same model.
    stage = policy_stage(settings.variants)
    argument = common.stage_argument(stage, settings)
    folder = stages.require(inputs.policy, stage=stage, argument=argument, build=inputs.build)
    if inputs.judge != folder:
        stages.require(inputs.judge)
    if of_samples:
        stages.check_lengths({}, folder, sampled={"data.max_length": data.max_length})
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, date=date)
    policy = stages.load_policy(folder, settings.model, sharding, frozen=True)
    judge = ai_feedback.load_feedback_model(
        inputs.judge,
        dtype=settings.model.dtype,
        name=short_name(inputs.judge),
        max_length=labels.max_length,
        batch_tokens=labels.batch_tokens,
    )
    labeller = Labeller(judge, settings)
    reporting.banner(
        "AI labels",
        {
            "policy": f"{stages.count_parameters(policy):,} parameters, from {folder}",
            "judge": f"{stages.count_parameters(judge.model):,} parameters, from {inputs.judge}",
            "template": f"{labels.template} ({labeller.template.source})",
            "pairs": ", ".join(f"{count:,} {split}" for split, count in data.counts().items()),
            "run folder": settings.workdir,
        },
    )

    # 2. One split after the other; the last step asks about pairs that people ranked.
    people = people_of(settings, task)
    place = Path(settings.workdir) / folders.LABELS
    models = {"inputs.policy": folder, "inputs.judge": inputs.judge}
    pinned = stages.inputs(tokenizer, task, date=date, models=models)
    # Files that may be edited between two starts.
    pinned["asked"] = digests.of_text(repr(labeller.template), repr(labels.principles()))
    show = ("feedback/pairs", "feedback/flip_rate", "feedback/prefers_longer")
    with settings.run(len(SPLITS), "AI labels", show, pinned, on_step=on_step) as run:
        position = run.restore({"split": jnp.zeros((), jnp.int32)})
        for number in run.steps():
            split = SPLITS[number]
            if of_samples:
                pairs, drops = sampled_pairs(settings, task, split, policy, tokenizer, sharding)
                print(f"pairs of samples ({split}): {drops.summary()}")
            else:
                pairs = pairs_of_people(settings, task, split, data.counts()[split])
            told = labeller(pairs, split)
            place.mkdir(parents=True, exist_ok=True)
            made = [json.dumps(as_row(pair, told, i)) for i, pair in enumerate(pairs)]
            write_whole(place / f"{split}.jsonl", "".join(f"{line}\n" for line in made))
            metrics = told.statistics() | {"feedback/pairs": float(len(pairs))}
            metrics["feedback/prefers_longer"] = longer_preferred(pairs, told)
            run.log(number, metrics)
            run.checkpoint(number, position)

    # 3. How far it agrees with people, on held-out pairs.
    logged = solving.logged_rounds(run.workdir, len(SPLITS))
    measured = {
        split: {name: value for name, value in row.items() if name.startswith("feedback/")}
        for split, row in zip(SPLITS, logged, strict=True)
    }
    agreed, on_people = None, None
    if people:
        on_people = labeller(people, "people")
        agreed = agreement_with_people(people, on_people)
        measured["people's"] = on_people.statistics() | {
            "feedback/pairs": float(len(people)),
            "feedback/prefers_longer": longer_preferred(people, on_people),
        }
        print(agreed.line())
    with (place / "test.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, settings.eval.samples)]
    write_report(settings, run.workdir / "report.md", measured, agreed, rows, judge.name)
    found = None if agreed is None else dataclasses.asdict(agreed)
    run.finish({"measured": measured, "people": found, "shown": rows})
    print(f"AI labels: {place}; report in {run.workdir / 'report.md'}")


if __name__ == "__main__":
    command.cli(main, default="configs/ai_labels.py:quickstart")
