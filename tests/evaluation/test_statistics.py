"""Variety, perplexity and KL of responses, against loops and hand-computed numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import (
    distinct_n,
    kl_statistics,
    moss_perplexity,
    repetition,
    response_perplexity,
    response_statistics,
    sequence_kl,
)


@pytest.fixture
def batch():
    """Log-probs of six ragged responses; NaN and infinity wherever the mask is False."""
    rng = np.random.default_rng(0)
    log_probs = -rng.exponential(size=(6, 9)).astype(np.float32)
    ref_log_probs = -rng.exponential(size=(6, 9)).astype(np.float32)
    where = rng.random((6, 9)) < 0.6
    where[2] = False
    log_probs[~where] = np.nan
    ref_log_probs[~where] = -np.inf
    return log_probs, ref_log_probs, where


def _responses(array, where):
    """The selected values of each row, as lists of floats."""
    return [
        [float(array[i, t]) for t in range(array.shape[1]) if where[i, t]]
        for i in range(len(array))
    ]


def test_distinct_by_hand():
    # Bigrams: ab bc | ab b? -> (1,2) (2,3) | (1,2) (2,2): 3 different of 4.
    assert distinct_n([[1, 2, 3], [1, 2, 2]], 2) == 3 / 4
    # Unigrams: 1 2 3 of six tokens.
    assert distinct_n([[1, 2, 3], [1, 2, 2]], 1) == 3 / 6
    # No bigram crosses from one response into the next: (2, 5) does not exist.
    assert distinct_n([[1, 2], [5, 6]], 2) == 1.0


def test_distinct_is_over_the_corpus_not_a_mean_over_responses():
    assert distinct_n([[1, 2, 3]] * 5, 1) == 3 / 15


def test_distinct_over_words_ignores_case_and_spacing():
    assert distinct_n(["The film  was good", "the FILM was\nbad"], 2) == 4 / 6
    assert distinct_n(["a b"], 2) == distinct_n([["a", "b"]], 2) == 1.0


def test_distinct_against_a_loop():
    rng = np.random.default_rng(1)
    corpus = [rng.integers(5, size=rng.integers(0, 12)).tolist() for _ in range(30)]
    for n in (1, 2, 3):
        seen, total = [], 0
        for response in corpus:
            for start in range(len(response) - n + 1):
                gram = response[start : start + n]
                total += 1
                if gram not in seen:
                    seen.append(gram)
        assert distinct_n(corpus, n) == len(seen) / total


@pytest.mark.parametrize("corpus", [[], [[]], [[1]], [""]])
def test_no_bigram(corpus):
    assert distinct_n(corpus, 2) == 0.0
    assert repetition(corpus, 2) == 0.0


def test_repetition_by_hand():
    # 1 2 1 2 1: bigrams 12 21 12 21, two of four repeat; 1 2 3: none of two; 7: left out.
    assert repetition([[1, 2, 1, 2, 1], [1, 2, 3], [7]], 2) == (2 / 4 + 0) / 2
    # The same response twice is no repetition within a response.
    assert repetition([[1, 2, 3], [1, 2, 3]], 2) == 0.0
    assert repetition(["so good " * 50], 4) == pytest.approx(95 / 97)  # 97 four-grams, 2 differ


@pytest.mark.parametrize("function", [distinct_n, repetition])
def test_bad_n(function):
    with pytest.raises(ValueError, match="n must be >= 1"):
        function([[1]], 0)


def test_response_statistics_by_hand():
    tokens = np.array([[5, 6, 5, 6], [9, 5, 6, 9], [5, 6, 9, 9]])
    where = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
    # Responses 5656, 56, 56: lengths 4, 2, 2; mean 8/3, variance 8/9.
    result = response_statistics(tokens, where=where, ended=[False, True, True])
    assert result.pop("response/length") == pytest.approx(8 / 3)
    assert result.pop("response/length_std") == pytest.approx(math.sqrt(8 / 9))
    assert result == {
        "response/length_max": 4.0,
        "response/distinct_1": 2 / 8,
        "response/distinct_2": 2 / 5,  # 56 65 56 | 56 | 56
        "response/repetition_4": 0.0,
        "response/unique": 2 / 3,
        "response/eos_rate": 2 / 3,
    }
    assert "response/eos_rate" not in response_statistics(tokens, where=where)
    with pytest.raises(ValueError, match="ended must be"):
        response_statistics(tokens, where=where, ended=[True])


def test_perplexity_by_hand():
    # Tokens of probability ½, ½ and ⅛: exp((1 + 1 + 3) ln 2 / 3) = 2^(5/3), not the mean of
    # the rows' perplexities (2 and 8).
    log_probs = np.log([[0.5, 0.5], [0.125, 0.3]])
    where = np.array([[True, True], [True, False]])
    assert response_perplexity(log_probs, where=where) == pytest.approx(2 ** (5 / 3))


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary():
    log_probs = jnp.full((3, 4), -jnp.log(50.0))
    assert response_perplexity(log_probs, where=jnp.ones((3, 4), bool)) == pytest.approx(50, 1e-5)


def test_perplexity_against_a_loop(batch):
    log_probs, _, where = batch
    tokens = [value for row in _responses(log_probs, where) for value in row]
    expected = math.exp(-sum(tokens) / len(tokens))
    assert response_perplexity(log_probs, where=where) == pytest.approx(expected)


def test_moss_perplexity_against_a_loop(batch):
    log_probs, _, where = batch
    rows = [row for row in _responses(log_probs, where) if row]
    mean_nll = sum(-sum(row) / len(row) for row in rows)
    expected = math.exp(mean_nll / sum(len(row) for row in rows))
    assert moss_perplexity(log_probs, where=where) == pytest.approx(expected)


def test_moss_perplexity_of_the_figures():
    # Figure 4 of the paper starts at 1.0195 with responses of 110 tokens: a mean NLL of 2.12.
    log_probs = np.full((4, 110), -110 * math.log(1.0195))
    where = np.ones((4, 110), bool)
    assert moss_perplexity(log_probs, where=where) == pytest.approx(1.0195)
    assert response_perplexity(log_probs, where=where) == pytest.approx(math.exp(2.124), rel=1e-3)


def test_moss_perplexity_falls_with_length_alone():
    values = [
        moss_perplexity(np.full((2, length), -2.0), where=np.ones((2, length), bool))
        for length in (100, 500)
    ]
    assert values == pytest.approx([math.exp(0.02), math.exp(0.004)])


def test_moss_perplexity_with_means_over_prompt_and_response():
    # Means -1 and -3 over the mask, response lengths 2 and 6: exp(4 / 8).
    log_probs = np.array([[-1.0, -1.0, -1.0], [-2.0, -4.0, np.nan]])
    where = np.array([[True, True, True], [True, True, False]])
    assert moss_perplexity(log_probs, where=where, lengths=[2, 6]) == pytest.approx(math.exp(0.5))
    with pytest.raises(ValueError, match="lengths must be"):
        moss_perplexity(log_probs, where=where, lengths=[2])
    with pytest.raises(ValueError, match="every response is empty"):
        moss_perplexity(log_probs, where=where, lengths=[0, 0])


def test_sequence_kl_against_a_loop(batch):
    log_probs, ref_log_probs, where = batch
    pairs = zip(_responses(log_probs, where), _responses(ref_log_probs, where), strict=True)
    k1, k3 = [], []
    for new, ref in pairs:
        differences = [p - q for p, q in zip(new, ref, strict=True)]
        k1.append(sum(differences))
        k3.append(sum(math.exp(-d) - 1 + d for d in differences))
    arguments = (log_probs, ref_log_probs)
    np.testing.assert_allclose(sequence_kl(*arguments, where=where), k1, atol=1e-12)
    np.testing.assert_allclose(
        sequence_kl(*arguments, where=where, estimator="k3"), k3, rtol=1e-9, atol=1e-12
    )
    tokens = where.sum()
    assert kl_statistics(*arguments, where=where) == pytest.approx(
        {
            "policy/kl_ref": sum(k1) / tokens,
            "policy/kl_ref_sequence": sum(k1) / 6,
            "policy/kl_ref_k3": sum(k3) / tokens,
            "policy/kl_ref_sequence_k3": sum(k3) / 6,
        }
    )


def test_kl_by_hand():
    # d = ln 2, ln 2 | -ln 2: k1 = 2 ln 2 | -ln 2, k3 per token = ½ - 1 + ln 2 and 2 - 1 - ln 2.
    log_probs = np.log([[0.5, 0.5], [0.25, 1.0]])
    ref_log_probs = np.log([[0.25, 0.25], [0.5, 1.0]])
    where = np.array([[True, True], [True, False]])
    result = kl_statistics(log_probs, ref_log_probs, where=where)
    ln2 = math.log(2)
    assert result["policy/kl_ref"] == pytest.approx(ln2 / 3)
    assert result["policy/kl_ref_sequence"] == pytest.approx(ln2 / 2)
    assert result["policy/kl_ref_k3"] == pytest.approx((2 * (ln2 - 0.5) + 1 - ln2) / 3)
    assert result["policy/kl_ref_sequence_k3"] == pytest.approx((2 * (ln2 - 0.5) + 1 - ln2) / 2)


def test_kl_of_equal_policies_is_exactly_zero(batch):
    log_probs, _, where = batch
    assert set(kl_statistics(log_probs, log_probs, where=where).values()) == {0.0}


def test_k3_keeps_its_digits_for_tiny_differences():
    # exp(-d) - 1 + d loses all digits here; expm1 keeps d²/2 = 5e-19.
    log_probs = np.full((1, 1), 1e-9)
    where = np.ones((1, 1), bool)
    value = sequence_kl(log_probs, np.zeros((1, 1)), where=where, estimator="k3")
    np.testing.assert_allclose(value, 5e-19, rtol=1e-3)


def test_both_estimators_agree_with_the_exact_kl_on_many_samples():
    rng = np.random.default_rng(2)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    exact = float((p * np.log(p / q)).sum())
    tokens = rng.choice(3, size=(20_000, 4), p=p)
    result = kl_statistics(np.log(p)[tokens], np.log(q)[tokens], where=np.ones((20_000, 4), bool))
    assert result["policy/kl_ref"] == pytest.approx(exact, abs=0.01)
    assert result["policy/kl_ref_k3"] == pytest.approx(exact, abs=0.01)
    assert result["policy/kl_ref_sequence"] == pytest.approx(4 * exact, abs=0.04)


def test_padding_side_and_width_change_nothing(batch):
    log_probs, ref_log_probs, where = batch
    fill = np.full((6, 3), np.nan, np.float32)
    off = np.zeros((6, 3), bool)
    for wide in (
        [
            np.hstack([x, pad])
            for x, pad in ((log_probs, fill), (ref_log_probs, fill), (where, off))
        ],
        [
            np.hstack([pad, x])
            for x, pad in ((log_probs, fill), (ref_log_probs, fill), (where, off))
        ],
    ):
        assert kl_statistics(wide[0], wide[1], where=wide[2]) == pytest.approx(
            kl_statistics(log_probs, ref_log_probs, where=where)
        )
        for function in (response_perplexity, moss_perplexity):
            assert function(wide[0], where=wide[2]) == pytest.approx(
                function(log_probs, where=where)
            )


def test_nan_under_the_mask_is_not_hidden(batch):
    log_probs, ref_log_probs, where = batch
    log_probs[tuple(np.argwhere(where)[0])] = np.nan
    assert math.isnan(response_perplexity(log_probs, where=where))
    assert math.isnan(moss_perplexity(log_probs, where=where))
    assert math.isnan(kl_statistics(log_probs, ref_log_probs, where=where)["policy/kl_ref"])


def test_shapes_masks_and_names_are_checked():
    ones, mask = np.ones((2, 3)), np.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        response_perplexity(ones, where=mask[:, :2])
    with pytest.raises(ValueError, match=r"must be \[N, T\]"):
        response_perplexity(ones[0], where=mask[0])
    with pytest.raises(ValueError, match="where must be boolean, got float64"):
        moss_perplexity(ones, where=ones)
    with pytest.raises(ValueError, match="False everywhere"):
        response_perplexity(ones, where=~mask)
    with pytest.raises(ValueError, match="ref_log_probs"):
        sequence_kl(ones, ones[:, :1], where=mask)
    with pytest.raises(ValueError, match="'k1' or 'k3', got 'k2'"):
        sequence_kl(ones, ones, where=mask, estimator="k2")
