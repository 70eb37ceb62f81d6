"""Llama-family GGUF files: weights, tokenizer and chat template, through the `gguf` package.

GGUF is what llama.cpp runs: one file with metadata, vocabulary and, mostly quantised, tensors.
Quantised weights are read as the float32 numbers that they encode; training them further is fine,
but they are not the weights from before the quantisation.

    python -m rlhf_jax.models.files.gguf MODEL.gguf FOLDER     # once; then load FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.models.config import ModelConfig, RopeScaling
from rlhf_jax.models.files.gguf_tokenizer import tokenizer_from_metadata
from rlhf_jax.models.files.hf_config import not_stretched, within_window
from rlhf_jax.models.files.hf_names import check_tensors, leaves_on_file
from rlhf_jax.models.files.hf_shards import Shardings, assemble
from rlhf_jax.models.files.hf_weights import check_vocabulary, save_model
from rlhf_jax.models.layers import rope_frequencies
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime.errors import MissingPackageError

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral and SmolLM are "llama" here.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
NAMES = {
    "embedding": "token_embd.weight",
    "layers.attention_norm": "blk.*.attn_norm.weight",
    "layers.q": "blk.*.attn_q.weight",
    "layers.k": "blk.*.attn_k.weight",
    "layers.v": "blk.*.attn_v.weight",
    "layers.o": "blk.*.attn_output.weight",
    "layers.q_bias": "blk.*.attn_q.bias",
    "layers.k_bias": "blk.*.attn_k.bias",
    "layers.v_bias": "blk.*.attn_v.bias",
    "layers.q_norm": "blk.*.attn_q_norm.weight",
    "layers.k_norm": "blk.*.attn_k_norm.weight",
    "layers.mlp_norm": "blk.*.ffn_norm.weight",
    "layers.gate": "blk.*.ffn_gate.weight",
    "layers.up": "blk.*.ffn_up.weight",
    "layers.down": "blk.*.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(
    path: str | Path,
    *,
    dtype: str = "float32",
    remat: str = "none",
    attention: str = "xla",
    max_length: int | None = None,
    shardings: Shardings = None,
) -> tuple[Transformer, Any]:
    """Loads a model and its tokenizer.

    Args:
      path: the file.
      dtype: type in memory, "float32" or "bfloat16".
      remat: see `ModelConfig`.
      attention: see `ModelConfig`.
      max_length: replaces the longest context that the file states.
      shardings: as for `hf_weights.load_model`.

    Returns:
      The model, and a `transformers` tokenizer whose pad token is not its end of sequence.

    Raises:
      ValueError: the file is truncated or no GGUF, or holds a model or tokenizer that is not
        supported; one line says which.
      MissingPackageError: the `gguf` package is not installed.
    """
    file = _GGUF(Path(path))
    config = file.config(dtype=dtype, remat=remat, attention=attention, max_length=max_length)
    model = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    leaves = [leaf for leaf, _ in leaves_on_file(model, NAMES)]
    found = {
        name: (tensor.tensor_type.name, tuple(map(int, reversed(tensor.shape))))
        for name, tensor in file.tensors.items()
        if name != ROPE_FACTORS  # in the configuration
    }
    check_tensors(found, leaves, str(path), types=TYPES)
    tokenizer = tokenizer_from_metadata(file.metadata, str(path))
    check_vocabulary(tokenizer, config)
    tokenizer.model_max_length = config.max_length

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return file.read(name, config)[index]

    return assemble(model, leaves, read, shardings), tokenizer


def gguf_to_hf(path: str | Path, folder: str | Path, *, dtype: str = "float32") -> None:
    """Writes a GGUF file as a Hugging Face folder, which loads in a fraction of the time.

    Args:
      path: the file.
      folder: where to write, see `hf_weights.save_model`.
      dtype: type on file; bfloat16 is half the size and rounds what the quantised numbers mean.
    """
    model, tokenizer = load_gguf(path)
    save_model(model, folder, tokenizer, dtype=dtype)


class _GGUF:
    """An open file: metadata as plain values, tensors by name."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise MissingPackageError(
                f"reading {path} needs the gguf package: pip install 'gguf>=0.17,<1'"
            ) from error
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give the path of a .gguf file")
        self.path, self._dequantize = path, gguf.quants.dequantize
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{path} is truncated or not a GGUF file ({reason}); fetch it again"
            ) from error
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path}: architecture {self.architecture} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)} (Mistral and SmolLM are llama in GGUF)"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A value of this architecture; an absent one without default is an error."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{self.path} has no {self.architecture}.{key}; it is incomplete")
        # float32 on file: 1e-5 reads as 9.999999747e-06; its shortest spelling is what was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def config(self, *, max_length: int | None, **changes: Any) -> ModelConfig:
        """The configuration.

        Raises:
          ValueError: a value is absent, or says what the decoder has no code for.
        """
        heads, width = self.get("attention.head_count"), self.get("embedding_length")
        head_dim = self.get("attention.key_length", width // heads)
        window = self.get("attention.sliding_window", 0)
        length = within_window(self.get("context_length"), max_length, window, str(self.path))
        for key, value, only in (
            ("rope.dimension_count", self.get("rope.dimension_count", head_dim), head_dim),
            ("expert_count", self.get("expert_count", 0), 0),
        ):
            if value != only:
                raise ValueError(f"{self.path}: {key}={value} is not supported; it must be {only}")
        theta = self.get("rope.freq_base", 10_000.0)
        config = ModelConfig(
            vocab_size=int(self._tensor(NAMES["embedding"]).shape[-1]),
            hidden_size=width,
            num_layers=self.get("block_count"),
            num_heads=heads,
            num_kv_heads=self.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=self.get("feed_forward_length"),
            rope_theta=theta,
            rope_scaling=self._rope_scaling(head_dim, theta),
            norm_eps=self.get("attention.layer_norm_rms_epsilon"),
            tie_embeddings=NAMES["lm_head"] not in self.tensors,
            qkv_bias=self.architecture == "qwen2",
            qk_norm=self.architecture == "qwen3",
            max_length=length,
            **changes,
        )
        return config if max_length else not_stretched(config, window, str(self.path))

    def read(self, name: str, config: ModelConfig) -> np.ndarray:
        """One tensor in float32, rows of queries and keys in the order of Hugging Face files."""
        tensor = self.tensors[name]
        values = self._dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        part = name.split(".")[-2]
        if self.architecture == "llama" and part in heads:
            values = split_halves(values, heads[part])
        return values

    def _tensor(self, name: str) -> Any:
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name}; it is incomplete")
        return self.tensors[name]

    def _rope_scaling(self, head_dim: int, theta: float) -> RopeScaling | None:
        """Linear scaling is in the metadata; that of Llama 3 in a tensor of divisors."""
        kind = self.get("rope.scaling.type", "none")
        if kind == "linear":
            return RopeScaling("linear", factor=self.get("rope.scaling.factor"))
        if kind != "none":
            raise ValueError(f"{self.path}: rope scaling {kind!r} is not supported; use linear")
        if ROPE_FACTORS not in self.tensors:
            return None
        divisors = np.asarray(self.tensors[ROPE_FACTORS].data, np.float32)
        # All Llama 3 releases share the other three numbers; what differs is refused.
        scaling = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, 8192)
        plain, scaled = (np.asarray(rope_frequencies(head_dim, theta, s)) for s in (None, scaling))
        if divisors.shape != plain.shape or not np.allclose(plain / divisors, scaled, rtol=1e-4):
            raise ValueError(f"{self.path}: {ROPE_FACTORS} is not a scaling of Llama 3")
        return scaling


def split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from pairs to halves.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face files rotate (i, i + H/2).

    Args:
      weight: `[heads * H, ...]`.
      heads: number of heads.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def main(arguments: list[str] | None = None) -> None:
    """Converts a file on the command line."""
    parser = argparse.ArgumentParser(description="Write a GGUF file as a Hugging Face folder.")
    parser.add_argument("file", help="the .gguf file")
    parser.add_argument("folder", help="the folder to write")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args(arguments)
    try:
        gguf_to_hf(given.file, given.folder, dtype=given.dtype)
    except (ValueError, ImportError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
