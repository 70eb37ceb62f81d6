"""Every loss over drawn shapes, masks and numbers, with anything in the padding, by the oracles.

Shapes come from few sizes, since each one compiles. Numbers are eighths: sums of them are exact in
float32, so that equal numbers have no spread and a tie is a tie.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from tests.losses.cases import CASES, IDS
from tests.losses.harness import BATCH, SIZES, as_jax, value_and_gradients
from tests.references import returns

# Leading axes, and the sizes of the letters: one number or token, a batch (compiled for the other
# tests already), a batch of groups.
SHAPES = [
    ((), {"T": 1, "K": 2, "V": 2, "C": 3}),
    ((BATCH,), SIZES),
    ((2, 2), {"T": 3, "K": 4, "V": 3, "C": 3}),
]
EIGHTHS = {"real": (-40, 40), "falling": (-40, 40), "log_prob": (-24, -1), "positive": (1, 24)}
INTEGERS = {"token": 1, "label": 2, "rank": 2}
few = settings(max_examples=15, deadline=None, derandomize=True)


@st.composite
def masks(draw, shape, together):
    """True anywhere, or in one run a row; possibly nowhere."""
    if not together:
        return draw(hnp.arrays(bool, shape))
    ends = draw(hnp.arrays(np.int32, (2, *shape[:-1]), elements=st.integers(0, shape[-1])))
    low, high = np.sort(ends, axis=0)[..., None]
    position = np.arange(shape[-1])
    return (position >= low) & (position < high)


@st.composite
def inputs(draw, case):
    """The number of leading axes, and the arguments; what a mask covers may be NaN or infinite."""
    lead, sizes = draw(st.sampled_from(SHAPES))
    arrays = {}
    for name, spec in case.inputs.items():
        kind, letters = spec.split(":")
        shape = () if letters == "-" else (*lead, *(sizes[letter] for letter in letters))
        if kind == "mask":
            # Returns and advantages are of responses without holes.
            together = getattr(returns, case.name, None) is case.oracle
            arrays[name] = draw(masks(shape, together))
        elif kind == "flag":
            arrays[name] = draw(hnp.arrays(bool, shape))
        elif kind in INTEGERS:
            elements = st.integers(0, INTEGERS[kind])
            arrays[name] = draw(hnp.arrays(np.int32, shape, elements=elements))
        else:
            low, high = EIGHTHS.get(kind, (1, 7))  # a probability
            eighths = draw(hnp.arrays(np.int32, shape, elements=st.integers(low, high)))
            arrays[name] = (eighths / 8).astype(np.float32)
            if kind == "falling":
                arrays[name] = -np.sort(-arrays[name], axis=-1)
    if case.name == "pro_loss":  # responses without tokens come last
        absent = ~arrays["where"].any(-1, keepdims=True)
        order = np.argsort(absent, axis=-2, kind="stable")
        arrays["where"] = np.take_along_axis(arrays["where"], order, axis=-2)
    filler = draw(st.sampled_from([np.nan, np.inf, 0.0]))
    for name in case.masks:
        bad = filler if arrays[name].dtype == np.float32 else np.int32(99)
        arrays[name] = np.where(case.cover(name, arrays), arrays[name], bad)
    return len(lead), arrays


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_agrees_with_the_oracle_whatever_the_shape_and_the_mask(case):
    @few
    @given(inputs(case))
    def check(drawn):
        lead, arrays = drawn
        out, gradients = value_and_gradients(case, as_jax(arrays))
        expected = case.expected(arrays, lead)
        assert out.shape == expected.shape
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
        for name, gradient in gradients.items():
            assert np.all(np.isfinite(gradient)), name
            if name in case.masks:
                assert not np.any(gradient[~case.cover(name, arrays)]), name

    check()
