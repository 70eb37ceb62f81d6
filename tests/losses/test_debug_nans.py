"""`jax_debug_nans` finds the NaN of the user and none of ours: eager, compiled, or with jit off."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from tests.losses.cases import CASES, IDS
from tests.losses.harness import as_jax, draw, weights_like

MASKED = [(i, case) for i, case in zip(IDS, CASES, strict=True) if case.masks]


def with_nan_under_the_mask(case):
    """Drawn inputs; what a mask covers is NaN, or no id that a table has."""
    arrays = draw(case, 11)
    for name in case.masks:
        bad = np.nan if np.issubdtype(arrays[name].dtype, np.floating) else 99
        covered = np.where(case.cover(name, arrays), arrays[name], bad)
        arrays[name] = covered.astype(arrays[name].dtype)
    return as_jax(arrays)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compiled", "jit off"])
@pytest.mark.parametrize("case", [c for _, c in MASKED], ids=[i for i, _ in MASKED])
def test_nan_under_the_mask_raises_no_alarm(case, mode):
    arrays = with_nan_under_the_mask(case)
    floats = {k: arrays.pop(k) for k in case.floats()}

    def weighted_sum(floats):
        out = case({**floats, **arrays})
        return jnp.sum(out * weights_like(out).astype(np.float32))

    function = jax.value_and_grad(weighted_sum)
    if jnp.issubdtype(case({**floats, **arrays}).dtype, jnp.bool_):
        function = lambda floats: case({**floats, **arrays})  # noqa: E731
    if mode == "compiled":
        function = jax.jit(function)
    with jax.debug_nans(True), jax.disable_jit() if mode == "jit off" else contextlib.nullcontext():
        function(floats)


@pytest.mark.parametrize("off", [False, True])
def test_moments_of_padded_values_raise_no_alarm(off):
    values = jnp.array([1.0, np.nan], jnp.bfloat16)
    with jax.debug_nans(True), jax.disable_jit(off):
        moments = losses.update_moments(
            losses.RunningMoments.zeros(), values, where=jnp.array([True, False])
        )
    assert moments.count == 1


@pytest.mark.parametrize("off", [False, True])
def test_a_real_nan_is_found(off):
    x, where = jnp.array([1.0, np.nan, 2.0]), jnp.ones(3, bool)
    with jax.debug_nans(True), jax.disable_jit(off), pytest.raises(FloatingPointError):
        losses.gae(x, x, discount=1.0, lambda_=0.5, where=where)
