"""What holds for every loss: right, compilable, batchable, unreduced, safe under its mask."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from tests.losses.cases import CASES, IDS
from tests.losses.harness import (
    BATCH,
    SIZES,
    as_jax,
    draw,
    draw_extreme,
    value_and_gradients,
    weights_like,
)

# Checked on their own: a container and its operations, and a function that draws at random.
ELSEWHERE = {"RunningMoments", "update_moments", "merge_moments", "hindsight_visible"}
# What needs no paper: masked reductions, and log-probabilities.
DEFINITIONS = {
    "last_token_mask",
    "masked_fill",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "select_log_probs",
    "sequence_log_prob",
    "token_log_probs",
}


def cases(condition=lambda case: True):
    chosen = [(i, case) for i, case in zip(IDS, CASES, strict=True) if condition(case)]
    return pytest.mark.parametrize("case", [c for _, c in chosen], ids=[i for i, _ in chosen])


def has_time(case):
    return any("T" in spec.split(":")[1] for spec in case.inputs.values())


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def test_the_table_is_complete():
    assert {case.name for case in CASES} | ELSEWHERE == set(losses.__all__)


@cases()
def test_agrees_with_the_oracle(case):
    for seed in (0, 1):
        arrays = draw(case, seed)
        out, _ = value_and_gradients(case, as_jax(arrays))
        expected = case.expected(arrays)
        assert out.shape == expected.shape
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@cases()
def test_compiled_equals_eager_and_vmap_equals_batch(case):
    arrays = as_jax(draw(case, 2))
    eager = case(arrays)
    compiled, _ = value_and_gradients(case, arrays)
    np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)
    if any(spec.endswith("-") for spec in case.inputs.values()):
        return  # scalars have no batch axis
    batched = jax.vmap(case.__call__)(arrays)
    if case.level == "whole":
        eager = jnp.stack([case({k: v[i] for k, v in arrays.items()}) for i in range(BATCH)])
    np.testing.assert_allclose(batched, eager, rtol=1e-5, atol=1e-6)


@cases()
def test_gradient_reaches_the_differentiated_and_nothing_else(case):
    _, gradients = value_and_gradients(case, as_jax(draw(case, 3)))
    for name, gradient in gradients.items():
        assert np.any(gradient != 0) == (name in case.differentiated), name


@cases(lambda case: case.differentiated)
def test_gradient_agrees_with_finite_differences(case):
    with jax.enable_x64(True):
        arrays = as_jax(draw(case, 4), jnp.float64)
        out, gradients = value_and_gradients(case, arrays)
        rng = np.random.default_rng(6)
        for name in case.differentiated:
            direction = rng.normal(size=arrays[name].shape)
            ahead, behind = (
                value_and_gradients(case, {**arrays, name: arrays[name] + step * direction})[0]
                for step in (1e-6, -1e-6)
            )
            slope = np.sum((ahead - behind) / 2e-6 * weights_like(out))
            found = np.sum(gradients[name] * direction)
            np.testing.assert_allclose(found, slope, rtol=1e-6, atol=1e-7)


@cases(lambda case: case.masks)
@pytest.mark.parametrize("filler", [np.nan, np.inf, -np.inf])
def test_values_under_the_mask_change_nothing(case, filler):
    clean = draw(case, 7)
    dirty = dict(clean)
    for name in case.masks:
        bad = filler if np.issubdtype(clean[name].dtype, np.floating) else 99
        dirty[name] = np.where(case.cover(name, clean), clean[name], bad)
        dirty[name] = dirty[name].astype(clean[name].dtype)
    wanted, wanted_gradients = value_and_gradients(case, as_jax(clean))
    found, found_gradients = value_and_gradients(case, as_jax(dirty))
    np.testing.assert_array_equal(found, wanted)
    if np.isnan(filler):  # the compiler turns x · mask into a choice, which hides NaN · 0
        np.testing.assert_allclose(case(as_jax(dirty)), wanted, rtol=1e-5, atol=1e-6)
    for name, gradient in found_gradients.items():
        np.testing.assert_array_equal(gradient, wanted_gradients[name], err_msg=name)
        if name in case.masks:
            assert not np.any(gradient[~case.cover(name, clean)]), name


@pytest.mark.slow
@cases()
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stays_finite(case, dtype):
    nothing_real = {
        k: np.zeros_like(v) if case.inputs[k].startswith("mask") else v
        for k, v in draw(case, 8).items()
    }
    situations = [draw_extreme(case, 8), draw_extreme(case, 9), nothing_real]
    if has_time(case) and case.level != "element":
        situations.append(draw_extreme(case, 8, {**SIZES, "T": 1}))
    for arrays in situations:
        out, gradients = value_and_gradients(case, as_jax(arrays, dtype))
        assert np.all(np.isfinite(out.astype(np.float32)))
        for name, gradient in gradients.items():
            assert np.all(np.isfinite(gradient.astype(np.float32))), name


@cases()
def test_refuses_wrong_shapes_and_integers(case):
    arrays = as_jax(draw(case, 9))
    for name in case.floats():
        with pytest.raises(AssertionError):
            case({**arrays, name: arrays[name].astype(jnp.int32)})
    for name in arrays if len(arrays) > 1 and not case.name.startswith("adaptive") else ():
        with pytest.raises(AssertionError):
            case({**arrays, name: arrays[name][:-1]})


@cases(lambda case: case.level == "element")
def test_positions_do_not_touch_each_other(case):
    clean = as_jax(draw(case, 10))
    dirty = {k: v.at[0].set(jnp.nan) if is_float(v) else v for k, v in clean.items()}
    found, _ = value_and_gradients(case, dirty)
    wanted, _ = value_and_gradients(case, clean)
    np.testing.assert_array_equal(found[1:], wanted[1:])


@pytest.mark.parametrize("name", sorted(set(losses.__all__) - {"RunningMoments"}))
def test_docstring_tells_what_a_reader_needs(name):
    text = inspect.getdoc(getattr(losses, name))
    for part in ("\n\n    ", "\n\nArgs:\n", "\n\nRaises:\n", "\n\n>>> "):
        assert part in text, part  # the second begins an equation
    returns = text.split("\n\nReturns:\n")[1].split("\n\n")[0]
    assert re.search(r"\[|same shape|scalars|without the reduced axes", returns), "no shape"
    assert "\nSource: " in text or name in DEFINITIONS, "no source"


@cases()
def test_docstring_says_what_is_constant(case):
    text = inspect.getdoc(getattr(losses, case.name))
    if is_float(case(as_jax(draw(case, 0)))):
        returns = text.split("\nReturns:\n")[1].split("\nRaises:")[0]
        assert ("constant" in returns) == (not case.differentiated)
