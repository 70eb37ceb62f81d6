"""The decoder of the Llama family once more: slow, in float64, one token and one head at a time.

Written from the papers and from the formulas of Llama 3.1's release, not from `rlhf_jax.models`.
"""

import math

import numpy as np

from rlhf_jax.models.config import ModelConfig


def rotary_frequencies(config: ModelConfig, length: int = 0) -> list[float]:
    """Radians per position of each pair of a head, in a document of `length` tokens."""
    frequencies = []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            frequency /= scaling.factor
        elif scaling is not None and scaling.kind == "dynamic":
            longer = max(length / scaling.original_max_length, 1)
            exponent = config.head_dim / (config.head_dim - 2)
            base = config.rope_theta * (scaling.factor * longer - (scaling.factor - 1)) ** exponent
            frequency = base ** (-2 * i / config.head_dim)
        elif scaling is not None and scaling.kind == "yarn":
            share = yarn_interpolated(i, config)
            frequency = share * frequency / scaling.factor + (1 - share) * frequency
        elif scaling is not None:
            wavelength = 2 * math.pi / frequency
            context = scaling.original_max_length
            if wavelength > context / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength >= context / scaling.high_freq_factor:
                smooth = (context / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return frequencies


def yarn_interpolated(pair: int, config: ModelConfig) -> float:
    """How far a pair has gone from its own frequency, 0, to the divided one, 1."""
    scaling, half = config.rope_scaling, config.head_dim / 2

    def where(turns: float) -> float:
        # original / (2 pi theta^(pair / half)) = turns, solved for the pair
        ratio = scaling.original_max_length / (2 * math.pi * turns)
        return half * math.log(ratio) / math.log(config.rope_theta)

    low, high = where(scaling.beta_fast), where(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    return min(max((pair - low) / (high - low), 0), 1)


def attention_scale(config: ModelConfig) -> float:
    """By which yarn multiplies queries and keys: sqrt(1/t) = 0.1 ln s + 1, unless told."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        log = 0.1 * math.log(scaling.factor)
        return (scaling.mscale * log + 1) / (scaling.mscale_all_dim * log + 1)
    return 0.1 * math.log(scaling.factor) + 1


def rotate(head: np.ndarray, position: int, config: ModelConfig, length: int) -> np.ndarray:
    """Turns pair (i, i + H/2) of a head by position times frequency i."""
    half = config.head_dim // 2
    out = np.empty_like(head)
    for i, frequency in enumerate(rotary_frequencies(config, length)):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[i] = head[i] * cos - head[i + half] * sin
        out[i + half] = head[i + half] * cos + head[i] * sin
    return out * attention_scale(config)


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / math.sqrt(float(np.mean(x * x)) + eps) * scale


def softmax(scores: np.ndarray) -> np.ndarray:
    exponents = np.exp(scores - scores.max())
    return exponents / exponents.sum()


def _weights(module, index: int | None = None) -> dict[str, np.ndarray]:
    """Arrays of a module by name, of one layer if asked."""
    arrays = {}
    for name, value in vars(module).items():
        if hasattr(value, "shape"):
            array = np.asarray(value[...], np.float64)
            arrays[name] = array if index is None else array[index]
    return arrays


def hidden_states(model, tokens) -> np.ndarray:
    """Final hidden states `[T, D]` of one document without padding."""
    config, top = model.config, _weights(model)
    x = [top["embedding"][token] for token in tokens]
    for index in range(config.num_layers):
        x = _layer(x, _weights(model.layers, index), config)
    return np.stack([rms_norm(row, top["final_norm"], config.norm_eps) for row in x])


def logits(model, tokens) -> np.ndarray:
    """`[T, V]`."""
    top = _weights(model)
    kernel = top["embedding"].T if model.config.tie_embeddings else top["lm_head"]
    return hidden_states(model, tokens) @ kernel


def _layer(x: list[np.ndarray], w: dict[str, np.ndarray], config: ModelConfig) -> list[np.ndarray]:
    queries, keys, values = [], [], []
    for position, row in enumerate(x):
        h = rms_norm(row, w["attention_norm"], config.norm_eps)
        queries.append(_heads(h, w, "q", position, config, len(x)))
        keys.append(_heads(h, w, "k", position, config, len(x)))
        values.append(_heads(h, w, "v", None, config, len(x)))
    group = config.num_heads // config.num_kv_heads
    out = []
    for t, row in enumerate(x):
        attended = []
        for head in range(config.num_heads):
            seen_keys = np.stack([keys[s][head // group] for s in range(t + 1)])
            seen_values = np.stack([values[s][head // group] for s in range(t + 1)])
            weights = softmax(seen_keys @ queries[t][head] / math.sqrt(config.head_dim))
            attended.append(weights @ seen_values)
        row = row + np.concatenate(attended) @ w["o"]
        h = rms_norm(row, w["mlp_norm"], config.norm_eps)
        gate = h @ w["gate"]
        out.append(row + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"])
    return out


def _heads(
    h, w, name: str, position: int | None, config: ModelConfig, length: int
) -> list[np.ndarray]:
    """One projection, split into heads; normalised and rotated unless it is the values."""
    projected = h @ w[name]
    if config.qkv_bias:
        projected = projected + w[f"{name}_bias"]
    heads = list(projected.reshape(-1, config.head_dim))
    if position is None:
        return heads
    if config.qk_norm:
        heads = [rms_norm(head, w[f"{name}_norm"], config.norm_eps) for head in heads]
    return [rotate(head, position, config, length) for head in heads]
