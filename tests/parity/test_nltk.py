"""Agreement of raters against nltk's."""

import numpy as np
import pytest

from rlhf_jax.evaluation.agreement import cohen_kappa
from rlhf_jax.evaluation.krippendorff import krippendorff_alpha

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(5))
def test_alpha_and_kappa(seed):
    agreement = pytest.importorskip("nltk.metrics.agreement")
    distance = pytest.importorskip("nltk.metrics.distance")
    rng = np.random.default_rng(seed)
    ratings = np.clip(rng.integers(1, 6, 20) + rng.integers(-1, 2, (3, 20)), 1, 5)
    triples = [(f"r{r}", f"u{u}", int(ratings[r, u])) for r in range(3) for u in range(20)]
    nominal = agreement.AnnotationTask(triples)
    assert krippendorff_alpha(ratings, "nominal").value == pytest.approx(nominal.alpha())
    interval = agreement.AnnotationTask(triples, distance=distance.interval_distance)
    assert krippendorff_alpha(ratings, "interval").value == pytest.approx(interval.alpha())
    assert cohen_kappa(*ratings[:2]).value == pytest.approx(nominal.kappa_pairwise("r0", "r1"))
