"""Reading a compiled HLO module: which collectives run how often, and how much arithmetic.

Everything is per device: a module after partitioning holds the shapes of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: name of its result.
      shape: its result's type, as text.
      opcode: such as `dot`.
      operands: names.
      rest: the text after the opening parenthesis.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of `COLLECTIVES`.
      size: bytes of the whole array that it makes or reduces, on each of the devices in a group.
      group: devices that exchange.
      times: how often it runs in one call of the program.
      loops: trip counts of the loops around it, the outermost first; empty outside loops.
      dtype: element type of the first operand.
      source: the operation in the program that it comes from.
    """

    kind: str
    size: int
    group: int
    times: int
    loops: tuple[int, ...]
    dtype: str
    source: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all calls, by a ring: the least that there can be."""
        if self.group == 1:
            return 0.0
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * passes * self.size * (self.group - 1) / self.group


class Module:
    """A parsed HLO module.

    Args:
      text: `compiled.as_text()`.
      devices: partitions of the module.
      unknown_trips: trip count of loops whose count is not known to the compiler (a loop that ends
        when all sequences have ended).
    """

    def __init__(self, text: str, *, devices: int, unknown_trips: int = 1):
        self._devices, self._unknown = devices, unknown_trips
        # Loops whose trip count the module does not state.
        self.unknown_loops: set[str] = set()
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        self._parse(text)
        # Computation -> the loops around each of its calls.
        self._contexts: dict[str, list[tuple[int, ...]]] = {}
        self._visit(self._entry, ())

    def _parse(self, text: str) -> None:
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                current = self._computations.setdefault(name, {})
                self._entry = name if line.startswith("ENTRY ") else self._entry
                continue
            match = _INSTRUCTION.match(line)
            if match:
                name, shape, opcode, rest = match.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", _until_closed(rest)))
                current[name] = Instruction(name, shape, opcode, operands, rest)

    def _visit(self, name: str, loops: tuple[int, ...]) -> None:
        if name not in self._computations:
            return
        self._contexts.setdefault(name, []).append(loops)
        for instruction in self._computations[name].values():
            for role, called in _CALLED.findall(instruction.rest):
                # Scalar reducers of reductions and collectives hold no work of their own.
                if role == "to_apply" and instruction.opcode != "call":
                    continue
                inner = loops
                if role == "body":
                    inner = (*loops, self._trips(instruction))
                for one in re.findall(r"[\w.\-]+", called):
                    self._visit(one, inner)

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'"?known_trip_count"?:? ?=?\{"?n"?:"?(\d+)', loop.rest)
        if not known:
            self.unknown_loops.add(loop.name)
        return int(known[1]) if known else self._unknown

    def _calls(self) -> Iterator[tuple[dict[str, Instruction], Instruction, tuple[int, ...]]]:
        for name, contexts in self._contexts.items():
            computation = self._computations[name]
            for loops in contexts:
                for instruction in computation.values():
                    yield computation, instruction, loops

    @property
    def loops(self) -> list[int]:
        """Trip counts of all loops, nested ones included."""
        return sorted(
            {trips for contexts in self._contexts.values() for c in contexts for trips in c}
        )

    def collectives(self) -> list[Collective]:
        """All collectives that run, with the loops around them."""
        found = []
        for computation, instruction, loops in self._calls():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or instruction.opcode.endswith("-done"):
                continue
            group = self._group(instruction.rest)
            shapes = [computation[name].shape for name in instruction.operands]
            size = sum(byte_size(shape) for shape in shapes)
            source = re.search(r'op_name="([^"]*)"', instruction.rest)
            dtype = _SHAPE.search(shapes[0])
            found.append(
                Collective(
                    kind=kind,
                    size=size * group if kind == "all-gather" else size,
                    group=group,
                    times=math.prod(loops),
                    loops=loops,
                    dtype=dtype[1] if dtype else "",
                    source=source[1] if source else "",
                )
            )
        return found

    def _group(self, rest: str) -> int:
        """Devices in one group, from any of the ways to write groups."""
        mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
        if mesh:
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
        if iota:
            return int(iota[2])
        listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
        if listed:
            return len(listed[1].split(","))
        return 2 if "source_target_pairs" in rest else self._devices

    def kernels(self) -> dict[str, int]:
        """Library kernels such as `__cudnn$fmhaSoftmax`, and how often each runs in one call."""
        found: collections.Counter[str] = collections.Counter()
        for _, instruction, loops in self._calls():
            target = re.search(r'custom_call_target="(__cu[^"]*)"', instruction.rest)
            if target:
                found[target[1]] += math.prod(loops)
        return dict(sorted(found.items()))

    def flops(self) -> float:
        """Floating-point operations of matrix products and attention kernels in one call."""
        return sum(
            math.prod(loops) * _flops(computation, instruction)
            for computation, instruction, loops in self._calls()
        )


def _flops(computation: dict[str, Instruction], instruction: Instruction) -> float:
    """Operations of one instruction: two for each multiplication and addition."""
    if instruction.opcode == "dot":
        left = _dimensions(computation[instruction.operands[0]].shape)
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        contracted = [left[int(a)] for a in axes[1].split(",") if a] if axes else []
        return 2.0 * math.prod(_dimensions(instruction.shape)) * math.prod(contracted)
    if instruction.opcode == "convolution":
        # TPUs write products this way: kernel elements for each output feature are multiplied.
        kernel = _dimensions(computation[instruction.operands[1]].shape)
        labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)
        out = kernel[labels[1].index("o")] if labels else 1
        return 2.0 * math.prod(_dimensions(instruction.shape)) * math.prod(kernel) / out
    if "__cudnn$fmha" in instruction.rest:
        # Queries [B, T, N, H]: QK' and PV; backward makes five such products.
        queries = _dimensions(computation[instruction.operands[0]].shape)
        length = _dimensions(computation[instruction.operands[1]].shape)[1]
        products = 5 if "Backward" in instruction.rest else 2
        return 2.0 * products * math.prod(queries) * length
    return 0.0


def byte_size(shape: str) -> int:
    """Bytes of a type, or of all parts of a tuple."""
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in _SHAPE.findall(shape)
    )


def _dimensions(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def _until_closed(rest: str) -> str:
    """The operands: the text before the closing parenthesis."""
    depth = 1
    for position, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:position]
    return rest
