"""Does a run fit, what decides, how fast can it be, and does its traffic agree with theory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhf_jax.preflight.microbatches import Trial, largest
from rlhf_jax.preflight.programs import Measured
from rlhf_jax.preflight.topologies import Topology
from rlhf_jax.training.memory import Holding, show

# On top of what XLA plans: CUDA context, NCCL's buffers, kernels, workspaces of libraries.
RESERVE = 2 * 2**30
# Collectives of at most this many bytes are metrics and norms, not weights or gradients.
SMALL = 2**20
# Times the bytes of the parameters that an update exchanges (Rajbhandari et al. 2020, section 7):
# scattering gradients and gathering parameters are one each, an all-reduce is both; zero3 gathers
# in the forward and the backward pass.
THEORY = {"zero0": 2, "zero1": 2, "zero2": 2, "zero3": 3}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a preflight.

    Attributes:
      topology: the machine.
      mode: sharding mode.
      holdings: trees that stay on the devices between programs.
      programs: all programs of an iteration, or of an update.
      samples: responses of an iteration, or rows or pairs of an update.
      layers: layers of the models: a loop with as many trips is the loop over layers.
      counted_in: what the samples are, and what they are counted in.
      notes: what should be known of the shapes that were compiled.
      trials: numbers of microbatches that were tried.
    """

    topology: Topology
    mode: str
    holdings: tuple[Holding, ...]
    programs: tuple[Measured, ...]
    samples: int
    layers: int = 0
    counted_in: tuple[str, str] = ("responses", "iteration")
    notes: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()

    @property
    def resident(self) -> int:
        """Bytes per device between programs."""
        return sum(item.per_device for item in self.holdings)

    def peak(self, program: Measured) -> int:
        """Bytes per device while a program runs: its own need on top of what is resident."""
        return self.resident + program.extra

    @property
    def deciding(self) -> Measured:
        """The program with the highest peak."""
        return max(self.programs, key=self.peak)

    def trial(self, count: int, rows: int) -> Trial:
        """How these programs bear their number of microbatches, of `rows` each."""
        divided = [program for program in self.programs if program.divided]
        most = max(divided, key=self.peak)
        return Trial(count, rows, self.peak(most), self.peak(most) - self.room, most.name)

    @property
    def room(self) -> int:
        """Bytes per device that XLA may plan with."""
        return self.topology.chip.memory - RESERVE

    @property
    def missing(self) -> int:
        """Bytes per device that are missing; 0 or less when the run fits."""
        return self.peak(self.deciding) - self.room

    @property
    def fraction(self) -> float:
        """Share of the memory that must be given to XLA, rounded up to hundredths."""
        return -(-100 * self.peak(self.deciding) // self.topology.chip.memory) / 100

    @property
    def counted(self) -> bool:
        """Whether work, traffic and times are known; the memory always is."""
        return all(program.counted for program in self.programs)

    @property
    def seconds(self) -> float:
        """The least time of an iteration."""
        return sum(p.calls * p.seconds(self.topology) for p in self.programs)

    def traffic(self, program: Measured) -> dict[str, float] | None:
        """Bytes that an update exchanges against theory; None where there is none.

        In units of an all-gather of the parameters, so that the count of devices drops out.
        """
        if not program.weights or self.mode not in THEORY:
            return None
        exchanged = sum(
            c.times * c.size * (2 if c.kind == "all-reduce" else 1) for c in program.collectives
        )
        theory = THEORY[self.mode] * program.weights
        return {"bytes": exchanged, "theory": theory, "ratio": exchanged / theory}

    def gradient_all_reduces(self) -> list[str]:
        """Programs that all-reduce something as large as gradients, with its size."""
        return [
            f"{program.name}: {show(c.size)} x {c.times}"
            for program in self.programs
            for c in program.collectives
            if c.kind == "all-reduce" and c.size > SMALL
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything that is known, as numbers."""
        work = {
            "iteration_seconds_at_least": self.seconds,
            "samples_per_second_at_most": self.samples / self.seconds,
            "all_reduces": self.gradient_all_reduces(),
        }
        return {
            "topology": self.topology.name,
            "devices": self.topology.size,
            "mode": self.mode,
            "fits": self.missing <= 0,
            "missing_bytes": max(self.missing, 0),
            "memory_bytes": self.topology.chip.memory,
            "reserve_bytes": RESERVE,
            "memory_fraction": self.fraction,
            "resident_bytes": {item.name: item.per_device for item in self.holdings},
            "whole": {item.name: dict(item.whole) for item in self.holdings if item.whole},
            "deciding_program": self.deciding.name,
            "peak_bytes": self.peak(self.deciding),
            "samples": self.samples,
            "counted": self.counted,
            "counted_in": list(self.counted_in),
            "notes": list(self.notes),
            "microbatches": self._microbatches(),
            **(work if self.counted else {}),
            "programs": [self._program(program) for program in self.programs],
        }

    def _microbatches(self) -> dict[str, Any]:
        """What was tried, and the largest microbatch that fits."""
        tried = [dataclasses.asdict(one) | {"fits": one.fits} for one in self.trials]
        best = largest(self.trials)
        return {
            "tried": tried,
            "largest": None if best is None else {"count": best.count, "rows": best.rows},
        }

    def _program(self, program: Measured) -> dict[str, Any]:
        known = {
            "name": program.name,
            "calls": program.calls,
            "peak_bytes": self.peak(program),
            "extra_bytes": program.extra,
            "compile_seconds": round(program.compile_seconds, 1),
        }
        if not program.counted:
            return known
        return known | {
            "flops": program.flops,
            "sent_bytes": program.sent,
            "seconds_at_least": program.seconds(self.topology),
            "bounds": program.bounds(self.topology),
            "update_traffic": self.traffic(program),
            "kernels": program.kernels,
            "collectives": [
                {
                    **dataclasses.asdict(c),
                    "sent_bytes": c.sent,
                    "place": _place(c.loops, self.layers),
                }
                for c in program.collectives
            ],
        }


def text(verdict: Verdict) -> str:
    """The report as text."""
    topology, chip = verdict.topology, verdict.topology.chip
    lines = [f"\n{topology.name}: {topology.size} devices of {show(chip.memory)}, {verdict.mode}"]
    lines += [f"  {note}" for note in verdict.notes]
    lines.append("\nresident on each device")
    lines += _table((item.name, show(item.per_device)) for item in verdict.holdings)
    lines += _table([("together", show(verdict.resident))])
    for item in verdict.holdings:
        if item.whole and sum(size for _, size in item.whole) > SMALL:
            lines.append(f"  {item.name}: {len(item.whole)} leaves are whole ({item.reason})")
    if verdict.counted:
        lines += _work(verdict)
    else:
        lines.append("\npeak of each program")
        lines += _table((p.name, show(verdict.peak(p))) for p in verdict.programs)
        lines.append(
            f"\nmemory only: the compiler for {chip.name} does not tell how often its loops run, "
            "so work, traffic and least times are not known"
        )
    lines += _tried(verdict)
    lines.append(summary(verdict))
    return "\n".join(lines)


def _tried(verdict: Verdict) -> list[str]:
    """Numbers of microbatches that were tried, and the largest microbatch that fits."""
    if not verdict.trials:
        return []
    lines = ["\nmicrobatches that were tried"]
    for one in verdict.trials:
        fits = f"fits, {show(-one.missing)} free"
        fits = fits if one.fits else f"does not fit, {show(one.missing)} are missing"
        number = f"{one.count} of {one.rows} {verdict.counted_in[0]}"
        lines.append(f"  {number:<26} {show(one.peak):>10} in {one.program}: {fits}")
    best = largest(verdict.trials)
    found = "none of these"
    if best is not None:
        found = f"{best.rows} {verdict.counted_in[0]}, config.train.microbatches={best.count}"
    return [*lines, f"  the largest microbatch that fits: {found}", ""]


def _work(verdict: Verdict) -> list[str]:
    """What the programs compute and send, and how long that takes at least."""
    topology, (samples, unit) = verdict.topology, verdict.counted_in
    lines = ["\npeak of each program, its work and its least time"]
    lines += [f"  {'':<26} {'peak':>10} {'TFLOP':>8} {'sent':>10} {'seconds':>8}  bound by"]
    for program in verdict.programs:
        bounds = program.bounds(topology)
        lines.append(
            f"  {program.name:<26} {show(verdict.peak(program)):>10} {program.flops / 1e12:>8.1f} "
            f"{show(program.sent):>10} {program.seconds(topology):>8.3f}  "
            f"{max(bounds, key=bounds.__getitem__)}, {program.calls} an {unit}"
        )
    lines.append("\ncollectives above 1 MiB")
    for program in verdict.programs:
        lines += _collectives(program, verdict.layers)
    kernels = [
        f"  {program.name:<26} {name}, {times} runs"
        for program in verdict.programs
        for name, times in program.kernels.items()
    ]
    lines += ["\nlibrary kernels", *kernels] if kernels else []
    lines.append("\ntraffic of an update, against theory")
    for program in verdict.programs:
        traffic = verdict.traffic(program)
        if traffic is not None:
            lines.append(
                f"  {program.name}: {show(traffic['bytes'])}, theory {THEORY[verdict.mode]} x "
                f"parameters = {show(traffic['theory'])}, ratio {traffic['ratio']:.3f}"
            )
    reduced = verdict.gradient_all_reduces()
    lines.append("  all-reduces above 1 MiB: " + ("; ".join(reduced) if reduced else "none"))
    lines.append(
        f"\nan {unit} of {verdict.samples} {samples} takes at least {verdict.seconds:.1f} s: "
        f"at most {verdict.samples / verdict.seconds:.1f} samples/s"
    )
    return lines


def summary(verdict: Verdict) -> str:
    """One line: whether it fits, what decides, by how much."""
    peak = f"peak {show(verdict.peak(verdict.deciding))} a device in {verdict.deciding.name}"
    if verdict.missing > 0:
        return (
            f"DOES NOT FIT: {peak}, {show(verdict.missing)} more than the {show(verdict.room)} "
            f"that {verdict.topology.chip.name} leaves to XLA"
        )
    return (
        f"fits: {peak}, {show(-verdict.missing)} free; run with "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION={max(verdict.fraction, 0.9):.2f}"
    )


def _collectives(program: Measured, layers: int) -> list[str]:
    """One line for each kind, place and type."""
    groups: dict[tuple[str, str, str], list] = {}
    for collective in program.collectives:
        if collective.size > SMALL:
            place = _place(collective.loops, layers)
            groups.setdefault((collective.kind, collective.dtype, place), []).append(collective)
    return [
        f"  {program.name:<26} {kind:<15} {dtype:<5} {place:<22} {len(found):>3} of together "
        f"{show(sum(c.size for c in found))}, {sum(c.times for c in found)} runs, "
        f"{show(sum(c.sent for c in found))} sent"
        for (kind, dtype, place), found in groups.items()
    ]


def _place(loops: Sequence[int], layers: int) -> str:
    if not loops:
        return "outside of loops"
    return "in the loop over layers" if loops[-1] == layers else "in another loop"


def _table(rows) -> list[str]:
    return [f"  {name:<26} {value:>10}" for name, value in rows]
