"""What every loss says to arguments that it does not take: which one, and what to pass instead."""

import re

import jax.numpy as jnp
import pytest

from rlhf_jax import losses
from tests.losses.cases import CASES, IDS
from tests.losses.harness import as_jax, draw

# Keyword arguments that are arrays by their docstring.
ARRAYS = {"bootstrap", "other_where", "segments", "where"}


def cases():
    return pytest.mark.parametrize("case", CASES, ids=IDS)


def refusal(case, arrays, **settings):
    function = case.call or getattr(losses, case.name)
    with pytest.raises(AssertionError) as raised:
        function(**{**arrays, **case.settings, **settings})
    message = str(raised.value)
    assert "\n" not in message
    return message


@cases()
def test_what_is_refused_is_named(case):
    arrays = as_jax(draw(case, 0))
    for name, x in arrays.items():
        word = rf"\b{name}\b"
        for wrong in (x.tolist(), 1.0, None):
            if name == "margin" or (wrong is None and name in ARRAYS):
                continue  # a number will do, or nothing
            message = refusal(case, {**arrays, name: wrong})
            assert re.match(rf"{name} is (a float|a list|None), but must be an array", message)
        if jnp.issubdtype(x.dtype, jnp.floating):
            message = refusal(case, {**arrays, name: x.astype(jnp.int32)})
            assert re.match(rf"{name} is int32\[.*\], but must be float: .*astype", message)
        if x.dtype == bool:
            for dtype in (jnp.int32, jnp.float32):
                message = refusal(case, {**arrays, name: x.astype(dtype)})
                assert re.match(rf"{name} is .*\], but must be boolean: cast to bool", message)
        if len(arrays) > 1 and x.ndim:
            message = refusal(case, {**arrays, name: x[:-1]})
            assert re.search(word, message) and "shape" in message


def test_moments_are_refused_by_name_too():
    zeros = losses.RunningMoments.zeros()
    with pytest.raises(AssertionError, match="values is a list"):
        losses.update_moments(zeros, [1.0])
    with pytest.raises(AssertionError, match=r"where is float32.*cast to bool"):
        losses.update_moments(zeros, jnp.ones(2), where=jnp.ones(2))
