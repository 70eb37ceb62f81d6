"""How far GAE is from a memory-bound pass over the same data.

    python -m benchmarks.gae [--rows 512] [--length 1024] [--repeats 50]

Times, compiled, on [rows, length] float32: a sum over rewards, values and mask (the floor: every
byte is read once), and `gae` as trainers call it. The scan runs over time, so arrays are transposed
on the way in and out; on CPU that costs more when the length is a power of two (rows then share
cache sets), hence the second, odd length.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import gae


def batch(rows: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards, values and a ragged mask, [rows, length]."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, rows, length)).astype(np.float32)
    where = np.arange(length)[None] < rng.integers(1, length + 1, (rows, 1))
    return jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(where)


def floor(rewards: jax.Array, values: jax.Array, where: jax.Array) -> jax.Array:
    """Reads everything once."""
    return rewards.sum() + values.sum() + where.sum()


def advantages(rewards: jax.Array, values: jax.Array, where: jax.Array) -> jax.Array:
    """The function under test, [rows, length] to [rows, length]."""
    return gae(rewards, values, discount=0.99, lambda_=0.95, where=where)


def median_ms(calls: dict[str, Callable[[], jax.Array]], repeats: int) -> dict[str, float]:
    """Median time of each call; they take turns, so that noise falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):  # the first round warms up
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(all_times[1:])) for name, all_times in times.items()}


def main() -> None:
    """Prints one line per measurement: milliseconds, and the ratio to the floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    for length in (args.length, args.length - 24):
        data = batch(args.rows, length)
        inputs = {"sum": floor, "gae": advantages}
        calls = {
            name: functools.partial(jax.jit(function).lower(*data).compile(), *data)
            for name, function in inputs.items()
        }
        times = median_ms(calls, args.repeats)
        for name, ms in times.items():
            print(f"[{args.rows}, {length}] {name:4} {ms:7.3f} ms  {ms / times['sum']:5.2f} x sum")


if __name__ == "__main__":
    main()
