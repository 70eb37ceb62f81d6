"""Texts that nearly repeat an earlier one, found by their runs of words."""

import numpy as np
import pytest

from rlhf_jax.data.near_duplicates import near_duplicates


def jaccard(a: str, b: str, size: int) -> float:
    """By sets of runs, word by word."""
    sets = []
    for text in (a, b):
        words = text.lower().split()
        starts = range(max(1, len(words) - size + 1))
        sets.append({" ".join(words[i : i + size]) for i in starts})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_case_and_punctuation_do_not_count():
    texts = ["The plot, though thin, works.", "the plot though THIN works!", "The plot works."]
    assert near_duplicates(texts, 1.0) == [-1, 0, -1]


def test_a_word_changed_in_a_long_text_is_a_near_duplicate():
    words = [f"word{n}" for n in range(30)]
    changed = [*words[:29], "other"]
    # 27 runs of 28 are shared, of 29 different ones.
    assert near_duplicates([" ".join(words), " ".join(changed)], 27 / 29) == [-1, 0]
    assert near_duplicates([" ".join(words), " ".join(changed)], 27 / 29 + 1e-6) == [-1, -1]


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_found_is_what_comparing_all_pairs_finds(size):
    rng = np.random.default_rng(size)
    texts = [" ".join(rng.choice(list("abcd"), rng.integers(1, 7))) for _ in range(120)]
    found, kept = near_duplicates(texts, 0.5, size=size), []
    for number, text in enumerate(texts):
        alike = [jaccard(text, texts[other], size) for other in kept]
        best = int(np.argmax(alike)) if alike else -1
        if best >= 0 and alike[best] >= 0.5:
            assert found[number] == kept[best]
        else:
            assert found[number] == -1
            kept.append(number)
    assert 0 < len(kept) < len(texts)


@pytest.mark.parametrize("similarity", [0.0, -1.0, 1.1, float("nan")])
def test_a_similarity_is_a_share(similarity):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        near_duplicates(["a"], similarity)
