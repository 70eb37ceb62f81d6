"""Properties over drawn masks and numbers. Shapes come from few sizes: each one compiles."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from rlhf_jax import losses
from tests.references import alignment, returns, tokens

few = settings(max_examples=25, deadline=None, derandomize=True)
numbers = st.floats(-5, 5, width=32)
sizes = st.sampled_from([1, 4, 7])
rates = st.sampled_from([0.0, 0.5, 0.9, 1.0])


@st.composite
def responses(draw):
    """Rewards, values, and where the real tokens stand; possibly nowhere."""
    size = draw(sizes)
    rewards, values = (draw(hnp.arrays(np.float32, size, elements=numbers)) for _ in range(2))
    start = draw(st.integers(0, size))
    end = draw(st.integers(start, size))
    position = np.arange(size)
    return rewards, values, (position >= start) & (position < end)


@st.composite
def masked_numbers(draw):
    size = draw(sizes)
    x = draw(hnp.arrays(np.float32, size, elements=numbers))
    return x, draw(hnp.arrays(bool, size))


gae = jax.jit(losses.gae)
k_step = jax.jit(losses.k_step_returns, static_argnames="k")
whiten = jax.jit(losses.masked_whiten)
mean = jax.jit(losses.masked_mean)
figa = jax.jit(losses.figa_weights)
k3 = jax.jit(losses.kl_estimate, static_argnames="estimator")
ranking = jax.jit(losses.plackett_luce_loss)
pairwise = jax.jit(losses.pairwise_ranking_loss)


@few
@given(responses(), rates, rates, numbers)
def test_gae_equals_its_definition(response, discount, lambda_, ahead):
    rewards, values, where = response
    found = gae(
        rewards,
        values,
        discount=discount,
        lambda_=lambda_,
        where=where,
        bootstrap=jnp.float32(ahead),
    )
    wanted = returns.gae(rewards, values, where, discount, lambda_, ahead)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@few
@given(responses(), rates, st.sampled_from([1, 2, 5]))
def test_k_step_returns_equal_their_definition(response, discount, k):
    rewards, values, where = response
    found = k_step(rewards, values, discount=discount, k=k, where=where)
    wanted = returns.k_step_returns(rewards, values, where, discount, k)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@few
@given(masked_numbers())
def test_masked_statistics_are_those_of_the_compacted_array(drawn):
    x, where = drawn
    compact = x[where].astype(np.float64)
    np.testing.assert_allclose(
        mean(x, where=where), compact.mean() if compact.size else 0, atol=1e-5
    )
    white = np.asarray(whiten(x, where=where))
    assert not np.any(white[~where])
    if compact.size:
        wanted = (compact - compact.mean()) / np.sqrt(compact.var() + 1e-8)
        # A spread of a few units in the last place is rounding in float32, not signal.
        if compact.std() == 0 or compact.std() > 1e-3:
            np.testing.assert_allclose(white[where], wanted, rtol=1e-3, atol=2e-3)


@few
@given(hnp.arrays(np.float32, 7, elements=st.floats(-80, 80, width=32)))
def test_k3_is_never_negative(log_ratio):
    assert np.all(k3(jnp.zeros(7), log_ratio, estimator="k3") >= 0)
    tiny = log_ratio * np.float32(1e-7)
    assert np.all(k3(jnp.zeros(7), tiny, estimator="k3") >= 0)


@few
@given(
    st.lists(st.integers(0, 2), min_size=5, max_size=5),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    hnp.arrays(bool, 5),
    hnp.arrays(bool, 4),
)
def test_figa_agrees_with_a_walk_through_all_shortest_edits(a, b, where, other_where):
    found = figa(
        jnp.array(a),
        jnp.array(b),
        weight=1.0,
        where=jnp.array(where),
        other_where=jnp.array(other_where),
    )
    np.testing.assert_array_equal(found, alignment.figa_weights(a, b, where, other_where, 1.0))


@few
@given(hnp.arrays(np.float32, 4, elements=numbers), st.permutations(range(4)))
def test_a_ranking_loss_does_not_see_the_order_in_which_candidates_are_listed(rewards, order):
    ranks, there = np.array([0, 1, 1, 2], np.int32), np.ones(4, bool)
    order = np.array(order)
    found = pairwise(rewards[order], ranks[order], where=there)
    np.testing.assert_allclose(found, pairwise(rewards, ranks, where=there), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@few
@given(hnp.arrays(np.float32, 4, elements=numbers), hnp.arrays(bool, 4))
def test_plackett_luce_of_those_who_are_there(rewards, where):
    compact = jnp.asarray(rewards[where])
    wanted = losses.plackett_luce_loss(compact, where=jnp.ones(compact.shape, bool))
    np.testing.assert_allclose(ranking(rewards, where=where), wanted, rtol=1e-4, atol=1e-5)


@few
@given(hnp.arrays(np.float32, 6, elements=numbers), st.integers(0, 6), st.integers(0, 6))
def test_moments_of_three_batches_are_those_of_the_concatenation(values, a, b):
    first, last = min(a, b), max(a, b)
    moments = losses.RunningMoments.zeros()
    for low, high in ((0, first), (first, last), (last, 6)):
        where = (np.arange(6) >= low) & (np.arange(6) < high)
        moments = losses.update_moments(moments, jnp.asarray(values), where=jnp.asarray(where))
    assert moments.count == 6
    np.testing.assert_allclose(moments.mean, values.mean(dtype=np.float64), atol=1e-5)
    np.testing.assert_allclose(moments.var, values.var(dtype=np.float64), rtol=1e-3, atol=1e-4)


@few
@given(masked_numbers())
def test_last_token_is_the_last_real_one(drawn):
    _, where = drawn
    found = losses.last_token_mask(jnp.asarray(where))
    np.testing.assert_array_equal(found, tokens.last_token_mask(where))


@pytest.mark.slow
def test_absent_candidates_change_nothing():
    rng = np.random.default_rng(2)
    log_probs = -rng.uniform(0.1, 2, (4, 3))
    where = np.ones((4, 3), bool)
    where[2:] = False
    for name, scores, weights in (
        ("rrhf_loss", [3.0, 2.0, 9.0, 0.5], {"rank_weight": 1.0}),  # the best score is of no one
        ("pro_loss", [3.0, 2.0, 1.0, 0.5], {"sft_weight": 0.1}),
    ):
        loss = getattr(losses, name)
        arrays = jnp.asarray(log_probs, jnp.float32), jnp.asarray(scores)
        all_four = loss(*arrays, where=jnp.asarray(where), **weights)
        first_two = loss(*(x[:2] for x in arrays), where=jnp.asarray(where[:2]), **weights)
        np.testing.assert_allclose(all_four, first_two, rtol=1e-6)


@pytest.mark.slow
def test_hidden_tokens_of_hindsight():
    where = jnp.asarray(np.arange(400)[None] >= np.array([[0], [100]]))
    visible = losses.hindsight_visible(jax.random.key(0), where, max_rate=0.5)
    assert not bool(jnp.any(visible & ~where))
    assert bool(visible[0, 0]) and bool(visible[1, 100])  # the first real token stays
    hidden = 1 - visible.sum(-1) / where.sum(-1)
    assert bool(jnp.all((hidden > 0) & (hidden < 0.6)))
    # Each row draws its own rate: 0.144 apart as U(0, 0.5) is; with one for all, √(pq/400) ≤ 0.025.
    many = losses.hindsight_visible(jax.random.key(2), jnp.ones((64, 400), bool), max_rate=0.5)
    assert 0.1 < float(jnp.std(1 - many.mean(-1))) < 0.2
    nothing = losses.hindsight_visible(jax.random.key(1), where, max_rate=0.0)
    np.testing.assert_array_equal(nothing, where)
