"""Tiny models, prompts and rollouts that several test files share.

Weights are drawn by NumPy, wide enough that every part of a model matters: at the usual standard
deviation of 0.02 a tiny model is so close to uniform that a missing rotation would pass a test.
What costs a compilation is cached for the whole test session.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarModel, next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.rollout import Rollout, SamplingConfig, generate

PAD, EOS = 0, 1
VOCAB = 40
PROMPT, RESPONSE = 6, 7


# The backend's optimisations double the time of a compilation and gain nothing at this size.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def model_config(**changes) -> ModelConfig:
    """Two layers, grouped queries, tied: sizes that differ from each other, most divisible by 8."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 24,
    }
    return ModelConfig(**(sizes | changes))


def draw(shapes, seed: int, std: float = 0.3):
    """Fills a tree of shapes with normal numbers; norms are drawn around 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        numbers = rng.normal(1.0 if "norm" in name else 0.0, std, shape.shape)
        return jnp.asarray(numbers, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def language_model(config: ModelConfig | None = None, *, seed: int = 0) -> Transformer:
    """A policy; different seeds are different models."""
    config = config or model_config()
    return draw(jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0)), seed)


def scalar_model(config: ModelConfig | None = None, *, seed: int = 7) -> ScalarModel:
    """A reward model or critic whose head is not zero."""
    config = config or model_config()

    def make(key):
        return ScalarModel(Transformer(config, key))

    return draw(jax.eval_shape(make, jax.random.key(0)), seed)


@jit
def forward(model, tokens, segments):
    """Hidden states, jitted once for all tests."""
    return model(tokens, segments)


@functools.partial(jit, static_argnames=("start", "with_entropy", "chunk"))
def teacher_forced(
    model, tokens, segments, temperature=1.0, *, start=1, with_entropy=True, chunk=128
):
    """Log-probabilities and entropies from the training pass; the temperature is an argument."""
    return next_token_log_probs(
        model,
        tokens,
        segments,
        start=start,
        temperature=temperature,
        with_entropy=with_entropy,
        chunk=chunk,
    )


def left_padded(lengths, width: int, *, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Prompts `[B, width]` of the given lengths, without EOS or padding inside, and their mask."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(lengths), width), PAD, np.int32)
    mask = np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        tokens[row, width - length :] = rng.integers(2, VOCAB, length)
        mask[row, width - length :] = True
    return tokens, mask


@functools.cache
def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Eight prompts of 1 to 6 tokens."""
    return left_padded([6, 1, 3, 5, 2, 6, 4, 1], PROMPT)


# A quarter of the vocabulary ends a response: about one row in ten is cut at seven tokens.
EOS_IDS = (EOS, *range(2, 11))

SETTINGS = {
    "plain": SamplingConfig(RESPONSE),
    "hot nucleus": SamplingConfig(RESPONSE, temperature=1.5, top_p=0.8),
    "cold top-k": SamplingConfig(RESPONSE, temperature=0.7, top_k=5),
    "every filter": SamplingConfig(
        RESPONSE, temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.3
    ),
    "greedy": SamplingConfig(RESPONSE, temperature=0.0, repetition_penalty=2.0),
}


def pad_of(setting: str) -> int:
    """One setting pads with a token that ends responses, as many tokenizers do."""
    return EOS if setting == "cold top-k" else PAD


@functools.cache
def sampler(setting: str):
    """`generate` with its settings bound, jitted."""
    return jit(
        functools.partial(
            generate, config=SETTINGS[setting], eos_ids=EOS_IDS, pad_id=pad_of(setting)
        )
    )


@functools.cache
def rollout(setting: str = "plain") -> Rollout:
    """Responses of `language_model()` to `prompts()`, with early ends and cut ones."""
    return sampler(setting)(language_model(), *prompts(), jax.random.key(5))


def close(actual, wanted, tolerance: float = 1e-5) -> None:
    """Absolute comparison of two trees, leaf by leaf."""

    def leaf(path, a, w):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(w, np.float64), 0, tolerance, err_msg=name
        )

    jax.tree_util.tree_map_with_path(leaf, actual, wanted)


def largest_difference(one, other) -> float:
    """The largest absolute difference between two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()) for a, b in pairs)
