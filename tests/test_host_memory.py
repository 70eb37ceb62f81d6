"""Memory that is freed comes back without page faults."""

import subprocess
import sys

import pytest

# Calls of a program with a temporary of 64 MiB; prints the page faults of the last fifty.
CALLS = """
import resource, sys
from rlhf_jax.host_memory import reuse_freed_memory
if sys.argv[1] == "reuse":
    assert reuse_freed_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.outer(x, x) @ x)
x = jnp.arange(4096.0)
for call in range(70):
    if call == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other C libraries")
def test_buffers_of_the_next_call_cause_no_page_faults():
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", CALLS, mode], capture_output=True, text=True, check=True
            ).stdout
        )
        for mode in ("as it is", "reuse")
    }
    assert faults["as it is"] > 50 * 16_000  # pages of 64 MiB at every call
    # Another thread frees a buffer, at times only after the next call has taken one more.
    assert faults["reuse"] < faults["as it is"] / 4
