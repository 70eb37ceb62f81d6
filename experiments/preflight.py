"""Does a run fit on machines that are not here? Memory, traffic and least time, from XLA.

  python -m experiments.preflight --config configs/ppo_max.py:paper_en --topology a100-80g:8
  python -m experiments.preflight --config configs/dpo.py:paper_en,lora.rank=8 \
      --topology h100-80g:1
  python -m experiments.preflight --config configs/ppo_max.py:paper_en --topology a100-80g:8x8 \
      --scale_batch 8

Takes the config of any stage: sft, reward_model, dpo, ppo_max. Compiles every program of an update
or an iteration for the topology (no GPU, no driver, no weights), and then those that work in
microbatches with larger ones, or smaller ones, until it is known which is the largest that fits.
Writes JSON beside the other runs and ends with exit status 1 when the run does not fit. Topologies:
a100-80g:N, h100-80g:N, either with NODESxN, and v5p:XxYxZ; needs the extra `preflight` (or
`preflight-tpu`).
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import common
from configs import sft as sft_configs
from experiments import command, dpo, ppo_max, reward_model, sft
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.presets import PRESETS, preset
from rlhf_jax.preflight import microbatches
from rlhf_jax.preflight import verdict as verdicts
from rlhf_jax.preflight.microbatches import Trial
from rlhf_jax.preflight.ppo_run import PPORun
from rlhf_jax.preflight.programs import Program, measure
from rlhf_jax.preflight.run_shapes import RunShapes
from rlhf_jax.preflight.topologies import Topology, make_devices, parse_topology
from rlhf_jax.preflight.tuning_runs import DPORun, RewardModelRun, SFTRun
from rlhf_jax.preflight.verdict import Verdict
from rlhf_jax.runtime import files
from rlhf_jax.runtime.run_info import to_json
from rlhf_jax.runtime.sharding import Sharding, mesh_of
from rlhf_jax.training.run import peak_memory_gib


class Stage(NamedTuple):
    """An experiment whose runs can be compiled.

    Attributes:
      settings: the type of its settings.
      shapes: the run as shapes, from its settings, the sizes of its models, and where they lie.
      batch: keys of `config.train` that are multiplied where a batch is for more devices.
    """

    settings: type[Any]
    shapes: Callable[[Any, ModelConfig, Sharding], RunShapes]
    batch: tuple[str, ...]


def sft_shapes(settings: sft.Settings, sizes: ModelConfig, sharding: Sharding) -> SFTRun:
    """A run of SFT."""
    return SFTRun(
        settings.train,
        sizes,
        sharding,
        adapters=settings.lora,
        optimizer=settings.optimizer,
    )


def reward_model_shapes(
    settings: reward_model.Settings, sizes: ModelConfig, sharding: Sharding
) -> RewardModelRun:
    """A run of the reward model."""
    return RewardModelRun(
        settings.method(),
        sizes,
        sharding,
        train=settings.train,
        longest=settings.data.max_length,
        layers=settings.inputs.layers,
        adapters=settings.lora,
        optimizer=settings.optimizer,
    )


def dpo_shapes(settings: dpo.Settings, sizes: ModelConfig, sharding: Sharding) -> DPORun:
    """A run of DPO."""
    return DPORun(
        settings.dpo,
        sizes,
        sharding,
        train=settings.train,
        longest=settings.data.max_length,
        adapters=settings.lora,
        optimizer=settings.optimizer,
        sampling=settings.eval.sampling.of(settings.sampling),
        prompt_length=settings.data.longest_prompt,
        answered=settings.eval.batch,
    )


def ppo_shapes(settings: ppo_max.Settings, sizes: ModelConfig, sharding: Sharding) -> PPORun:
    """A run of PPO.

    Raises:
      ValueError: it trains adapters.
    """
    if settings.lora.rank:
        raise ValueError(
            f"lora.rank={settings.lora.rank}: the preflight compiles PPO runs that train every "
            "weight; pass --config.lora.rank=0 for an upper bound"
        )
    return PPORun(
        settings.method(),
        sizes,
        sharding,
        prompt_length=settings.data.longest_prompt,
        ptx_length=settings.data.ptx_length,
    )


_PAIRS = ("max_tokens", "min_pairs", "max_pairs")
STAGES = {
    "sft": Stage(sft.Settings, sft_shapes, ("minibatch",)),
    "reward_model": Stage(reward_model.Settings, reward_model_shapes, _PAIRS),
    "dpo": Stage(dpo.Settings, dpo_shapes, _PAIRS),
    "ppo_max": Stage(ppo_max.Settings, ppo_shapes, ("prompts_per_iteration", "minibatch")),
}


def stage_of(experiment: str | None) -> Stage:
    """The stage of that name.

    Raises:
      ValueError: none of `STAGES` has it.
    """
    if experiment not in STAGES:
        raise ValueError(
            f"this is a config of {experiment!r}: the preflight compiles runs of "
            f"{', '.join(STAGES)}; give one of their configs, such as configs/sft.py:paper_en"
        )
    return STAGES[experiment]


def model_sizes(settings: Any, name: str = "") -> ModelConfig:
    """Sizes of the run's models: from a name, from files, or from the settings of SFT.

    Files are those of the model that the run begins with, settings its own or those of its scale.

    Raises:
      ValueError: they are not found anywhere; says what to pass.
    """
    options = settings.model.keywords()
    folder = Path(getattr(settings.inputs, "reference", settings.inputs.model))
    if not name and (folder / "config.json").exists():
        return dataclasses.replace(hf_weights.load_config(folder), **options)
    if not name:
        stage = settings if isinstance(settings, sft.Settings) else _sft_stage(settings)
        name = stage.inputs.model
        if not name:
            sizes = dataclasses.asdict(stage.sizes)
            return ModelConfig(vocab_size=stage.tokenizer.vocab_size, **sizes, **options)
    if f"/{name}".endswith(f"/{common.SMOLLM2}"):
        name = "SmolLM2-135M"
    found = preset(name, **options)
    if found is not None:
        return found
    if (Path(name) / "config.json").exists():
        return dataclasses.replace(hf_weights.load_config(name), **options)
    raise ValueError(
        f"the sizes of {name} are not known here: pass --model with a folder or one of "
        f"{', '.join(PRESETS)}"
    )


def _sft_stage(settings: Any) -> sft.Settings:
    """The settings of SFT that make the models of a scale."""
    config = sft_configs.get_config(common.scale_of_stage("sft", settings.scale))
    return command.open_config("sft", config, sft.Settings)


def examine(settings: Any, topology: Topology, model: str = "") -> Verdict:
    """Compiles all programs, then those in microbatches with others; prints each once done."""
    run = make_run(settings, topology, model)
    verdict = compile_all(run, topology)
    return dataclasses.replace(
        verdict, trials=tuple(try_microbatches(settings, run, verdict, model))
    )


def try_microbatches(
    settings: Any, run: RunShapes, verdict: Verdict, model: str = ""
) -> list[Trial]:
    """Looks for the largest microbatch that fits, see `preflight.microbatches`.

    Args:
      settings: of the run.
      run: its shapes.
      verdict: on the run as it is.
      model: see `make_run`.
    """

    def attempt(count: int) -> Trial:
        changed = _changed(settings, "train", microbatches=count)
        other = make_run(changed, verdict.topology, model)
        print(f"trying {count} microbatches", flush=True)
        return compile_all(other, verdict.topology, lambda program: program.divided).trial(
            count, other.updated_rows // count
        )

    count = settings.train.microbatches
    return microbatches.search(
        verdict.trial(count, run.updated_rows // count), run.microbatch_counts, attempt
    )


def compile_all(
    run: RunShapes, topology: Topology, wanted: Callable[[Program], bool] = lambda program: True
) -> Verdict:
    """Compiles the programs of a run, or only those that are wanted."""
    measured = []
    for program in run.programs():
        if wanted(program):
            measured.append(measure(program, topology))
            print(f"compiled {program.name} in {measured[-1].compile_seconds:.0f} s", flush=True)
    return Verdict(
        topology,
        run.sharding.mode,
        tuple(run.holdings()),
        tuple(measured),
        samples=run.rows,
        layers=run.sizes.num_layers,
        counted_in=(run.samples, run.unit),
        notes=tuple(run.notes()),
    )


def make_run(settings: Any, topology: Topology, model: str = "") -> RunShapes:
    """The run on the devices of a topology.

    Args:
      settings: those of one of `STAGES`.
      topology: the machines.
      model: folder or hub name with the sizes of its models; empty finds them by `model_sizes`.

    Raises:
      ValueError: sizes that do not divide, or a run that cannot be compiled.
    """
    if not topology.chip.target and settings.model.attention == "cudnn":
        settings = _changed(settings, "model", attention="xla")
    mesh = mesh_of(make_devices(topology), tensor=settings.sharding.tensor)
    shapes = STAGES[settings.experiment].shapes
    return shapes(settings, model_sizes(settings, model), Sharding(mesh, settings.sharding.mode))


def _changed(settings: Any, group: str, **values: object) -> Any:
    """Settings with other values of a group."""
    changed = dataclasses.replace(getattr(settings, group), **values)
    return dataclasses.replace(settings, **{group: changed})


def remedies(settings: Any, run: RunShapes) -> Iterator[tuple[str, Any]]:
    """Changes that make a run smaller, each on top of those before it."""
    if settings.model.remat != "full":
        settings = _changed(settings, "model", remat="full")
        yield "config.model.remat=full", settings
    for count in run.microbatch_counts:
        if count >= 2 * settings.train.microbatches:
            settings = _changed(settings, "train", microbatches=count)
            yield f"config.train.microbatches={count}", settings
    if settings.sharding.mode in ("zero0", "zero1", "zero2") and run.sharding.mesh.size > 1:
        settings = _changed(settings, "sharding", mode="zero3")
        yield "config.sharding.mode=zero3", settings


def advise(settings: Any, verdict: Verdict, model: str) -> Iterator[str]:
    """Tries the remedies on the program with the highest peak until it fits; a line for each."""
    changes: dict[str, str] = {}
    deciding = verdict.deciding
    for change, changed in remedies(settings, make_run(settings, verdict.topology, model)):
        key, value = change.split("=")
        changes[key] = f"--{key}={value}"
        if key == "config.train.microbatches" and not deciding.divided:
            continue  # it has the same rows as before
        run = make_run(changed, verdict.topology, model)
        smaller = compile_all(run, verdict.topology, lambda program: program.name == deciding.name)
        if smaller.missing <= 0:  # then all the others have to fit as well
            smaller = compile_all(run, verdict.topology)
        yield f"with {' '.join(changes.values())}: {verdicts.summary(smaller)}"
        if smaller.missing <= 0:
            return
    yield "nothing tried makes it fit: use more devices, or fewer rows or tokens"


def scale_batch(settings: Any, factor: int) -> Any:
    """Multiplies the rows of an iteration and of an update: the same work for each device."""
    keys = STAGES[settings.experiment].batch
    scaled = {key: factor * getattr(settings.train, key) for key in keys}
    return _changed(settings, "train", **scaled)


def main(
    config: ConfigDict, topology: str, *, model: str = "", factor: int = 1, out: str = ""
) -> None:
    """Prints and saves the report; exits with status 1 when the run does not fit."""
    start = time.perf_counter()
    # Programs for other machines do not belong in this machine's cache.
    jax.config.update("jax_enable_compilation_cache", False)
    name = config.get("experiment")
    settings = scale_batch(command.open_config(name, config, stage_of(name).settings), factor)
    path = Path(out or f"{settings.workdir}/preflight-{topology.replace(':', '-')}.json")
    files.make_folder(path.parent)  # before the work
    verdict = examine(settings, parse_topology(topology), model)
    print(verdicts.text(verdict))
    usage = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(peak_memory_gib(), 2),
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
    }
    about = {"experiment": settings.experiment, "lora_rank": settings.lora.rank}
    report = to_json({**about, **verdict.to_json(), "preflight": usage})
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
