"""From a config to batches: rows of a source, encoded, what was dropped told, batched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import other_data
from rlhf_jax.data import chat, review_chats
from rlhf_jax.data.batches import PackedBatches, PairBatches, PromptBatches, pad_prompts
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair
from rlhf_jax.data.sets import harm, reviews
from rlhf_jax.data.streaming import StreamedBatches
from rlhf_jax.evaluation.judges import VaderJudge


def _reviews(
    config: ConfigDict, split: str, drops: DropCounts | None = None
) -> list[reviews.Review]:
    loaded = reviews.load_reviews(split, domains=tuple(config.data.domains), drops=drops)
    return loaded[: config.data.limit or None]


def _review_rows(config: ConfigDict, split: str, drops: DropCounts | None = None) -> list[dict]:
    """Reviews to be written: as they stand, or as the assistant's turn in a chat."""
    if config.data.instruction:
        return review_chats.response_rows(_reviews(config, split, drops), config.data.instruction)
    return reviews.sft_rows(_reviews(config, split, drops))


def _told(what: str, split: str, drops: DropCounts) -> None:
    print(f"{what} ({split}): {drops.summary()}")


def tokenizer_texts(config: ConfigDict) -> list[str]:
    """Text for the tokenizer of a model from scratch: what it will be trained on.

    Of reviews all domains, so that models of every variant share one vocabulary.
    """
    if config.inputs.model:
        return []
    if config.data.source == "reviews":
        everything = reviews.load_reviews("train", domains=tuple(reviews.DOMAINS))
        return [review.text for review in everything]
    return other_data.training_texts(config)


def sft_documents(
    config: ConfigDict, tokenizer: Any, split: str, *, max_length: int = 0
) -> Sequence[Encoded]:
    """Documents with loss masks, of at most `max_length` (0: data.max_length) tokens."""
    data, drops = config.data, DropCounts()
    longest = max_length or data.max_length
    if data.source == "reviews":
        rows = _review_rows(config, split, drops)
        documents = chat.encode_sft(rows, tokenizer, max_length=longest, drops=drops)
    else:
        documents = other_data.prepared(
            config, "sft", split, tokenizer, drops, max_length=longest, limit=data.limit
        )
    _told("SFT documents", split, drops)
    return documents


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
    settings = {
        "batch_size": rows,
        "length": length,
        "pad_id": tokenizer.pad_token_id,
        # One document a row: as many ptx documents as responses, as the released code draws them.
        "packed": packed,
    }
    if other_data.streamed(config):
        return other_data.stream(config, "sft", tokenizer, max_length, PackedBatches, settings)
    documents = sft_documents(config, tokenizer, "train", max_length=max_length)
    return PackedBatches(documents, seed=config.seed, **settings)


def evaluation_batches(
    documents: Sequence[Encoded], tokenizer: Any, train: ConfigDict
) -> list[dict]:
    """All documents once, packed like the training batches."""
    batches = PackedBatches(
        documents,
        batch_size=train.minibatch,
        length=train.row_length,
        seed=0,
        pad_id=tokenizer.pad_token_id,
    )
    return list(batches.once())


def preference_pairs(
    config: ConfigDict, tokenizer: Any, split: str, count: int
) -> Sequence[EncodedPair]:
    """Pairs of responses, the better one first."""
    data, drops = config.data, DropCounts()
    if data.source == "reviews" and data.instruction:
        return rated_pairs(config, tokenizer, split, count)[0]
    if data.source in ("harm", "reviews"):
        drawn = {
            "min_gap": data.min_gap,
            "num_pairs": count,
            "seed": config.seed,
            "drops": drops,
        }
        if data.source == "harm":
            rows = harm.harm_pairs(split, **drawn)
        else:
            rows = reviews.preference_rows(_reviews(config, split, drops), **drawn)
        pairs = chat.encode_pairs(rows, tokenizer, max_length=data.max_length, drops=drops)
    else:
        pairs = other_data.prepared(
            config, "preference", split, tokenizer, drops, max_length=data.max_length, limit=count
        )
    _told("pairs", split, drops)
    return pairs


def rated_pairs(
    config: ConfigDict, tokenizer: Any, split: str, count: int
) -> tuple[list[EncodedPair], np.ndarray]:
    """Pairs of reviews in a chat, and their ratings `[n, 2]`.

    Raises:
      ValueError: another source, or reviews without `data.instruction`.
    """
    data, drops = config.data, DropCounts()
    if data.source != "reviews" or not data.instruction:
        raise ValueError(
            f"loss.comparisons='batch' needs ratings: data.source={data.source!r} must be "
            "'reviews' with a data.instruction; or set loss.comparisons='pairs'"
        )
    pairs, ratings = review_chats.encode_pairs(
        _reviews(config, split, drops),
        tokenizer,
        data.instruction,
        min_gap=data.min_gap,
        num_pairs=count,
        seed=config.seed,
        max_length=data.max_length,
        drops=drops,
    )
    _told("pairs", split, drops)
    return pairs, ratings


def pair_batches(
    pairs: Sequence[EncodedPair], tokenizer: Any, train: ConfigDict, seed: int, devices: int
) -> PairBatches:
    """Endless token-balanced batches."""
    return PairBatches(pairs, seed=seed, num_buckets=3, **_pair_settings(tokenizer, train, devices))


def training_pairs(
    config: ConfigDict, tokenizer: Any, devices: int
) -> PairBatches | StreamedBatches:
    """Endless batches of the training pairs, streamed where the source says so."""
    longest = config.data.max_length
    if not other_data.streamed(config):
        pairs = preference_pairs(config, tokenizer, "train", config.data.pairs)
        return pair_batches(pairs, tokenizer, config.train, config.seed, devices)
    # Lengths that fit the data best cannot be known.
    settings = _pair_settings(tokenizer, config.train, devices)
    settings["buckets"] = tuple(sorted({max(1, longest // part) for part in (4, 2, 1)}))
    return other_data.stream(config, "preference", tokenizer, longest, PairBatches, settings)


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
    return list(pair_batches(pairs, tokenizer, train, 0, devices).once())


def judge_pairs(pairs: Sequence[EncodedPair], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The VADER rule's scores of the chosen and the rejected texts of the same pairs."""
    judge = VaderJudge()

    def scores(side: str) -> np.ndarray:
        tokens = [getattr(pair, side).tokens for pair in pairs]
        return judge(tokenizer.batch_decode(tokens, skip_special_tokens=True))

    return scores("chosen"), scores("rejected")


def reference_documents(config: ConfigDict, tokenizer: Any) -> list[Encoded]:
    """Responses whose scores get mean 0 and standard deviation 1: training texts.

    For reviews the texts themselves; else the chosen responses.
    """
    count = config.data.reference_texts
    if config.data.source == "reviews":
        rows = _review_rows(config, "train")[:count]
        return chat.encode_sft(rows, tokenizer, max_length=config.data.max_length)
    return [pair.chosen for pair in preference_pairs(config, tokenizer, "train", count)]


def prompt_batches(
    config: ConfigDict, tokenizer: Any, split: str
) -> PromptBatches | StreamedBatches:
    """Endless batches of prompts, left padded to one of few lengths."""
    settings = {
        "batch_size": config.train.prompts_per_iteration,
        "pad_id": tokenizer.pad_token_id,
        "buckets": tuple(config.data.prompt_buckets),
    }
    if other_data.streamed(config) and split == "train":
        longest = max(config.data.prompt_buckets)
        return other_data.stream(config, "prompt", tokenizer, longest, PromptBatches, settings)
    return PromptBatches(prompts(config, tokenizer, split), seed=config.seed, **settings)


def each_repeated(batch: dict, times: int) -> dict:
    """Every row `times` times in a row: samples of one prompt stand side by side.

    Args:
      batch: Arrays `[B, ...]`.
      times: Samples per prompt.

    Returns:
      Arrays `[B * times, ...]`.
    """
    return {name: np.repeat(rows, times, axis=0) for name, rows in batch.items()}


def fixed_prompts(config: ConfigDict, tokenizer: Any, split: str, batch_size: int) -> list[dict]:
    """All prompts of a split in whole batches of one length, always the same."""
    found = prompts(config, tokenizer, split)
    length = max(config.data.prompt_buckets)
    whole = len(found) - len(found) % batch_size
    if not whole:
        raise ValueError(
            f"{split} has {len(found)} prompts, fewer than one batch of {batch_size}: lower "
            "train.prompts_per_iteration (ppo_max) or eval.batch (dpo)"
        )
    return [
        pad_prompts(found[i : i + batch_size], length, pad_id=tokenizer.pad_token_id)
        for i in range(0, whole, batch_size)
    ]


def prompts(config: ConfigDict, tokenizer: Any, split: str) -> Sequence[np.ndarray]:
    """Prompts, open for the assistant's words."""
    data, drops = config.data, DropCounts()
    longest = max(data.prompt_buckets)
    if data.source == "reviews":
        rows = reviews.prompt_rows(_reviews(config, split, drops), seed=config.seed, drops=drops)
        if data.instruction:
            found = review_chats.encode_openings(
                rows, tokenizer, data.instruction, max_length=longest, drops=drops
            )
        else:
            found = chat.encode_prompts(rows, tokenizer, max_length=longest, drops=drops)
    else:
        found = other_data.prepared(
            config, "prompt", split, tokenizer, drops, max_length=longest, limit=data.limit
        )
    _told("prompts", split, drops)
    return found


def shown_prompt(config: ConfigDict, tokenizer: Any) -> Callable[[str], str]:
    """What of a decoded prompt is shown and judged: of reviews in a chat, the opening words."""
    data = config.data
    if data.source != "reviews" or not data.instruction:
        return lambda prompt: prompt
    return functools.partial(
        review_chats.shown_prompt, tokenizer=tokenizer, instruction=data.instruction
    )


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
