"""The machine: its name, and how fast it multiplies matrices."""

import os
import platform
import time

import numpy as np

from rlhf_jax.runtime.run_info import processor


def describe(cores: int) -> dict:
    """Processor, cores used, and the peak of float32 matrix products in FLOP/s."""
    return {
        "cpu": processor(),
        "cores": cores,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "matmul_peak": matmul_peak(cores),
    }


def matmul_peak(cores: int, size: int = 2048, repeats: int = 12) -> float:
    """FLOP/s of the fastest of several square float32 matrix products in XLA."""
    import jax
    import jax.numpy as jnp

    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if before is not None:
        os.sched_setaffinity(0, sorted(before)[:cores])
    multiply = jax.jit(jnp.matmul)
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    jax.block_until_ready(multiply(a, a))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        best = min(best, time.perf_counter() - start)
    if before is not None:
        os.sched_setaffinity(0, before)
    return 2 * size**3 / best
