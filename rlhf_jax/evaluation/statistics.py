"""What a policy's responses look like: variety, perplexity, KL to the reference. NumPy only.

Masks are called `where`; values outside of them are never read, so NaN there is harmless. Logits
and log-probs come in as float32 and are summed as float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


def distinct_n(responses: Sequence[Any], n: int) -> float:
    """Distinct n-grams of a set of responses over all of its n-grams (Li et al. 2016, distinct-n).

    Taken over the whole set, so that one response repeated by every prompt counts as poor. It falls
    as a set grows: compare sets of the same number of responses, and mind their lengths.

    Args:
      responses: token lists (n-grams of tokens), or texts (n-grams of lower-case words between
        white space). N-grams do not cross from one response into the next.
      n: at least 1.

    Returns:
      In [0, 1]; 0 where no response is n long.
    """
    grams: Counter[tuple[Any, ...]] = Counter()
    for response in responses:
        grams.update(_ngrams(response, n))
    return len(grams) / grams.total() if grams else 0.0


def repetition(responses: Sequence[Any], n: int = 4) -> float:
    """Share of n-grams that repeat an earlier one of the same response; mean over responses.

    1 - distinct n-grams / n-grams within one response: 'seq-rep-n' of Welleck et al. 2020
    (arXiv 1908.04319). A collapsed policy that repeats one sentence is near 1.

    Args:
      responses: token lists or texts, as in `distinct_n`.
      n: at least 1.

    Returns:
      In [0, 1); responses shorter than n are left out, 0 where all are.
    """
    shares = []
    for response in responses:
        grams = _ngrams(response, n)
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else 0.0


def response_statistics(tokens: Any, *, where: Any, ended: Any = None) -> dict[str, float]:
    """Length and variety of sampled responses; n-grams are of tokens.

    Args:
      tokens: int [N, T].
      where: bool [N, T], True on response tokens, EOS included.
      ended: bool [N], True where the response ended by itself rather than by the length limit.

    Returns:
      `response/length`, `length_std`, `length_max` (tokens), `distinct_1`, `distinct_2`,
      `repetition_4`, `unique` (different responses over responses), and `eos_rate` where `ended`
      is given; every name starts with `response/`.
    """
    tokens, where = _masked(tokens=tokens, where=where, dtype=np.int64)
    responses = [row[keep].tolist() for row, keep in zip(tokens, where, strict=True)]
    lengths = where.sum(axis=-1)
    statistics = {
        "length": float(lengths.mean()),
        "length_std": float(lengths.std()),
        "length_max": float(lengths.max()),
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
        "repetition_4": repetition(responses, 4),
        "unique": len(set(map(tuple, responses))) / len(responses),
    }
    if ended is not None:
        ended = np.asarray(ended)
        if ended.shape != lengths.shape:
            raise ValueError(f"ended must be [N] = {lengths.shape}, got {ended.shape}")
        statistics["eos_rate"] = float(ended.astype(bool).mean())
    return {f"response/{name}": value for name, value in statistics.items()}


def response_perplexity(log_probs: Any, *, where: Any) -> float:
    """Perplexity of responses: exp of the mean negative log-likelihood of their tokens.

        exp(−Σ_i Σ_t log π(y_{i,t} | x_i, y_{i,<t}) / Σ_i |y_i|)

    Args:
      log_probs: float [N, T].
      where: bool [N, T], True on response tokens.

    Returns:
      At least 1 for proper log-probs. Each token weighs the same, so long responses weigh more.

    Raises:
      ValueError: shapes differ, or the mask is empty.
    """
    log_probs, where = _masked(log_probs=log_probs, where=where)
    return float(np.exp(-log_probs[where].mean()))


def moss_perplexity(log_probs: Any, *, where: Any, lengths: Any = None) -> float:
    """The quantity that Zheng et al. 2023 plot as 'perplexity'; only for laying curves over theirs.

        exp(Σ_i mean_t(−log π_{i,t}) / Σ_i |y_i|)

    The mean NLL of each sequence is divided by lengths once more, so this falls towards 1 as
    responses grow, whatever the model: at a mean NLL of 2, length 100 gives e^0.02 and length 500
    gives e^0.004. Source: the released code (OpenLMLab/MOSS-RLHF, `ppo/ppo_trainer.py` and
    `metric.py`), where the mean is over prompt and response and |y_i| counts response tokens.

    Args:
      log_probs: float [N, T].
      where: bool [N, T], the tokens of each mean: prompt and response as in the released code, or
        the response alone. Rows without a token are left out.
      lengths: int [N], response lengths |y_i|; None counts `where`.

    Returns:
      The plotted value; not a perplexity, see `response_perplexity`.

    Raises:
      ValueError: shapes differ, the mask is empty, or all responses are empty.
    """
    log_probs, where = _masked(log_probs=log_probs, where=where)
    counts = where.sum(axis=-1)
    lengths = counts if lengths is None else np.asarray(lengths)
    if lengths.shape != counts.shape:
        raise ValueError(f"lengths must be [N] = {counts.shape}, got {lengths.shape}")
    used = counts > 0
    if lengths[used].sum() <= 0:
        raise ValueError("lengths must hold a positive number: every response is empty")
    mean_nll = -np.where(where, log_probs, 0.0).sum(axis=-1)[used] / counts[used]
    return float(np.exp(mean_nll.sum() / lengths[used].sum()))


def sequence_kl(
    log_probs: Any, ref_log_probs: Any, *, where: Any, estimator: str = "k1"
) -> np.ndarray:
    """Estimates KL(π(·|x) ‖ π_ref(·|x)) of whole responses from samples y ~ π.

        d_t = log π(y_t | x, y_{<t}) − log π_ref(y_t | x, y_{<t})
        k1 = Σ_t d_t
        k3 = Σ_t (exp(−d_t) − 1 + d_t)

    k1 is unbiased for the KL of the sequences; a sample, and for a tiny KL the mean as well, can be
    negative. k3 (Schulman 2020, "Approximating KL Divergence") is never negative and has less
    spread for small KL, but its mean grows without bound where π_ref has mass that π lacks.

    Args:
      log_probs: float [N, T], of the distribution that sampled the tokens.
      ref_log_probs: float [N, T], of the reference, for the same tokens.
      where: bool [N, T], True on response tokens.
      estimator: "k1" or "k3".

    Returns:
      float64 [N], in nats, unreduced.
    """
    log_probs, where = _masked(log_probs=log_probs, where=where)
    ref_log_probs, _ = _masked(ref_log_probs=ref_log_probs, where=where)
    if estimator not in ("k1", "k3"):
        raise ValueError(f"estimator must be 'k1' or 'k3', got {estimator!r}")
    difference = np.subtract(log_probs, ref_log_probs, out=np.zeros_like(log_probs), where=where)
    if estimator == "k3":
        difference = np.expm1(-difference) + difference
    return difference.sum(axis=-1)


def kl_statistics(log_probs: Any, ref_log_probs: Any, *, where: Any) -> dict[str, float]:
    """KL to the reference per token and per sequence, by k1 and k3; see `sequence_kl`.

    Per sequence is the mean over responses of the sum over tokens; per token is that sum over all
    responses divided by the number of all tokens.

    Args:
      log_probs: float [N, T].
      ref_log_probs: float [N, T].
      where: bool [N, T].

    Returns:
      `policy/kl_ref` and `policy/kl_ref_sequence` (k1), `policy/kl_ref_k3` and
      `policy/kl_ref_sequence_k3`, in nats.
    """
    result = {}
    num_tokens = np.asarray(where).sum()
    for estimator, suffix in (("k1", ""), ("k3", "_k3")):
        per_sequence = sequence_kl(log_probs, ref_log_probs, where=where, estimator=estimator)
        result[f"policy/kl_ref{suffix}"] = float(per_sequence.sum() / num_tokens)
        result[f"policy/kl_ref_sequence{suffix}"] = float(per_sequence.mean())
    return result


def _masked(*, where: Any, dtype: Any = np.float64, **array: Any) -> tuple[np.ndarray, np.ndarray]:
    """An [N, T] array and its boolean mask, checked."""
    ((name, values),) = array.items()
    values, where = np.asarray(values).astype(dtype), np.asarray(where)
    if where.dtype != bool:
        raise ValueError(f"where must be boolean, got {where.dtype}")
    if values.ndim != 2 or values.shape != where.shape:
        raise ValueError(f"{name} and where must be [N, T], got {values.shape} and {where.shape}")
    if not where.any():
        raise ValueError(f"where is False everywhere: there is no token to average {name} over")
    return values, where


def _ngrams(response: Any, n: int) -> list[tuple[Any, ...]]:
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    units = response.lower().split() if isinstance(response, str) else list(response)
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
