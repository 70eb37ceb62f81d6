"""Rows of sources other than the reviews: encoded once and kept, or streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.data import prepare, sources
from rlhf_jax.data.endless import Batches
from rlhf_jax.data.preferences import texts_of
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.streaming import StreamedBatches
from rlhf_jax.runtime import distributed

_TOKENIZER_ROWS = 20_000


def training_texts(config: ConfigDict) -> list[str]:
    """Texts of the first training rows, for the tokenizer of a model from scratch."""
    rows = sources.load_rows("sft", config.data.source, "train", limit=_TOKENIZER_ROWS)
    return [text for row in rows for text in texts_of(row)]


def prepared(
    config: ConfigDict,
    kind: str,
    split: str,
    tokenizer: Any,
    drops: DropCounts,
    *,
    max_length: int,
    limit: int,
) -> Sequence[Any]:
    """Encoded rows of a split.

    Process 0 encodes and writes what is large; then the others open it (or, where they do not see
    its disk, encode for themselves).
    """

    def rows() -> Sequence[Any]:
        return prepare.encoded_rows(
            kind,
            config.data.source,
            split,
            tokenizer,
            max_length=max_length,
            limit=limit,
            drops=drops,
        )

    found = rows() if distributed.is_main() else None
    distributed.barrier(f"{kind} rows are encoded")
    return rows() if found is None else found


def streamed(config: ConfigDict) -> bool:
    """Whether training rows are read as the run trains."""
    return sources.is_streamed(config.data.source)


def stream(
    config: ConfigDict,
    kind: str,
    tokenizer: Any,
    max_length: int,
    batches: Callable[..., Batches],
    settings: dict[str, Any],
) -> StreamedBatches:
    """Batches of blocks of rows that are read as the run trains."""
    source = config.data.source

    def make(rows: list[dict], seed: int) -> Batches | None:
        drops = DropCounts()
        converted = sources.convert_stream(kind, source, rows, drops)
        found = prepare.encode_block(kind, converted, tokenizer, max_length=max_length, drops=drops)
        print(f"{kind} rows, the next {len(rows):,} of {source}: {drops.summary()}")
        return batches(found, seed=seed, **settings) if found else None

    return StreamedBatches(
        lambda: sources.open_stream(source),
        make,
        seed=config.seed,
        name=f"{kind} {source}",
        limit=config.data.limit,
    )
