"""Scores of reference responses get mean 0 and std 1, or the reason why they cannot."""

import jax
import numpy as np
import pytest

from rlhf_jax.methods.reward_model import normalization
from rlhf_jax.models.heads import ScalarModel
from tests import tiny


def test_scores_and_models_are_normalised_alike():
    scores = np.array([1.0, 2.0, 6.0], np.float32)  # mean 3, std sqrt(14 / 3)
    normalized = normalization(scores)
    np.testing.assert_allclose(normalized(scores), (scores - 3) / (14 / 3) ** 0.5, rtol=1e-6)
    model = ScalarModel(tiny.language_model(), jax.random.key(0))
    changed = normalized(model)
    np.testing.assert_allclose(changed.bias[...], -3 / (14 / 3) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.7], r"all of 1 reference responses have the score 0\.7"),
        ([0.0] * 3, "all of 3 reference responses have the score 0"),
        ([2.5, np.nextafter(np.float32(2.5), 3)], "all of 2 reference responses"),
        ([1.0, np.inf], "a reference response has a score that is not finite"),
        ([1.0, np.nan], "a reference response has a score that is not finite"),
    ],
)
def test_what_cannot_be_normalised_is_one_line_and_no_model_with_infinity(scores, message):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message) as error:
        normalization(np.array(scores, np.float32))
    assert "\n" not in str(error.value)


def test_small_scores_are_no_equal_ones():
    tiny_scores = np.array([1e-12, 2e-12], np.float32)
    np.testing.assert_allclose(normalization(tiny_scores)(tiny_scores), [-1, 1], rtol=1e-5)
