"""The one table of tensor names, and the check that a file holds exactly what a model needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

# Leaf of `Transformer` or `ScalarModel` -> name on file; "*" is the number of the layer.
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers.attention_norm": "model.layers.*.input_layernorm.weight",
    "layers.q": "model.layers.*.self_attn.q_proj.weight",
    "layers.k": "model.layers.*.self_attn.k_proj.weight",
    "layers.v": "model.layers.*.self_attn.v_proj.weight",
    "layers.o": "model.layers.*.self_attn.o_proj.weight",
    "layers.q_bias": "model.layers.*.self_attn.q_proj.bias",
    "layers.k_bias": "model.layers.*.self_attn.k_proj.bias",
    "layers.v_bias": "model.layers.*.self_attn.v_proj.bias",
    "layers.q_norm": "model.layers.*.self_attn.q_norm.weight",
    "layers.k_norm": "model.layers.*.self_attn.k_norm.weight",
    "layers.mlp_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.gate": "model.layers.*.mlp.gate_proj.weight",
    "layers.up": "model.layers.*.mlp.up_proj.weight",
    "layers.down": "model.layers.*.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "kernel": "score.weight",
}
# Kernels are [in, out] in the model and [out, in] on file.
TRANSPOSED = {"lm_head", *(f"layers.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down"))}
# Buffers of old conversions, computed here and not read.
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class Leaf(NamedTuple):
    """One leaf of a model and its place on file.

    Attributes:
      path: dotted attributes, "layers.q".
      shape: in the model; leaves of "layers" have the axis L first.
      table: path -> name on file.
    """

    path: str
    shape: tuple[int, ...]
    table: Mapping[str, str] = NAMES

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts layers."""
        return self.path.startswith("layers.")

    @property
    def transposed(self) -> bool:
        """Whether the file holds the last two axes the other way round."""
        return self.path in TRANSPOSED

    @property
    def names(self) -> list[str]:
        """Names on file, in the order of the layers."""
        name = self.table[self.path]
        if not self.stacked:
            return [name]
        return [name.replace("*", str(i)) for i in range(self.shape[0])]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of each of these tensors on file."""
        shape = self.shape[1:] if self.stacked else self.shape
        if self.path == "kernel":
            return (1, *shape)
        return shape[::-1] if self.transposed else shape


def path_of(key_path: tuple[Any, ...]) -> str:
    """Dotted path of a leaf; the trunk of a `ScalarModel` is named like a `Transformer`."""
    parts = [str(getattr(key, "name", key)) for key in key_path]
    return ".".join(part for part in parts if part not in ("value", "trunk"))


def leaves_on_file(
    model: Any, table: Mapping[str, str] = NAMES
) -> Iterator[tuple[Leaf, jax.Array]]:
    """The leaves of a model, or of its `jax.eval_shape`, that are tensors on file."""
    for key_path, value in jax.tree_util.tree_flatten_with_path(model)[0]:
        path = path_of(key_path)
        if path != "bias":  # of a ScalarModel: a number in config.json
            yield Leaf(path, tuple(value.shape), table), value


def check_tensors(
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    leaves: Iterable[Leaf],
    where: str,
    types: tuple[str, ...] = ("F32", "F16", "BF16"),
) -> None:
    """Accounts for every tensor.

    Args:
      found: name on file -> (type, shape).
      leaves: what the model needs.
      where: the file or folder, for the message.
      types: the types that can be read.

    Raises:
      ValueError: tensors are unknown, missing, misshapen or of another type; one message lists
        them all.
    """
    wanted = {name: leaf.file_shape for leaf in leaves for name in leaf.names}
    unknown = [name for name in found if name not in wanted and not IGNORED.search(name)]
    missing = [name for name in wanted if name not in found]
    bad = []
    for name, shape in wanted.items():
        if name not in found:
            continue
        dtype, found_shape = found[name]
        if tuple(found_shape) != shape:
            bad.append(f"{name} {list(found_shape)} instead of {list(shape)}")
        elif dtype not in types:
            bad.append(f"{name} of type {dtype} instead of {', '.join(types)}")
    problems = []
    for label, names in (("missing", missing), ("unknown", unknown), ("misshapen", bad)):
        if names:
            problems.append(f"{len(names)} {label}: {', '.join(collapse(names))}")
    if problems:
        raise ValueError(f"{where}: the tensors are not those of its config; {'; '.join(problems)}")


def collapse(names: Iterable[str]) -> list[str]:
    """Joins what differs in the number of the layer only: "layers.{0-3,7}.mlp"."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=layers\.)\d+", name)
        template = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        groups.setdefault(template, []).extend([int(number.group())] if number else [])
    return [
        template.replace("*", _ranges(sorted(numbers))) if numbers else template
        for template, numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` -> "{0-2,5}"; a single number has no braces."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if text.isdigit() else f"{{{text}}}"
