"""Log-probabilities of tokens and sequences. The only place that shifts by one.

Logits are cast to float32 here (float64 stays): a bfloat16 log-softmax over a large vocabulary is
off by more than a PPO step moves it.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import select, widen

Scalar = float | jax.Array


def select_log_probs(
    logits: jax.Array, targets: jax.Array, *, temperature: Scalar = 1.0
) -> jax.Array:
    """Log-probability of each target under the logits at the same position (no shift).

        log π(y) = z_y/τ − log Σ_v exp(z_v/τ)

    Args:
      logits: z, [..., V] float.
      targets: y, [...] int; an id past the end of the vocabulary gives NaN, so mask such padding.
      temperature: τ of the sampler, so that the scored policy is the one that was sampled.

    Returns:
      [...] float32, unreduced.

    Raises:
      AssertionError: logits are not [..., V] for targets [...], or of the wrong type.
      ValueError: temperature is not positive.

    >>> print(select_log_probs(jnp.zeros((2, 4)), jnp.array([1, 3])).round(3))
    [-1.386 -1.386]
    """
    check.floats(logits=logits)
    check.integers(targets=targets)
    check.fits("targets", (*targets.shape, *logits.shape[-1:]), {"logits": logits})
    check.scalars(temperature=temperature)
    check.require(
        temperature > 0, f"temperature={temperature} must be positive; for greedy use argmax"
    )
    logits = widen(logits) / temperature
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def token_log_probs(
    logits: jax.Array, tokens: jax.Array, *, temperature: Scalar = 1.0
) -> jax.Array:
    """Log-probability of each token given those before it: logits at t predict token t+1.

        log π(y_{t+1} | y_{≤t}),  t = 0 … T−2

    A mask over tokens, [..., T], becomes a mask over the result as `mask[..., 1:]`.

    Args:
      logits: [..., T, V] float.
      tokens: [..., T] int, the sequence that the logits were computed on.
      temperature: divides the logits.

    Returns:
      [..., T−1] float32, unreduced; element t belongs to token t+1.

    Raises:
      AssertionError: logits are not [..., T, V] for tokens [..., T], or of the wrong type.
      ValueError: temperature is not positive.

    >>> print(token_log_probs(jnp.zeros((3, 4)), jnp.array([1, 3, 0])).round(3))
    [-1.386 -1.386]
    """
    check.floats(logits=logits)
    check.integers(tokens=tokens)
    check.fits("tokens", (*tokens.shape, *logits.shape[-1:]), {"logits": logits})
    return select_log_probs(logits[..., :-1, :], tokens[..., 1:], temperature=temperature)


def sequence_log_prob(
    log_probs: jax.Array, *, where: jax.Array, normalize: bool = False
) -> jax.Array:
    """Log-probability of each response.

        log π(y|x) = Σ_t m_t log π(y_t | x, y_{<t})    (÷ |y| if normalize)

    Args:
      log_probs: [..., T] float.
      where: True on response tokens, [..., T] bool.
      normalize: divide by the number of tokens (RRHF, PRO, ORPO, length-normalised IPO); static
        under `jit`.

    Returns:
      [...], unreduced; 0 for an empty response.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> log_probs, where = jnp.array([-1.0, -2.0, -9.0]), jnp.array([True, True, False])
    >>> print(sequence_log_prob(log_probs, where=where))
    -3.0
    """
    check.same_shape(check.floats(log_probs=log_probs), check.masks(where=where))
    check.static(normalize=normalize)
    total = jnp.sum(widen(select(where, log_probs)), axis=-1)
    length = jnp.maximum(jnp.sum(where, axis=-1, dtype=total.dtype), 1)
    return (total / length if normalize else total).astype(log_probs.dtype)


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of the next-token distribution, exact over the vocabulary.

        H(π) = −Σ_a π(a|s) log π(a|s)

    Source: slide "Entropy Bonus"; the sum runs over actions a at a fixed state s, where the slide
    prints s under the sum. Logits of −inf (top-p) count as probability 0.

    Args:
      logits: [..., V] float.

    Returns:
      [...] float32, unreduced, between 0 and log V.

    Raises:
      AssertionError: logits are not float.

    >>> print(entropy(jnp.zeros((2, 4))).round(3))
    [1.386 1.386]
    """
    check.floats(logits=logits)
    log_p = jax.nn.log_softmax(widen(logits), axis=-1)
    log_p = jnp.where(log_p > -jnp.inf, log_p, 0.0)  # the term is then 1 · 0
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
