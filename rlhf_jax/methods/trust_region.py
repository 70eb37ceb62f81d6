"""One TRPO step: a natural gradient, held to a bound on the KL by a line search.

The algorithm takes two functions of the parameters and no model. Everything is `lax` control flow,
so the step can be jitted (close over the batch, or jit a function of parameters and batch).
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

Params = Any
Objective = Callable[[Params], jax.Array]


def trust_region_step(
    params: Params,
    surrogate: Objective,
    kl: Objective,
    *,
    max_kl: float | jax.Array,
    damping: float = 0.1,
    cg_iterations: int = 10,
    backtracks: int = 10,
    shrink: float = 0.5,
) -> tuple[Params, dict[str, jax.Array]]:
    """Moves params to a better surrogate within a KL distance, or leaves them where they are.

        x ≈ F⁻¹ g,   g = ∇J(θ),   F = ∇² KL(θ)
        θ′ = θ + a^j √(2δ / xᵀFx) x,   the first j with KL(θ′) ≤ δ and J(θ′) > J(θ)

    Products with F are a Jacobian-vector product of ∇KL, so F is never built; x comes from
    conjugate gradients (`jax.scipy.sparse.linalg.cg`), whose inner products flatten each array: one
    that is spread over devices along an axis other than its first is gathered for that.

    Source: Schulman et al. 2015 (arXiv 1502.05477), eq 14 and appendix C; slide "TRPO".

    Args:
      params: θ, any pytree of float arrays.
      surrogate: J, params -> [] float, maximised: a mean of `losses.trpo_surrogate`.
      kl: params -> [] float, mean KL(π_old ‖ π_θ) with π_old constant; it and its gradient are 0
        at `params`.
      max_kl: δ.
      damping: added to the diagonal of F, so that flat directions stay bounded.
      cg_iterations: upper limit on the iterations of conjugate gradients, a product with F each;
        it ends sooner once ‖Fx − g‖ ≤ 1e-5 ‖g‖. Two products more are made, before and after.
      backtracks: number of step lengths that are tried.
      shrink: a, the factor from one length to the next.

    Returns:
      new params, same structure and types; and scalars: policy/kl, policy/improvement,
      policy/step_fraction (a^j, 0 if no step was taken), policy/accepted, optim/grad_norm,
      optim/cg_residual (norm of Fx − g).

    Raises:
      ValueError: a hyper-parameter is out of range.

    >>> def gain(x):
    ...     return 3.0 * x
    >>> def divergence(x):
    ...     return 0.5 * x**2
    >>> x, info = trust_region_step(jnp.array(0.0), gain, divergence, max_kl=0.5, damping=0.0)
    >>> print(x, info["policy/kl"])
    1.0 0.5
    """
    _check_ranges(damping, cg_iterations, backtracks, shrink)
    before, gradient = jax.value_and_grad(surrogate)(params)
    # `cg` accumulates in the type of its vectors, which must not be that of half-precision weights.
    gradient = jax.tree.map(_widen, gradient)

    def fisher(vector: Params) -> Params:
        tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
        _, product = jax.jvp(jax.grad(kl), (params,), (tangent,))
        return jax.tree.map(lambda p, v: _widen(p) + damping * v, product, vector)

    solution, _ = cg(fisher, gradient, tol=1e-5, maxiter=cg_iterations)
    bent = fisher(solution)
    residual = jax.tree.map(operator.sub, bent, gradient)
    curvature = _dot(solution, bent)
    # Where F is flat along a direction, `cg` has divided by 0: no step then, rather than NaN.
    sound = (curvature > 0) & jnp.isfinite(curvature)
    length = jnp.sqrt(2 * max_kl / jnp.where(sound, curvature, 1))
    full_step = jax.tree.map(lambda x: jnp.where(sound, length * x, 0), solution)

    def trial(fraction: jax.Array) -> tuple[Params, jax.Array, jax.Array]:
        moved = jax.tree.map(lambda p, s: (p + fraction * s).astype(p.dtype), params, full_step)
        return moved, kl(moved), surrogate(moved) - before

    fraction, accepted = _line_search(trial, max_kl, backtracks, shrink)
    new_params, new_kl, improvement = trial(jnp.where(accepted, fraction, 0.0))
    return new_params, {
        "policy/kl": new_kl,
        "policy/improvement": improvement,
        "policy/step_fraction": jnp.where(accepted, fraction, 0.0),
        "policy/accepted": accepted,
        "optim/grad_norm": jnp.sqrt(_dot(gradient, gradient)),
        "optim/cg_residual": jnp.sqrt(_dot(residual, residual)),
    }


def _line_search(
    trial: Callable[[jax.Array], tuple[Params, jax.Array, jax.Array]],
    max_kl: float | jax.Array,
    backtracks: int,
    shrink: float,
) -> tuple[jax.Array, jax.Array]:
    """The first fraction 1, a, a², … that keeps the bound and improves; and whether there is one.

    A NaN anywhere compares as false, so such a step is refused.
    """

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, _, accepted = state
        return ~accepted & (count < backtracks)

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]):
        count, _, _ = state
        fraction = jnp.float32(shrink) ** count
        _, new_kl, improvement = trial(fraction)
        return count + 1, fraction, (new_kl <= max_kl) & (improvement > 0)

    start = (jnp.int32(0), jnp.float32(0), jnp.bool_(False))
    _, fraction, accepted = jax.lax.while_loop(unfinished, attempt, start)
    return fraction, accepted


def _dot(a: Params, b: Params) -> jax.Array:
    """Inner product over all leaves, in float32 at least."""
    products = jax.tree.map(lambda x, y: jnp.sum(_widen(x) * _widen(y)), a, b)
    return jax.tree.reduce(operator.add, products, jnp.float32(0))


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_ranges(damping: float, cg_iterations: int, backtracks: int, shrink: float) -> None:
    if damping < 0:
        raise ValueError(f"damping={damping} must not be negative")
    if cg_iterations < 1 or backtracks < 1:
        raise ValueError(f"{cg_iterations=} and {backtracks=} must be at least 1")
    if not 0 < shrink < 1:
        raise ValueError(f"shrink={shrink} must be between 0 and 1")
