"""Batches in which a judge reads texts of many lengths: few shapes, whatever the texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def each_once(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Different texts, for a policy that has collapsed writes one again and again.

    Args:
      texts: N texts.

    Returns:
      The M different ones in their order, and int64 [N], the place of each text among them.

    Raises:
      ValueError: `texts` is one string instead of a sequence of them.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a sequence of strings, got one: wrap it in [...]")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(place), np.array([place[text] for text in texts], np.int64)


def plan(lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Batches of similar lengths, the longest first.

    A batch has all the rows that it may have or a quarter of them, so that few texts are not padded
    to many.

    Args:
      lengths: [N], tokens of each text.
      batch_tokens: about how many tokens are in a batch, padding included.

    Yields:
      The members of a batch (positions among the texts), its rows, at least as many, and columns.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
    while order.size:
        columns = columns_for(lengths[order[0]])
        full = max(1, batch_tokens // columns)
        quarter = max(1, full // 4)
        num_rows = full if order.size > full - quarter else quarter
        yield order[:num_rows], num_rows, columns
        order = order[num_rows:]


def columns_for(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: from 16 on, at most a third of a row is padding."""
    columns = 16
    while columns < length:
        is_power = columns & (columns - 1) == 0
        columns = columns * 3 // 2 if is_power else columns * 4 // 3
    return columns


def padded(
    rows: Sequence[Sequence[int]], num_rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 and mask bool `[num_rows, columns]`, padded on the right and below."""
    tokens = np.zeros((num_rows, columns), np.int32)
    mask = np.zeros((num_rows, columns), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask
