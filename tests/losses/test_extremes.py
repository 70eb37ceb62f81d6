"""No finite float32 gives NaN, neither as a loss nor as a gradient; infinity it may give.

Numbers from the smallest to the largest, in all combinations of the arguments. What a function
adds up over a row is a 64th of that at most: past the largest float a sum is infinite, and where
two such sums are subtracted nothing is known.

The functions are compiled, as in training: a compiler may round x/τ − max x/τ once and not twice.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from tests.losses.cases import CASES, IDS
from tests.losses.harness import SIZES, as_jax, draw

SIZE = [1e-45, 1e-38, 1.0, 20.0, 88.0, 100.0, 1e4, 1e30, 3e38]  # the first two are subnormal
EXTREMES = np.float32([0.0, *SIZE, *(-x for x in SIZE)])
PROBABILITIES = np.float32([0.0, 1e-45, 0.5, 1.0])
ELEMENTS = len(EXTREMES) ** 4  # of all cases, so that an operation compiles once
ROWS = len(EXTREMES) ** 3 + 1000
MOMENTS = {"RunningMoments", "merge_moments", "merge_moments_across", "update_moments"}
WITHOUT_FLOATS = {"hindsight_visible"}
# Of logits past this the exponential of x/τ − max x/τ may overflow: compiled, the difference is
# rounded once and not twice.
LARGEST_LOGIT = 1e6
CHECKED = [(i, case) for i, case in zip(IDS, CASES, strict=True) if case.floats()]


def extremes_of(case, name):
    if case.inputs[name].startswith("prob"):
        return PROBABILITIES
    if case.name in ("select_log_probs", "token_log_probs"):
        return np.clip(EXTREMES, -LARGEST_LOGIT, LARGEST_LOGIT)
    return EXTREMES if case.level == "element" else np.clip(EXTREMES, -3e38 / 64, 3e38 / 64)


def combinations(case):
    """Arguments with one more leading axis: all combinations, and of rows also a mixture."""
    floats = case.floats()
    columns = np.array(list(itertools.product(*(extremes_of(case, name) for name in floats)))).T
    count = ELEMENTS if case.level == "element" else ROWS
    assert columns.shape[1] <= count
    drawn, arrays = draw(case, 0), {}
    for name, spec in case.inputs.items():
        if name not in floats:  # of rows the drawn masks and labels in turn; every element counts
            shape = () if case.level == "element" else drawn[name].shape[1:]
            rows = np.ones(1, bool) if case.level == "element" else drawn[name]
            arrays[name] = np.resize(rows, (count, *shape))
            continue
        column = columns[floats.index(name)]
        if case.level == "element":
            arrays[name] = np.resize(column, count)
            continue
        shape = tuple(SIZES[letter] for letter in spec.split(":")[1].strip("-"))
        arrays[name] = mixture(extremes_of(case, name), column, (count, *shape))
        if spec.startswith("falling"):
            arrays[name] = -np.sort(-arrays[name], axis=-1)
    return arrays


def mixture(extremes, column, shape):
    """Rows of one number each, then rows of many."""
    rows = np.random.default_rng(0).choice(extremes, shape)
    rows[: len(column)] = column.reshape(-1, *[1] * (len(shape) - 1))
    return rows


def where_nan(x):
    """Rows, or elements, with a NaN."""
    return np.isnan(np.asarray(x, np.float64)).reshape(len(x), -1).any(-1)


@pytest.mark.parametrize("case", [c for _, c in CHECKED], ids=[i for i, _ in CHECKED])
def test_finite_numbers_never_give_nan(case):
    arrays = as_jax(combinations(case))
    function = jax.vmap(case.__call__) if case.level == "whole" else case.__call__

    def total(differentiated, others):
        out = function({**differentiated, **others})
        return jnp.sum(jax.lax.convert_element_type(out, jnp.float32)), out

    differentiated = {name: arrays.pop(name) for name in case.differentiated}
    gradients, out = jax.jit(jax.grad(total, has_aux=True))(differentiated, arrays)
    for what, found in {"the value": out, **gradients}.items():
        bad = where_nan(found)
        first = int(bad.argmax())
        at = {name: x[first].tolist() for name, x in (differentiated | arrays).items()}
        assert not bad.any(), f"{what} is NaN in {bad.sum()} of {len(bad)}, first at {at}"


@pytest.mark.parametrize("seen", [True, False])
def test_moments_of_finite_numbers_are_not_nan(seen):
    """On two devices, of which the second may have seen nothing; merged with those of one row."""
    values = jnp.asarray(np.random.default_rng(1).choice(EXTREMES / 64, (200, 2, 4)))
    where = jnp.array([[True] * 4, [seen] * 4])

    @jax.vmap
    def moments_of(values):
        none = losses.RunningMoments.zeros()
        update = lambda x, m: losses.update_moments(none, x, where=m, axis_name="devices")  # noqa: E731
        both = jax.tree.map(lambda x: x[0], jax.vmap(update, axis_name="devices")(values, where))
        one = losses.update_moments(none, values[1], where=where[1])
        return both, one, losses.merge_moments(both, one)

    for moments in jax.jit(moments_of)(values):
        for number in (*moments, moments.var, moments.std, moments.std_or_one):
            assert not np.isnan(number).any()


def test_every_public_function_is_in_one_of_these_tests():
    assert {case.name for case in CASES} | MOMENTS | WITHOUT_FLOATS == set(losses.__all__)
