"""Krippendorff's alpha: how far any number of raters agree beyond chance, where some said nothing.

Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", University of Pennsylvania.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_jax.evaluation.comparison import Interval, bootstrap_interval

LEVELS = NOMINAL, ORDINAL, INTERVAL = ("nominal", "ordinal", "interval")


class UndefinedError(ValueError):
    """A coefficient is not defined on what was given; the message says why."""


def krippendorff_alpha(
    ratings: Any, level: str, *, clusters: Any = None, seed: int = 0
) -> Interval:
    """Agreement of raters on units, with a 95% bootstrap interval.

        α = 1 − (n − 1) Σ_{c,k} o_{c,k} δ_{c,k} / Σ_{c,k} n_c n_k δ_{c,k}

    Here o_{c,k} = Σ_u (pairs of ratings c, k of unit u) / (m_u − 1) are the coincidences of the
    units with m_u ≥ 2 ratings, n_c = Σ_k o_{c,k} and n = Σ_c n_c. The difference δ_{c,k} is, by
    level:

        nominal: δ_{c,k} = 1[c ≠ k]
        interval: δ_{c,k} = (c − k)²
        ordinal: δ_{c,k} = (Σ_{g=c}^{k} n_g − (n_c + n_k) / 2)²

    1 is full agreement, 0 that of chance. The interval draws clusters with replacement; a draw in
    which everything is one value tells nothing and counts as 0.

    Source: Krippendorff 2011, section C.

    Args:
      ratings: float [R, U], of R raters on U units; NaN where one said nothing.
      level: "nominal", "ordinal" or "interval".
      clusters: [U], which units belong together, as the steps of one solution; by default none do.
      seed: of the bootstrap.

    Returns:
      An `Interval`.

    Raises:
      UndefinedError: no unit has two ratings, or all of those are one value.
      ValueError: ratings are not [R, U] or infinite, the level is none, or clusters are not [U].

    >>> round(krippendorff_alpha([[1, 2, 3, 3], [1, 2, 3, 2]], "nominal").value, 3)
    0.667
    """
    rated = np.asarray(ratings, np.float64)
    if rated.ndim != 2 or np.isinf(rated).any():
        raise ValueError(f"ratings must be [R, U] and finite or NaN, got shape {rated.shape}")
    if level not in LEVELS:
        raise ValueError(f"level {level!r} must be one of {', '.join(LEVELS)}")
    groups = np.arange(rated.shape[1]) if clusters is None else np.asarray(clusters)
    if groups.shape != rated.shape[1:]:
        raise ValueError(f"clusters must be [{rated.shape[1]}], one a unit, got {groups.shape}")
    values, tables = _coincidences(rated, groups)
    if not len(tables):
        raise UndefinedError("undefined because no unit has ratings of two raters")
    if len(values) == 1:
        raise UndefinedError(
            f"undefined because every rating is {values[0]:g}: without variation agreement cannot "
            "be told from chance"
        )
    flat = tables.reshape(len(tables), -1)

    def alpha(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = np.atleast_2d(drawn).astype(np.int64)
        times = np.stack([np.bincount(row, minlength=len(flat)) for row in rows])
        pooled = (times @ flat).reshape(len(rows), len(values), len(values))
        return np.reshape(_alpha(pooled, values, level), drawn.shape[:-1])

    return bootstrap_interval(np.arange(len(flat)), alpha, seed=seed)


def _coincidences(rated: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The V values of units with two ratings, and the coincidences of each cluster, [C, V, V]."""
    given = ~np.isnan(rated)
    counts = given.sum(0)
    pairable = counts >= 2
    rated, given, groups, counts = (one[..., pairable] for one in (rated, given, groups, counts))
    values = np.unique(rated[given])
    # How often each unit has each value, [U, V]; a rating makes no pair with itself.
    often = np.stack([(rated == value).sum(0) for value in values], -1) if len(values) else None
    if often is None:
        return values, np.zeros((0, 0, 0))
    pairs = often[:, :, None] * often[:, None, :] - often[:, :, None] * np.eye(len(values))
    units = pairs / (counts - 1)[:, None, None]
    names, where = np.unique(groups, return_inverse=True)
    tables = np.zeros((len(names), len(values), len(values)))
    np.add.at(tables, where, units)
    return values, tables


def _alpha(coincidences: np.ndarray, values: np.ndarray, level: str) -> np.ndarray:
    """Of tables [B, V, V]; 0 for one in which all is one value."""
    often = coincidences.sum(-1)  # n_c, [B, V]
    total = often.sum(-1)
    differences = _differences(often, values, level)
    seen = (coincidences * differences).sum((-2, -1))
    by_chance = (often[:, :, None] * often[:, None, :] * differences).sum((-2, -1))
    told = by_chance > 1e-12
    return np.where(told, 1 - (total - 1) * seen / np.where(told, by_chance, 1.0), 0.0)


def _differences(often: np.ndarray, values: np.ndarray, level: str) -> np.ndarray:
    """δ², [V, V] or, where it depends on how often values are, [B, V, V]."""
    if level == NOMINAL:
        return 1.0 - np.eye(len(values))
    if level == INTERVAL:
        return (values[:, None] - values[None, :]) ** 2
    # Σ_{g=c}^{k} n_g less half of both ends is the distance of the middles of c and k.
    middles = np.cumsum(often, -1) - often / 2
    return (middles[:, :, None] - middles[:, None, :]) ** 2
