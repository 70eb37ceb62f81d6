"""Candidates: several answers of a policy to each prompt, scored by a reward model, made once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import stages
from rlhf_jax.data.candidates import check_row
from rlhf_jax.data.encode import encode_prompt
from rlhf_jax.data.jsonl import existing, numbered_rows
from rlhf_jax.data.prepare import tokenizer_text
from rlhf_jax.data.schemas import DropCounts, EncodedPrompt, Row, one_line
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.answers import sample_answers
from rlhf_jax.rollouts.rescore import answers_scores
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import digests
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task

KEPT = "runs/candidates"


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Answers that the policy draws to training prompts.

    Attributes:
      prompts: how many training prompts.
      per_prompt: K, answers to each.
      rows: the most that are drawn at a time.
    """

    prompts: int
    per_prompt: int
    rows: int

    def __post_init__(self):
        check(self, prompts="[1, inf)", per_prompt="[2, inf)", rows="[1, inf)")
        if self.per_prompt > self.rows:
            raise ValueError(
                f"samples.rows={self.rows} must be at least samples.per_prompt={self.per_prompt}: "
                "the answers to a prompt are drawn at a time"
            )


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A policy that answers, and the reward model that scores what it says.

    Attributes:
      policy: the policy.
      policy_folder: of its weights, which decide what is drawn.
      scorer: the reward model.
      scorer_folder: of its weights.
      tokenizer: of both.
      sampling: how answers are drawn.
      longest_prompt: tokens; longer ones lose their beginning.
      seed: of the draws.
      root: folder that kept candidates lie below; empty is the current one.
      sharding: where batches go.
    """

    policy: Transformer
    policy_folder: str
    scorer: ScalarModel
    scorer_folder: str
    tokenizer: Any
    sampling: SamplingConfig
    longest_prompt: int
    seed: int
    root: str
    sharding: Sharding

    def candidates(self, task: Task, config: SamplesConfig) -> list[Row]:
        """Rows of candidates for the first training prompts of a task, drawn once and kept.

        Beside the fields of `data.candidates` a row has "log_probs", log π of each answer in nats.

        Raises:
          ValueError: the task has no prompts.
        """
        prompts = prompt_rows(task, "train", config.prompts)
        encoded = self._encoded(prompts)
        task.note("prompt", "train", [one for _, one in encoded])
        decides = [
            stages.weights_digest(self.policy_folder),
            stages.weights_digest(self.scorer_folder),
            digests.of_text(tokenizer_text(self.tokenizer), str(self.tokenizer.chat_template)),
            [row for row, _ in encoded],
            dataclasses.asdict(config),
            dataclasses.asdict(self.sampling),
            self.longest_prompt,
            self.seed,
        ]
        name = f"{config.per_prompt} answers to each of {len(encoded):,} training prompts"
        return kept(name, decides, self.root, lambda: self._draw(encoded, config))

    def _encoded(self, rows: Sequence[Row]) -> list[tuple[Row, EncodedPrompt]]:
        """Prompts that have tokens, with them."""
        chat, drops = ChatTokenizer(self.tokenizer), DropCounts()
        both = [
            (
                row,
                encode_prompt(
                    row["prompt"], chat, self.longest_prompt, drops, opening=row.get("opening", "")
                ),
            )
            for row in rows
        ]
        print(f"prompts (train): {drops.summary()}")
        return [(row, tokens) for row, tokens in both if tokens is not None]

    def _draw(
        self, encoded: Sequence[tuple[Row, EncodedPrompt]], config: SamplesConfig
    ) -> list[Row]:
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(b"candidates"))
        prompts = [tokens for _, tokens in encoded]
        answers = sample_answers(
            self.policy,
            prompts,
            self.tokenizer,
            samples=config.per_prompt,
            sampling=self.sampling,
            key=key,
            rows=config.rows,
            sharding=self.sharding,
        )
        scores = answers_scores(
            self.scorer,
            prompts,
            answers,
            pad_id=self.tokenizer.pad_token_id,
            rows=config.rows,
            sharding=self.sharding,
        )
        return [
            {
                **row,
                "responses": [answer.text for answer in some],
                "scores": values,
                "ended": [answer.ended for answer in some],
                "log_probs": [answer.log_prob for answer in some],
                "tokens": [list(answer.tokens) for answer in some],
            }
            for (row, _), some, values in zip(encoded, answers, scores, strict=True)
        ]


def prompt_rows(task: Task, split: str, count: int) -> list[Row]:
    """The first prompts of a split, as {"prompt"} and perhaps "opening"; at most `data.limit`.

    Raises:
      ValueError: there are none.
    """
    count = min(count, task.config.limit or count)
    rows = itertools.islice(task.rows("prompt", split, DropCounts(), count=count), count)
    found = [{name: row[name] for name in ("prompt", "opening") if row.get(name)} for row in rows]
    if not found:
        raise ValueError(f"data.source={task.config.source!r} has no prompts in its split {split}")
    return found


def kept(name: str, decides: Sequence[Any], root: str, make: Callable[[], list[Row]]) -> list[Row]:
    """Rows that were made before, or those that `make` makes now.

    Args:
      name: what they are, as a message calls them.
      decides: all that they depend on, as values that JSON can hold.
      root: folder that they lie below.
      make: makes them.
    """
    path = Path(root) / KEPT / f"{digests.of_text(json.dumps(decides))[:16]}.jsonl"
    if path.exists():
        print(f"{name}: kept in {path}")
        return read_rows(path)
    start = time.time()
    rows = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    print(f"{name}: drawn and scored in {time.time() - start:.0f} s, kept in {path}", flush=True)
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows, one a line."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    write_whole(path, "".join(f"{line}\n" for line in lines))


def read_rows(path: Path) -> list[Row]:
    """Rows of candidates of a file, checked.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is no JSON object or no row of candidates; names file and line.
    """
    found = []
    for number, row in numbered_rows(existing(path)):
        try:
            found.append(check_row(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {one_line(error)}") from error
    if not found:
        raise ValueError(f"{path} has no rows")
    return found
