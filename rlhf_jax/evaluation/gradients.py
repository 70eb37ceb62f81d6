"""Policy-gradient estimators on one policy: what they expect, how far they scatter, who is biased.

The gradient of a response is a sum over its tokens, weighted by one choice of Φ_t:

    g = Σ_t Φ_t ∇ log π(a_t | s_t)

All choices share ∇ log π, so one forward pass serves them, and each is a backward pass. A gradient
is as long as the model, so what is kept of it is a count sketch, in which lengths and inner
products stay what they are but for an error of about √(2/m).

Sources: slide "Policy Gradient Methods"; Schulman et al. 2016 (arXiv 1506.02438), section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.evaluation.comparison import Interval
from rlhf_jax.models.heads import next_token_log_probs

# Of the shares of resamples below and above an interval.
_TAILS = (2.5, 97.5)


@flax.struct.dataclass
class CountSketch:
    """A random linear map of n numbers to m that keeps inner products in expectation.

        (S x)_b = Σ_{j : h(j) = b} s_j x_j

    for buckets h(j) and signs s_j that are drawn once. E ⟨S x, S y⟩ = ⟨x, y⟩, and the standard
    deviation of ⟨S x, S y⟩ is at most √(2/m) |x| |y|.

    Source: Charikar, Chen and Farach-Colton 2002; Weinberger et al. 2009
    (arXiv 0902.2206), lemma 2.

    Attributes:
      buckets: h, `[n]` int32 in [0, m).
      signs: s, `[n]` float32, 1 or -1.
      size: m.
    """

    buckets: jax.Array
    signs: jax.Array
    size: int = flax.struct.field(pytree_node=False)

    @classmethod
    def draw(cls, key: jax.Array, count: int, size: int) -> CountSketch:
        """Draws buckets and signs.

        Args:
          key: random key, consumed.
          count: n.
          size: m.

        Raises:
          ValueError: `count` or `size` is below 1.
        """
        if count < 1 or size < 1:
            raise ValueError(f"count={count} and size={size} must be at least 1")
        of_buckets, of_signs = jax.random.split(key)
        buckets = jax.random.randint(of_buckets, (count,), 0, size)
        return cls(buckets, jax.random.rademacher(of_signs, (count,), jnp.float32), size)

    def __call__(self, vectors: jax.Array) -> jax.Array:
        """`[V, n]` float32 to `[V, m]`."""
        signed = (vectors * self.signs[None]).T
        return jax.ops.segment_sum(signed, self.buckets, num_segments=self.size).T


def sketched_gradients(
    model: Any,
    tokens: jax.Array,
    segments: jax.Array,
    weights: jax.Array,
    *,
    start: int,
    sketch: CountSketch,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of responses, each for several choices of the weight of its tokens.

        g_iv = Σ_t Φ_ivt ∇ log π(y_it | y_i,<t)

    One response after the other, so that the gradients of one are in memory at a time.

    Args:
      model: the policy; all of its weights are differentiated.
      tokens: `[B, T]` int32, a prompt and its response.
      segments: `[B, T]` int32, see `Transformer.__call__`.
      weights: Φ, `[B, V, T - start]` float32, 0 on padding.
      start: the first response column.
      sketch: for as many numbers as the model has.
      temperature: the sampler's. With top-p, top-k or a repetition penalty responses come from
        another distribution than the one that is differentiated here, and every Φ is biased.

    Returns:
      Sketches `[B, V, m]`, exact |g|² `[B, V]`, and log π of the tokens `[B, T - start]`; float32.
    """

    def of_one(one: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        row, real, phi = one

        def log_probs(model: Any) -> jax.Array:
            return next_token_log_probs(
                model, row[None], real[None], start=start, temperature=temperature
            )[0][0]

        values, pull = jax.vjp(log_probs, model)
        (gradients,) = jax.vmap(pull)(phi)
        leaves = [leaf.reshape(len(phi), -1) for leaf in jax.tree.leaves(gradients)]
        flat = jnp.concatenate(leaves, axis=1).astype(jnp.float32)
        return sketch(flat), jnp.sum(jnp.square(flat), axis=1), values

    sketches, squares, log_probs = jax.lax.map(of_one, (tokens, segments, weights))
    return sketches, squares, log_probs


@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """All that is needed of the gradients of P prompts to compare A estimators.

    Prompts are what is independent, not the responses to one of them: rloo and grpo compare these.

    Attributes:
      names: of the estimators.
      reference: the one that the others are compared with; unbiased, if the comparison is to say
        who is biased.
      squares: `[A, P]` float64, mean of |g|² over the responses to a prompt.
      products: `[A, P, P]` float64, ⟨ḡ_p, ḡ_q⟩ of the means over the responses to prompts p and q.
      crosses: `[A, P, P]` float64, ⟨ḡ_p, ḡ_q of the reference⟩, made symmetric.
    """

    names: tuple[str, ...]
    reference: str
    squares: np.ndarray
    products: np.ndarray
    crosses: np.ndarray

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        reference: str,
        means: np.ndarray,
        squares: np.ndarray,
    ) -> GradientMoments:
        """The moments of sketched gradients.

        Args:
          names: A of them.
          reference: one of the names.
          means: `[P, A, m]`, the mean over the responses to each prompt.
          squares: `[P, A]`, the mean of |g|².

        Raises:
          ValueError: shapes and names disagree, or there is one prompt.
        """
        names = tuple(names)
        if reference not in names:
            raise ValueError(f"reference={reference!r} must be one of {', '.join(names)}")
        prompts = len(means)
        if means.shape[1:2] != (len(names),) or squares.shape != (prompts, len(names)):
            raise ValueError(
                f"means {means.shape} and squares {squares.shape} must be of {len(names)} "
                "estimators"
            )
        if prompts < 2:
            raise ValueError(f"{prompts} prompts: the scatter of gradients needs at least 2")
        of_reference = np.asarray(means[:, names.index(reference)], np.float64)
        products, crosses = np.zeros((2, len(names), prompts, prompts))
        for i in range(len(names)):
            mine = np.asarray(means[:, i], np.float64)
            products[i] = mine @ mine.T
            cross = mine @ of_reference.T
            crosses[i] = (cross + cross.T) / 2
        return cls(names, reference, np.asarray(squares, np.float64).T, products, crosses)


def between_prompts(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """An inner product of two expected gradients, without what a gradient has with its own noise.

        m = Σ_{p≠q} w_p w_q K_pq / Σ_{p≠q} w_p w_q

    estimates ⟨E g, E h⟩ from K_pq = ⟨ḡ_p, h̄_q⟩. No product of a prompt with itself enters, so that
    the noise of the two factors is independent and the number is unbiased; it may be negative.

    Args:
      products: K, `[..., P, P]`.
      weights: w, `[R, P]`, how often each resample holds a prompt; ones are the sample itself.

    Returns:
      `[R, ...]` float64.
    """
    itself = np.diagonal(products, axis1=-2, axis2=-1)
    squared = np.square(weights)
    pairs = np.square(weights.sum(axis=1)) - squared.sum(axis=1)
    flat = products.reshape(-1, *products.shape[-2:])
    sums = np.stack([np.sum((weights @ one) * weights, axis=1) for one in flat], axis=1)
    sums = sums.reshape(len(weights), *products.shape[:-2])
    sums = sums - np.moveaxis(itself @ squared.T, -1, 0)
    return sums / pairs.reshape(-1, *[1] * (sums.ndim - 1))


# Quantity of an estimator -> [R, A]: of the sample itself in the first row, then of its resamples.
Comparison = Mapping[str, np.ndarray]


def compare_gradients(
    moments: GradientMoments, *, unit: str, num_resamples: int = 2000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Bias and variance of every estimator, and of bootstrap resamples of the prompts.

    With ref for the reference, and E g for an expected gradient:

      signal           |E g|² / |E g_ref|²
      bias             |E g − E g_ref|² / |E g_ref|², the squared bias where the reference has none
      scale            c = ⟨E g, E g_ref⟩ / |E g_ref|²
      off_direction    |E g − c E g_ref|² / |E g_ref|²: what no learning rate makes good
      cosine           of E g and E g_ref
      variance         tr Cov(g) of one response over that of `unit`
      noise            tr Cov(g) / |E g|²: so many responses until noise is as large as the gradient
      break_even       responses in a batch above which the reference has the smaller mean squared
                       error: (tr Cov(g_ref) − tr Cov(g)) / |E g − E g_ref|²

    Squares of expectations are free of their own noise, see `between_prompts`: a bias of 0 is
    estimated as 0 give or take, and so are cosines of 1.

    The bootstrap of such squares is right where the gradient prevails and too wide by up to √3
    where its noise does: resampling draws from the products that hold it, which count as signal
    there (Arcones and Giné 1992).

    Args:
      moments: from `GradientMoments.of`.
      unit: the estimator whose variance is 1.
      num_resamples: R.
      seed: of the bootstrap.

    Returns:
      quantity -> `[R + 1, A]`, the sample itself first.

    Raises:
      ValueError: `unit` is none of the estimators.
    """
    if unit not in moments.names:
        raise ValueError(f"unit={unit!r} must be one of {', '.join(moments.names)}")
    prompts = moments.squares.shape[1]
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=num_resamples)
    weights = np.concatenate([np.ones((1, prompts)), drawn.astype(np.float64)])
    own = between_prompts(moments.products, weights)
    inner = between_prompts(moments.crosses, weights)
    variance = weights @ moments.squares.T / prompts - own
    at = moments.names.index
    ref, unit_at = at(moments.reference), at(unit)
    signal = own[:, ref, None]
    distance = own - 2 * inner + signal
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = inner / signal
        return {
            "signal": own / signal,
            "bias": distance / signal,
            "scale": scale,
            "off_direction": own / signal - np.square(scale),
            "cosine": inner / np.sqrt(own * signal),
            "variance": variance / variance[:, unit_at, None],
            "noise": variance / own,
            "break_even": (variance[:, ref, None] - variance) / distance,
        }


def percentile_interval(resampled: np.ndarray) -> Interval:
    """A number with the ends of its 95% interval.

    Args:
      resampled: `[R + 1]`, of the sample itself and then of its resamples. Where more than one in
        40 is not finite there is no interval, and its ends are infinite.
    """
    value, draws = float(resampled[0]), resampled[1:]
    finite = np.isfinite(draws)
    if not finite.size or finite.mean() < 1 - _TAILS[0] / 100:
        return Interval(value, -np.inf, np.inf)
    low, high = np.percentile(draws[finite], _TAILS)
    return Interval(value, float(low), float(high))
