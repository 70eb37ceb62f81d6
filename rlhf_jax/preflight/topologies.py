"""Machines by name: their public figures, and abstract devices that XLA compiles for.

Sources: NVIDIA A100 and H100 datasheets (dense bfloat16), CUDA programming guide (limits by
compute capability), Google Cloud TPU v5p documentation.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from rlhf_jax.runtime.errors import MissingPackageError

PIP_GPU = 'pip install "rlhf_jax[preflight]"'
PIP_TPU = 'pip install "rlhf_jax[preflight-tpu]"'


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one accelerator.

    Attributes:
      name: as in a topology.
      memory: bytes.
      flops: dense bfloat16 operations a second.
      bandwidth: bytes a second from its memory.
      link: bytes a second that it sends to chips of the same node (one direction).
      network: bytes a second that it sends to other nodes (one direction).
      target: a GPU as XLA describes it, the text of a `GpuTargetConfigProto`; empty otherwise.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    target: str = ""


def _nvidia(name: str, major: int, **sizes: Any) -> str:
    """A `GpuTargetConfigProto` in text form; what is written here holds for both GPUs."""
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        **sizes,
    }
    lines = [f"  {key}: {value}" for key, value in info.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            "runtime_version { major: 12 minor: 9 patch: 0 }",
            f'device_description_str: "{name}"',
        ]
    )


CHIPS = {
    # 108 multiprocessors; NVLink 3 with 300 GB/s each way, a 200 Gbit/s adapter for each GPU.
    "a100-80g": Chip(
        "a100-80g",
        memory=81_221 * 2**20,
        flops=312e12,
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        target=_nvidia(
            "NVIDIA A100-SXM4-80GB",
            8,
            core_count=108,
            fpus_per_core=64,
            clock_rate_ghz=1.41,
            memory_bandwidth=2_039 * 10**9,
            l2_cache_size=40 * 2**20,
            device_memory_size=81_221 * 2**20,
            shared_memory_per_core=164 * 2**10,
            shared_memory_per_block_optin=163 * 2**10,
        ),
    ),
    # 132 multiprocessors; NVLink 4 with 450 GB/s each way, a 400 Gbit/s adapter for each GPU.
    "h100-80g": Chip(
        "h100-80g",
        memory=81_079 * 2**20,
        flops=989e12,
        bandwidth=3.352e12,
        link=450e9,
        network=50e9,
        target=_nvidia(
            "NVIDIA H100 80GB HBM3",
            9,
            core_count=132,
            fpus_per_core=128,
            clock_rate_ghz=1.98,
            memory_bandwidth=3_352 * 10**9,
            l2_cache_size=50 * 2**20,
            device_memory_size=81_079 * 2**20,
            shared_memory_per_core=228 * 2**10,
            shared_memory_per_block_optin=227 * 2**10,
        ),
    ),
    # Six links of a three-dimensional torus, 600 GB/s each way together.
    "v5p": Chip(
        "v5p", memory=95 * 2**30, flops=459e12, bandwidth=2.765e12, link=600e9, network=600e9
    ),
    # The devices of this process, for tests: the figures are made up, the memory is 16 GiB.
    "host": Chip("host", memory=16 * 2**30, flops=1e11, bandwidth=2e10, link=1e10, network=1e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips of one kind.

    Attributes:
      name: the name that was asked for.
      chip: its figures.
      nodes: machines.
      per_node: chips of a machine, or of a TPU slice.
    """

    name: str
    chip: Chip
    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        """All chips."""
        return self.nodes * self.per_node


def parse_topology(text: str) -> Topology:
    """Reads `a100-80g:8` (one node of 8), `a100-80g:4x8` (4 nodes of 8) or `v5p:2x2x2`.

    Raises:
      ValueError: an unknown chip, or sizes of another form.
    """
    name, _, sizes = text.partition(":")
    try:
        numbers = [int(part) for part in sizes.split("x")]
    except ValueError:
        numbers = []
    fits = len(numbers) == 3 if name == "v5p" else len(numbers) in (1, 2)
    if name not in CHIPS or not fits or min(numbers) < 1:
        raise ValueError(
            f"topology {text!r}: use one of {', '.join(CHIPS)} with sizes, as in a100-80g:8, "
            "h100-80g:4x8 (nodes x chips of each) or v5p:2x2x2"
        )
    if name == "v5p" or len(numbers) == 1:
        return Topology(text, CHIPS[name], 1, math.prod(numbers))
    return Topology(text, CHIPS[name], *numbers)


def make_devices(topology: Topology) -> list[jax.Device]:
    """Abstract devices to compile for.

    Raises:
      MissingPackageError: the compiler for these chips is not installed; names the pip command.
      ValueError: `host` with more devices than this process has.
    """
    if topology.chip.name == "host":
        if topology.size > jax.device_count():
            raise ValueError(f"{topology.name}: this process has {jax.device_count()} devices")
        return jax.devices()[: topology.size]
    if topology.chip.target:
        _require("jax_plugins.xla_cuda12", topology, PIP_GPU)
        described = topologies.get_topology_desc(
            topology.chip.name,
            "cuda",
            topology=f"1x{topology.nodes}x{topology.per_node}",
            target_config=topology.chip.target,
        )
        return list(described.devices)
    _require("libtpu", topology, PIP_TPU)
    # Else libtpu asks the metadata server of the cloud what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return list(topologies.get_topology_desc(topology.name, "tpu").devices)


def _require(module: str, topology: Topology, command: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise MissingPackageError(f"compiling for {topology.name} needs {module}: {command}")
