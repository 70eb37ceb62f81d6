"""Running moments: the same numbers whatever the order, the sizes and the padding of batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlhf_jax.losses import (
    RunningMoments,
    last_token_mask,
    merge_moments,
    merge_moments_across,
    normalize_rewards,
    rolling_discounted_sum,
    scale_rewards,
    update_moments,
)

SCORES = np.random.default_rng(0).normal(3.0, 2.0, 12).astype(np.float32)


def moments_of(*batches):
    moments = RunningMoments.zeros()
    for batch in batches:
        moments = update_moments(moments, jnp.asarray(batch))
    return moments


def check(moments, values):
    assert moments.count == len(values)
    np.testing.assert_allclose(moments.mean, np.mean(values), rtol=1e-6)
    np.testing.assert_allclose(moments.std, np.std(values), rtol=1e-6)


def test_any_split_gives_the_moments_of_the_concatenation():
    for cuts in ([4, 8], [1, 3, 7], [0, 12], [6]):
        check(moments_of(*np.split(SCORES, cuts)), SCORES)


def test_merging_two_halves_is_updating_with_both():
    a, b = moments_of(SCORES[:5]), moments_of(SCORES[5:])
    check(merge_moments(a, b), SCORES)
    check(merge_moments(b, a), SCORES)


def test_merging_with_nothing_changes_nothing():
    some = moments_of(SCORES)
    for merged in (merge_moments(some, moments_of()), merge_moments(moments_of(), some)):
        np.testing.assert_array_equal(jnp.stack(merged), jnp.stack(some))


def test_a_large_offset_costs_no_digits():
    # Sums of squares would lose everything here: 4096² = 2^24 is where float32 stops counting.
    values = (4096 + np.arange(8)).astype(np.float32)
    np.testing.assert_allclose(moments_of(values[:3], values[3:]).std, np.std(values), rtol=1e-5)


def test_padding_does_not_count():
    padded = jnp.array([[1.0, 5.0, np.nan], [3.0, np.inf, np.nan]])
    where = jnp.array([[True, True, False], [True, False, False]])
    moments = jax.jit(update_moments)(RunningMoments.zeros(), padded, where=where)
    check(moments, np.array([1.0, 5.0, 3.0]))
    nothing = update_moments(moments, padded, where=jnp.zeros((2, 3), bool))
    np.testing.assert_array_equal(jnp.stack(nothing), jnp.stack(moments))


def test_scores_in_bfloat16_are_counted_in_float32():
    moments = moments_of(jnp.array([256.0, 258.0], jnp.bfloat16))
    assert all(value.dtype == jnp.float32 for value in moments)
    assert moments.mean == 257  # no bfloat16 number
    assert moments.std == 1


def test_no_gradient():
    def spread(values):
        return update_moments(RunningMoments.zeros(), values).m2

    assert not np.any(jax.grad(spread)(jnp.asarray(SCORES)))


def test_before_any_spread_rewards_are_left_unscaled():
    first = moments_of([0.7])
    np.testing.assert_allclose(scale_rewards(jnp.array([0.7]), first), [0.7])
    np.testing.assert_allclose(normalize_rewards(jnp.array([0.7]), first, clip=0.3), [0.0])


def test_two_readings_of_reward_scaling_agree_when_the_reward_comes_last():
    where = jnp.arange(4)[None] < jnp.array([[4], [2], [3]])
    scores = jnp.array([1.0, -2.0, 0.5])
    rewards = jnp.where(last_token_mask(where), jnp.broadcast_to(scores[:, None], (3, 4)), 0.0)
    sums = rolling_discounted_sum(rewards, discount=1.0, where=where)
    at_end = update_moments(RunningMoments.zeros(), sums, where=last_token_mask(where))
    np.testing.assert_allclose(at_end.std, moments_of(scores).std, rtol=1e-6)
    everywhere = update_moments(RunningMoments.zeros(), sums, where=where)
    assert everywhere.std < at_end.std  # the zeros on the way count too


def test_history_decides_not_the_batch():
    history = moments_of([0.0, 4.0], [10.0, 10.0])  # mean 6, variance (36 + 4 + 16 + 16)/4 = 18
    found = normalize_rewards(jnp.array([10.0]), history, clip=5.0)
    np.testing.assert_allclose(found, [4 / np.sqrt(18)], rtol=1e-6)


PARTS = np.random.default_rng(1).normal(3.0, 2.0, (8, 3)).astype(np.float32)
PRESENT = np.arange(3)[None] < np.array([[3], [1], [0], [2], [3], [3], [0], [1]])


def check_parts(moments):
    """As if one device had seen them all."""
    check(moments, PARTS[PRESENT])


def test_moments_merge_over_a_named_axis_of_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=PartitionSpec())
    def merged(values, where):
        local = update_moments(RunningMoments.zeros(), values, where=where)
        return merge_moments_across(local, axis_name="data")

    check_parts(merged(PARTS, PRESENT))


@pytest.mark.parametrize("over", ["vmap", "pmap"])
def test_a_batch_merges_over_a_named_axis_and_history_counts_once(over):
    history = moments_of([0.0, 4.0, 11.0])

    def updated(values, where):
        return update_moments(history, values, where=where, axis_name="data")

    transform = {"vmap": jax.vmap, "pmap": jax.pmap}[over]
    everywhere = transform(updated, axis_name="data")(PARTS, PRESENT)
    for i in range(8):  # every device has the same
        moments = jax.tree.map(lambda x, i=i: x[i], everywhere)
        check(moments, np.concatenate([[0.0, 4.0, 11.0], PARTS[PRESENT]]))


def test_two_named_axes_and_nothing_seen():
    def merged(values, where):
        return update_moments(
            RunningMoments.zeros(), values, where=where, axis_name=("rows", "columns")
        )

    over_both = jax.vmap(jax.vmap(merged, axis_name="columns"), axis_name="rows")
    everywhere = over_both(PARTS, PRESENT)
    check_parts(jax.tree.map(lambda x: x[3, 1], everywhere))
    nothing = over_both(PARTS, np.zeros_like(PRESENT))
    assert all(np.all(x == 0) for x in nothing)


def test_a_large_offset_costs_no_digits_across_devices_either():
    values = (4096 + np.arange(8)).astype(np.float32)[:, None]

    def updated(values):
        return update_moments(RunningMoments.zeros(), values, axis_name="data")

    moments = jax.tree.map(lambda x: x[0], jax.pmap(updated, axis_name="data")(values))
    np.testing.assert_allclose(moments.std, np.std(values), rtol=1e-5)
