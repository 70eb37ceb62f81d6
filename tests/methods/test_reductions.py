"""Reducers: weights against loops, and what may be where nothing counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.methods import reductions
from tests import tiny

# Rows of 4, 2, 0 and 1 tokens.
WHERE = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
LOSS = np.arange(16, dtype=np.float32).reshape(4, 4) + 1


def by_loop(name: str) -> float:
    per_row = [
        [float(x) for x, real in zip(*row, strict=True) if real]
        for row in zip(LOSS, WHERE, strict=True)
    ]
    rows = [row for row in per_row if row]
    if name == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if name == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / len(rows)


@pytest.mark.parametrize("name", reductions.REDUCTIONS)
def test_reduces_as_the_loop_does(name):
    weights = reductions.reduction_weights(name, jnp.asarray(WHERE))
    assert weights.dtype == jnp.float32 and weights.shape == WHERE.shape
    tiny.close(reductions.weighted_sum(jnp.asarray(LOSS), weights), by_loop(name), 1e-5)


def test_the_three_differ():
    # Rows add up to 10, 11 and 14: 35 / 7 tokens; (10/4 + 11/2 + 14/1) / 3 rows; 35 / 3 rows.
    wanted = {"token_mean": 5.0, "sequence_mean": 22 / 3, "sequence_sum": 35 / 3}
    assert {name: by_loop(name) for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("name", reductions.REDUCTIONS)
def test_nothing_real_gives_zero(name):
    weights = reductions.reduction_weights(name, jnp.zeros((2, 3), bool))
    assert float(reductions.weighted_sum(jnp.full((2, 3), jnp.nan), weights)) == 0.0


def test_nan_under_zero_weight_is_harmless_forwards_and_backwards():
    weights = reductions.reduction_weights("token_mean", jnp.asarray(WHERE))
    poisoned = jnp.where(WHERE, LOSS, jnp.nan)
    value, grad = jax.value_and_grad(reductions.weighted_sum)(poisoned, weights)
    tiny.close(value, by_loop("token_mean"))
    tiny.close(grad, weights, 0.0)


def test_unknown_name_and_wrong_shape():
    with pytest.raises(ValueError, match="reduction='mean' is unknown; use one of"):
        reductions.reduction_weights("mean", jnp.asarray(WHERE))
    with pytest.raises(AssertionError):
        reductions.weighted_sum(jnp.zeros((2, 3)), jnp.zeros((2,)))
