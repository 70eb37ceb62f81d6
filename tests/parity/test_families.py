"""Every supported family against `transformers` on torch, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import ModelConfig, RopeScaling
from rlhf_jax.models.files.hf_weights import load_model, load_scalar_model, save_model
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TOLERANCE = 1e-4
PAD = 0
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}
MSCALE = {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
# Name -> (model_type, what differs from SIZES).
FAMILIES = {
    "llama1": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama2_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama32_tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    "llama_yarn_defaults": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2_yarn_mscale": ("qwen2", {"rope_parameters": {**YARN, **MSCALE}}),
    "qwen3_yarn_attention": (
        "qwen3",
        {"rope_parameters": {**YARN, "attention_factor": 0.8}, "head_dim": 16},
    ),
    # Rows of 40 tokens: nothing is scaled in 64.
    "llama_dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "open_chinese_llama": (
        "llama",
        {"num_key_value_heads": 4, "vocab_size": 211, "rms_norm_eps": 1e-3},
    ),
    "smollm2": (
        "llama",
        {
            "hidden_size": 36,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.fixture
def torch():
    import torch

    torch.manual_seed(0)
    return torch


def hf_model(torch, family: str, kind: str):
    """A random model in which every weight, norms and biases included, matters."""
    import transformers

    model_type, changes = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})
    if kind == "AutoModelForSequenceClassification":
        config.num_labels = 1
    model = getattr(transformers, kind).from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            weight.normal_(centre, 0.15)
    return model


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
    """Rows without padding, padded left, and padded right: tokens and mask `[4, 40]`."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, SIZES["vocab_size"], (4, 40), dtype=np.int32)
    mask = np.ones_like(tokens, bool)
    mask[1, :13] = mask[2, 29:] = mask[3, :39] = False
    return np.where(mask, tokens, PAD), mask


def their_logits(torch, model) -> np.ndarray:
    tokens, mask = padded_batch()
    with torch.no_grad():
        out = model(torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask))
    return out.logits.numpy()


def our_logits(model: Transformer) -> np.ndarray:
    tokens, mask = padded_batch()
    hidden = model(jnp.asarray(tokens), jnp.asarray(mask, jnp.int32))
    return np.asarray(model.logits(hidden))


def our_scores(model: ScalarModel) -> np.ndarray:
    tokens, mask = padded_batch()
    return np.asarray(model.scores(jnp.asarray(tokens), jnp.asarray(mask, jnp.int32)))


def assert_close(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compares, after checking that the numbers are not all alike, and prints the difference."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    difference = np.abs(ours - theirs).max()
    print(f"{name}: largest difference {difference:.1e} at a spread of {theirs.std():.2f}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_transformers_folder(torch, tmp_path, family):
    theirs = hf_model(torch, family, "AutoModelForCausalLM")
    theirs.save_pretrained(tmp_path)
    _, mask = padded_batch()
    ours = our_logits(load_model(tmp_path))
    assert_close(family, ours[mask], their_logits(torch, theirs)[mask])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_transformers_folder(torch, tmp_path, family):
    theirs = hf_model(torch, family, "AutoModelForSequenceClassification")
    theirs.save_pretrained(tmp_path)
    ours = our_scores(load_scalar_model(tmp_path))
    assert_close(family, ours, their_logits(torch, theirs)[:, 0])


@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 24, 40, 63])
@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", DYNAMIC),
        ("qwen2", DYNAMIC | {"factor": 5.0}),
        ("llama", YARN),
        ("qwen2", YARN | MSCALE),
        ("qwen3", YARN | {"attention_factor": 0.8}),
    ],
)
def test_stretched_models_at_every_length(torch, tmp_path, model_type, rope, length):
    """Below, at and beyond the 16 tokens of pre-training; read from a folder, and saved to one.

    transformers keeps the frequencies of the longest sequence that a model has read; a model that
    is opened anew has read none.
    """
    import transformers

    changes = {"rope_parameters": dict(rope), "max_position_embeddings": 16, "head_dim": 16}
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.15)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    rng = np.random.default_rng(length)
    tokens = rng.integers(1, SIZES["vocab_size"], (2, length), dtype=np.int32)
    logits = np.asarray(ours.logits(ours(jnp.asarray(tokens), jnp.ones_like(tokens))))
    for folder in ("theirs", "ours"):
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            wanted = opened(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        assert_close(f"{folder} at {length}", logits, wanted)


OURS = {
    "llama": {},
    "llama_untied": {"tie_embeddings": False},
    "llama_head_dim": {"head_dim": 10},
    "llama_linear": {"rope_scaling": RopeScaling("linear", factor=3.0)},
    "llama_llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16), "rope_theta": 500.0},
    "llama_yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_max_length=16)},
    "llama_dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0, original_max_length=64)},
    "qwen2": {"qkv_bias": True},
    "qwen2_untied": {"qkv_bias": True, "tie_embeddings": False},
    "qwen2_head_dim": {"qkv_bias": True, "head_dim": 10},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "qwen3_untied": {"qk_norm": True, "tie_embeddings": False},
}


def our_model(changes: dict) -> Transformer:
    """A random model in which every weight matters."""
    config = ModelConfig(
        vocab_size=97,
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=80,
        norm_eps=1e-4,
        **changes,
    )
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            ("norm" in jax.tree_util.keystr(path)) + 0.15 * rng.standard_normal(leaf.shape),
            leaf.dtype,
        ),
        abstract,
    )


@pytest.mark.parametrize("name", OURS)
def test_transformers_opens_what_we_save(torch, tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = our_model(OURS[name])
    save_model(model, tmp_path / "model")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    _, mask = padded_batch()
    assert_close(name, our_logits(model)[mask], their_logits(torch, theirs.eval())[mask])


@pytest.mark.parametrize("name", OURS)
def test_transformers_opens_reward_models_that_we_save(torch, tmp_path, name):
    from transformers import AutoModelForSequenceClassification

    model = ScalarModel(our_model(OURS[name]), jax.random.key(2)).normalized(
        jnp.float32(0.5), jnp.float32(0.1)
    )
    bias = float(model.bias[...])
    save_model(model, tmp_path / "model", max_shard_bytes=50_000)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) <= {"lm_head.weight"}
    assert theirs.config.num_labels == 1
    theirs.config.pad_token_id = PAD
    scores = their_logits(torch, theirs.eval())[:, 0] + bias
    assert bias == pytest.approx(-5)  # a shift that the comparison would notice
    assert_close(name, our_scores(model), scores)


def test_bfloat16_weights_open_as_bfloat16(torch, tmp_path):
    from transformers import AutoModelForCausalLM

    save_model(our_model({}), tmp_path / "model", dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == torch.bfloat16
    theirs.float().save_pretrained(tmp_path / "wide")
    ours, wide = load_model(tmp_path / "model", dtype="float32"), load_model(tmp_path / "wide")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), ours, wide)))
