"""Shows encoded examples: which tokens are trained, how long they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from rlhf_jax.data.schemas import Encoded, EncodedPair, EncodedPrompt

_TRAINED, _READ, _SPECIAL, _END = "\033[32m", "\033[90m", "\033[1;7m", "\033[0m"
_BARS = "▁▂▃▄▅▆▇█"


def use_color(stream: TextIO) -> bool:
    """Whether to write ANSI colours: on a terminal, unless NO_COLOR is set and not empty."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def render(encoded: Encoded | EncodedPair | EncodedPrompt, tokenizer: Any, *, color: bool) -> str:
    """Returns the text of an example with its loss mask.

    Args:
      encoded: a document, a pair (two parts, the better first) or a prompt (nothing trained).
      tokenizer: that encoded it.
      color: trained tokens in green, the others in grey, special tokens inverted; without
        colour, trained stretches are enclosed in [[ and ]].
    """
    if isinstance(encoded, EncodedPair):
        chosen, rejected = (
            render(side, tokenizer, color=color) for side in (encoded.chosen, encoded.rejected)
        )
        said = f"margin {encoded.margin:g}"
        if encoded.p_chosen != 1:
            said += f", p {encoded.p_chosen:g}"
        return f"chosen ({said}):\n{chosen}\nrejected:\n{rejected}"
    if not isinstance(encoded, Encoded):
        encoded = Encoded(encoded, np.zeros(len(encoded), dtype=bool))
    parts = []
    for ids, trained in _runs(encoded):
        if color:
            parts += _coloured(ids, _TRAINED if trained else _READ, tokenizer)
        else:
            text = tokenizer.decode(ids)
            parts.append(f"[[{text}]]" if trained else text)
    return "".join(parts)


def legend(*, color: bool) -> str:
    """Returns one line that explains what `render` shows."""
    if color:
        return f"{_TRAINED}trained{_END} {_READ}read only{_END} {_SPECIAL}special token{_END}"
    return "[[trained]] read only"


def lengths_line(lengths: Sequence[int] | np.ndarray, *, bins: int = 24) -> str:
    """Returns number, minimum, median, 95th percentile and maximum, and a histogram of bars.

    >>> lengths_line([2, 2, 2, 4], bins=3)
    '4 examples, tokens: min 2, median 2, p95 4, max 4  █▁▃ (2 to 4)'
    """
    if not len(lengths):
        return "0 examples"
    low, high = min(lengths), max(lengths)
    counts, _ = np.histogram(lengths, bins=bins, range=(low, high + 1e-9))
    tallest = len(_BARS) - 1
    bars = "".join(_BARS[round(tallest * count / counts.max())] for count in counts)
    ranked = sorted(lengths)
    median, p95 = (ranked[min(len(ranked) - 1, int(q * len(ranked)))] for q in (0.5, 0.95))
    return (
        f"{len(lengths):,} examples, tokens: min {low}, median {median}, p95 {p95}, max {high}  "
        f"{bars} ({low} to {high})"
    )


def _runs(encoded: Encoded) -> Iterator[tuple[list[int], bool]]:
    """Splits a document into stretches that are trained and that are not."""
    mask = encoded.loss_mask
    (seams,) = np.nonzero(mask[1:] != mask[:-1])
    for ids, flags in zip(
        np.split(encoded.tokens, seams + 1), np.split(mask, seams + 1), strict=True
    ):
        if len(ids):
            yield ids.tolist(), bool(flags[0])


def _coloured(ids: list[int], style: str, tokenizer: Any) -> list[str]:
    """Decodes a stretch, its special tokens apart."""
    special = set(tokenizer.all_special_ids)
    parts, plain = [], []
    for token in ids:
        if token not in special:
            plain.append(token)
            continue
        if plain:
            parts.append(f"{style}{tokenizer.decode(plain)}{_END}")
            plain = []
        parts.append(f"{style}{_SPECIAL}{tokenizer.decode([token])}{_END}")
    return [*parts, f"{style}{tokenizer.decode(plain)}{_END}"] if plain else parts
