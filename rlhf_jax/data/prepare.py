"""From the name of a source to encoded rows: few in memory, many in a store on disk.

Reading, templates and tokenization are one pass over the rows; rows as text are never in memory
together. Many rows (more than `IN_MEMORY`) go to a folder below the cache folder, named by a hash
of all that decides them: the source and its files (path, size, time), kind, split, limit, lengths,
the tokenizer with its chat template, and the code of this package. The next run, the next stage and
the other processes open it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data import store as token_store
from rlhf_jax.data.encode import encode_row
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair, Kind, Row, one_line
from rlhf_jax.data.sets import archives
from rlhf_jax.data.templates import ChatTokenizer, date_of, stop_tokens
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.progress import progress

IN_MEMORY = 10_000  # Rows; some 10 to 50 MiB.
_CHUNK = 512  # Rows that are tokenized at a time.
_CHECKED = 4096  # Documents whose masks are checked at a time.
_SILENT_SECONDS = 3.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def prepared(
    kind: Kind,
    rows: Callable[[], Iterable[Row]],
    tokenizer: Any,
    *,
    max_length: int,
    drops: DropCounts,
    name: str,
    decides: Sequence[Any] | None = None,
    total: int = 0,
    cache: Path | None = None,
    in_memory: int | None = None,
    say: Callable[[str], None] = print,
) -> Sequence[Any]:
    """Returns the encoded rows: a list, or a `TokenStore` where there are many.

    Where rows may go to disk, process 0 encodes and writes; then the others open it (or, where
    they do not see its disk, encode for themselves).

    Args:
      kind: "sft", "preference" or "prompt".
      rows: opens the rows; called where no store holds them.
      tokenizer: with a chat template.
      max_length: the most tokens of a row (of each side of a pair).
      drops: counts what was kept, dropped and truncated, also where a store is opened.
      name: of source and split, as messages call them.
      decides: all that decides the rows; equal lists open one store. None: rows stay in memory,
        however many they are.
      total: how many rows the progress bar counts up to; 0 where nobody knows.
      cache: folder of the stores; by default one below `archives.cache_dir()`.
      in_memory: the most rows of a list; by default `IN_MEMORY`.
      say: reports which store is opened or was written.

    Raises:
      ValueError: no row is left, a row is wrong, or the cache cannot be written.
    """

    def encode() -> Sequence[Any]:
        found = encoded_rows(kind, rows(), tokenizer, max_length=max_length, drops=drops)
        encoded = _checked(_shown(found, name, total), tokenizer)
        most = IN_MEMORY if in_memory is None else in_memory
        few = list(encoded if decides is None else itertools.islice(encoded, most + 1))
        if not few:
            raise ValueError(f"no row is left to train on: {drops.summary()}")
        if decides is None or len(few) <= most:
            return few
        return _written(folder, kind, itertools.chain(few, encoded), drops, name, say)

    if decides is None:
        return encode()
    folder = (cache or archives.cache_dir() / "tokens") / _key(
        [*decides, kind, max_length], tokenizer
    )

    def find() -> Sequence[Any]:
        if not token_store.exists(folder):
            return encode()
        store = token_store.TokenStore(folder)
        drops.update(store.counts)
        say(f"{kind} rows of {name}: encoded before, read from {folder}")
        return store

    found = find() if distributed.is_main() else None
    distributed.barrier(f"{kind} rows are encoded")
    return find() if found is None else found


def _written(
    folder: Path,
    kind: Kind,
    encoded: Iterable[Any],
    drops: DropCounts,
    name: str,
    say: Callable[[str], None],
) -> token_store.TokenStore:
    try:
        store = token_store.write(folder, kind, encoded, drops)
    except OSError as error:
        # A row that cannot be read is not the store's.
        if error.errno not in _NO_ROOM or error.filename not in (None, str(folder)):
            raise
        raise ValueError(
            f"cannot write encoded rows below {folder.parent}: {error.strerror}; set "
            "RLHF_JAX_CACHE to a folder with room, or put stream: before the source"
        ) from error
    say(f"{kind} rows of {name}: written to {folder}")
    return store


def encoded_rows(
    kind: Kind,
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int,
    drops: DropCounts | None = None,
) -> Iterator[Any]:
    """Yields what each row becomes, or None where it is dropped; their masks are not checked.

    The pieces of some hundred rows are tokenized at once.

    Args:
      kind: "sft", "preference" or "prompt".
      rows: read as they are needed; for their shapes see `schemas`.
      tokenizer: with a chat template.
      max_length: the most tokens of a row.
      drops: counts the rows.

    Raises:
      ValueError: a row is wrong; names the row.
    """
    chat, drops = ChatTokenizer(tokenizer), DropCounts() if drops is None else drops
    rows, number = iter(rows), 0
    while chunk := list(itertools.islice(rows, _CHUNK)):
        with chat.ahead(chunk):
            for row in chunk:
                try:
                    yield encode_row(kind, row, chat, max_length, drops)
                except ValueError as error:
                    raise ValueError(f"row {number}: {one_line(error)}") from error
                number += 1


def encode_rows(
    kind: Kind,
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int,
    drops: DropCounts | None = None,
) -> list[Any]:
    """Returns the encoded rows with their masks checked; the list is empty if none is left."""
    found = encoded_rows(kind, rows, tokenizer, max_length=max_length, drops=drops)
    return list(_checked((one for one in found if one is not None), tokenizer))


def check_masks(encoded: Sequence[Encoded], stops: Sequence[int]) -> None:
    """Checks that something is trained, and that stopping is.

    Raises:
      ValueError: no token of any document is trained, or a trained stretch does not end with a
        stop token.
    """
    if not any(document.loss_mask.any() for document in encoded):
        raise ValueError(
            f"the loss mask is zero on all of {len(encoded)} documents, so nothing would be "
            "trained: check the roles of the messages and max_length"
        )
    tokens = np.concatenate([document.tokens for document in encoded])
    mask = np.concatenate([document.loss_mask for document in encoded])
    last = np.cumsum([len(document.tokens) for document in encoded]) - 1
    goes_on = np.append(mask[1:], False)
    goes_on[last] = False
    wrong = np.flatnonzero(mask & ~goes_on & ~np.isin(tokens, stops))
    if len(wrong):
        number = int(np.searchsorted(last, wrong[0]))
        position = int(wrong[0] - (last[number - 1] + 1 if number else 0))
        raise ValueError(
            f"document {number}: the trained tokens up to position {position} end without a stop "
            f"token (ids {list(stops)}): the stop token is outside the loss mask"
        )


def _shown(found: Iterable[Any], what: str, limit: int) -> Iterator[Any]:
    """Leaves out what was dropped; shows a progress bar where it takes longer than a moment."""
    with contextlib.ExitStack() as stack:
        bar, start = None, time.monotonic()
        for number, one in enumerate(found, 1):
            if bar is not None:
                bar.update()
            elif time.monotonic() - start > _SILENT_SECONDS:
                bar = stack.enter_context(progress(limit or None, f"encoding {what}", number))
            if one is not None:
                yield one


def _checked(encoded: Iterator[Any], tokenizer: Any) -> Iterator[Any]:
    """Checks the masks of what is trained, some thousand rows at a time; see `check_masks`."""
    stops = stop_tokens(tokenizer)
    while some := list(itertools.islice(encoded, _CHECKED)):
        pairs = [row for row in some if isinstance(row, EncodedPair)]
        documents = [row for row in some if isinstance(row, Encoded)]
        documents += [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        if documents:
            check_masks(documents, stops)
        yield from some


def _key(decides: Sequence[Any], tokenizer: Any) -> str:
    """Returns the name of a store: a hash of everything that decides its rows."""
    everything = [
        *decides,
        [str(tokenizer.chat_template), tokenizer.bos_token, tokenizer.eos_token],
        date_of(tokenizer),
        tokenizer_text(tokenizer),
        _code(),
    ]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:24]


def tokenizer_text(tokenizer: Any) -> str:
    """Returns a text that decides what a tokenizer does, its chat template aside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()


@functools.cache
def _code() -> str:
    """Hash of the modules of this folder: rows encoded by other code are not taken for these."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
