"""Models in Hugging Face folders: loaded straight into shards, saved for other tools to open.

Llama 1-3, OpenChineseLLaMA, SmolLM2, Mistral, Qwen2 and Qwen3, by folder or by hub name. What is
written opens in `transformers` and vLLM: policies as `...ForCausalLM`, reward models and critics
as `...ForSequenceClassification` with one label, whose scores lack a constant: see `save_model`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.files import hf_files
from rlhf_jax.models.files.hf_config import (
    CAUSAL_LM,
    SCALAR,
    architecture_of,
    config_from_hf,
    config_to_hf,
)
from rlhf_jax.models.files.hf_names import Leaf, check_tensors, leaves_on_file
from rlhf_jax.models.files.hf_shards import Shardings, assemble, transpose_into
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer

HEAD = "lm_head.weight"


def load_config(path_or_name: str | Path, *, max_length: int | None = None) -> ModelConfig:
    """Reads the configuration of a folder or hub name.

    Args:
      path_or_name: a folder, or a hub name such as "HuggingFaceTB/SmolLM2-135M".
      max_length: replaces the longest context that the file states.

    Raises:
      ValueError: no such folder or name, or a model that is not supported.
    """
    folder = hf_files.find_folder(path_or_name, hf_files.CONFIG_PATTERNS)
    file = folder / "config.json"
    return config_from_hf(hf_files.read_json(file), str(file), max_length=max_length)


def load_model(
    path_or_name: str | Path,
    *,
    dtype: str | None = None,
    remat: str = "none",
    attention: str = "xla",
    max_length: int | None = None,
    shardings: Shardings = None,
) -> Transformer:
    """Loads a language model.

    Every leaf is put together shard by shard from slices of the file: the host holds one shard
    and one tensor of one layer at a time.

    Args:
      path_or_name: a folder, or a hub name.
      dtype: type in memory, "float32" or "bfloat16"; None is the type of the file (float32 where
        that is float16 or not stated).
      remat: see `ModelConfig`.
      attention: see `ModelConfig`.
      max_length: replaces the longest context that the file states.
      shardings: a tree of `jax.sharding.Sharding` like the model's, or a function that makes one
        from the model's `jax.eval_shape`. None puts everything on the default device.

    Raises:
      ValueError: a folder, file or tensor is invalid; one line says which.
    """
    opened = _Opened(path_or_name, dtype, remat, attention, max_length)
    if opened.kind == SCALAR:
        raise ValueError(
            f"{path_or_name} is a reward or value model; read it with load_scalar_model, "
            "whose .trunk is the decoder"
        )
    model = jax.eval_shape(lambda: Transformer(opened.config, jax.random.key(0)))
    return opened.fill(model, shardings)


def load_scalar_model(
    path_or_name: str | Path,
    *,
    key: jax.Array | None = None,
    dtype: str | None = None,
    remat: str = "none",
    attention: str = "xla",
    max_length: int | None = None,
    shardings: Shardings = None,
) -> ScalarModel:
    """Loads a reward model or critic, or puts a new head on a language model.

    A `...ForSequenceClassification` folder that other tools wrote has no language-model head;
    its trunk is then marked as tied, which only `trunk.logits` would read.

    Args:
      path_or_name: a folder or hub name; `...ForSequenceClassification` with one label, or
        `...ForCausalLM`.
      key: random key of the new head; needed for, and only read with, `...ForCausalLM`.
      dtype: as for `load_model`.
      remat: as for `load_model`.
      attention: as for `load_model`.
      max_length: as for `load_model`.
      shardings: as for `load_model`, like the tree of a `ScalarModel`.

    Raises:
      ValueError: as for `load_model`; or a language model and no key.
    """
    opened = _Opened(path_or_name, dtype, remat, attention, max_length)
    if opened.kind == CAUSAL_LM and key is None:
        raise ValueError(
            f"{path_or_name} has no scalar head: pass key= for a new one, or load a folder that "
            "save_model wrote from a ScalarModel"
        )
    if opened.kind == SCALAR and HEAD not in opened.tensors.found:
        opened.config = dataclasses.replace(opened.config, tie_embeddings=True)
    model = jax.eval_shape(
        lambda: ScalarModel(Transformer(opened.config, jax.random.key(0)), jax.random.key(0))
    )
    return opened.fill(model, shardings, head_key=key)


def save_model(
    model: Transformer | ScalarModel,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `config.json`, safetensors and the tokenizer's files.

    The folder appears whole or not at all: it is written beside its place and then renamed; an
    earlier model there is replaced. The architecture follows from the configuration: Qwen2 with
    `qkv_bias`, Qwen3 with `qk_norm`, else Llama (a Mistral without sliding window is a Llama).

    A `ScalarModel` becomes `...ForSequenceClassification` with one label. The format has no
    bias: ours is kept in `config.json` as `{"rlhf_jax": {"score_bias": x}}`. Scores of other tools
    lack it: add x to what they give, as docs/run.md shows. The language-model head of an untied
    trunk is kept as `lm_head.weight`, which other tools leave out.

    Args:
      model: the model.
      folder: where to write; must be new, empty, or hold a saved model.
      tokenizer: a `transformers` tokenizer, or None. Its special tokens go into `config.json`.
      dtype: type on file of the decoder's weights; None is the model's.
      max_shard_bytes: larger models are split into files of at most this size.

    Raises:
      ValueError: the folder holds other files, or the tokenizer has more tokens than the model.
    """
    trunk = model.trunk if isinstance(model, ScalarModel) else model
    config = dataclasses.replace(trunk.config, dtype=dtype or trunk.config.dtype)
    raw = config_to_hf(config, CAUSAL_LM if trunk is model else SCALAR)
    if isinstance(model, ScalarModel):
        raw["rlhf_jax"] = {"score_bias": float(model.bias[...])}
    with hf_files.AtomicFolder(folder) as partial:
        if tokenizer is not None:
            check_vocabulary(tokenizer, config)
            tokenizer.save_pretrained(partial)
            special = _special_tokens(tokenizer)
            raw |= special
            generation = special | _ends(tokenizer)
            hf_files.write_json(partial / "generation_config.json", generation)
        hf_files.write_json(partial / "config.json", raw)
        hf_files.write_tensors(partial, _tensors_of(model, config), max_shard_bytes)


def check_vocabulary(tokenizer: Any, config: ModelConfig, where: str = "") -> None:
    """Checks that every token has a row in the embedding.

    Args:
      tokenizer: one of transformers.
      config: the model's configuration.
      where: folder of the model, for the message.

    Raises:
      ValueError: the tokenizer has more tokens than `config.vocab_size`.
    """
    size = len(tokenizer)
    if size > config.vocab_size:
        raise ValueError(
            f"{where and f'{where}: '}the tokenizer has {size} tokens, but the embedding only "
            f"{config.vocab_size} rows; use the tokenizer that the model was trained with"
        )


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens that transformers and vLLM look for."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name, None) for name in names}
    return {name: int(token) for name, token in ids.items() if token is not None}


def _ends(tokenizer: Any) -> dict[str, int | list[int]]:
    """What ends a response, as the sampler has it: with a chat template often not EOS alone."""
    if not getattr(tokenizer, "chat_template", None):
        return {}
    try:
        stops = [int(token) for token in stop_tokens(tokenizer)]
    except ValueError:  # Its template ends no turn. Nothing samples with it, yet it may be saved.
        return {}
    return {"eos_token_id": stops if len(stops) > 1 else stops[0]}


def _tensors_of(
    model: Transformer | ScalarModel, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors in the form that files have, one leaf on the host at a time."""
    for leaf, value in leaves_on_file(model):
        if not value.is_fully_addressable:
            raise ValueError("save_model needs all shards on one host; gather the model first")
        # The scalar head stays in its float32: a kilobyte that decides rankings.
        dtype = value.dtype if leaf.path == "kernel" else jnp.dtype(config.dtype)
        host = np.asarray(value)
        for name, tensor in zip(leaf.names, host if leaf.stacked else [host], strict=True):
            out = np.empty(leaf.file_shape, dtype)
            if leaf.transposed:
                transpose_into(out, tensor)
            else:
                out[...] = tensor.reshape(leaf.file_shape)
            yield name, out


class _Opened:
    """A folder with its configuration read and its tensors listed."""

    def __init__(self, path_or_name, dtype, remat, attention, max_length):
        patterns = hf_files.CONFIG_PATTERNS + hf_files.WEIGHT_PATTERNS
        self.folder = hf_files.find_folder(path_or_name, patterns)
        file = self.folder / "config.json"
        self.raw = hf_files.read_json(file)
        _, self.kind = architecture_of(self.raw, str(file))
        config = config_from_hf(self.raw, str(file), max_length=max_length)
        self.config = dataclasses.replace(
            config, dtype=dtype or config.dtype, remat=remat, attention=attention
        )
        self.tensors = hf_files.TensorFiles(self.folder)

    def fill(self, model: Any, shardings: Shardings, head_key: jax.Array | None = None) -> Any:
        """The abstract `model` with its arrays read, or drawn where the file has no head."""
        leaves = [leaf for leaf, _ in leaves_on_file(model)]
        if self.kind == CAUSAL_LM:
            leaves = [leaf for leaf in leaves if leaf.path != "kernel"]
        self._check(leaves)
        drawn = {"bias": self._bias()}
        if head_key is not None:
            drawn["kernel"] = ScalarModel(model.trunk, head_key).kernel[...]
        return assemble(model, leaves, self.tensors.read, shardings, drawn)

    def _bias(self) -> jax.Array:
        """The bias of the scalar head; other tools write none."""
        return jnp.asarray(self.raw.get("rlhf_jax", {}).get("score_bias", 0.0), jnp.float32)

    def _check(self, on_file: list[Leaf]) -> None:
        """Accounts for every tensor; a head that repeats the tied embedding may be there."""
        found = self.tensors.found
        tied = self.config.tie_embeddings and HEAD in found
        listed = {name: spec for name, spec in found.items() if not (tied and name == HEAD)}
        check_tensors(listed, on_file, str(self.folder))
        if tied and not self._same(HEAD, "model.embed_tokens.weight"):
            raise ValueError(
                f"{self.folder}: config.json ties the embeddings, but {HEAD} differs from the "
                "embedding; set tie_word_embeddings to false in config.json"
            )

    def _same(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two tensors are equal, a few rows at a time."""
        shape = self.tensors.found[one][1]
        if shape != self.tensors.found[other][1]:
            return False
        starts = range(0, shape[0], rows)
        chunks = [(slice(start, min(start + rows, shape[0])),) for start in starts]
        read = self.tensors.read
        return all(np.array_equal(read(one, chunk), read(other, chunk)) for chunk in chunks)
