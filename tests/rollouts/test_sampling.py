"""Filters on logits against loops, and the distribution of what is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rollouts import sampling
from tests import tiny

LOGITS = np.random.default_rng(0).normal(0, 2, (6, 11)).astype(np.float32)
CUT = -1e29  # what a filter removes lies below


def kept(filtered) -> list[set[int]]:
    return [{int(v) for v in np.flatnonzero(row > CUT)} for row in np.asarray(filtered)]


def test_top_k_keeps_the_k_largest_and_their_values():
    for k in (1, 3, 11, 50):
        filtered = sampling.top_k_filter(LOGITS, k)
        wanted = [set(sorted(range(11), key=lambda v, row=row: -row[v])[:k]) for row in LOGITS]
        assert kept(filtered) == wanted
        assert np.array_equal(np.where(filtered > CUT, filtered, LOGITS), LOGITS)


def test_top_k_keeps_ties():
    assert kept(sampling.top_k_filter(np.array([[1.0, 3.0, 1.0, 0.0]]), 2)) == [{0, 1, 2}]


def nucleus(row: np.ndarray, p: float) -> set[int]:
    """Takes tokens from the likeliest down until their probability reaches p."""
    probabilities = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
    chosen, mass = set(), 0.0
    for token in sorted(range(len(row)), key=lambda v: -row[v]):
        if mass >= p:
            break
        chosen.add(token)
        mass += probabilities[token]
    return chosen


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.75, 0.95, 0.9999999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    filtered = sampling.top_p_filter(LOGITS, p)
    assert kept(filtered) == [nucleus(row, p) for row in LOGITS]
    assert np.array_equal(np.where(filtered > CUT, filtered, LOGITS), LOGITS)


@pytest.mark.parametrize(
    ("shares", "p", "wanted"),
    [
        ([0.5, 0.3, 0.1, 0.1], 0.8, {0, 1}),  # in float32 .5 + .3 is a little less than .8
        ([0.3, 0.1, 0.1, 0.5], 0.8, {0, 3}),
        ([0.4, 0.3, 0.2, 0.1], 0.7, {0, 1}),
        ([0.4, 0.3, 0.2, 0.1], 0.7001, {0, 1, 2}),
        ([0.7, 0.2, 0.06, 0.04], 0.9, {0, 1}),
        ([0.7, 0.2, 0.06, 0.04], 1e-12, {0}),
    ],
)
def test_a_sum_that_rounding_alone_keeps_from_p_reaches_it(shares, p, wanted):
    logits = jnp.log(jnp.array([shares])) + 2  # logits are known up to a constant
    for call in (
        sampling.top_p_filter,
        jax.jit(sampling.top_p_filter),
        jax.jit(sampling.top_p_filter, static_argnums=1),
    ):
        assert kept(call(logits, p)) == [wanted]


@pytest.mark.parametrize("size", [3, 1000, 150_000])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_of_many_tokens_the_tolerance_is_no_more_than_rounding(size, share):
    """Of V tokens that are nearly equal k reach k / V."""
    # Powers of 2 between them: float32 tells all of them apart.
    logits = -np.arange(size, dtype=np.float32)[None] * 2.0**-20
    shares = np.exp(logits[0].astype(np.float64))
    k = max(round(share * size), 1)
    mass = float(shares[:k].sum() / shares.sum())
    number = len(kept(sampling.top_p_filter(logits, mass))[0])
    assert k - 3e-6 * size <= number <= k
    assert len(kept(sampling.top_p_filter(logits, mass + 0.9 / size))[0]) >= k


def test_half_precision_is_summed_in_float32():
    """512 tokens have two thirds, 512 the rest; in bfloat16 such a sum stops growing half-way."""
    logits = jnp.where(jnp.arange(1024) < 512, np.log(2.0), 0.0).astype(jnp.bfloat16)[None]
    for p, wanted in ((0.3, 512), (0.66, 512), (0.67, 1024), (0.99, 1024)):
        assert len(kept(sampling.top_p_filter(logits, p))[0]) == wanted


def test_top_p_after_top_k_renormalises():
    """Of 5, 4, 3 the first two have 0.91; of all eleven they have 0.55."""
    row = np.array([[5.0, 4.0, 3.0, *[2.9] * 8]], np.float32)
    both = sampling.top_p_filter(sampling.top_k_filter(row, 3), 0.9)
    assert kept(both) == [{0, 1}]
    assert len(kept(sampling.top_p_filter(row, 0.9))[0]) > 3


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    seen = np.random.default_rng(1).random(LOGITS.shape) < 0.5
    penalized = np.asarray(sampling.penalize_repetition(LOGITS, seen, 1.3))
    for row in range(LOGITS.shape[0]):
        for v in range(LOGITS.shape[1]):
            x = LOGITS[row, v]
            wanted = x if not seen[row, v] else x / 1.3 if x > 0 else x * 1.3
            np.testing.assert_allclose(penalized[row, v], wanted, rtol=1e-6)
    assert np.all(penalized[seen] < LOGITS[seen])


@functools.partial(tiny.jit, static_argnames=("temperature", "top_k", "top_p"))
def draw(key, logits, *, temperature=1.0, top_k=0, top_p=1.0):
    return sampling.sample(key, logits, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"temperature": 1.0}, 8),
        ({"temperature": 0.6}, 8),
        ({"temperature": 1.5, "top_k": 4}, 4),
        ({"temperature": 0.8, "top_p": 0.8}, 3),
    ],
)
def test_draws_follow_the_distribution(settings, allowed):
    """Chi-square of 8,192 draws; 24.3 is the 0.999 quantile for the 7 degrees of freedom of eight
    tokens, more than for fewer."""
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    heat = np.exp(logits / settings["temperature"])
    heat[allowed:] = 0
    if "top_p" in settings:
        assert nucleus(logits / settings["temperature"], settings["top_p"]) == set(range(allowed))
    expected = 8192 * heat / heat.sum()
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (8192, 8))
    counts = np.bincount(draw(jax.random.key(11), rows, **settings), minlength=8)
    assert counts[allowed:].sum() == 0
    chi_square = np.sum((counts - expected)[:allowed] ** 2 / expected[:allowed])
    assert chi_square < 24.3
    # The test has power: the same counts do not fit the logits at another temperature.
    other = np.where(heat > 0, np.exp(logits / (settings["temperature"] * 1.15)), 0)
    other = 8192 * other / other.sum()
    assert np.sum((counts - other)[:allowed] ** 2 / other[:allowed]) > 24.3


def test_same_key_same_draw_other_key_other_draw():
    rows = jnp.zeros((64, 8))
    first, again, other = (draw(jax.random.key(seed), rows) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == jnp.int32


def test_temperature_zero_is_greedy_and_ignores_the_key():
    for seed in (1, 2):
        greedy = draw(jax.random.key(seed), LOGITS, temperature=0.0, top_k=3, top_p=0.5)
        assert np.array_equal(greedy, LOGITS.argmax(-1))


def test_filters_never_give_nan_even_for_one_certain_token():
    certain = np.full((4, 8), -1e9, np.float32)
    certain[:, 3] = 1e4
    for settings in ({"top_p": 0.5}, {"top_k": 2}, {"top_k": 2, "top_p": 0.99}, {}):
        assert draw(jax.random.key(0), certain, **settings).tolist() == [3] * 4


@pytest.mark.parametrize("shape", [(6, 11), (3, 1024)])
def test_the_draw_is_that_of_categorical(shape):
    """The same tokens from the same key, by other operations."""
    logits = np.random.default_rng(1).normal(0, 2, shape).astype(np.float32)
    for seed in range(20):
        drawn = draw(jax.random.key(seed), logits, temperature=0.7, top_k=0, top_p=1.0)
        wanted = jax.random.categorical(jax.random.key(seed), logits / np.float32(0.7))
        assert np.array_equal(drawn, wanted)


def test_greedy_takes_the_first_of_equals_and_a_token_even_of_nan():
    logits = np.array([[1.0, 3.0, 3.0], [np.nan, 0.0, 1.0], [-np.inf, -np.inf, -1e30]], np.float32)
    tokens = draw(jax.random.key(0), logits, temperature=0.0, top_k=0, top_p=1.0)
    assert tokens[0] == 1
    assert 0 <= tokens[1] < 3
    assert tokens[2] == 2
