"""`load_rows`: rows of a kind, of a split, from a source that a config names."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.convert import KINDS, Request, converted_rows, every_row, hh_rows
from rlhf_jax.data.jsonl import existing, read_jsonl, stamps
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.data.sets import archives, chitchat, harm, hh, reviews
from rlhf_jax.data.splits import SPLITS, check_split

_HH_FILES = {"train": ("train",), "all": ("train", "test")}  # Else the test file.
_STREAM = "stream:"


def load_rows(kind: str, source: str, split: str, *, limit: int = 0, **settings: Any) -> list[Row]:
    """Returns the rows of `iter_rows` in a list; `limit` is the most rows, 0 is all of them."""
    return list(itertools.islice(iter_rows(kind, source, split, **settings), limit or None))


def iter_rows(
    kind: str,
    source: str,
    split: str,
    *,
    seed: int = 0,
    domains: Sequence[str] = ("movie", "amazon"),
    num_pairs: int = 20_000,
    min_gap: float = 1.0,
    words: tuple[int, int] = (2, 5),
    allow_harmful: bool = False,
    drops: DropCounts | None = None,
) -> Iterator[Row]:
    """Yields rows that `chat.encode_sft`, `encode_pairs` or `encode_prompts` take.

    Sources:
        reviews: rated reviews, see `reviews`; `domains`, `num_pairs`, `min_gap`, `words` and
            `seed` are for it.
        chitchat: conversations for SFT, see `chitchat`.
        hh, hh:WHERE: Anthropic/hh-rlhf, some of its parts, or a local copy, see `hh`. Its test file
            is split by prompt: one eighth is test, the rest validation, close to the paper's sizes.
        jsonl:PATH: a file, split 80/10/10 by its prompts, or a folder with SPLIT.jsonl. The shapes
            of rows are those of `preferences`.
        llamafactory:en, llamafactory:zh: about 1,000 instructions and 300 pairs of a model's
            labels (Apache-2.0), split by prompt.
        pyrit: people's harm scores, see `harm`; only with `allow_harmful`.
        stream:hh, stream:jsonl:PATH, ...: the same rows, those of the hub over the network as they
            are needed and not through the cache of `datasets`. For training see `streaming`.

    Args:
        kind: "sft", "preference" or "prompt".
        source: see above.
        split: "train", "validation", "test" or "all".
        seed: of pairs and prompts that are drawn.
        domains: of reviews.
        num_pairs: of reviews and pyrit.
        min_gap: of the ratings of a pair.
        words: of a prompt, at least and at most.
        allow_harmful: needed for pyrit.
        drops: counts what the loader leaves out, as the rows are read.

    Raises:
        ValueError: unknown kind, source or split; missing fields; kinds that a source has not.
        archives.AssetError: no network and no cache.
        FileNotFoundError: no such file.
    """
    name, where = parse_source(kind, source, split)
    counts = DropCounts() if drops is None else drops
    streaming = is_streamed(source)
    request = Request(
        kind,
        where,
        split,
        counts,
        streaming,
        seed,
        domains,
        num_pairs,
        min_gap,
        words,
        allow_harmful,
    )
    return iter(_LOADERS[name](request))


def parse_source(kind: str, source: str, split: str) -> tuple[str, str]:
    """Returns the name of a source and what stands behind its colon.

    Raises:
        ValueError: unknown kind, source or split.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    check_split(split)
    name, _, where = source.removeprefix(_STREAM).partition(":")
    if name not in _LOADERS:
        raise ValueError(f"source={source!r} must be one of {', '.join(SOURCES)}")
    if is_streamed(source) and name not in ("hh", "jsonl"):
        raise ValueError(f"source={source!r} cannot be streamed: only hh and jsonl can")
    return name, where


def is_streamed(source: str) -> bool:
    """Whether a source is to be read as the run trains."""
    return source.startswith(_STREAM)


def open_stream(source: str) -> list[Iterable[Row]]:
    """Opens the training rows of a streamed source as they stand in its files or parts.

    Raises:
        ValueError, FileNotFoundError, archives.AssetError: see `iter_rows`.
    """
    name, where = parse_source("sft", source, "train")
    if name == "hh":
        return [reader() for reader in hh.readers(where, "train", streaming=True)]
    path = Path(where)
    return [read_jsonl(existing(path / "train.jsonl" if path.is_dir() else path))]


def convert_stream(kind: str, source: str, rows: Iterable[Row], drops: DropCounts) -> Iterator[Row]:
    """Brings rows of `open_stream` to a kind; of one file without splits, those of training."""
    name, where = parse_source(kind, source, "train")
    request = Request(kind, where, "train", drops=drops)
    if name == "hh":
        return hh_rows(rows, request, "train")
    return converted_rows(rows, request, every_row if Path(where).is_dir() else None)


def fingerprint(kind: str, source: str, split: str) -> list[Any]:
    """Returns what decides the rows of a source: of files their paths, sizes and times.

    Raises:
        ValueError, FileNotFoundError, archives.AssetError: see `iter_rows`.
    """
    name, where = parse_source(kind, source, split)
    if is_streamed(source) and name == "hh" and not Path(where).exists():
        return [
            source,
            "hub",
        ]  # Without downloading it: the hub's rows have not changed since 2022.
    if name == "jsonl":
        path = Path(where)
        return stamps(sorted(path.glob("*.jsonl")) if path.is_dir() else [existing(path)])
    if name == "hh":
        return hh.fingerprint(where, _HH_FILES.get(split, ("test",)), streaming=is_streamed(source))
    return [source]  # A pinned archive.


def _reviews(request: Request) -> list[Row]:
    loaded = reviews.load_reviews(request.split, domains=request.domains, drops=request.drops)
    if request.kind == "sft":
        return reviews.sft_rows(loaded)
    if request.kind == "prompt":
        return reviews.prompt_rows(loaded, words=request.words, seed=request.seed)
    return reviews.preference_rows(
        loaded, min_gap=request.min_gap, num_pairs=request.num_pairs, seed=request.seed
    )


def _chitchat(request: Request) -> Iterable[Row]:
    if request.kind == "preference":
        raise ValueError("source='chitchat' has no preferences: use it for sft or prompt")
    return converted_rows(
        chitchat.chitchat_rows(request.split, drops=request.drops), request, every_row
    )


def _pyrit(request: Request) -> Iterable[Row]:
    if not request.allow_harmful:
        raise ValueError("source='pyrit' holds harmful answers: pass allow_harmful=True to load it")
    if request.kind == "sft":
        raise ValueError("source='pyrit' is not for fine-tuning: use it for preference or prompt")
    if request.kind == "prompt":
        answers = harm.harm_answers(request.split, drops=request.drops)
        return converted_rows([{"prompt": row["prompt"]} for row in answers], request, every_row)
    return harm.harm_pairs(
        request.split, num_pairs=request.num_pairs, seed=request.seed, drops=request.drops
    )


def _llamafactory(request: Request) -> Iterable[Row]:
    if request.where not in ("en", "zh"):
        raise ValueError(f"source='llamafactory:{request.where}' must end in en or zh")
    name = "alpaca" if request.kind == "sft" else "dpo"
    content = archives.read_member("llamafactory", f"data/{name}_{request.where}_demo.json")
    return converted_rows(json.loads(content), request)


def _jsonl(request: Request) -> Iterable[Row]:
    path = Path(request.where)
    if not path.is_dir():
        return converted_rows(read_jsonl(existing(path)), request)
    names = SPLITS if request.split == "all" else [request.split]
    files = [existing(path / f"{name}.jsonl") for name in names]
    return converted_rows((row for file in files for row in read_jsonl(file)), request, every_row)


def _hh(request: Request) -> Iterable[Row]:
    """The train file is train; of the test file one eighth is test, the rest validation."""
    names = _HH_FILES.get(request.split, ("test",))
    opened = [
        (name, hh.readers(request.where, name, streaming=request.streaming)) for name in names
    ]
    return itertools.chain.from_iterable(
        hh_rows(itertools.chain.from_iterable(read() for read in readers), request, name)
        for name, readers in opened
    )


_LOADERS: dict[str, Callable[[Request], Iterable[Row]]] = {
    "reviews": _reviews,
    "chitchat": _chitchat,
    "hh": _hh,
    "jsonl": _jsonl,
    "llamafactory": _llamafactory,
    "pyrit": _pyrit,
}
SOURCES = (
    "reviews",
    "chitchat",
    "hh",
    "hh:PART+PART",
    "hh:FOLDER",
    "jsonl:PATH",
    "llamafactory:en",
    "llamafactory:zh",
    "pyrit",
    "stream:hh, stream:jsonl:PATH, ...",
)
