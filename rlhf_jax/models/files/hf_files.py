"""Folders with `config.json` and safetensors: found, read slice by slice, and written whole.

Pickled weights are never opened and remote code is never run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.runtime.files import naming, put, sync

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_PATTERNS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
CONFIG_PATTERNS = ("config.json",)
# What a saved model may hold; a folder with anything else is not replaced.
OWN_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)"
    r"\.json|merges\.txt|tokenizer\.model|chat_template\.(jinja|json)|additional_chat_templates"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)


def find_folder(path_or_name: str | Path, patterns: Iterable[str]) -> Path:
    """Returns a local folder; anything else is looked up on the Hugging Face hub.

    Args:
      path_or_name: a folder, or a name such as "HuggingFaceTB/SmolLM2-135M".
      patterns: the files to fetch from the hub.

    Raises:
      ValueError: neither a folder nor a hub name, or neither the hub nor its cache has it.
    """
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) or folder.exists():
        raise ValueError(
            f"{name} is not a folder, nor a name on the Hugging Face hub (OWNER/MODEL)"
        )
    from huggingface_hub import snapshot_download  # slow to import, and needed for names only

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # The hub's client raises a dozen types, some from its HTTP library.
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name} is no local folder, and neither the Hugging Face hub nor its cache gave it "
            f"({type(error).__name__}: {reason}); check name, network and HF_TOKEN"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: no such file, or not a JSON object.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no {file.name}; it is not a Hugging Face folder")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fetch or write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


class TensorFiles:
    """The tensors of a folder, in one `model.safetensors` or in several with an index.

    Only headers are read until `read` is called. Each read opens and closes its file, so that
    pages of the memory map never add up.

    Args:
      folder: the folder.

    Raises:
      ValueError: no safetensors, a file that the index names is absent, or one is truncated.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self.found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in _weight_files(folder):
            try:
                with safe_open(file, "np") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a mapping)
                        part = opened.get_slice(name)
                        self.file_of[name] = file
                        self.found[name] = (part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is truncated or not a safetensors file ({error}); fetch it again"
                ) from error

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of one slice of one tensor, in the type of the file."""
        with safe_open(self.file_of[name], "np") as opened:
            return opened.get_slice(name)[index]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; one file goes before an index, as in transformers.

    A model that is saved again as one file leaves the old index, perhaps with the old shards.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} must hold a weight_map of tensor to file names")
        files = [folder / Path(str(name)).name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(f"{folder / INDEX} names files that are absent: {', '.join(absent)}")
        return files
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    hint = "; pickles are never read, convert them with save_pretrained" if pickles else ""
    held = f" (only {pickles[0]})" if pickles else ""
    raise ValueError(f"{folder} holds no {WEIGHTS} and no {INDEX}{held}{hint}")


def write_tensors(
    folder: Path, tensors: Iterator[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes tensors as they come: one file, or numbered files with an index.

    At most one file's tensors are held at a time.
    """
    parts: list[tuple[Path, list[str]]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        file = folder / f"part-{len(parts)}.safetensors"
        file.touch()
        mode = file.stat().st_mode
        save_file(pending, file, metadata={"format": "pt"})
        file.chmod(mode)  # safetensors lets only the owner read it
        parts.append((file, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        held = sum(each.nbytes for each in pending.values())
        if pending and held + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        parts[0][0].rename(folder / WEIGHTS)
        return
    weight_map = {}
    for i, (file, names) in enumerate(parts, start=1):
        numbered = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        file.rename(folder / numbered)
        weight_map.update(dict.fromkeys(names, numbered))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes an indented JSON object."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class AtomicFolder:
    """`with AtomicFolder(folder) as partial:` write into `partial`; it becomes `folder` at the end.

    A run that is killed, or an exception, leaves `folder` as it was; what it leaves beside it
    (".NAME.partial") is removed by the next save. An earlier model at `folder` is replaced.

    Args:
      folder: Where to.
      own: What may be there and is replaced.

    Raises:
      ValueError: `folder` holds files that no saved model has; they would be lost.
      OSError: it cannot be written; names `folder`.
    """

    def __init__(self, folder: str | Path, own: re.Pattern[str] = OWN_FILES):
        self.own = own
        self.folder = Path(folder).expanduser().absolute()
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self.old = self.folder.with_name(f".{self.folder.name}.old")

    def check(self) -> None:
        """Checks that a model can be saved here, as `with` does; for before the work that it takes.

        Raises:
          ValueError: see above.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; give a folder to save into")
        held = sorted(file.name for file in self.folder.glob("*"))
        foreign = [name for name in held if not self.own.fullmatch(name)]
        if foreign:
            raise ValueError(
                f"{self.folder} holds {foreign[0]}, which is no part of a saved model and would "
                "be lost; save into a new folder"
            )

    def __enter__(self) -> Path:
        self.check()
        self._put_back()  # a kill may have come between the two renames
        shutil.rmtree(self.partial, ignore_errors=True)
        with naming(self.folder):
            self.partial.mkdir(parents=True)
        return self.partial

    def _put_back(self) -> None:
        if self.old.exists() and not self.folder.exists():
            self.old.rename(self.folder)

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            # What is written in Rust, tensors and tokenizers, has errors of its own types.
            found = re.search(r"\(os error (\d+)\)", str(error))
            code = error.errno if isinstance(error, OSError) else found and int(found[1])
            if code:
                raise OSError(code, os.strerror(code), str(self.folder)) from error
            return
        shutil.rmtree(self.old, ignore_errors=True)
        with naming(self.folder):
            sync(self.partial)  # now, so that there is no wait between the two renames
            if self.folder.exists():
                self.folder.rename(self.old)
            try:
                put(self.partial, self.folder)
            except BaseException:
                self._put_back()
                raise
        shutil.rmtree(self.old, ignore_errors=True)
