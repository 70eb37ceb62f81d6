"""Running mean and variance that merge exactly, whatever the order and the sizes of the batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import select
from rlhf_jax.losses.masking import masked_mean, masked_var

AxisName = str | tuple[str, ...]


class RunningMoments(NamedTuple):
    """Count, mean and sum of squared deviations of everything seen. A pytree: save it whole.

    Fields:
      count: number of values seen, [] float32.
      mean: their mean, [] float32.
      m2: Σ (x − mean)², [] float32.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mean: jax.Array
    m2: jax.Array

    @classmethod
    def zeros(cls) -> "RunningMoments":
        """Nothing seen yet."""
        return cls(*jnp.zeros((3,), jnp.float32))

    @property
    def var(self) -> jax.Array:
        """Variance, biased (divided by n), as numpy's default: [] float32, 0 before any value."""
        return self.m2 / jnp.maximum(self.count, 1.0)

    @property
    def std(self) -> jax.Array:
        """Standard deviation: [] float32."""
        return jnp.sqrt(self.var)

    @property
    def std_or_one(self) -> jax.Array:
        """Standard deviation, or 1 where nothing has varied yet, to divide by: [] float32."""
        return jnp.sqrt(jnp.where(self.var > 0, self.var, 1.0))


def merge_moments(a: RunningMoments, b: RunningMoments) -> RunningMoments:
    """Moments of the concatenation of what a and b have seen.

        n = n_a + n_b,  d = μ_b − μ_a
        μ = μ_a + d n_b/n,  M2 = M2_a + M2_b + d² n_a n_b/n

    Source: Chan, Golub and LeVeque 1979, pairwise updating.

    Args:
      a: scalars.
      b: scalars.

    Returns:
      scalars; the order does not matter.

    Raises:
      AssertionError: fields are not scalars.

    >>> one = update_moments(RunningMoments.zeros(), jnp.array([1.0]))
    >>> two = update_moments(RunningMoments.zeros(), jnp.array([5.0]))
    >>> print(merge_moments(one, two).std)
    2.0
    """
    check_moments(a=a, b=b)
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1.0)
    delta = b.mean - a.mean
    mean = a.mean + delta * share
    between = jnp.square(delta) * a.count * share
    both = (a.count > 0) & (b.count > 0)  # else delta may be so large that its square is not 0 · d²
    return RunningMoments(count, mean, a.m2 + b.m2 + jnp.where(both, between, 0))


def merge_moments_across(moments: RunningMoments, *, axis_name: AxisName) -> RunningMoments:
    """Moments of what all devices have seen, inside `shard_map`, `pmap` or `vmap`.

        n = Σ_i n_i,  μ = Σ_i μ_i n_i/n
        M2 = Σ_i [M2_i + n_i (μ_i − μ)²]

    Each device brings what it alone has seen: a history that all of them share would count once
    for each. `update_moments(..., axis_name=...)` merges the batch and then takes it into that
    history. Arrays that are sharded under plain `jit` need none of this.

    Source: Chan, Golub and LeVeque 1979, for any number of parts.

    Args:
      moments: of this device, scalars.
      axis_name: name of the axis, or names; static under `jit`.

    Returns:
      scalars, the same on every device.

    Raises:
      AssertionError: fields are not scalars.

    >>> parts = jax.vmap(lambda x: update_moments(RunningMoments.zeros(), x))(jnp.array([1.0, 5.0]))
    >>> merge = jax.vmap(lambda m: merge_moments_across(m, axis_name="parts"), axis_name="parts")
    >>> print(merge(parts).std)
    [2. 2.]
    """
    check_moments(moments=moments)
    count = jax.lax.psum(moments.count, axis_name)
    share = moments.count / jnp.maximum(count, 1.0)
    mean = jax.lax.psum(moments.mean * share, axis_name)
    between = moments.count * jnp.square(moments.mean - mean)
    between = jnp.where(moments.count > 0, between, 0)
    return RunningMoments(count, mean, jax.lax.psum(moments.m2 + between, axis_name))


def update_moments(
    moments: RunningMoments,
    values: jax.Array,
    *,
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> RunningMoments:
    """Takes a batch of values into the running moments.

        moments ← merge(moments, (n, x̄, Σ (x − x̄)²) of the batch)

    Source: Chan, Golub and LeVeque 1979, pairwise updating.

    Args:
      moments: of all values before.
      values: x, any shape, float.
      where: True where a value counts, same shape, bool; None counts all.
      axis_name: of `shard_map`, `pmap` or `vmap`, over which the batch is spread, or several names;
        static under `jit`.

    Returns:
      moments of all values, these included: scalars, constant.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> moments = update_moments(RunningMoments.zeros(), jnp.array([1.0, 5.0]))
    >>> print(moments.count, moments.mean, moments.std)
    2.0 3.0 2.0
    """
    check.floats(values=values)
    where = jnp.ones(values.shape, bool) if where is None else where
    check.same_shape({"values": values}, check.masks(where=where))
    values = jax.lax.stop_gradient(select(where, values)).astype(jnp.float32)
    count = jnp.sum(where, dtype=jnp.float32)
    mean, var = masked_mean(values, where=where), masked_var(values, where=where)
    batch = RunningMoments(count, mean, var * count)
    if axis_name is not None:
        batch = merge_moments_across(batch, axis_name=axis_name)
    return merge_moments(moments, batch)


def check_moments(**all_moments: RunningMoments) -> None:
    """Each field is one number.

    Args:
      **all_moments: by the name that the caller knows them by.

    Raises:
      AssertionError: fields are not scalars.
    """
    for name, moments in all_moments.items():
        check.scalars(**{f"{name}.{field}": x for field, x in moments._asdict().items()})
