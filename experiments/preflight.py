"""Does a PPO run fit on machines that are not here? Memory, traffic and least time, from XLA.

  python -m experiments.preflight --config configs/ppo_max.py:paper_en --topology a100-80g:8
  python -m experiments.preflight --config configs/ppo_max.py:paper_en --topology a100-80g:8x8 \
      --scale_batch 8

Compiles every program of an iteration for the topology: no GPU, no driver, no weights. Writes JSON
beside the other runs and ends with exit status 1 when the run does not fit. Topologies: a100-80g:N,
h100-80g:N, either with NODESxN, and v5p:XxYxZ; needs the extra `preflight` (or `preflight-tpu`).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import harness
from experiments.preflight_setup import Run, model_sizes
from rlhf_jax.preflight import verdict as verdicts
from rlhf_jax.preflight.programs import measure
from rlhf_jax.preflight.topologies import Topology, make_devices, parse_topology
from rlhf_jax.preflight.verdict import Verdict
from rlhf_jax.runtime.sharding import Sharding, mesh_of


def examine(config: ConfigDict, topology: Topology, model: str = "") -> Verdict:
    """Compiles all programs; prints each as it is done."""
    return compile_all(make_run(config, topology, model), topology)


def compile_all(run: Run, topology: Topology, only: str = "") -> Verdict:
    """Compiles the programs of a run, or only the one of that name."""
    measured = []
    for program in run.programs():
        if only in ("", program.name):
            measured.append(measure(program, topology))
            print(f"compiled {program.name} in {measured[-1].compile_seconds:.0f} s", flush=True)
    return Verdict(
        topology,
        run.sharding.mode,
        tuple(run.holdings()),
        tuple(measured),
        samples=run.rows,
        layers=run.sizes.num_layers,
    )


def make_run(config: ConfigDict, topology: Topology, model: str = "") -> Run:
    """The run on the devices of a topology."""
    if not topology.chip.target and config.model.attention == "cudnn":
        config.model.attention = "xla"
    mesh = mesh_of(make_devices(topology), tensor=config.sharding.tensor)
    return Run(config, model_sizes(config, model), Sharding(mesh, config.sharding.mode))


def remedies(config: ConfigDict, devices: int) -> Iterator[tuple[str, ConfigDict]]:
    """Changes that make a run smaller, each on top of those before it."""
    config = config.copy_and_resolve_references()
    if config.model.remat != "full":
        config.model.remat = "full"
        yield "config.model.remat=full", config
    while config.train.microbatch > devices:
        config.train.microbatch = max(config.train.microbatch // 2, devices)
        yield f"config.train.microbatch={config.train.microbatch}", config
    if config.sharding.mode in ("zero0", "zero1", "zero2"):
        config.sharding.mode = "zero3"
        yield "config.sharding.mode=zero3", config


def advise(config: ConfigDict, verdict: Verdict, model: str) -> Iterator[str]:
    """Tries the remedies on the program that decides until it fits; one line for each."""
    changes: dict[str, str] = {}
    for change, changed in remedies(config, verdict.topology.size):
        key, value = change.split("=")
        changes[key] = f"--{key}={value}"
        run = make_run(changed, verdict.topology, model)
        smaller = compile_all(run, verdict.topology, verdict.deciding.name)
        if smaller.missing <= 0:  # then all the others have to fit as well
            smaller = compile_all(run, verdict.topology)
        yield f"with {' '.join(changes.values())}: {verdicts.summary(smaller)}"
        if smaller.missing <= 0:
            return
    yield "nothing tried makes it fit: use more devices, or fewer rows or tokens"


def scale_batch(config: ConfigDict, factor: int) -> None:
    """Multiplies the rows of an iteration and of an update: the same work for each device."""
    for key in ("prompts_per_iteration", "minibatch", "microbatch"):
        config.train[key] *= factor


def main(
    config: ConfigDict, topology: str, *, model: str = "", factor: int = 1, out: str = ""
) -> None:
    """Prints and saves the report; exits with status 1 when the run does not fit."""
    start = time.perf_counter()
    # Programs for other machines do not belong into this machine's cache.
    jax.config.update("jax_enable_compilation_cache", False)
    scale_batch(config, factor)
    verdict = examine(config, parse_topology(topology), model)
    print(verdicts.text(verdict))
    usage = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(harness.peak_memory_gib(), 2),
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
    }
    path = Path(out or f"{config.workdir}/preflight-{topology.replace(':', '-')}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**verdict.to_json(), "preflight": usage}, indent=2) + "\n")
    print(f"{path}; {usage['seconds']:.0f} s, {usage['peak_memory_gib']:.1f} GiB of host memory")
    if verdict.missing > 0:
        for line in advise(config, verdict, model):
            print(line, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    wanted = flags.DEFINE_string("topology", "a100-80g:8", "machines, such as a100-80g:2x8")
    named = flags.DEFINE_string("model", "", "folder or hub name with the sizes of the models")
    times = flags.DEFINE_integer("scale_batch", 1, "multiply the batch sizes by this")
    target = flags.DEFINE_string("out", "", "file for the JSON")
    # Whatever is plugged in here, this process only compiles.
    jax.config.update("jax_platforms", "cpu")
    harness.cli(
        lambda config: main(
            config,
            wanted.value,
            model=named.value,
            factor=times.value,
            out=target.value,
        ),
        default="configs/ppo_max.py:paper_en",
    )
