"""Adapters as files of the PEFT library, which other tools open beside the model they are for.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; A is `[r, in]` and B is
`[out, r]` on file. What PEFT has no name for is kept in the metadata of the safetensors: the bias
of a scalar head, and the fingerprint of the weights that the adapters were trained beside.
"""

from __future__ import annotations

import functools
import hashlib
import os
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

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = _PREFIX + NAMES["kernel"]


def save_adapters(trained: Any, folder: str | Path, *, base: str, fingerprint: str) -> None:
    """Writes adapters, with the scalar head where there is one.

    Args:
      trained: `Adapters`, or a `ScalarModel` that has them in place of its trunk.
      folder: where to write; its two files are replaced.
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{WEIGHTS}.partial"
    save_file(tensors, scratch, metadata=metadata)
    os.replace(scratch, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets only the owner read it
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
    hf_files.write_json(folder / CONFIG, config)


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
    leaves = jax.tree_util.tree_leaves_with_path(model)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    digest = hashlib.sha256()
    for (path, leaf), number in zip(leaves, sums, strict=True):
        shown = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"{shown} {leaf.dtype} {leaf.shape} {int(number)};".encode())
    return digest.hexdigest()


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """A checksum of each array's bits, in integers: no order of addition changes it."""
    return [_checksum(leaf) for leaf in leaves]


def _checksum(x: jax.Array) -> jax.Array:
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # An odd weight for each place, so that numbers that change places change the sum.
    place = functools.reduce(
        lambda total, axis: (
            total * jnp.uint32(1_000_003) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        ),
        range(x.ndim),
        jnp.zeros(x.shape, jnp.uint32),
    )
    weight = (place * jnp.uint32(2_654_435_761)) | jnp.uint32(1)
    return jnp.sum((bits ^ (bits >> 15)) * weight, dtype=jnp.uint32)


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
