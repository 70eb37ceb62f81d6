"""Several episodes in one row: with a gap between them, or back to back with segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses

LENGTHS = (3, 1, 4)
RNG = np.random.default_rng(4)
EPISODES = [RNG.normal(size=(2, n)).astype(np.float32) for n in LENGTHS]  # rewards and values
AHEAD = np.float32(0.7)  # after the last episode, which was cut off
RATES = {"discount": 0.9}
FUNCTIONS = {
    "rewards_to_go": lambda r, v, **s: losses.rewards_to_go(r, **RATES, **s),
    "td_errors": lambda r, v, **s: losses.td_errors(r, v, **RATES, **s),
    "k_step_returns": lambda r, v, **s: losses.k_step_returns(r, v, k=2, **RATES, **s),
    "k_step_advantages": lambda r, v, **s: losses.k_step_advantages(r, v, k=3, **RATES, **s),
    "gae": lambda r, v, **s: losses.gae(r, v, lambda_=0.8, **RATES, **s),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def row(gap):
    """The episodes in a row with `gap` masked tokens around each: numbers, mask and segments."""
    hole = np.full((2, gap), np.nan, np.float32)
    parts, segments = [hole], [np.zeros(gap)]
    for i, episode in enumerate(EPISODES):
        parts += [episode, hole]
        segments += [np.full(episode.shape[1], i + 1), np.zeros(gap)]
    segments = np.concatenate(segments).astype(np.int32)
    (rewards, values) = np.concatenate(parts, axis=1)
    return (
        jnp.asarray(rewards),
        jnp.asarray(values),
        jnp.asarray(segments > 0),
        jnp.asarray(segments),
    )


def alone(function, bootstrap):
    """Each episode in a row of its own, and what came out, in one array."""
    out = []
    for i, (rewards, values) in enumerate(EPISODES):
        ahead = bootstrap if i == len(EPISODES) - 1 else 0.0
        where = jnp.ones(rewards.shape, bool)
        out.append(function(rewards, values, where=where, bootstrap=jnp.float32(ahead)))
    return np.concatenate(out)


@functions
@pytest.mark.parametrize("gap", [0, 1, 2])
def test_packed_episodes_are_those_of_rows_of_their_own(name, gap):
    rewards, values, where, segments = row(gap)
    function = FUNCTIONS[name]
    found = jax.jit(function)(
        rewards, values, where=where, segments=segments, bootstrap=jnp.asarray(AHEAD)
    )
    np.testing.assert_allclose(found[where], alone(function, AHEAD), rtol=1e-5, atol=1e-6)
    assert not np.any(found[~where])
    if gap:  # what is masked between them is enough
        found = function(rewards, values, where=where, bootstrap=jnp.asarray(AHEAD))
        np.testing.assert_allclose(found[where], alone(function, AHEAD), rtol=1e-5, atol=1e-6)
    else:
        joined = function(rewards, values, where=where, bootstrap=jnp.asarray(AHEAD))
        assert not np.allclose(found, joined)  # without segments they are one episode


def test_rolling_sums_and_last_tokens_of_packed_episodes():
    for gap in (0, 2):
        rewards, _, where, segments = row(gap)
        found = losses.rolling_discounted_sum(rewards, discount=0.9, where=where, segments=segments)
        alone = [
            losses.rolling_discounted_sum(r, discount=0.9, where=jnp.ones(r.shape, bool))
            for r, _ in EPISODES
        ]
        np.testing.assert_allclose(found[where], np.concatenate(alone), rtol=1e-6)
        last = losses.last_token_mask(where, segments=segments)
        np.testing.assert_array_equal(np.flatnonzero(last[where]), np.cumsum(LENGTHS) - 1)
        assert losses.last_token_mask(where).sum() == 1


@functions
def test_nan_of_one_episode_stays_there(name):
    rewards, values, where, segments = row(0)
    dirty = rewards.at[LENGTHS[0]].set(jnp.nan)
    found = FUNCTIONS[name](dirty, values, where=where, segments=segments)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found)), [LENGTHS[0]])


def test_segments_in_a_batch_and_under_vmap():
    segments = jnp.array([[1, 1, 2, 2], [1, 2, 2, 0], [5, 5, 5, 5]])
    where, ones = segments > 0, jnp.ones((3, 4))
    wanted = [[2, 1, 2, 1], [1, 2, 1, 0], [4, 3, 2, 1]]

    def togo(rewards, where, segments):
        return losses.rewards_to_go(rewards, discount=1.0, where=where, segments=segments)

    np.testing.assert_array_equal(togo(ones, where, segments), wanted)
    np.testing.assert_array_equal(jax.vmap(togo)(ones, where, segments), wanted)
    with pytest.raises(AssertionError, match=r"segments is float32.*must be integer"):
        togo(ones, where, segments.astype(jnp.float32))
    with pytest.raises(AssertionError, match=r"shapes differ.*segments"):
        togo(ones, where, segments[:, :3])


def test_the_bootstrap_belongs_to_the_last_episode():
    zeros, where = jnp.zeros(4), jnp.array([True, True, False, True])
    settings = {"discount": 1.0, "where": where, "bootstrap": jnp.float32(1.0)}
    for found in (
        losses.gae(zeros, zeros, lambda_=1.0, **settings),
        losses.td_errors(zeros, zeros, **settings),
        losses.rewards_to_go(zeros, **settings),
        losses.k_step_returns(zeros, zeros, k=4, **settings),
        losses.k_step_advantages(zeros, zeros, k=4, **settings),
    ):
        np.testing.assert_array_equal(found, [0, 0, 0, 1])
    assert losses.total_return(zeros, **settings) == 1
