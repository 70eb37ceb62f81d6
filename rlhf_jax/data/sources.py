"""`load_rows`: rows of a kind, of a split, from a source that a config names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.data import assets, chitchat, harm, preferences, reviews
from rlhf_jax.data.splits import SPLITS, check_split, fraction_of, split_of
from rlhf_jax.data.types import DropCounts, Row

_HH = "Anthropic/hh-rlhf"
_HH_PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


class _Request(NamedTuple):
    """The arguments of `load_rows` that loaders read; `where` is what stands behind the colon."""

    kind: str
    where: str
    split: str
    seed: int
    domains: Sequence[str]
    num_pairs: int
    min_gap: float
    words: tuple[int, int]
    allow_harmful: bool
    drops: DropCounts


def load_rows(
    kind: str,
    source: str,
    split: str,
    *,
    limit: int = 0,
    seed: int = 0,
    domains: Sequence[str] = ("movie", "amazon"),
    num_pairs: int = 20_000,
    min_gap: float = 1.0,
    words: tuple[int, int] = (2, 5),
    allow_harmful: bool = False,
    drops: DropCounts | None = None,
) -> list[Row]:
    """Loads rows that `chat.encode_sft`, `encode_pairs` or `encode_prompts` take.

    Sources:
        reviews: rated reviews, see `reviews`; `domains`, `num_pairs`, `min_gap`, `words` and
            `seed` are for it.
        chitchat: conversations for SFT, see `chitchat`.
        hh: Anthropic/hh-rlhf from the hub; `hh:helpful-base` one of its parts; `hh:FOLDER` a local
            copy (train.jsonl, test.jsonl, gzipped or not, in any subfolder). Its test file is
            split by prompt: one eighth is test, the rest validation, close to the paper's sizes.
        jsonl:PATH: a file, split 80/10/10 by its prompts, or a folder with SPLIT.jsonl. The shapes
            of rows are those of `preferences`.
        llamafactory:en, llamafactory:zh: about 1,000 instructions and 300 pairs of a model's
            labels (Apache-2.0), split by prompt.
        pyrit: people's harm scores, see `harm`; only with `allow_harmful`.

    Args:
        kind: "sft", "preference" or "prompt".
        source: see above.
        split: "train", "validation", "test" or "all".
        limit: the most rows; 0 is all of them.
        seed: of pairs and prompts that are drawn.
        domains: of reviews.
        num_pairs: of reviews and pyrit.
        min_gap: of the ratings of a pair.
        words: of a prompt, at least and at most.
        allow_harmful: needed for pyrit.
        drops: counts what the loader leaves out.

    Raises:
        ValueError: unknown kind, source or split; missing fields; kinds that a source has not.
        assets.AssetError: no network and no cache.
        FileNotFoundError: no such file.
    """
    if kind not in _CONVERT:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(_CONVERT)}")
    check_split(split)
    name, _, where = source.partition(":")
    if name not in _LOADERS:
        raise ValueError(f"source={source!r} must be one of {', '.join(SOURCES)}")
    counts = DropCounts() if drops is None else drops
    request = _Request(
        kind, where, split, seed, domains, num_pairs, min_gap, words, allow_harmful, counts
    )
    rows = _LOADERS[name](request)
    return rows[: limit or None]


def _reviews(request: _Request) -> list[Row]:
    loaded = reviews.load_reviews(request.split, domains=request.domains, drops=request.drops)
    if request.kind == "sft":
        return reviews.sft_rows(loaded)
    if request.kind == "prompt":
        return reviews.prompt_rows(loaded, words=request.words, seed=request.seed)
    return reviews.preference_rows(
        loaded, min_gap=request.min_gap, num_pairs=request.num_pairs, seed=request.seed
    )


def _chitchat(request: _Request) -> list[Row]:
    if request.kind == "preference":
        raise ValueError("source='chitchat' has no preferences: use it for sft or prompt")
    return _converted(
        chitchat.chitchat_rows(request.split, drops=request.drops), request, cut=False
    )


def _pyrit(request: _Request) -> list[Row]:
    if not request.allow_harmful:
        raise ValueError("source='pyrit' holds harmful answers: pass allow_harmful=True to load it")
    if request.kind == "sft":
        raise ValueError("source='pyrit' is not for fine-tuning: use it for preference or prompt")
    if request.kind == "prompt":
        answers = harm.harm_answers(request.split, drops=request.drops)
        return _converted([{"prompt": row["prompt"]} for row in answers], request, cut=False)
    return harm.harm_pairs(
        request.split, num_pairs=request.num_pairs, seed=request.seed, drops=request.drops
    )


def _llamafactory(request: _Request) -> list[Row]:
    if request.where not in ("en", "zh"):
        raise ValueError(f"source='llamafactory:{request.where}' must end in en or zh")
    name = "alpaca" if request.kind == "sft" else "dpo"
    content = assets.read_member("llamafactory", f"data/{name}_{request.where}_demo.json")
    return _converted(json.loads(content), request)


def _jsonl(request: _Request) -> list[Row]:
    path = Path(request.where)
    if not path.is_dir():
        return _converted(_read_jsonl(path), request)
    names = SPLITS if request.split == "all" else [request.split]
    files = [_existing(path / f"{name}.jsonl") for name in names]
    return _converted((row for file in files for row in _read_jsonl(file)), request, cut=False)


def _hh(request: _Request) -> list[Row]:
    """The train file is train; of the test file one eighth is test, the rest validation."""
    rows: list[Row] = []
    if request.split in ("train", "all"):
        rows += _converted(_hh_file(request.where, "train"), request, cut=False)
    if request.split == "train":
        return rows
    held_out = _converted(_hh_file(request.where, "test"), request, cut=False)
    is_test = [fraction_of(_key(row)) < 1 / 8 for row in held_out]
    wanted = {"test": (True,), "validation": (False,), "all": (True, False)}[request.split]
    return rows + [row for row, flag in zip(held_out, is_test, strict=True) if flag in wanted]


def _hh_file(where: str, name: str) -> Iterable[Row]:
    """Rows of train or test: of the hub's data set, of one of its parts, or of a local folder."""
    if where and where not in _HH_PARTS:
        files = sorted(Path(where).rglob(f"{name}.jsonl*"))
        if not files:
            raise FileNotFoundError(
                f"source='hh:{where}' has no {name}.jsonl or {name}.jsonl.gz: give a folder of the "
                f"format of {_HH}, or one of {', '.join(_HH_PARTS)}"
            )
        return (row for file in files for row in _read_jsonl(file))
    import datasets

    try:
        return datasets.load_dataset(_HH, data_dir=where or None, split=name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise assets.AssetError(
            f"cannot load {_HH} and it is not in the cache of datasets: {reason} -- connect, or "
            "copy its files into a folder and use source='hh:FOLDER'"
        ) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSON-lines file; errors name the line."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(_existing(path), "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be an object, not {row!r:.40}")
            yield row


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file of JSON lines, one row each")
    return path


def _converted(rows: Iterable[Row], request: _Request, *, cut: bool = True) -> list[Row]:
    """Brings rows to the kind; keeps those of the split (`cut`) and each prompt row once."""
    kept, seen = [], set()
    for number, row in enumerate(rows):
        try:
            converted = _CONVERT[request.kind](row, request.drops)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if converted is None or (cut and not _is_in_split(converted, request)):
            continue
        if request.kind == "prompt":
            key = json.dumps(converted, sort_keys=True, ensure_ascii=False)
            if key in seen:
                request.drops.drop("duplicate prompt")
                continue
            seen.add(key)
        kept.append(converted)
    return kept


def _is_in_split(row: Row, request: _Request) -> bool:
    """Whether the row belongs to the split; a pair without a prompt must do so with both texts."""
    found = {split_of(_key(row))}
    if request.kind == "preference" and not row["prompt"]:
        found.add(split_of(row["rejected"]))
    if len(found) > 1:
        request.drops.drop("texts of two splits")
    return request.split == "all" or found == {request.split}


def _key(row: Row) -> str:
    """Returns the text that decides the split: of a conversation, what was said first."""
    said = row.get("messages") or row.get("prompt")
    if said and not isinstance(said, str):
        return next((m["content"] for m in said if m["role"] != "system"), "")
    return said or row.get("text") or row.get("chosen") or row.get("response") or ""


_CONVERT: dict[str, Callable[[Row, DropCounts | None], Row | None]] = {
    "sft": preferences.as_sft,
    "preference": preferences.as_preference,
    "prompt": preferences.as_prompt,
}
_LOADERS: dict[str, Callable[[_Request], list[Row]]] = {
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
    "hh:PART_OR_FOLDER",
    "jsonl:PATH",
    "llamafactory:en",
    "llamafactory:zh",
    "pyrit",
)
