"""Constitutional AI, its supervised part: rounds of critique and revision, then SFT on all of them.

  python -m experiments.constitutional --config configs/constitutional.py:smollm2

The policy answers prompts. In every round a principle is drawn for each response, the critic (the
policy itself, or a larger model) says what is wrong with it by that principle, and revises it. The
policy is then fine-tuned on the revisions of all rounds, mixed with ordinary documents (SL-CAI, Bai
et al. 2022, section 3). A round that is done is not done again. Writes `revisions/N.jsonl`,
`model/`, report.md with transcripts, metrics.jsonl, config.json and summary.json to the run folder.
Comparisons by the same principles, a reward model and PPO follow from `model/`, see
docs/ai_feedback.md.
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
from experiments import asking, command, folders, judging, reporting, solving, stages
from experiments.ai_labels import RowsConfig
from experiments.distilling import distil
from experiments.settings import DataConfig, Shared, judge_names
from rlhf_jax.data.encode import encode_prompt
from rlhf_jax.data.jsonl import read_jsonl
from rlhf_jax.data.schemas import DropCounts, EncodedPrompt, Row
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.evaluation.comparison import win_tie_lose
from rlhf_jax.evaluation.judges import Judge
from rlhf_jax.evaluation.report import escape_markdown
from rlhf_jax.methods import constitution
from rlhf_jax.methods.constitution import Constitution, Prompt, load_constitution
from rlhf_jax.methods.sft import SFTConfig
from rlhf_jax.rollouts.answers import sample_answers
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import digests, distributed
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.run import OnStep

REVISIONS = "revisions"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Folders of the policy, and of who criticises and revises."""

    policy: str
    critic: str
    build: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsToRevise(DataConfig):
    """Prompts whose responses are revised, and held-out ones.

    Attributes:
      max_length: Tokens of a prompt with its response.
      prompts: To train on.
      eval_prompts: Held out, to compare the policy before and after.
    """

    max_length: int
    prompts: int
    eval_prompts: int

    def __post_init__(self):
        super().__post_init__()
        check(self, max_length="[1, inf)", prompts="[1, inf)", eval_prompts="[1, inf)")


@dataclasses.dataclass(frozen=True)
class ReviseConfig:
    """How responses are revised.

    Attributes:
      constitution: See `constitution.load_constitution`.
      rounds: Of a critique and a revision.
      max_new_tokens: Of each of both.
      max_length: Tokens of examples and talk.
      temperature: Of the sampling of both.
      ordinary: Documents of the data in the fine-tuning, for each revision.
    """

    constitution: str
    rounds: int
    max_new_tokens: int
    max_length: int
    temperature: float
    ordinary: float

    def __post_init__(self):
        whole = ("rounds", "max_new_tokens", "max_length")
        check(self, temperature="[0, 100]", ordinary="[0, 1e6]", **dict.fromkeys(whole, "[1, inf)"))
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"revise.max_length={self.max_length} must be above revise.max_new_tokens="
                f"{self.max_new_tokens}: it holds the talk as well"
            )
        self.load()

    def load(self) -> Constitution:
        """The constitution."""
        try:
            return load_constitution(self.constitution)
        except ValueError as error:
            raise ValueError(f"revise.constitution: {error}") from None


@dataclasses.dataclass(frozen=True)
class ShownConfig:
    """Transcripts that the report shows."""

    samples: int

    def __post_init__(self):
        check(self, samples="[0, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Every key of configs/constitutional.py."""

    inputs: Inputs
    data: PromptsToRevise
    revise: ReviseConfig
    samples: RowsConfig
    sampling: SamplingConfig
    train: SFTConfig
    optimizer: OptimizerConfig
    eval: ShownConfig
    judges: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        if self.data.max_length <= self.sampling.max_new_tokens:
            raise ValueError(
                f"data.max_length={self.data.max_length} leaves no room for a prompt: it must be "
                f"above sampling.max_new_tokens={self.sampling.max_new_tokens}"
            )

    @property
    def room(self) -> int:
        """Tokens of the longest prompt."""
        return self.data.max_length - self.sampling.max_new_tokens


class Asker:
    """Lets a model answer prompts that are texts or messages.

    Args:
      model: its weights.
      tokenizer: its own.
      settings: of the run.
      sharding: where batches go.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings, sharding: Sharding):
        self.model, self.tokenizer = model, tokenizer
        self._settings, self._sharding = settings, sharding
        self._chat = ChatTokenizer(tokenizer)
        self.read = DropCounts()

    def cut(self) -> float:
        """Prompts that lost examples, or did not fit even without, since `read` was cleared."""
        return float(self.read[DropCounts.TRUNCATED] + self.read.dropped)

    def answers(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig, key: jax.Array
    ) -> list[str]:
        """One answer to each encoded prompt."""
        drawn = sample_answers(
            self.model,
            prompts,
            self.tokenizer,
            samples=1,
            sampling=sampling,
            key=key,
            rows=self._settings.samples.rows,
            sharding=self._sharding,
        )
        return [some[0].text for some in drawn]

    def talk(self, prompts: list[Prompt], key: jax.Array) -> list[str]:
        """Critiques or revisions; a prompt that is too long loses its oldest examples, counted.

        One that does not fit without any has the answer "": what is criticised stays as it is.
        """
        revise = self._settings.revise
        sampling = SamplingConfig(revise.max_new_tokens, temperature=revise.temperature)
        longest = min(revise.max_length, self.model.config.max_length) - revise.max_new_tokens
        encoded = [encode_prompt(prompt, self._chat, longest, self.read) for prompt in prompts]
        fit = [number for number, prompt in enumerate(encoded) if prompt is not None]
        drawn = self.answers([p for p in encoded if p is not None], sampling, key) if fit else []
        texts = [""] * len(prompts)
        for number, text in zip(fit, drawn, strict=True):
            texts[number] = text
        return texts


def request_of(row: Row, told: Constitution) -> str:
    """What the human has asked: the task of the constitution, or else the prompt."""
    if told.task:
        return told.task
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def whole(row: Row, text: str, told: Constitution) -> str:
    """A response as it is read: with its beginning, where the prompt is that."""
    if row.get("opening"):
        return f"{row['opening']}{text}"
    return f"{row['prompt']}{text}" if told.task and isinstance(row["prompt"], str) else text


def as_document(row: Row, response: str, told: Constitution) -> Row:
    """A whole response as a row to learn from."""
    if told.task and isinstance(row["prompt"], str):
        return {"text": response}
    return {"prompt": row["prompt"], "response": response}


def training_rows(
    settings: Settings, task: Task, rows: Sequence[Row], rounds: Sequence[Sequence[str]]
) -> list[Row]:
    """Revisions of all rounds and ordinary documents of the data; empty responses are left out."""
    told = settings.revise.load()
    revised = [
        as_document(row, response, told)
        for responses in rounds
        for row, response in zip(rows, responses, strict=True)
        if response.strip()
    ]
    count = round(settings.revise.ordinary * len(revised))
    ordinary = list(itertools.islice(task.rows("sft", "train", DropCounts()), count))
    return [*revised, *ordinary]


def measured(responses: Sequence[str], judges: Mapping[str, Judge]) -> dict[str, float]:
    """What the judges say of responses, on average."""
    scores = {name: judge(responses) for name, judge in judges.items()}
    return {f"judge/{name}": float(np.mean(values)) for name, values in scores.items()}


def one_round(
    settings: Settings,
    asker: Asker,
    rows: Sequence[Row],
    responses: Sequence[str],
    number: int,
) -> list[constitution.Revised]:
    """A critique and a revision of every response, by principles that are drawn anew."""
    told = settings.revise.load()
    key = jax.random.fold_in(jax.random.key(settings.seed), number)
    keys = iter(jax.random.split(key, 2))
    rng = np.random.default_rng([settings.seed, number])
    return constitution.revise(
        lambda prompts: asker.talk(prompts, next(keys)),
        told,
        [request_of(row, told) for row in rows],
        responses,
        constitution.draw_principles(told, len(rows), rng),
    )


def write_round(workdir: Path, number: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """What a round left, a response a line."""
    (workdir / REVISIONS).mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(workdir / REVISIONS / f"{number}.jsonl", text)


def read_round(workdir: Path, number: int) -> list[Row]:
    """What `write_round` wrote."""
    return list(read_jsonl(workdir / REVISIONS / f"{number}.jsonl"))


def compared(
    settings: Settings,
    asker: Asker,
    trained: Any,
    prompts: Sequence[EncodedPrompt],
    rows: Sequence[Row],
    judges: Mapping[str, Judge],
) -> dict[str, Any]:
    """The policy after against the one before, on held-out prompts and by the same keys."""
    told = settings.revise.load()
    key = jax.random.fold_in(jax.random.key(settings.seed), settings.revise.rounds + 1)
    both = {}
    for name, model in (("before", asker.model), ("after", trained)):
        one = Asker(model, asker.tokenizer, settings, settings.sharding.make())
        drawn = one.answers(prompts, settings.sampling, key)
        both[name] = [whole(row, text, told) for row, text in zip(rows, drawn, strict=True)]
    found = {
        name: constitution.response_statistics(texts) | measured(texts, judges)
        for name, texts in both.items()
    }
    wins = {
        name: win_tie_lose(judge(both["after"]), judge(both["before"]))._asdict()
        for name, judge in judges.items()
    }
    return {"policies": found, "win_rates": wins}


def write_report(
    settings: Settings,
    workdir: Path,
    rounds: Sequence[Mapping[str, float]],
    held_out: Mapping[str, Any],
) -> dict[str, Any]:
    """Tables of rounds and policies, the most frequent sentences, and the first transcripts."""
    kept = [read_round(workdir, number) for number in range(settings.revise.rounds + 1)]
    sentences = [constitution.boilerplate([one["response"] for one in some]) for some in kept]
    policies = held_out["policies"]
    parts = [
        f"# Constitutional AI ({settings.revise.constitution})\n\n",
        _table({f"round {number}": one for number, one in enumerate(rounds)}, "training prompts"),
        "\n\nRound 0 is what the policy answered.\n\n",
        _table(policies, "held-out prompts"),
        "\n",
    ]
    for name, rate in held_out["win_rates"].items():
        parts.append(f"\n- after against before by {name}: {rate['win_rate']:.1%} ")
        parts.append(f"[{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]")
    # Of some data nothing is shown.
    shown = range(min(settings.eval.samples, len(kept[0])))
    if shown:
        parts.append("\n\n## The most frequent sentence of each round\n")
        parts += [
            f"\n- round {number}, in {share:.1%}: {escape_markdown(sentence)}"
            for number, (share, sentence) in enumerate(sentences)
        ]
        parts.append("\n\n## Transcripts\n")
    for i in shown:
        parts.append(f"\n{i + 1}. {escape_markdown(kept[0][i]['response'])}\n")
        for number, some in enumerate(kept[1:], 1):
            parts.append(f"\n   - round {number}, {some[i]['principle']}:")
            parts.append(f" {escape_markdown(some[i]['critique']) or '(no critique)'}")
            parts.append(f"\n   - revision: {escape_markdown(some[i]['response'])}\n")
    write_whole(workdir / "report.md", "".join(parts).rstrip() + "\n")
    return {"boilerplate": [share for share, _ in sentences], "shown": len(shown)}


def _table(columns: Mapping[str, Mapping[str, float]], head: str) -> str:
    names = sorted({name for one in columns.values() for name in one})
    rows = [
        [name, *(f"{one[name]:.3f}" if name in one else "" for one in columns.values())]
        for name in names
    ]
    return tabulate(rows, [head, *columns], "github", disable_numparse=True)


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Answers, rounds of critique and revision, SFT; resumes after the last round that is done."""
    distributed.require_one("constitutional AI")
    settings = command.open_config("constitutional", config, Settings)
    if not folders.claim(settings, "constitutional AI"):
        return
    data, inputs, sharding, task = (
        settings.data,
        settings.inputs,
        settings.sharding.make(),
        settings.task(),
    )
    told, rounds = settings.revise.load(), settings.revise.rounds
    judges = judging.load_judges(judge_names(settings.judges, task), settings)

    # 1. The policy, and who criticises it: itself, or another model.
    argument = common.stage_argument("sft", settings)
    folder = stages.require(inputs.policy, stage="sft", argument=argument, build=inputs.build)
    stages.check_lengths({}, folder, sampled={"data.max_length": data.max_length})
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, date=date)
    first = stages.load_policy(folder, settings.model, sharding, frozen=True)
    policy = critic = Asker(first, tokenizer, settings, sharding)
    if inputs.critic != folder:
        stages.require(inputs.critic)
        other = stages.load_policy(inputs.critic, settings.model, sharding, frozen=True)
        own = stages.load_tokenizer(inputs.critic, date=date)
        critic = Asker(other, own, settings, sharding)
    rows, prompts = asking.prompts_of(task, tokenizer, "train", data.prompts, settings.room)
    held_out = asking.prompts_of(task, tokenizer, "test", data.eval_prompts, settings.room)
    reporting.banner(
        "Constitutional AI",
        {
            "policy": f"{stages.count_parameters(first):,} parameters, from {folder}",
            "critic": inputs.critic,
            "constitution": f"{told.name}, {len(told.principles)} principles ({told.source})",
            "prompts": f"{len(rows):,}, {len(held_out[0]):,} held out",
            "rounds": f"{rounds}, then SFT on all of them",
            "run folder": settings.workdir,
        },
    )

    # 2. Answers, and rounds of critique and revision.
    models = {"inputs.policy": folder, "inputs.critic": inputs.critic}
    pinned = stages.inputs(tokenizer, task, date=date, models=models)
    pinned["constitution"] = digests.of_text(repr(told))  # a file that may be edited in between
    show = ("revise/unchanged", "revise/words", *(f"judge/{name}" for name in judges))
    with settings.run(rounds + 1, "constitutional AI", show, pinned, on_step=on_step) as run:
        place = run.restore({"round": jnp.zeros((), jnp.int32)})
        for number in run.steps():
            if number == 0:
                key = jax.random.fold_in(jax.random.key(settings.seed), 0)
                drawn = policy.answers(prompts, settings.sampling, key)
                responses = [whole(*pair, told) for pair in zip(rows, drawn, strict=True)]
                lines: list[dict[str, Any]] = [{"response": text} for text in responses]
                metrics = constitution.response_statistics(responses)
            else:
                before = [one["response"] for one in read_round(run.workdir, number - 1)]
                critic.read.clear()
                revised = one_round(settings, critic, rows, before, number)
                responses = [one.response for one in revised]
                lines = [dataclasses.asdict(one) for one in revised]
                metrics = constitution.statistics(revised) | {"revise/cut": critic.cut()}
            write_round(run.workdir, number, lines)
            run.log(number, metrics | measured(responses, judges))
            run.checkpoint(number, place)

    # 3. SL-CAI: the policy is fine-tuned on the revisions of all rounds and ordinary documents.
    kept = [[one["response"] for one in read_round(run.workdir, n)] for n in range(1, rounds + 1)]
    learned = training_rows(settings, task, rows, kept)
    start = stages.load_policy(folder, settings.model, sharding)
    trained, numbers = distil(settings, start, learned, tokenizer, sharding, 0)
    stages.save(trained, run.workdir / folders.MODEL, tokenizer)

    # 4. Before and after on held-out prompts, report.
    found = compared(settings, policy, trained, held_out[1], held_out[0], judges)
    logged = [
        {name: v for name, v in row.items() if name.startswith(("revise/", "judge/"))}
        for row in solving.logged_rounds(run.workdir, rounds + 1)
    ]
    found |= write_report(settings, run.workdir, logged, found)
    run.finish({"rounds": logged, "documents": len(learned), "sft": numbers, **found})
    print(f"constitutional AI: {run.workdir / 'model'}; report in {run.workdir / 'report.md'}")


if __name__ == "__main__":
    command.cli(main, default="configs/constitutional.py:smollm2")
