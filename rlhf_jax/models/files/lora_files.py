"""Adapters as files of the PEFT library, which other tools open beside the model they are for.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; A is `[r, in]` and B is
`[out, r]` on file. What PEFT has no name for is kept in the metadata of the safetensors: the bias
of a scalar head, and the fingerprint of the weights that the adapters were trained beside.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.models.files import hf_files
from rlhf_jax.models.files.hf_names import NAMES, collapse
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.lora import TARGETS, Adapters, Pair, matrix_of
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime.checksums import checksums

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# README.md is what other tools add.
_OWN_FILES = re.compile(rf"{re.escape(CONFIG)}|{re.escape(WEIGHTS)}|README\.md")
_PREFIX = "base_model.model."
_HEAD = _PREFIX + NAMES["kernel"]


def save_adapters(trained: Any, folder: str | Path, *, base: str, fingerprint: str) -> None:
    """Writes adapters, with the scalar head where there is one.

    Args:
      trained: `Adapters`, or a `ScalarModel` that has them in place of its trunk.
      folder: where to write, whole or not at all; adapters that are there are replaced.
      base: folder or hub name of the frozen model.
      fingerprint: that of the frozen model, see `fingerprint`.
    """
    scalar = isinstance(trained, ScalarModel)
    adapters = trained.trunk if scalar else trained
    tensors, metadata = {}, {"format": "pt", "trunk": fingerprint}
    for target in adapters.targets:
        pair = getattr(adapters, target)
        for part, stacked in (("A", pair.a), ("B", pair.b)):
            for layer, matrix in enumerate(np.asarray(stacked[...])):
                tensors[_name(target, layer, part)] = np.ascontiguousarray(matrix.T)
    if scalar:
        tensors[_HEAD] = np.asarray(trained.kernel[...])[None]
        metadata["score_bias"] = repr(float(trained.bias[...]))
    rank = adapters.rank
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapters.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": [NAMES[f"layers.{t}"].split(".")[-2] for t in adapters.targets],
        "modules_to_save": ["score"] if scalar else None,
        "bias": "none",
        "inference_mode": True,
    }
    with hf_files.AtomicFolder(folder, own=_OWN_FILES) as partial:
        hf_files.write_json(partial / CONFIG, config)
        save_file(tensors, partial / WEIGHTS, metadata=metadata)
        (partial / WEIGHTS).chmod(0o644)  # safetensors leaves it to the owner alone


def load_adapters(folder: str | Path, trunk: Transformer) -> Any:
    """Reads what `save_adapters` wrote.

    Args:
      folder: the folder.
      trunk: the model that they are for.

    Returns:
      `Adapters`, or a `ScalarModel` that has them in place of its trunk; arrays on the host.

    Raises:
      ValueError: files are missing or damaged, or the tensors are not those of this model.
    """
    folder = Path(folder)
    config = hf_files.read_json(folder / CONFIG)
    scalar, rank = config.get("task_type") == "SEQ_CLS", int(config.get("r", 0))
    modules = set(config.get("target_modules", ()))
    targets = [t for t in TARGETS if NAMES[f"layers.{t}"].split(".")[-2] in modules]
    wanted = {}
    for target in targets:
        layers, inputs, outputs = matrix_of(trunk, target).shape
        for layer in range(layers):
            wanted[_name(target, layer, "A")] = (rank, inputs)
            wanted[_name(target, layer, "B")] = (outputs, rank)
    if scalar:
        wanted[_HEAD] = (1, trunk.config.hidden_size)
    tensors, metadata = _read(folder / WEIGHTS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != wanted:
        odd = collapse(sorted(n for n in shapes | wanted if shapes.get(n) != wanted.get(n)))
        raise ValueError(
            f"{folder} does not fit the model: {odd[0]} differs in shape, is missing or unknown "
            f"({len(odd)} kinds of tensors do); use the model that the adapters were trained beside"
        )

    def stacked(target: str, part: str) -> np.ndarray:
        count = matrix_of(trunk, target).shape[0]
        return np.stack([tensors[_name(target, layer, part)].T for layer in range(count)])

    pairs = {target: Pair(stacked(target, "A"), stacked(target, "B")) for target in targets}
    adapters = Adapters(pairs, float(config["lora_alpha"]) / rank)
    if not scalar:
        return adapters
    model = ScalarModel(trunk)
    model.trunk = adapters  # type: ignore[assignment]  # adapters in place of their trunk
    model.kernel = nnx.Param(tensors[_HEAD][0])
    model.bias = nnx.Param(jnp.float32(metadata.get("score_bias", 0.0)))
    return model


def trained_beside(folder: str | Path) -> str:
    """The fingerprint of the weights that saved adapters were trained beside; empty if none."""
    file = Path(folder) / WEIGHTS
    return _read(file, tensors=False)[1].get("trunk", "") if file.exists() else ""


def fingerprint(model: Any) -> str:
    """A digest of a model's numbers and their types, the same however they are sharded."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
    }
    sums, digest = checksums(leaves), hashlib.sha256()
    for name, leaf in leaves.items():
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {sums[name]};".encode())
    return digest.hexdigest()


def _name(target: str, layer: int, part: str) -> str:
    """`base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`."""
    name = NAMES[f"layers.{target}"].replace("*", str(layer)).removesuffix("weight")
    return f"{_PREFIX}{name}lora_{part}.weight"


def _read(file: Path, *, tensors: bool = True) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(file, "np") as opened:
            names = opened.keys() if tensors else ()
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is missing, truncated or not a safetensors file ({error}); write it again"
        ) from error
