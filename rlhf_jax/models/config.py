"""The shape of a Llama-family decoder, as a frozen dataclass that refuses unknown keys."""

import dataclasses

from rlhf_jax.runtime.settings import check

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "full")
ATTENTIONS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    Attributes:
      kind: ``linear`` divides every frequency by `factor` (Chen et al. 2023, "Extending context
        window via positional interpolation"); ``llama3`` divides only the low frequencies and
        blends in between (Llama 3.1 release).
      factor: how many times longer the context becomes.
      low_freq_factor: ``llama3``: wavelengths above `original_max_length / low_freq_factor` are
        divided by `factor`.
      high_freq_factor: ``llama3``: wavelengths below `original_max_length / high_freq_factor` stay.
      original_max_length: ``llama3``: the context length of pre-training, in tokens.
    """

    kind: str = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                f"rope_scaling.kind={self.kind!r} is unknown; use 'linear' or 'llama3'"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder of the Llama family.

    Covers Llama 1-3, OpenChineseLLaMA, SmolLM2, Mistral (without sliding window), Qwen2
    (`qkv_bias`) and Qwen3 (`qk_norm`).

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width D of the residual stream.
      num_layers: decoder layers L.
      num_heads: query heads N.
      num_kv_heads: key and value heads K; N must be a multiple of K. 0 means N.
      head_dim: width H of one head. 0 means `hidden_size // num_heads`.
      intermediate_size: width F of the gated MLP.
      rope_theta: base of the rotary frequencies.
      rope_scaling: optional stretching of the rotary frequencies.
      norm_eps: epsilon of RMSNorm.
      tie_embeddings: whether the output projection is the embedding.
      qkv_bias: biases on the query, key and value projections (Qwen2).
      qk_norm: RMSNorm on queries and keys, per head (Qwen3).
      max_length: longest sequence in tokens that the model is meant for.
      init_std: standard deviation of the normal initialisation.
      dtype: type of weights and activations, "float32" or "bfloat16".
      remat: what the backward pass recomputes: "none" keeps every activation, "dots" keeps the
        results of matrix products, "full" keeps one residual-stream tensor per layer.
      attention: "xla", or "cudnn" for the flash kernel on NVIDIA GPUs in bfloat16.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_kv_heads: int = 0
    head_dim: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    max_length: int = 2048
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self):
        check(
            self,
            vocab_size="[1, inf)",
            hidden_size="[1, inf)",
            num_layers="[1, inf)",
            num_heads="[1, inf)",
            intermediate_size="[1, inf)",
            num_kv_heads="[0, inf)",
            head_dim="[0, inf)",
            max_length="[1, inf)",
            dtype=DTYPES,
            remat=REMATS,
            attention=ATTENTIONS,
        )
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
