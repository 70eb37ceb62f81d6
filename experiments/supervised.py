"""Supervised alignment: candidates whose worth is known, and a loss that says so.

  python -m experiments.supervised --config configs/supervised.py:quickstart,rrhf

Quality prompts (Quark, C-RLFT, chain of hindsight) tell the model how good a response is, quality
contrast (RRHF, SLiC-HF, PRO, ORPO, unlikelihood, FIGA) sets responses against each other; either is
L_total = L_SFT + L_aux. Candidates are samples of the SFT policy scored by the reward model, which
all methods share, or texts that people rated. No response is drawn while the policy trains.

The report is that of DPO and PPO-max: the same SFT policy, prompts, keys and judges. A policy of
quality prompts is asked with the words of the best class, which judges, reward model and reference
do not read.

Writes `model/`, report.md with figures, metrics.jsonl, config.json and summary.json to the run
folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from configs import common
from experiments import command, curating, folders, judging, reporting, stages
from experiments.answering import BatchedAnswersConfig, make_respondents, policies_to_compare
from experiments.curating import Sampler, SamplesConfig
from experiments.settings import (
    Answering,
    PromptData,
    check_label,
    judge_names,
    sampled_lengths,
)
from rlhf_jax.data.candidates import CandidateBatches, Candidates, encode_candidates, of_pairs
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.evaluation.panels import ANSWER_PANELS, SUPERVISED_PANELS
from rlhf_jax.evaluation.plots import plot_dpo
from rlhf_jax.methods import supervised
from rlhf_jax.methods.supervised import CandidateTrainConfig, SupervisedConfig
from rlhf_jax.models.files import hf_weights
from rlhf_jax.rollouts.conditioned import Conditioned
from rlhf_jax.rollouts.respond import AgainstBaseline
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import digests, distributed
from rlhf_jax.runtime.settings import OutOfRange, check
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.run import OnStep
from rlhf_jax.training.step import create_state

SAMPLES, PAIRS, FILE = "samples", "pairs", "jsonl:"
PANELS = (*SUPERVISED_PANELS, *ANSWER_PANELS)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The SFT policy, where training starts and which samples, and the reward model."""

    model: str
    reward_model: str
    build: bool


@dataclasses.dataclass(frozen=True)
class Compare:
    """Folders of what the report compares with."""

    ppo_max: str
    dpo: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateData(PromptData):
    """Prompts to answer, and pairs that people rated.

    Attributes:
      max_length: tokens of a prompt with a response.
      min_gap: the least difference of two ratings that make a pair.
      pairs: to train on.
    """

    max_length: int
    min_gap: float
    pairs: int

    def __post_init__(self):
        super().__post_init__()
        check(self, max_length="[1, inf)", min_gap="[0, 1e6]", pairs="[1, inf)")


@dataclasses.dataclass(frozen=True)
class CandidatesConfig:
    """Where candidates come from: "samples", "pairs" or "jsonl:FILE"."""

    read: str

    def __post_init__(self):
        if self.read not in (SAMPLES, PAIRS) and not self.read.startswith(FILE):
            raise OutOfRange(f"read={self.read!r} must be {SAMPLES}, {PAIRS} or {FILE}FILE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Answering):
    """Every key of configs/supervised.py."""

    label: str
    inputs: Inputs
    compare: Compare
    data: CandidateData
    candidates: CandidatesConfig
    samples: SamplesConfig
    objective: SupervisedConfig
    train: CandidateTrainConfig
    sampling: SamplingConfig
    optimizer: OptimizerConfig
    eval: BatchedAnswersConfig
    judges: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        check_label(self.label, ("SFT", "PPO-max", "DPO"))


class Material(NamedTuple):
    """What a run learns from.

    Attributes:
      groups: candidates of each prompt.
      line: what was read, for the report.
      counts: the same in numbers: prompts, responses, and labels of people or of a reward model.
      digests: of rows that no task has noted.
    """

    groups: list[Candidates]
    line: str
    counts: dict[str, int]
    digests: dict[str, str]


def read_material(
    settings: Settings, task: Task, asked: Task, tokenizer: Any, sampler: Callable[[], Sampler]
) -> Material:
    """Candidates from where `candidates.read` says.

    Args:
      settings: of the run.
      task: has pairs.
      asked: has prompts.
      tokenizer: of the policy.
      sampler: makes what draws samples, where samples are read.

    Raises:
      ValueError: the source has no pairs, or a file no candidates; says what makes some.
    """
    read, longest = settings.candidates.read, settings.data.max_length
    if read == PAIRS:
        try:
            pairs = task.preferences(
                tokenizer, "train", max_length=longest, count=settings.data.pairs
            ).loaded()
        except ValueError as error:
            raise ValueError(
                f"candidates.read='{PAIRS}': {error}; candidates.read='{SAMPLES}' needs prompts "
                "alone, and experiments.curate makes a file of candidates"
            ) from None
        groups, labels, rows = of_pairs(pairs), len(pairs), None
        whose = f"{labels:,} comparisons by people"
    else:
        prompt = settings.data.longest_prompt if read == SAMPLES else 0
        if read == SAMPLES:
            rows = sampler().candidates(asked, settings.samples)
        else:
            rows = curating.read_rows(Path(read.removeprefix(FILE)))
        drops = DropCounts()
        groups = encode_candidates(
            rows, tokenizer, max_length=longest, longest_prompt=prompt, drops=drops
        )
        print(f"candidates: {drops.summary()}")
        labels = sum(len(row["scores"]) for row in rows)
        whose = f"{labels:,} scores by a reward model" if read == SAMPLES else f"{labels:,} scores"
    responses = sum(len(one.documents) for one in groups)
    return Material(
        groups,
        f"Read ({read}): {responses:,} responses to {len(groups):,} prompts, with {whose}",
        {"prompts": len(groups), "responses": responses, "labels": labels},
        {} if rows is None else {"candidates": digests.of_text(json.dumps(rows))},
    )


def require_scorer(settings: Settings) -> str:
    """The folder of the reward model, which the report shows where it is there; empty if not.

    Samples are scored by it: then it must be there, and its stage makes it if it may.
    """
    folder = settings.inputs.reward_model
    if settings.candidates.read != SAMPLES:
        return folder if folders.is_whole(folder) else ""
    return stages.require(
        folder,
        stage="reward_model",
        argument=common.stage_argument("reward_model", settings),
        build=settings.inputs.build,
    )


class Words(NamedTuple):
    """What is said before prompts of how good a response is; nothing without quality prompts.

    Attributes:
      texts: from those of the worst class to those of the best.
      prefixes: their tokens.
      bos: the token behind which they stand; None where no prompt begins with one.
    """

    texts: tuple[str, ...]
    prefixes: list[tuple[int, ...]]
    bos: int | None

    def asking(self, model: Any) -> Any:
        """A policy as it is asked: with the words of the best class."""
        if not self.prefixes:
            return model
        return Conditioned(model, self.prefixes[-1], -1 if self.bos is None else self.bos)

    def notes(self) -> tuple[str, ...]:
        """What the report says of it."""
        if not self.prefixes:
            return ()
        return (
            f"The policy is asked with {self.texts[-1]!r} before each prompt, which judges, reward "
            "model and reference do not read; its KL is that of the policy so asked.",
        )


def find_words(settings: Settings, folder: str, tokenizer: Any) -> Words:
    """The words of the objective's classes.

    Raises:
      ValueError: the tokenizer lacks one of them, or a text is longer than the model in `folder`
        reads, the words included.
    """
    objective, data = settings.objective, settings.data
    texts = objective.texts if objective.prompted else ()
    prefixes = supervised.quality_prefixes(texts, tokenizer)
    longest = max(map(len, prefixes), default=0)
    sampled = sampled_lengths(data, eval_sampling=settings.eval.sampling.of(settings.sampling))
    stages.check_lengths(
        {"data.max_length": data.max_length},
        folder,
        sampled={key: tokens + longest for key, tokens in sampled.items()},
    )
    return Words(texts, prefixes, ChatTokenizer(tokenizer).leading_bos)


def make_batches(
    settings: Settings, groups: Sequence[Candidates], words: Words, folder: str, tokenizer: Any
) -> tuple[CandidateBatches, int, int]:
    """Batches of what the objective reads of the candidates; their rows, and sequences of each."""
    rows = supervised.arrange(
        settings.objective,
        groups,
        words.prefixes,
        bos=words.bos,
        longest=hf_weights.load_config(folder).longest,
        seed=settings.seed,
    )
    sides = max(len(one.documents) for one in rows)
    batching = settings.train.batching(settings.sharding.make().mesh.size, sides)
    pad_id = tokenizer.pad_token_id
    batches = CandidateBatches(rows, seed=settings.seed, pad_id=pad_id, num_buckets=3, **batching)
    return batches, len(rows), sides


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Trains, compares with SFT, DPO and PPO-max, reports; resumes where an earlier run stopped."""
    distributed.require_one("supervised alignment")
    settings = command.open_config("supervised", config, Settings)
    if not folders.claim(settings, "supervised alignment"):
        return
    train, data, sharding = settings.train, settings.data, settings.sharding.make()
    objective, task, asked = settings.objective, settings.task(), settings.prompt_task()
    judges = judging.load_judges(judge_names(settings.judges, task), settings)

    # 1. The SFT policy, frozen and to be trained, the reward model, and the words of the classes.
    folder = stages.require(
        settings.inputs.model,
        stage="sft",
        argument=common.stage_argument("sft", settings),
        build=settings.inputs.build,
    )
    scorer_folder = require_scorer(settings)
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, *filter(None, [scorer_folder]), date=date)
    words = find_words(settings, folder, tokenizer)
    policy = stages.make_tuning(settings, stages.load_policy(folder, settings.model, sharding))
    reference = policy.trunk or stages.load_policy(folder, settings.model, sharding, frozen=True)
    scorer: Any = None
    if scorer_folder:
        scorer = stages.load_scalar(scorer_folder, settings.model, sharding, frozen=True)

    # 2. Candidates, as the method reads them; prompts to measure with.
    sampler = functools.partial(
        Sampler,
        policy=reference,
        policy_folder=folder,
        scorer=scorer,
        scorer_folder=scorer_folder,
        tokenizer=tokenizer,
        sampling=settings.sampling,
        longest_prompt=data.longest_prompt,
        seed=settings.seed,
        root=settings.root,
        sharding=sharding,
    )
    material = read_material(settings, task, asked, tokenizer, sampler)
    batches, rows, sides = make_batches(settings, material.groups, words, folder, tokenizer)
    respond = make_respondents(settings, asked, tokenizer, judges, reference, scorer, sharding)

    # 3. Optimizer and the compiled step; Quark reads the reference at every update.
    optimizer, schedule = make_optimizer(settings.optimizer, train.steps)
    train_step = supervised.make_step(
        objective, train, optimizer, sharding, pad_id=tokenizer.pad_token_id, trunk=policy.trunk
    )
    constants = (reference,) if objective.method == supervised.QUARK else ()
    state = create_state(policy.take(), optimizer, sharding)
    epochs = train.steps / batches.steps_per_epoch
    seen = f"{epochs:.2f} epochs of {rows:,} rows of {sides} sequences"
    reporting.banner(
        f"Supervised alignment: {objective.method}",
        {
            "policy": f"{stages.parameters_line(policy, state.model)}, from {folder}",
            "candidates": material.line,
            "batches": batches.describe(),
            "asked": " ".join(words.notes()) or "with the prompt alone",
            "updates": f"{train.steps:,}, {seen}",
            "devices": f"{sharding.mesh.size}, {sharding.mode}",
            "run folder": settings.workdir,
        },
    )
    # The same key as in ppo_max and dpo, so that SFT gives the same responses there and here.
    _, eval_key = jax.random.split(jax.random.key(settings.seed))
    hiding = jax.random.fold_in(jax.random.key(settings.seed), zlib.crc32(b"hidden"))
    compare = AgainstBaseline(respond["validation"], reference, eval_key, settings.eval.prompts)

    # 4. Train.
    show = ("loss/supervised", "rank/accuracy", *(f"win_rate/{name}" for name in judges))
    models = {"inputs.model": folder, "inputs.reward_model": scorer_folder}
    inputs = stages.inputs(tokenizer, task, asked, date=date, models=models)
    inputs["rows"] |= material.digests
    with settings.run(train.steps, objective.method, show, inputs, on_step=on_step) as run:
        state = run.restore(state, batches)
        for step in run.steps():
            batch = supervised.hide(objective, next(batches), jax.random.fold_in(hiding, step))
            state, metrics = train_step(state, sharding.put_batch(batch), *constants)
            metrics["optim/learning_rate"] = schedule(step)
            if run.is_due(step, settings.eval.every):
                metrics |= compare(words.asking(policy.sampling_model(state.model)))
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 5. Save, compare on prompts that no stage has seen, report.
    trained = stages.save_tuned(policy, state.model, run.workdir, tokenizer, base=folder)
    others = {"DPO": settings.compare.dpo, "PPO-max": settings.compare.ppo_max}
    policies, notes = policies_to_compare(
        settings, reference, words.asking(trained), others, sharding
    )
    answers = {
        name: respond["test"](model, eval_key, settings.eval.final_prompts)
        for name, model in policies.items()
    }
    reporting.write(
        settings,
        run,
        answers,
        judges,
        plot=functools.partial(plot_dpo, panels=PANELS),
        notes=(f"{material.line}; {train.steps:,} updates are {seen}.", *words.notes(), *notes),
        summary={
            "read": material.counts | {"rows": rows, "sequences": sides * rows},
            "asked_with": words.texts[-1] if words.texts else "",
        },
    )


if __name__ == "__main__":
    command.cli(main, default="configs/supervised.py:quickstart")
