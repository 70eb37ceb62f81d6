"""One compiled program: its memory, its work, what it sends, and how fast it can be at best."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax

from rlhf_jax.preflight.hlo import Collective, Module
from rlhf_jax.preflight.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
      name: for the report.
      function: jitted, with `lower`.
      arguments: abstract arrays with shardings.
      calls: how often an iteration runs it.
      traffic: bytes that a device reads from its memory in one call, at least; the arguments,
        where that is more.
      steps: trip count of a loop whose end depends on the data: tokens to sample.
      weights: bytes of the parameters that the program updates; 0 for programs that update none.
      creates: its results, and not its arguments, stay on the devices.
      beside: bytes of a device that are taken while it runs by what is neither its own nor there
        between programs.
      divided: it goes through its rows in microbatches.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    calls: int = 1
    traffic: float = 0.0
    steps: int = 1
    weights: int = 0
    creates: bool = False
    beside: int = 0
    divided: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the compiler says of a program, per device, for one call.

    Attributes:
      name: name of the program.
      calls: how often an iteration runs it.
      held: bytes of it that are resident anyway: its arguments, or what it creates.
      peak: bytes while it runs, its arguments and what is `beside` it included.
      flops: operations of matrix products.
      traffic: see `Program`.
      collectives: all of them.
      compile_seconds: wall time of lowering and compiling.
      weights: see `Program`.
      kernels: library kernels, and how often each runs.
      counted: whether the compiler states how often each loop runs, except the one of `Program`;
        if not, only the memory is known. TPU modules do not state it.
      divided: see `Program`.
    """

    name: str
    calls: int
    held: int
    peak: int
    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    compile_seconds: float
    weights: int = 0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    counted: bool = True
    divided: bool = False

    @property
    def extra(self) -> int:
        """Bytes on top of what is resident: activations, gradients, caches."""
        return self.peak - self.held

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(collective.sent for collective in self.collectives)

    def bounds(self, topology: Topology) -> dict[str, float]:
        """Seconds that one call takes at least, for each thing that may limit it."""
        chip = topology.chip
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "links": sum(_seconds(c, topology) for c in self.collectives),
        }

    def seconds(self, topology: Topology) -> float:
        """The largest of the bounds: all else overlapped perfectly."""
        return max(self.bounds(topology).values())


def measure(program: Program, topology: Topology) -> Measured:
    """Lowers and compiles a program for the topology that its arguments are placed on."""
    start = time.perf_counter()
    compiled = program.function.lower(*program.arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    module = Module(compiled.as_text(), devices=topology.size, unknown_trips=program.steps)
    arguments = memory.argument_size_in_bytes
    added = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return Measured(
        name=program.name,
        calls=program.calls,
        held=memory.output_size_in_bytes if program.creates else arguments,
        # Temporaries are one allocation, so the sum is what is taken, even where less is in use.
        peak=arguments + added + program.beside,
        flops=module.flops(),
        traffic=max(program.traffic, arguments),
        collectives=tuple(module.collectives()),
        compile_seconds=seconds,
        weights=program.weights,
        kernels=module.kernels(),
        counted=len(module.unknown_loops) <= (program.steps > 1),
        divided=program.divided,
    )


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree with shardings: what `lower` takes in place of arrays."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _seconds(collective: Collective, topology: Topology) -> float:
    """The least time of a collective: within a node over its links, between nodes over adapters.

    Groups of at most a node's size are taken to lie within one. A larger group sends what all of
    a node's devices need from elsewhere through all of the node's adapters.
    """
    chip = topology.chip
    within = collective.sent / chip.link
    nodes = -(-collective.group // topology.per_node)
    if nodes == 1:
        return within
    share = (nodes - 1) / nodes * collective.group / (collective.group - 1)
    return max(within, collective.sent * share / (topology.per_node * chip.network))
