"""From a config to batches, through the task that its source names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data import batches
from rlhf_jax.data.batches import each_repeated
from rlhf_jax.data.schemas import Encoded, EncodedPair
from rlhf_jax.data.shapes import PackedBatches, PairBatches, PromptBatches
from rlhf_jax.data.streaming import StreamedBatches
from rlhf_jax.evaluation.judges import VaderJudge
from rlhf_jax.tasks import Task, TaskConfig, make_task

__all__ = ["each_repeated"]  # Defined elsewhere, called here by experiments.


def task_of(config: ConfigDict) -> Task:
    """The task that `config.data` names."""
    data = config.data
    return make_task(
        TaskConfig(
            data.source,
            domains=tuple(data.domains),
            limit=data.limit,
            instruction=data.instruction,
            min_gap=data.get("min_gap", 1.0),
            seed=config.seed,
        )
    )


def tokenizer_texts(config: ConfigDict) -> list[str]:
    """Text for the tokenizer of a model from scratch: what it will be trained on."""
    return [] if config.inputs.model else task_of(config).texts()


def sft_documents(
    config: ConfigDict, tokenizer: Any, split: str, *, max_length: int = 0
) -> Sequence[Encoded]:
    """Documents with loss masks, of at most `max_length` (0: data.max_length) tokens."""
    longest = max_length or config.data.max_length
    return task_of(config).documents(tokenizer, split, max_length=longest).loaded()


def sft_batches(
    config: ConfigDict,
    tokenizer: Any,
    *,
    rows: int,
    length: int,
    max_length: int,
    packed: bool = True,
) -> PackedBatches | StreamedBatches:
    """Endless batches of the training documents, streamed where the source says so."""
    return batches.packed_batches(
        task_of(config).documents(tokenizer, "train", max_length=max_length),
        rows=rows,
        length=length,
        seed=config.seed,
        pad_id=tokenizer.pad_token_id,
        packed=packed,
    )


def evaluation_batches(
    documents: Sequence[Encoded], tokenizer: Any, train: ConfigDict
) -> list[dict]:
    """All documents once, packed like the training batches."""
    return batches.once_packed(
        documents, rows=train.minibatch, length=train.row_length, pad_id=tokenizer.pad_token_id
    )


def preference_pairs(
    config: ConfigDict, tokenizer: Any, split: str, count: int
) -> Sequence[EncodedPair]:
    """Pairs of responses, the better one first."""
    longest = config.data.max_length
    pairs = task_of(config).preferences(tokenizer, split, max_length=longest, count=count)
    return pairs.loaded()


def rated_pairs(
    config: ConfigDict, tokenizer: Any, split: str, count: int
) -> tuple[list[EncodedPair], np.ndarray]:
    """Pairs and their ratings `[n, 2]`; a ValueError where nobody rated them."""
    longest = config.data.max_length
    return task_of(config).rated(tokenizer, split, max_length=longest, count=count)


def pair_batches(
    pairs: Sequence[EncodedPair], tokenizer: Any, train: ConfigDict, seed: int, devices: int
) -> PairBatches | StreamedBatches:
    """Endless token-balanced batches."""
    return batches.pair_batches(pairs, seed=seed, **_pair_settings(tokenizer, train, devices))


def training_pairs(
    config: ConfigDict, tokenizer: Any, devices: int
) -> PairBatches | StreamedBatches:
    """Endless batches of the training pairs, streamed where the source says so."""
    data = config.data
    return batches.pair_batches(
        task_of(config).preferences(
            tokenizer, "train", max_length=data.max_length, count=data.pairs
        ),
        seed=config.seed,
        longest=data.max_length,
        **_pair_settings(tokenizer, config.train, devices),
    )


def _pair_settings(tokenizer: Any, train: ConfigDict, devices: int) -> dict[str, Any]:
    return {
        "max_tokens": train.max_tokens,
        "min_pairs": train.min_pairs,
        "max_pairs": train.max_pairs,
        "pad_id": tokenizer.pad_token_id,
        "multiple_of": devices * train.microbatches,
    }


def all_pairs(
    pairs: Sequence[EncodedPair], tokenizer: Any, train: ConfigDict, devices: int
) -> list[dict]:
    """All pairs once."""
    return batches.once_pairs(pairs, **_pair_settings(tokenizer, train, devices))


def judge_pairs(pairs: Sequence[EncodedPair], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The VADER rule's scores of the chosen and the rejected texts of the same pairs."""
    judge = VaderJudge()

    def scores(side: str) -> np.ndarray:
        tokens = [getattr(pair, side).tokens for pair in pairs]
        return judge(tokenizer.batch_decode(tokens, skip_special_tokens=True))

    return scores("chosen"), scores("rejected")


def reference_documents(config: ConfigDict, tokenizer: Any) -> list[Encoded]:
    """Training responses whose scores get mean 0 and standard deviation 1."""
    data = config.data
    return task_of(config).references(
        tokenizer, max_length=data.max_length, count=data.reference_texts
    )


def prompt_batches(
    config: ConfigDict, tokenizer: Any, split: str
) -> PromptBatches | StreamedBatches:
    """Endless batches of prompts, left padded to one of few lengths."""
    buckets = tuple(config.data.prompt_buckets)
    return batches.prompt_batches(
        task_of(config).prompts(tokenizer, split, max_length=max(buckets)),
        batch_size=config.train.prompts_per_iteration,
        buckets=buckets,
        seed=config.seed,
        pad_id=tokenizer.pad_token_id,
    )


def fixed_prompts(config: ConfigDict, tokenizer: Any, split: str, batch_size: int) -> list[dict]:
    """All prompts of a split in whole batches of one length, always the same."""
    return batches.fixed_prompts(
        prompts(config, tokenizer, split),
        batch_size,
        max(config.data.prompt_buckets),
        tokenizer.pad_token_id,
        split,
    )


def prompts(config: ConfigDict, tokenizer: Any, split: str) -> Sequence[np.ndarray]:
    """Prompts, open for the assistant's words."""
    longest = max(config.data.prompt_buckets)
    return task_of(config).prompts(tokenizer, split, max_length=longest).loaded()


def shown_prompt(config: ConfigDict, tokenizer: Any) -> Callable[[str], str]:
    """What of a decoded prompt is shown and judged: of reviews in a chat, the opening words."""
    return task_of(config).shown(tokenizer)


def ptx_batches(config: ConfigDict, tokenizer: Any) -> PackedBatches | StreamedBatches:
    """Endless batches of SFT text for the ptx loss: as many rows as a minibatch has responses."""
    return sft_batches(
        config,
        tokenizer,
        rows=config.train.minibatch,
        length=config.data.ptx_length,
        max_length=config.data.ptx_length,
        packed=False,
    )
