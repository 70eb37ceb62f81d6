"""How far a judge agrees with people: measured on texts that people rated, and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rlhf_jax
from rlhf_jax.data.comparisons import check_scores
from rlhf_jax.evaluation.comparison import Interval, bootstrap_interval, paired_outcomes
from rlhf_jax.evaluation.judges import Judge
from rlhf_jax.runtime.run_info import to_json


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How often a judge ordered texts as people did.

    Attributes:
      judge: Name of the judge.
      what: What the texts are, e.g. "movie reviews".
      value: Share of pairs in the order of people's ratings; ties count one half.
      low: Lower end of the 95% interval.
      high: Upper end.
      num_texts: Texts that were judged.
      num_pairs: Pairs of them, rated `min_gap` or more apart.
      min_gap: Least difference of the two ratings of a pair.
    """

    judge: str
    what: str
    value: float
    low: float
    high: float
    num_texts: int
    num_pairs: int
    min_gap: float

    def line(self) -> str:
        """A sentence for reports, see `measured_agreement`."""
        gap = "a rating" if self.min_gap == 1 else f"{self.min_gap:g} ratings"
        return (
            f"{self.judge} orders {self.value:.1%} [{100 * self.low:.0f}, {100 * self.high:.0f}] "
            f"of the pairs of {self.num_texts} held-out {self.what} {gap} apart as people do"
        )


def agreement(
    judge: Judge,
    texts: Sequence[str],
    ratings: Sequence[float],
    *,
    min_gap: float = 1.0,
    num_texts: int = 600,
    seed: int = 0,
) -> Interval:
    """Share of pairs a rating apart that the judge orders as people do; a tie counts one half.

        Σ_{i,j} 1[y_i − y_j ≥ gap] (1[s_i > s_j] + ½ 1[s_i = s_j]) / Σ_{i,j} 1[y_i − y_j ≥ gap]

    over all pairs of the texts that are judged, for ratings y and scores s.

    The interval is a 95% percentile bootstrap that resamples texts and takes all pairs of those
    drawn. Pairs are not what is independent: a text that is misread is wrong in each of its pairs,
    and resampling pairs gives intervals that are far too narrow. It covers the choice of texts, not
    people's disagreement about a text, nor texts of another kind; for fewer than 30 texts it is
    rough.

    Args:
      judge: Scores texts; called once.
      texts: N different texts that neither the judge nor what it judges was trained on.
      ratings: [N], people's.
      min_gap: Least difference of the ratings of a pair.
      num_texts: How many texts are drawn and judged; all where there are fewer.
      seed: Of the draw and the bootstrap.

    Returns:
      An `Interval`.

    Raises:
      ValueError: Texts and ratings differ in number, a rating is not finite, no two texts are rated
        `min_gap` apart, or a score is NaN.
    """
    drawn, better, worse = _draw(texts, ratings, min_gap=min_gap, num_texts=num_texts, seed=seed)
    count = len(drawn)
    scores = np.asarray(judge([texts[i] for i in drawn]), np.float64)
    paired, right = np.zeros((2, count, count))
    paired[better, worse] = 1
    right[better, worse] = paired_outcomes(scores[better], scores[worse])

    def share(texts_drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """The share over pairs of texts drawn with replacement, a row a resample."""
        rows = np.atleast_2d(texts_drawn).astype(np.int64)
        times = np.stack([np.bincount(row, minlength=count) for row in rows]).astype(np.float64)
        won, pairs = (np.sum(times @ matrix * times, axis) for matrix in (right, paired))
        # Of a handful of texts a resample may hold no pair: it says nothing, one half.
        return np.divide(won, pairs, out=np.full(len(rows), 0.5), where=pairs > 0).squeeze()

    return bootstrap_interval(np.arange(count), share, seed=seed)


def cohen_kappa(one: Any, other: Any, *, seed: int = 0) -> Interval:
    """How far two raters agree beyond chance.

        κ = (p_o − p_e) / (1 − p_e)

    where p_o is the share of items on which they say the same, and p_e the share on which two would
    who say what these say as often, item by item at random. 1 is full agreement, 0 that of chance;
    0 as well where both always say the same one thing, which tells nothing. The interval is a 95%
    bootstrap over items: no two of them should share a text.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".

    Args:
      one: [N], what a rater says: numbers, each a category of its own.
      other: [N], what the other says of the same items.
      seed: of the bootstrap.

    Returns:
      An `Interval`.

    Raises:
      ValueError: the numbers of items differ, or there is none.

    >>> cohen_kappa([1, 1, 0, 0], [1, 1, 0, 1]).value
    0.5
    """
    a, b = np.asarray(one), np.asarray(other)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"two raters say [N] each of N > 0 items, got {a.shape} and {b.shape}")
    kinds = np.unique(np.concatenate([a, b]))

    def kappa(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = drawn.astype(np.int64)
        observed = np.mean(a[rows] == b[rows], axis)
        shares = [np.mean(a[rows] == k, axis) * np.mean(b[rows] == k, axis) for k in kinds]
        beyond = 1 - np.sum(shares, axis=0)
        said = beyond > 1e-12
        return np.where(said, (observed - 1 + beyond) / np.where(said, beyond, 1.0), 0.0)

    return bootstrap_interval(np.arange(len(a)), kappa, seed=seed)


def clustered_kappa(one: Any, other: Any, clusters: Any, *, seed: int = 0) -> Interval:
    """`cohen_kappa` of items that belong together, as the steps of a solution.

    Clusters are drawn with replacement, not items: what two raters make of one step says something
    of the next. The value is that of `cohen_kappa`.

    Args:
      one: [N], what a rater says.
      other: [N], what the other says of the same items.
      clusters: [N], the cluster of each item.
      seed: of the bootstrap.

    Returns:
      An `Interval`.

    Raises:
      ValueError: the numbers of items differ, or there is none.
    """
    a, b, groups = np.asarray(one), np.asarray(other), np.asarray(clusters)
    if not a.shape == b.shape == groups.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"need [N] each of N > 0 items, got {a.shape}, {b.shape}, {groups.shape}")
    names, where = np.unique(groups, return_inverse=True)
    kinds = np.unique(np.concatenate([a, b]))
    # How often one says a kind and the other another, [clusters, kinds, kinds].
    tables = np.zeros((len(names), len(kinds), len(kinds)))
    np.add.at(tables, (where, np.searchsorted(kinds, a), np.searchsorted(kinds, b)), 1)

    def kappa(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        table = tables[drawn.astype(np.int64)].sum(-3)
        table /= table.sum((-2, -1), keepdims=True)
        observed = np.trace(table, axis1=-2, axis2=-1)
        beyond = 1 - np.sum(table.sum(-1) * table.sum(-2), -1)
        said = beyond > 1e-12
        return np.where(said, (observed - 1 + beyond) / np.where(said, beyond, 1.0), 0.0)

    return bootstrap_interval(np.arange(len(names)), kappa, seed=seed)


def measured_agreement(
    judge: Judge,
    what: str,
    texts: Sequence[str],
    ratings: Sequence[float],
    cache_folder: str | Path,
    *,
    min_gap: float = 1.0,
    num_texts: int = 600,
    seed: int = 0,
) -> Agreement:
    """`agreement`, measured on the first call and read from a file on later ones.

    The file is named by a digest of all that the numbers depend on: the judge's fingerprint (for a
    language model its weights, question and settings), texts and ratings, the arguments, and the
    version of this package. One that cannot be read is measured again.

    Args:
      judge: Scores texts.
      what: What the texts are, as a report says it: "movie reviews".
      texts: As for `agreement`.
      ratings: As for `agreement`.
      cache_folder: Where the files are; made where it is missing.
      min_gap: As for `agreement`.
      num_texts: As for `agreement`.
      seed: As for `agreement`.

    Returns:
      An `Agreement`; its `line` reads `VADER orders 71.8% [69, 75] of the pairs of 600 held-out
      movie reviews a rating apart as people do`.

    Raises:
      ValueError: As `agreement`.
    """
    drawn: dict[str, Any] = {"min_gap": min_gap, "num_texts": num_texts, "seed": seed}
    rated = json.dumps([list(texts), np.asarray(ratings, np.float64).tolist()])
    key = {
        "judge": judge.name,
        "fingerprint": judge.fingerprint(),
        "texts": hashlib.sha256(rated.encode()).hexdigest(),
        "rlhf_jax": rlhf_jax.__version__,
        **drawn,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    file = Path(cache_folder) / f"agreement-{name}.json"
    numbers = _read(file, key)
    if numbers is None:
        interval = agreement(judge, texts, ratings, **drawn)
        judged, better, _ = _draw(texts, ratings, **drawn)
        numbers = interval._asdict() | {"num_texts": len(judged), "num_pairs": len(better)}
        _write(file, {"key": key, "what": what, "numbers": numbers})
    return Agreement(judge=judge.name, what=what, min_gap=min_gap, **numbers)


def _draw(
    texts: Sequence[str],
    ratings: Sequence[float],
    *,
    min_gap: float,
    num_texts: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the texts that are judged, and the pairs among them: better and worse, [M]."""
    if len(texts) != len(ratings):
        raise ValueError(f"{len(texts)} texts and {len(ratings)} ratings: give one rating a text")
    if not min_gap > 0 or num_texts < 2:
        raise ValueError(f"min_gap={min_gap} must be positive and num_texts={num_texts} at least 2")
    check_scores(ratings, texts)
    drawn = np.random.default_rng(seed).permutation(len(texts))[:num_texts]
    rated = np.asarray(ratings, np.float64)[drawn]
    # Mean ratings are fractions: 1e-9 forgives rounding, so that 1.9 and 0.9 are 1 apart.
    better, worse = np.nonzero(rated[:, None] - rated[None, :] >= min_gap - 1e-9)
    if not better.size:
        raise ValueError(f"no two of {len(drawn)} texts are rated {min_gap} apart")
    return drawn, better, worse


def _read(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers that a file keeps for `key`, or None."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        numbers = {name: float(kept["numbers"][name]) for name in Interval._fields}
        numbers |= {name: int(kept["numbers"][name]) for name in ("num_texts", "num_pairs")}
        return numbers if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, content: dict[str, Any]) -> None:
    """Writes whole or not at all: several processes may measure the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
        json.dump(to_json(content), part, indent=2, allow_nan=False)
    os.replace(part.name, file)
