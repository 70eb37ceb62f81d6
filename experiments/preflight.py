"""Does a PPO run fit on machines that are not here? Memory, traffic and least time, from XLA.

  python -m experiments.preflight --config configs/ppo_max.py:paper_en --topology a100-80g:8
  python -m experiments.preflight --config configs/ppo_max.py:paper_en --topology a100-80g:8x8 \
      --scale_batch 8

Compiles every program of an iteration for the topology: no GPU, no driver, no weights. Writes JSON
beside the other runs and ends with exit status 1 when the run does not fit. Topologies: a100-80g:N,
h100-80g:N, either with NODESxN, and v5p:XxYxZ; needs the extra `preflight` (or `preflight-tpu`).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import common
from experiments import command
from experiments.ppo_max import Settings
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.presets import PRESETS, preset
from rlhf_jax.preflight import verdict as verdicts
from rlhf_jax.preflight.ppo_run import PPORun
from rlhf_jax.preflight.programs import measure
from rlhf_jax.preflight.topologies import Topology, make_devices, parse_topology
from rlhf_jax.preflight.verdict import Verdict
from rlhf_jax.runtime import files
from rlhf_jax.runtime.run_info import to_json
from rlhf_jax.runtime.sharding import Sharding, mesh_of
from rlhf_jax.training.run import peak_memory_gib


def model_sizes(settings: Settings, name: str = "") -> ModelConfig:
    """Sizes of the run's models: from `name`, from the SFT model's files, or from its stage.

    Raises:
      ValueError: they are not found anywhere; says what to pass.
    """
    options = settings.model.keywords()
    folder = Path(settings.inputs.reference)
    if not name and (folder / "config.json").exists():
        return dataclasses.replace(hf_weights.load_config(folder), **options)
    if not name:
        stage = importlib.import_module("configs.sft").get_config(_stage_scale(settings))
        name = stage.inputs.model
        if not name:
            sizes = {**stage.sizes, "vocab_size": stage.tokenizer.vocab_size}
            return ModelConfig(**sizes, **options)
    found = preset(name, **options)
    if found is not None:
        return found
    if (Path(name) / "config.json").exists():
        return dataclasses.replace(hf_weights.load_config(name), **options)
    raise ValueError(
        f"the sizes of {name} are not known here: pass --model with a folder or one of "
        f"{', '.join(PRESETS)}"
    )


def _stage_scale(settings: Settings) -> str:
    """The scale of configs/sft.py that makes the models of this one."""
    return common.scale_of_stage("sft", settings.scale)


def examine(settings: Settings, topology: Topology, model: str = "") -> Verdict:
    """Compiles all programs; prints each as it is done."""
    return compile_all(make_run(settings, topology, model), topology)


def compile_all(run: PPORun, topology: Topology, only: str = "") -> Verdict:
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


def make_run(settings: Settings, topology: Topology, model: str = "") -> PPORun:
    """The run on the devices of a topology.

    Raises:
      ValueError: the run trains adapters.
    """
    if settings.lora.rank:
        raise ValueError(
            f"lora.rank={settings.lora.rank}: the preflight compiles runs that train every "
            "weight; pass --config.lora.rank=0 for an upper bound"
        )
    if not topology.chip.target and settings.model.attention == "cudnn":
        settings = _changed(settings, "model", attention="xla")
    mesh = mesh_of(make_devices(topology), tensor=settings.sharding.tensor)
    return PPORun(
        settings.method(),
        model_sizes(settings, model),
        Sharding(mesh, settings.sharding.mode),
        prompt_length=settings.data.longest_prompt,
        ptx_length=settings.data.ptx_length,
    )


def _changed(settings: Settings, group: str, **values: object) -> Settings:
    """Settings with other values of a group."""
    changed = dataclasses.replace(getattr(settings, group), **values)
    return dataclasses.replace(settings, **{group: changed})


def remedies(settings: Settings, devices: int) -> Iterator[tuple[str, Settings]]:
    """Changes that make a run smaller, each on top of those before it."""
    if settings.model.remat != "full":
        settings = _changed(settings, "model", remat="full")
        yield "config.model.remat=full", settings
    train = settings.train
    while train.microbatch > devices and train.minibatch % (2 * train.microbatches) == 0:
        settings = _changed(settings, "train", microbatches=2 * train.microbatches)
        train = settings.train
        yield f"config.train.microbatches={train.microbatches}", settings
    if settings.sharding.mode in ("zero0", "zero1", "zero2"):
        settings = _changed(settings, "sharding", mode="zero3")
        yield "config.sharding.mode=zero3", settings


def advise(settings: Settings, verdict: Verdict, model: str) -> Iterator[str]:
    """Tries the remedies on the program with the highest peak until it fits; a line for each."""
    changes: dict[str, str] = {}
    for change, changed in remedies(settings, verdict.topology.size):
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


def scale_batch(settings: Settings, factor: int) -> Settings:
    """Multiplies the rows of an iteration and of an update: the same work for each device."""
    return _changed(
        settings,
        "train",
        prompts_per_iteration=settings.train.prompts_per_iteration * factor,
        minibatch=settings.train.minibatch * factor,
    )


def main(
    config: ConfigDict, topology: str, *, model: str = "", factor: int = 1, out: str = ""
) -> None:
    """Prints and saves the report; exits with status 1 when the run does not fit."""
    start = time.perf_counter()
    # Programs for other machines do not belong in this machine's cache.
    jax.config.update("jax_enable_compilation_cache", False)
    settings = scale_batch(command.open_config("ppo_max", config, Settings), factor)
    path = Path(out or f"{settings.workdir}/preflight-{topology.replace(':', '-')}.json")
    files.make_folder(path.parent)  # before the work
    verdict = examine(settings, parse_topology(topology), model)
    print(verdicts.text(verdict))
    usage = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(peak_memory_gib(), 2),
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
    }
    report = to_json({**verdict.to_json(), "preflight": usage})
    files.write_whole(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"{path}; {usage['seconds']:.0f} s, {usage['peak_memory_gib']:.1f} GiB of host memory")
    if verdict.missing > 0:
        for line in advise(settings, verdict, model):
            print(line, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    wanted = flags.DEFINE_string("topology", "a100-80g:8", "machines, such as a100-80g:2x8")
    named = flags.DEFINE_string("model", "", "folder or hub name with the sizes of the models")
    times = flags.DEFINE_integer("scale_batch", 1, "multiply the batch sizes by this")
    target = flags.DEFINE_string("out", "", "file for the JSON")
    # Whatever is plugged in here, this process only compiles.
    jax.config.update("jax_platforms", "cpu")
    command.cli(
        lambda config: main(
            config,
            wanted.value,
            model=named.value,
            factor=times.value,
            out=target.value,
        ),
        default="configs/ppo_max.py:paper_en",
    )
