"""Digests: what changes them, and what does not."""

import numpy as np
import pytest

from rlhf_jax.data import store
from rlhf_jax.data.digests import rows_digest
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair
from rlhf_jax.runtime import digests


def document(*tokens, trained=(-1,)):
    mask = np.zeros(len(tokens), bool)
    mask[list(trained)] = True
    return Encoded(np.array(tokens, np.int32), mask)


DOCUMENTS = [document(n, n + 1, 2) for n in range(5, 5000)]  # more than are joined at a time
PAIRS = [EncodedPair(document(n, 7, 2), document(n, 8, 9, 2), n / 4) for n in range(5, 20)]
PROMPTS = [np.array([n, n + 1], np.int32) for n in range(5, 20)]


@pytest.mark.parametrize(
    ("kind", "rows"), [("sft", DOCUMENTS), ("preference", PAIRS), ("prompt", PROMPTS)]
)
def test_rows_in_memory_and_rows_of_a_store_have_one_digest(tmp_path, monkeypatch, kind, rows):
    monkeypatch.setattr(store, "_BLOCK", 1000)  # and however many bytes are read at a time
    stored = store.write(tmp_path / "store", kind, rows, DropCounts())
    assert rows_digest(Examples(stored)) == rows_digest(Examples(rows)) == rows_digest(rows)


@pytest.mark.parametrize(
    ("rows", "others"),
    [
        (DOCUMENTS, [*DOCUMENTS[:-1], document(4999, 5001, 2)]),
        (DOCUMENTS, [*DOCUMENTS[:-1], document(4999, 5000, 2, trained=(-1, -2))]),
        (DOCUMENTS, DOCUMENTS[::-1]),
        (DOCUMENTS, DOCUMENTS[:-1]),
        ([document(5, 2), document(6, 7, 2)], [document(5, 2, 6), document(7, 2)]),
        (PAIRS, [pair._replace(margin=pair.margin + 1) for pair in PAIRS]),
        (PAIRS, [EncodedPair(pair.rejected, pair.chosen, pair.margin) for pair in PAIRS]),
        (PROMPTS, [*PROMPTS[1:], PROMPTS[0]]),
    ],
    ids=["token", "mask", "order", "count", "borders", "margins", "sides", "prompts"],
)
def test_every_part_of_a_row_counts(rows, others):
    assert rows_digest(rows) != rows_digest(others)


def test_files_count_by_their_bytes_and_order(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_PART", 4)  # bytes; the first file has three parts
    one, other, same = (tmp_path / name for name in ("one", "other", "same"))
    one.write_bytes(b"0123456789")
    other.write_bytes(b"0123456798")
    same.write_bytes(one.read_bytes())
    assert digests.of_files([one, other]) == digests.of_files([same, other])
    found = [
        digests.of_files(files)
        for files in ([one], [other], [one, other], [other, one], [one, same], [])
    ]
    assert len(set(found)) == len(found)
    one.write_bytes(b"4567012389")  # parts that change places
    assert digests.of_files([one]) != found[0]


def test_texts_keep_their_borders():
    assert digests.of_text("ab", "c") != digests.of_text("a", "bc")
    assert digests.of_text("\ud83d")  # half a pair, as vocabularies may hold
