"""`config.json` of Hugging Face folders, read into a `ModelConfig` and written from one.

Read without `transformers`, so that no remote code can run and both spellings of the rotary
parameters are understood: `rope_theta` with `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5).
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

from rlhf_jax.models.config import ROPE_KINDS, ModelConfig, RopeScaling


class Family(NamedTuple):
    """What `config.json` leaves out for one `model_type`, as transformers fills it in."""

    prefix: str  # of the class names: prefix + "ForCausalLM"
    max_length: int
    head_dim: int = 0  # 0: hidden_size // num_heads


FAMILIES = {
    "llama": Family("Llama", 2048),
    "mistral": Family("Mistral", 131_072),
    "qwen2": Family("Qwen2", 32_768),
    "qwen3": Family("Qwen3", 32_768, head_dim=128),
}
CAUSAL_LM, SCALAR = "ForCausalLM", "ForSequenceClassification"

# Keys of `rope_parameters` -> fields of RopeScaling, as each kind reads them.
ORIGINAL = "original_max_position_embeddings"
_FACTOR, _LENGTH = {"factor": "factor"}, {ORIGINAL: "original_max_length"}
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
_ROPE_KEYS = {
    "linear": _FACTOR,
    "dynamic": _FACTOR | _LENGTH,
    "yarn": _FACTOR | _LENGTH | {key: key for key in _YARN},
    "llama3": _FACTOR | {key: key for key in ("low_freq_factor", "high_freq_factor")} | _LENGTH,
}
_ROPE_TYPES = {ORIGINAL: int, "truncate": bool}

_log = logging.getLogger(__name__)


def architecture_of(raw: dict[str, Any], where: str) -> tuple[str, str]:
    """Family and kind of a `config.json`: `("llama", "ForCausalLM")`.

    Raises:
      ValueError: an architecture that is not supported; the message lists those that are.
    """
    supported = {
        (family.prefix + kind).lower(): (model_type, kind)
        for model_type, family in FAMILIES.items()
        for kind in (CAUSAL_LM, SCALAR)
    }
    named = raw.get("architectures") or []
    if not named and raw.get("model_type") in FAMILIES:
        return raw["model_type"], CAUSAL_LM
    # Case is ignored: the first Llama conversions wrote "LLaMAForCausalLM".
    if len(named) == 1 and str(named[0]).lower() in supported:
        return supported[str(named[0]).lower()]
    shown = ", ".join(map(str, named)) or f"model_type {raw.get('model_type')}"
    prefixes = ", ".join(family.prefix for family in FAMILIES.values())
    raise ValueError(
        f"{where}: architecture {shown} is not supported; supported are {prefixes}, "
        f"each with {CAUSAL_LM} or {SCALAR}"
    )


def config_from_hf(
    raw: dict[str, Any], where: str = "config.json", *, max_length: int | None = None
) -> ModelConfig:
    """Reads a parsed `config.json`.

    Args:
      raw: the parsed file.
      where: the name of the file, for messages.
      max_length: replaces the file's `max_position_embeddings`. A model whose attention slides
        over fewer tokens than that is used within its window; that is said once for each file.

    Returns:
      The configuration; `dtype` is the file's where it is float32 or bfloat16, and float32, which
      loses nothing, for float16 and for files that say nothing.

    Raises:
      ValueError: a key is missing, or the model has a part that the decoder does not.
    """
    model_type, _ = architecture_of(raw, where)
    family = FAMILIES[model_type]
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    absent = [key for key in (*sizes, "intermediate_size") if not isinstance(raw.get(key), int)]
    if absent:
        raise ValueError(f"{where} must give a whole number for {', '.join(absent)}")
    _check_supported(raw, where)
    length = raw.get("max_position_embeddings") or family.max_length
    length = within_window(length, max_length, _window(raw, model_type), where)
    dtype = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    theta, scaling = _rope_from_hf(raw, where)
    config = ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or 0,
        head_dim=raw.get("head_dim") or family.head_dim,
        intermediate_size=raw["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        max_length=length,
        init_std=raw.get("initializer_range", 0.02),
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
    )
    return config if max_length else not_stretched(config, _window(raw, model_type), where)


def config_to_hf(config: ModelConfig, kind: str = CAUSAL_LM) -> dict[str, Any]:
    """Writes the `config.json` of a model; the inverse of `config_from_hf`.

    Raises:
      ValueError: both `qkv_bias` and `qk_norm`, which no supported family has.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("qkv_bias=True with qk_norm=True has no Hugging Face architecture")
    model_type = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[model_type].prefix + kind],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "torch_dtype": config.dtype,
        **_rope_to_hf(config),
    }
    if kind == SCALAR:
        # One label, read as a number: transformers and vLLM then apply no sigmoid.
        raw |= {"id2label": {"0": "SCORE"}, "label2id": {"SCORE": 0}, "problem_type": "regression"}
    return raw


def _rope_from_hf(raw: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base of the rotary frequencies and their scaling, from the old or the new spelling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not any(isinstance(value, dict) for value in rope.values()):
        return _one_rope(rope, raw, where)
    # One set for each type of layer, as in Gemma 3. This decoder rotates all layers alike.
    by_layer = {key: value for key, value in rope.items() if value is None or type(value) is dict}
    used = dict.fromkeys(raw.get("layer_types") or by_layer)
    absent = [name for name in used if not by_layer.get(name)]
    if absent:
        raise ValueError(
            f"{where}: rope_parameters has nothing for layers of type {', '.join(absent)}, and "
            "layers without rotation are not supported"
        )
    found = {name: _one_rope(by_layer[name] or {}, raw, where) for name in used}
    if len(set(found.values())) > 1:
        shown = ", ".join(
            f"{name} (base {theta:g}, {scaling.kind if scaling else 'not scaled'})"
            for name, (theta, scaling) in found.items()
        )
        raise ValueError(
            f"{where}: rope_parameters differ by layer type, which is not supported: {shown}"
        )
    return next(iter(found.values()))


def _one_rope(
    rope: dict[str, Any], raw: dict[str, Any], where: str
) -> tuple[float, RopeScaling | None]:
    """The same from one set of parameters."""
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor must be 1 (all of the head is rotated)")
    if kind == "default":
        return theta, None
    if kind not in ROPE_KINDS:
        kinds = ", ".join(ROPE_KINDS)
        raise ValueError(f"{where}: rope type {kind!r} is not supported; use one of {kinds}")
    given = {key: value for key, value in rope.items() if value is not None}
    family = FAMILIES[architecture_of(raw, where)[0]]
    length = raw.get("max_position_embeddings") or family.max_length
    if kind == "dynamic":  # transformers reads the length of pre-training there and nowhere else
        return theta, _scaling(kind, {**given, ORIGINAL: length}, where)
    given[ORIGINAL] = raw.get(ORIGINAL) or given.get(ORIGINAL) or length
    if kind == "yarn" and rope.get("factor", 0) is None:
        given["factor"] = length / given[ORIGINAL]
    return theta, _scaling(kind, given, where)


def _scaling(kind: str, given: dict[str, Any], where: str) -> RopeScaling:
    """A scaling from what a file gives for it."""
    keys = _ROPE_KEYS[kind]
    required = [key for key in keys if key not in _YARN]
    if absent := [key for key in required if key not in given]:
        raise ValueError(f"{where}: rope type {kind!r} must also give {', '.join(absent)}")
    try:
        read = {key: _ROPE_TYPES.get(key, float)(given[key]) for key in keys if key in given}
        return RopeScaling(kind, **{keys[key]: value for key, value in read.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: rope type {kind!r}: {error}") from None


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Both spellings of the rotary parameters, for old and new readers."""
    scaling, old = config.rope_scaling, None
    if scaling is not None:
        values = {key: getattr(scaling, name) for key, name in _ROPE_KEYS[scaling.kind].items()}
        if scaling.kind == "dynamic":
            del values[ORIGINAL]
        old = {"rope_type": scaling.kind}
        old |= {key: value for key, value in values.items() if value is not None}
    new = {**(old or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    written = {"rope_theta": config.rope_theta, "rope_scaling": old, "rope_parameters": new}
    if scaling is not None and scaling.kind == "dynamic":
        # Part of the formula, so that it must not be another length that a caller has set.
        written["max_position_embeddings"] = scaling.original_max_length
    return written


def _check_supported(raw: dict[str, Any], where: str) -> None:
    """Refuses what the decoder has no code for."""
    required = (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
    )
    for key, only in required:
        value = raw.get(key, only)
        if (value or None) != (only or None):
            raise ValueError(f"{where}: {key}={value!r} is not supported; it must be {only!r}")


def _window(raw: dict[str, Any], model_type: str) -> int:
    """Tokens over which attention slides in any layer; 0 where it sees all."""
    window = raw.get("sliding_window", 4096) or 0
    if model_type == "mistral":
        return window
    if model_type == "llama" or not raw.get("use_sliding_window", False):
        return 0
    first = raw.get("max_window_layers", 28)
    layer_types = raw.get("layer_types") or []
    slides = "sliding_attention" in layer_types or (
        not layer_types and first < raw["num_hidden_layers"]
    )
    return window if slides else 0


def within_window(length: int, asked: int | None, window: int, where: str) -> int:
    """The longest sequence that is read: what was asked for, or else the file's within its window.

    Args:
      length: what the file states.
      asked: what a caller wants instead; None or 0 is nothing.
      window: tokens over which attention slides; 0 is all.
      where: the name of the file, for messages.

    Raises:
      ValueError: more is asked for than the window holds.
    """
    if not window or (asked or length) <= window:
        return asked or length
    if asked:
        raise ValueError(
            f"{where}: attention slides over {window} tokens, which is not supported beyond the "
            f"window; max_length={asked} must be at most {window}"
        )
    _say_window(where, length, window)
    return window


def not_stretched(config: ModelConfig, window: int, where: str) -> ModelConfig:
    """Returns the configuration, unless its rotary scaling goes beyond the window.

    Raises:
      ValueError: it does.
    """
    if window and config.longest > window:
        raise ValueError(
            f"{where}: rotary scaling stretches to {config.longest} tokens, and attention slides "
            f"over {window}, which is not supported beyond the window; without the scaling the "
            "model can be used within it"
        )
    return config


@functools.cache
def _say_window(where: str, length: int, window: int) -> None:
    """Once for each file, however often it is read."""
    _log.warning(
        "%s: attention slides over %d tokens: texts may be as long as that, and not the model's %d",
        where,
        window,
        length,
    )
