"""Sizes of published models, for when neither their files nor the hub can be reached.

From the `config.json` of each model on the Hugging Face hub.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.config import ModelConfig, RopeScaling

_LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "intermediate_size": 11_008,
    "norm_eps": 1e-6,
    "tie_embeddings": False,
    "max_length": 2048,
}

PRESETS: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": _LLAMA_7B,
    "huggyllama/llama-13b": {
        **_LLAMA_7B,
        "hidden_size": 5120,
        "num_layers": 40,
        "num_heads": 40,
        "intermediate_size": 13_824,
    },
    "meta-llama/Llama-2-7b-hf": {**_LLAMA_7B, "norm_eps": 1e-5, "max_length": 4096},
    "meta-llama/Llama-3.1-8B": {
        **_LLAMA_7B,
        "vocab_size": 128_256,
        "num_kv_heads": 8,
        "intermediate_size": 14_336,
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": RopeScaling("llama3", factor=8.0),
        "max_length": 131_072,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "intermediate_size": 1536,
        "norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_embeddings": True,
        "max_length": 8192,
    },
}


def preset(name: str, **changes: Any) -> ModelConfig | None:
    """The sizes of a published model, or None where they are not known.

    The organisation may be left out, and case does not matter: `llama-7b`.

    Args:
      name: hub name.
      **changes: fields of `ModelConfig` to set, such as `dtype`.
    """
    for known, sizes in PRESETS.items():
        if name.lower() in (known.lower(), known.split("/")[1].lower()):
            return ModelConfig(**(sizes | changes))
    return None
