"""Process supervision: losses on the steps of a solution, and scores of a solution from its steps.

Classes of a step are 0 negative, 1 neutral, 2 positive: PRM800K's rating plus one.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import log_loss, select, widen

NEGATIVE, NEUTRAL, POSITIVE = 0, 1, 2


def step_label_loss(logits: jax.Array, labels: jax.Array, *, where: jax.Array) -> jax.Array:
    """Classification of each step, read after its last token.

        L_i = −log p(label_i | x, s_1 … s_i)

    Source: Lightman et al. 2023 (arXiv 2305.20050), §2.6. Steps are labelled up to and including
    the first negative one: `until_first_error`.

    Args:
      logits: [..., S, C] float, differentiated; one row a step, or one a token with `where` True
        on the last token of each step.
      labels: [..., S] int, classes below C; anything where masked.
      where: True on labelled steps, [..., S] bool.

    Returns:
      [..., S], unreduced, 0 where masked.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> logits, labels = jnp.zeros((2, 3)), jnp.array([2, 0])
    >>> print(step_label_loss(logits, labels, where=jnp.array([True, False])).round(1))
    [1.1 0. ]
    """
    check.same_shape(check.integers(labels=labels), check.masks(where=where))
    check.floats(logits=logits)
    check.fits("where", (*where.shape, *logits.shape[-1:]), {"logits": logits})
    every_class = jnp.broadcast_to(where[..., None], logits.shape)
    log_p = jax.nn.log_softmax(widen(select(every_class, logits)), axis=-1)
    labels = select(where, labels, 0)[..., None]  # another label may be no class, and give NaN
    losses = -jnp.take_along_axis(log_p, labels, axis=-1)[..., 0]
    return select(where, losses).astype(logits.dtype)


def outcome_loss(logits: jax.Array, correct: jax.Array, *, where: jax.Array) -> jax.Array:
    """Outcome supervision: the same target, was the final answer right, at every token.

        L_t = −[c log σ(z_t) + (1 − c) log σ(−z_t)]

    A logit may be infinite: the loss is then 0 if the label is certain and says so, too, else inf.

    Source: Cobbe et al. 2021 (arXiv 2110.14168), §4.2; Lightman et al. 2023, §2.5. The score of a
    solution is σ(z) at its last token.

    Args:
      logits: z, [..., T] float, differentiated.
      correct: c, [...] bool or float (a soft label), constant.
      where: True on the tokens of the solution, [..., T] bool.

    Returns:
      [..., T], unreduced, 0 where masked.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> print(outcome_loss(jnp.zeros(2), jnp.array(True), where=jnp.ones(2, bool)).round(3))
    [0.693 0.693]
    """
    check.same_shape(check.floats(logits=logits), check.masks(where=where))
    check.fits("where", where.shape[:-1], check.numbers(correct=correct))
    if correct.dtype != bool:
        check.floats(correct=correct)
    logits = select(where, logits)
    target = jnp.broadcast_to(correct[..., None].astype(logits.dtype), logits.shape)
    target = jax.lax.stop_gradient(target)
    return select(where, log_loss(logits, target))


def until_first_error(labels: jax.Array, *, where: jax.Array) -> jax.Array:
    """Keeps the steps up to and including the first negative one: what comes after is undefined.

        m_i = real_i ∧ no negative label before i

    Source: Lightman et al. 2023 (arXiv 2305.20050), §2.6.

    Args:
      labels: [..., S] int, 0 negative, 1 neutral, 2 positive.
      where: True on the steps that are there, [..., S] bool.

    Returns:
      [..., S] bool.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> print(until_first_error(jnp.array([2, 0, 2]), where=jnp.ones(3, bool)))
    [ True  True False]
    """
    check.same_shape(check.integers(labels=labels), check.masks(where=where))
    wrong = (where & (labels == NEGATIVE)).astype(jnp.int32)
    return where & (jnp.cumsum(wrong, axis=-1) - wrong == 0)


def step_scores(logits: jax.Array, *, neutral: str) -> jax.Array:
    """Probability that a step is right, with neutral steps counted either way.

        p_i = P(positive)            (neutral = "negative")
        p_i = P(positive) + P(neutral)    (neutral = "positive")

    Source: Lightman et al. 2023 (arXiv 2305.20050), appendix F.2 (both are compared).

    Args:
      logits: [..., S, 3] float: negative, neutral, positive.
      neutral: "positive" or "negative"; static under `jit`.

    Returns:
      [..., S], unreduced.

    Raises:
      AssertionError: the last axis is not 3, or logits are not float.
      ValueError: neutral is neither.

    >>> print(step_scores(jnp.log(jnp.array([[1.0, 1.0, 2.0]])), neutral="positive"))
    [0.75]
    """
    check.floats(logits=logits)
    check.fits("the three classes", (*logits.shape[:-1], 3), {"logits": logits})
    check.require(
        neutral in ("positive", "negative"), f"neutral={neutral!r} must be positive or negative"
    )
    p = jax.nn.softmax(widen(logits), axis=-1)
    right = p[..., POSITIVE] + (p[..., NEUTRAL] if neutral == "positive" else 0)
    return right.astype(logits.dtype)


def aggregate_step_scores(probs: jax.Array, *, method: str, where: jax.Array) -> jax.Array:
    """Score of a solution from the scores of its steps.

        Π_i p_i  ("product": all steps are right)    or    min_i p_i  ("min": the weakest step)

    Source: Lightman et al. 2023 (arXiv 2305.20050), appendix F.2.

    Args:
      probs: p, [..., S] float.
      method: "product" or "min"; static under `jit`.
      where: True on the steps that are there, [..., S] bool.

    Returns:
      [...], one number a solution, unreduced; 1 for no steps.

    Raises:
      AssertionError: shapes differ, or a type is wrong.
      ValueError: the method is unknown.

    >>> probs, where = jnp.array([0.5, 0.5, 0.1]), jnp.array([True, True, False])
    >>> print(aggregate_step_scores(probs, method="product", where=where))
    0.25
    """
    check.same_shape(check.floats(probs=probs), check.masks(where=where))
    check.require(method in ("product", "min"), f"method={method!r} must be product or min")
    probs = select(where, probs, 1)
    return jnp.prod(probs, axis=-1) if method == "product" else jnp.min(probs, axis=-1)
