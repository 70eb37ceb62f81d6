"""What a dtype promises: sums in float32 for bfloat16, and no type that comes from nowhere."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from tests.losses.cases import CASES, IDS
from tests.losses.harness import SIZES, as_jax, draw

LONG = {**SIZES, "T": 300}


def cases(condition=lambda case: True):
    chosen = [(i, case) for i, case in zip(IDS, CASES, strict=True) if condition(case)]
    return pytest.mark.parametrize("case", [c for _, c in chosen], ids=[i for i, _ in chosen])


@cases(lambda case: case.level != "element" and case.floats())
def test_bfloat16_is_summed_in_float32(case):
    """One rounding at the end is all that it may differ by from float32 on the same numbers."""
    arrays = as_jax(draw(case, 12, LONG), jnp.bfloat16)
    for name in case.floats():
        if case.inputs[name].startswith("real"):
            arrays[name] = arrays[name] + 1  # sums grow: a count in bfloat16 stops at 256
    wide = {k: v.astype(jnp.float32) if k in case.floats() else v for k, v in arrays.items()}
    found, wanted = case(arrays), case(wide)
    once = wanted.astype(found.dtype) if found.dtype == jnp.bfloat16 else wanted
    np.testing.assert_allclose(
        found.astype(jnp.float32), once.astype(jnp.float32), rtol=2**-7, atol=1e-6
    )


@pytest.mark.slow
@cases()
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("setting", ["64 bits", "strict promotion"])
def test_the_dtype_is_that_of_the_inputs(case, setting, dtype):
    arrays = as_jax(draw(case, 13), dtype)
    wanted = case(arrays).dtype
    strict = jax.numpy_dtype_promotion("strict")
    with jax.enable_x64(True) if setting == "64 bits" else strict:
        found = case(arrays)
        jax.eval_shape(case.__call__, arrays)
    assert found.dtype == wanted


def test_long_sums_of_bfloat16_by_hand():
    ones, where = jnp.ones(512, jnp.bfloat16), jnp.ones(512, bool)
    zeros = jnp.zeros_like(ones)
    settings = {"discount": 1.0, "where": where}
    for found in (
        losses.rewards_to_go(ones, **settings)[0],
        losses.total_return(ones, **settings),
        losses.gae(ones, zeros, lambda_=1.0, **settings)[0],
        losses.k_step_returns(ones, zeros, k=512, **settings)[0],
        losses.k_step_advantages(ones, zeros, k=512, **settings)[0],
        losses.rolling_discounted_sum(ones, **settings)[-1],
    ):
        assert found.dtype == jnp.bfloat16
        assert found == 512  # 256 + 1 is 256 in bfloat16


@pytest.mark.parametrize("x64", [False, True])
def test_weights_of_figa_are_float32(x64):
    tokens, real = jnp.array([1, 2]), jnp.ones(2, bool)
    with jax.enable_x64(True) if x64 else contextlib.nullcontext():
        found = losses.figa_weights(tokens, tokens, weight=0.5, where=real, other_where=real)
    assert found.dtype == jnp.float32
