"""Memory that is freed comes back without page faults, and in huge pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.runtime.host_memory import memory_limit


def printed(code: str, *arguments: str) -> str:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Calls of a program with a temporary of 64 MiB; prints the page faults of the last fifty.
CALLS = """
import resource, sys
from rlhf_jax.runtime.host_memory import reuse_freed_memory
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


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other C libraries")
def test_buffers_of_the_next_call_cause_no_page_faults():
    faults = {mode: int(printed(CALLS, mode)) for mode in ("as it is", "reuse")}
    assert faults["as it is"] > 50 * 16_000  # pages of 64 MiB at every call
    # Another thread frees a buffer, at times only after the next call has taken one more.
    assert faults["reuse"] < faults["as it is"] / 4


# Makes arrays of 128 MiB; prints the KiB of huge pages that the process then holds.
ARRAYS = """
import sys
from rlhf_jax.runtime.host_memory import reuse_freed_memory
if sys.argv[1] == "reuse":
    assert reuse_freed_memory()
import jax, jax.numpy as jnp
arrays = [jnp.ones(2**20).at[i].set(2).block_until_ready() for i in range(32)]
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SETTING.is_file() or "[madvise]" not in SETTING.read_text(),
    reason="huge pages are not for programs to ask for here",
)
def test_arrays_lie_in_huge_pages():
    held = {mode: int(printed(ARRAYS, mode)) for mode in ("as it is", "reuse")}
    assert held["as it is"] < 32 * 1024
    assert held["reuse"] > 96 * 1024


def test_without_address_space_the_rest_still_works():
    code = (
        "import resource; from rlhf_jax.runtime.host_memory import reuse_freed_memory;"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); assert reuse_freed_memory()"
    )
    printed(code)


# Frees 256 MiB that lie below an array that stays; prints the MiB held before and after.
RELEASES = """
from pathlib import Path
from rlhf_jax.runtime.host_memory import release_freed_memory, reuse_freed_memory
assert reuse_freed_memory()
import ctypes, os
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
block, above = libc.malloc(2**28), libc.malloc(2**20)
ctypes.memset(block, 1, 2**28)
ctypes.memset(above, 1, 2**20)
libc.free(block)
before = held()
assert not release_freed_memory(above=1.0)
assert held() > before - 2**24  # the 256 MiB are still here, whatever the interpreter does
assert release_freed_memory(above=0.0)
print(before // 2**20, held() // 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other C libraries")
def test_freed_memory_goes_back_above_the_share_only():
    before, after = map(int, printed(RELEASES).split())
    assert before > 256 and after < before - 240


MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB, UNLIMITED = 2**30, 2**63 - 4096  # what version 1 says where there is no limit
# Lines of /proc/self/cgroup, files below /sys/fs/cgroup, and what the process may have.
GROUPS = {
    "no limit": ("0::/job\n", {"job/memory.max": "max\n"}, MACHINE),
    "version 2": ("0::/job\n", {"job/memory.max": GIB}, GIB),
    "version 2, throttled first": (
        "0::/job\n",
        {"job/memory.max": GIB, "job/memory.high": GIB // 2},
        GIB // 2,
    ),
    "version 2, a group above": (
        "0::/slurm/job_1/step_0\n",
        {"slurm/job_1/step_0/memory.max": "max", "slurm/job_1/memory.max": GIB},
        GIB,
    ),
    "version 2 in a container": ("0::/\n", {"memory.max": GIB}, GIB),
    "version 2 in a container, by its path outside": (
        "0::/docker/0123\n",
        {"memory.max": GIB},
        GIB,
    ),
    "version 1": (
        "9:cpu:/x\n4:memory:/job\n",
        {"memory/job/memory.limit_in_bytes": GIB, "cpu/x/memory.limit_in_bytes": 1},
        GIB,
    ),
    "version 1, no limit": (
        "4:memory:/job\n0::/\n",
        {"memory/job/memory.limit_in_bytes": UNLIMITED},
        MACHINE,
    ),
    "version 1, a group above": (
        "4:cpuset,memory:/a/b:c\n",
        {"memory/a/b:c/memory.limit_in_bytes": UNLIMITED, "memory/a/memory.limit_in_bytes": GIB},
        GIB,
    ),
    "version 1 in a container": (
        "4:memory:/docker/0123\n",
        {"memory/memory.limit_in_bytes": GIB},
        GIB,
    ),
    "both": (
        "4:memory:/job\n0::/job\n",
        {"memory/job/memory.limit_in_bytes": 2 * GIB, "unified/job/memory.max": GIB},
        GIB,
    ),
    "more than there is": ("0::/job\n", {"job/memory.max": 4 * MACHINE}, MACHINE),
    "beside it": ("0::/job\n", {"other/memory.max": GIB}, MACHINE),
    "damaged": ("0::/job\n", {"job/memory.max": "?", "memory.max": "-1"}, MACHINE),
    "no groups": ("", {"memory.max": GIB}, MACHINE),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_limit_of_a_control_group_counts(tmp_path, name):
    lines, files, wanted = GROUPS[name]
    (tmp_path / "memory.max").write_text("1")  # outside of the mount
    for file, limit in files.items():
        path = tmp_path / "cgroup" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    (tmp_path / "groups").write_text(lines)
    assert memory_limit(tmp_path / "groups", tmp_path / "cgroup") == wanted


def test_without_control_groups_the_machine_counts(tmp_path):
    assert memory_limit(tmp_path / "groups", tmp_path / "cgroup") == MACHINE
    assert 0 < memory_limit() <= MACHINE


# What is freed goes back once it is above the share of the limit, far below that of the machine.
LIMITED = (
    RELEASES.replace(
        "before = held()",
        "import rlhf_jax.runtime.host_memory as host_memory\n"
        "limit = host_memory.memory_limit\n"
        "host_memory.memory_limit = lambda: 4 * held()\n"
        "before = held()",
    )
    .replace("above=1.0", "above=0.4")
    .replace("above=0.0", "above=0.2")
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other C libraries")
def test_freed_memory_goes_back_above_the_share_of_the_limit():
    before, after = map(int, printed(LIMITED).split())
    assert before > 256 and after < before - 240
