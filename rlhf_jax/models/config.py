"""The shape of a Llama-family decoder, as a frozen dataclass that refuses unknown keys."""

import dataclasses
import math

from rlhf_jax.runtime.settings import check

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "full")
ATTENTIONS = ("xla", "cudnn")
ROPE_KINDS = ("linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    The length that ``dynamic`` scaling reads is that of each document, without padding
    (transformers takes the widest row of a batch, and keeps what a longer one left). Beyond
    `original_max_length` every state depends on the whole document: training reads it whole, and
    nothing of that length is sampled, see `ModelConfig.depends_on_length`.

    Attributes:
      kind: ``linear`` divides every frequency by `factor` (Chen et al. 2023, "Extending context
        window via positional interpolation"); ``llama3`` divides only the low frequencies and
        blends in between (Llama 3.1 release); ``yarn`` does so along a ramp over the pairs of a
        head, and sharpens attention (Peng et al. 2023, "YaRN", sections 3.2 and 3.4; the ramp is
        that of their code, straight in the number of the pair); ``dynamic`` raises the base with
        the length of the sequence (section 3.3; the formula is that of transformers).
      factor: how many times longer the context becomes.
      low_freq_factor: ``llama3``: wavelengths above `original_max_length / low_freq_factor` are
        divided by `factor`.
      high_freq_factor: ``llama3``: wavelengths below `original_max_length / high_freq_factor` stay.
      original_max_length: ``llama3``, ``yarn`` and ``dynamic``: the context length of pre-training,
        in tokens.
      beta_fast: ``yarn``: pairs that turn more often than this within `original_max_length` stay.
      beta_slow: ``yarn``: pairs that turn less often are divided by `factor`.
      attention_factor: ``yarn``: by which queries and keys are multiplied; None follows from
        `factor`, `mscale` and `mscale_all_dim`.
      mscale: ``yarn``: weight of ln `factor`, read where `mscale_all_dim` is given too.
      mscale_all_dim: ``yarn``: the same of what it is divided by (DeepSeek-V2).
      truncate: ``yarn``: whether the ramp begins and ends at whole pairs.
    """

    kind: str = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        check(
            self,
            kind=ROPE_KINDS,
            factor="(0, inf)",
            original_max_length="[1, inf)",
            beta_fast="(0, inf)",
            beta_slow="(0, inf)",
        )

    @property
    def attention_scale(self) -> float:
        """By which the rotated queries and keys are multiplied: 1 but for ``yarn``.

        There it is 0.1 ln `factor` + 1, unless other numbers are given (section 3.4).
        """
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder of the Llama family.

    Covers Llama 1-3, OpenChineseLLaMA, SmolLM2, Mistral (within its sliding window), Qwen2
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
      max_length: longest sequence in tokens that the model is meant for, see also `longest`.
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
        if self.depends_on_length and self.head_dim <= 2:
            raise ValueError(f"head_dim={self.head_dim} must be above 2 with dynamic rope_scaling")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model reads: `max_length`, perhaps stretched."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind == "llama3":
            return self.max_length
        if scaling.kind == "linear":
            return int(self.max_length * scaling.factor)
        return max(self.max_length, int(scaling.original_max_length * scaling.factor))

    @property
    def longest_sampled(self) -> int:
        """The same of prompt and response together, where responses are sampled."""
        if self.rope_scaling is not None and self.depends_on_length:
            return self.rope_scaling.original_max_length
        return self.longest

    @property
    def depends_on_length(self) -> bool:
        """Whether rotary frequencies follow the length of a sequence: ``dynamic`` scaling.

        Beyond `original_max_length` tokens every new token changes the keys of those before it, so
        that no cache of keys serves: such sequences are read as a whole, and not sampled.
        """
        return self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"
