"""Hugging Face folders without `transformers` models: round trips, shards, refusals."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.models.config import ModelConfig, RopeScaling
from rlhf_jax.models.files import hf_files
from rlhf_jax.models.files.hf_config import config_from_hf, config_to_hf
from rlhf_jax.models.files.hf_names import Leaf, collapse
from rlhf_jax.models.files.hf_weights import (
    check_vocabulary,
    load_config,
    load_model,
    load_scalar_model,
    save_model,
)
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.transformer import Transformer

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 24,
}
VARIANTS = {
    "llama": {},
    "untied": {"tie_embeddings": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 8, "tie_embeddings": False},
}


def random_model(**changes) -> Transformer:
    """A model in which no two weights are alike."""
    config = ModelConfig(**{**SIZES, **changes})
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), abstract
    )


def assert_same(one, other) -> None:
    """Equal leaves, bit for bit, of equal types."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def edit_config(folder, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw |= changes
    raw = {key: value for key, value in raw.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def saved(tmp_path):
    """The folder of a tied Llama."""
    save_model(random_model(), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_loaded(tmp_path, variant):
    model = random_model(**VARIANTS[variant])
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert_same(model, loaded)
    assert loaded.config == model.config == load_config(tmp_path / "model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_reward_models_keep_head_bias_and_lm_head(tmp_path, variant):
    model = ScalarModel(random_model(**VARIANTS[variant]), jax.random.key(2))
    model = model.normalized(jnp.float32(0.3), jnp.float32(2.0))
    save_model(model, tmp_path / "model")
    assert float(model.bias[...]) == pytest.approx(-0.15)
    assert_same(model, load_scalar_model(tmp_path / "model"))


def test_scores_of_other_tools_lack_the_bias_that_config_json_has(tmp_path):
    """What `AutoModelForSequenceClassification` computes: the last hidden state times one row."""
    model = ScalarModel(random_model(), jax.random.key(2))
    model = model.normalized(jnp.float32(0.3), jnp.float32(2.0))
    save_model(model, tmp_path / "model")
    tokens = jnp.array([[5, 6, 7, 8]])
    hidden = np.asarray(model.trunk(tokens, jnp.ones_like(tokens)))[0, -1]
    theirs = load_file(tmp_path / "model" / "model.safetensors")["score.weight"] @ hidden
    bias = json.loads((tmp_path / "model" / "config.json").read_text())["rlhf_jax"]["score_bias"]
    assert theirs.shape == (1,) and bias == pytest.approx(-0.15)
    ours = model.scores(tokens, jnp.ones_like(tokens))
    np.testing.assert_allclose(theirs + bias, ours, rtol=1e-5, atol=1e-6)


def test_kernels_are_transposed_and_numbered_on_file(saved):
    tensors = load_file(saved / "model.safetensors")
    model = random_model()
    np.testing.assert_array_equal(
        tensors["model.layers.2.mlp.down_proj.weight"], np.asarray(model.layers.down[...][2]).T
    )
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], model.embedding[...])
    assert len(tensors) == 2 + 3 * 9


def test_weights_may_be_read_by_whoever_may_read_the_config(saved):
    modes = {file.name: file.stat().st_mode for file in saved.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_large_models_are_split_with_an_index(tmp_path):
    model = random_model(tie_embeddings=False)
    save_model(model, tmp_path / "model", max_shard_bytes=6000)
    files = sorted(tmp_path.glob("model/model-*.safetensors"))
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 6000
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert_same(model, load_model(tmp_path / "model"))


def test_bfloat16_to_float32_and_back_changes_no_bit(tmp_path):
    model = random_model(dtype="bfloat16")
    save_model(model, tmp_path / "narrow")
    wide = load_model(tmp_path / "narrow", dtype="float32")
    assert wide.config.dtype == "float32" and wide.embedding.dtype == jnp.float32
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), model))
    save_model(wide, tmp_path / "again", dtype="bfloat16")
    stored = load_file(tmp_path / "again/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same(model, load_model(tmp_path / "again"))


def test_the_scalar_head_stays_float32(tmp_path):
    model = ScalarModel(random_model(dtype="bfloat16"), jax.random.key(2))
    save_model(model, tmp_path / "model")
    assert load_file(tmp_path / "model/model.safetensors")["score.weight"].dtype == np.float32
    assert_same(model, load_scalar_model(tmp_path / "model"))


def test_float16_files_are_read_as_float32(saved):
    def halve(tensors):
        tensors.update({name: tensor.astype(np.float16) for name, tensor in tensors.items()})

    edit_tensors(saved, halve)
    edit_config(saved, torch_dtype="float16")
    loaded = load_model(saved)
    assert loaded.config.dtype == "float32"
    expected = np.asarray(random_model().embedding[...]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(loaded.embedding[...], expected)


def test_remat_attention_and_length_are_the_callers(saved):
    config = load_model(saved, remat="full", attention="cudnn", max_length=77).config
    assert (config.remat, config.attention, config.max_length) == ("full", "cudnn", 77)


# Sharded loading.


def specs_of(spec_of_ndim: dict):
    """A function from the abstract model to shardings over a mesh of 2 x 4 devices."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return lambda model: jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec_of_ndim[leaf.ndim]), model
    )


@pytest.mark.parametrize(
    "specs",
    [
        {0: P(), 1: P(), 2: P(), 3: P()},
        {0: P(), 1: P("b"), 2: P(None, "a"), 3: P(None, "a", "b")},
        {0: P(), 1: P("a"), 2: P(), 3: P(None, "b")},
        {0: P(), 1: P(("a", "b")), 2: P(None, ("a", "b")), 3: P(None, None, ("b", "a"))},
    ],
    ids=["replicated", "tensor", "rows", "all"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_into_shards_gives_the_same_numbers(tmp_path, variant, specs):
    model = ScalarModel(random_model(**VARIANTS[variant]), jax.random.key(2))
    save_model(model, tmp_path / "model", max_shard_bytes=6000)
    make = specs_of(specs)
    loaded = load_scalar_model(tmp_path / "model", shardings=make)
    assert_same(model, loaded)
    wanted = make(model)
    same = jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, loaded, wanted)
    assert all(jax.tree.leaves(same))
    shard = loaded.trunk.layers.gate[...].addressable_shards[0].data
    assert shard.nbytes == loaded.trunk.layers.gate[...].nbytes / (8 if specs[3] else 1) * (
        2 if specs[3] == P(None, "b") else 1
    )


def test_layers_can_be_spread_too(tmp_path):
    model = random_model(num_layers=4)
    save_model(model, tmp_path / "model")
    specs = specs_of({1: P(), 2: P("b"), 3: P("b", "a")})
    assert_same(model, load_model(tmp_path / "model", shardings=specs))


def test_slices_only_are_read(saved, monkeypatch):
    """No read of a tensor spread over 8 devices is larger than an eighth."""
    sizes = []
    read = hf_files.TensorFiles.read

    def counted(self, name, index):
        part = read(self, name, index)
        sizes.append((name, part.size))
        return part

    monkeypatch.setattr(hf_files.TensorFiles, "read", counted)
    load_model(saved, shardings=specs_of({1: P(), 2: P(), 3: P(None, "a", "b")}))
    gate = [size for name, size in sizes if name.endswith("layers.1.mlp.gate_proj.weight")]
    assert gate == [16 * 24 / 8] * 8


MEMORY_PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rlhf_jax.models.files.hf_weights import load_model

def resident(key):  # not getrusage: its peak begins with that of the parent
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) / 1024

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
spread = NamedSharding(mesh, P(None, None, "data"))
jax.block_until_ready(jax.device_put(np.ones((8, 8, 8), np.float32), spread))
before = resident("VmRSS")
model = load_model(sys.argv[1], shardings=lambda tree: jax.tree.map(
    lambda leaf: NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "data")), tree))
jax.block_until_ready(model)
held = sum(s.data.nbytes for leaf in jax.tree.leaves(model) for s in leaf.addressable_shards)
print(held / 2**20, resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_host_memory_stays_below_one_tensor_and_one_shard(tmp_path):
    """1 GiB of bfloat16 into eighths: what the host holds beside the shards themselves.

    The devices are of the host, so the peak holds the shards of all 8: 1 GiB. Beside them
    there may be one tensor of one layer (2,048 x 5,632 or the embedding, 32 MiB) and one shard
    (27 MiB).
    """
    config = ModelConfig(8192, 2048, 10, 16, 5632, dtype="bfloat16", tie_embeddings=False)
    abstract = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    leaves = [
        Leaf(".".join(key.name for key in path[:-1]), leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
    ]
    rng = np.random.default_rng(0)

    def tensors():
        for leaf in leaves:
            for name in leaf.names:
                bits = rng.integers(0, 2**14, leaf.file_shape, dtype=np.uint16)
                yield name, bits.view(ml_dtypes.bfloat16)

    hf_files.write_json(tmp_path / "config.json", config_to_hf(config))
    hf_files.write_tensors(tmp_path, tensors(), 300 * 2**20)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY_PROGRAM), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert done.returncode == 0, done.stderr
    held, grown = map(float, done.stdout.split())
    tensor, shard = 32.0, 10 * 2048 * 5632 * 2 / 8 / 2**20
    print(f"weights {held:.0f} MiB, peak {grown:.0f} MiB above the start")
    assert 1000 < held < 1200
    assert grown - held < tensor + shard


# config.json.


def old_llama(**changes) -> dict:
    """A `config.json` as transformers 4 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "torch_dtype": "float16",
        **changes,
    }


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


LENGTH, ORIGINAL = {"max_position_embeddings": 512}, "original_max_position_embeddings"
DYNAMIC = RopeScaling("dynamic", 2.0, original_max_length=512)
YARN_KEYS = {
    "factor": 4.0,
    ORIGINAL: 64,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "attention_factor": 0.9,
    "mscale": 0.7,
    "mscale_all_dim": 0.5,
    "truncate": False,
}
YARN = RopeScaling(
    "yarn",
    factor=4.0,
    original_max_length=64,
    beta_fast=16.0,
    beta_slow=2.0,
    attention_factor=0.9,
    mscale=0.7,
    mscale_all_dim=0.5,
    truncate=False,
)
AT_LENGTH = RopeScaling("yarn", 4.0, original_max_length=512)


@pytest.mark.parametrize(
    ("written", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, RopeScaling("linear", 2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5, None),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
            1e6,
            RopeScaling("linear", 4.0),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 2e5, **LLAMA3}},
            2e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, **LENGTH}, 1e4, DYNAMIC),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2, "rope_theta": 1e6}, **LENGTH},
            1e6,
            DYNAMIC,
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 64}},
            1e4,
            RopeScaling("yarn", 4.0, original_max_length=64),
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN_KEYS}}, 1e6, YARN),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": None, ORIGINAL: 64}, **LENGTH},
            1e4,
            RopeScaling("yarn", 8.0, original_max_length=64),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, ORIGINAL: 64},
            1e4,
            RopeScaling("yarn", 4.0, original_max_length=64),
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, **LENGTH}, 1e4, AT_LENGTH),
        # One set for each type of layer.
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"type": "default", "rope_theta": 1_000_000},
                }
            },
            1e6,
            None,
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
                "layer_types": ["full_attention"] * 3,
            },
            1e6,
            RopeScaling("linear", 4.0),
        ),
        (
            {"rope_theta": 3e5, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            3e5,
            None,
        ),
    ],
)
def test_rope_in_both_spellings(written, theta, scaling):
    config = config_from_hf(old_llama(**written))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    again = config_from_hf(config_to_hf(config))
    assert again == config
    old = {key: value for key, value in config_to_hf(config).items() if key != "rope_parameters"}
    assert config_from_hf(old) == config


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 2e5, **LLAMA3}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 2e5, **YARN_KEYS}}),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 2e5, "factor": 3.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_configs_of_transformers_in_both_directions(tmp_path, model_type, changes):
    """The defaults of a family are those of transformers, and it reads back what we write."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type, **changes)
    theirs.architectures = [type(theirs).__name__.replace("Config", "ForCausalLM")]
    theirs.save_pretrained(tmp_path / "full")
    ours = load_config(tmp_path / "full")
    hf_files.write_json(tmp_path / "config.json", config_to_hf(ours))
    read = AutoConfig.from_pretrained(tmp_path)
    same = ("vocab_size", "hidden_size", "num_key_value_heads", "intermediate_size")
    same += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    for key in same:
        assert getattr(read, key) == getattr(theirs, key), key
    head_dim = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.head_dim == head_dim
    assert getattr(read, "sliding_window", None) is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"GPT2LMHeadModel is not supported.*Llama, Mistral",
        ),
        ({"architectures": ["LlamaForTokenClassification"]}, "ForTokenClassification is not"),
        ({"architectures": [], "model_type": "gemma"}, "model_type gemma is not supported"),
        ({"hidden_size": "absent"}, "whole number for hidden_size"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not supported; use one of linear"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' must also give factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "'dynamic': factor=0.0 must be above"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            r"differ by layer type.* full_attention \(base 1e\+06, linear\), sliding_attention "
            r"\(base 10000, not scaled\)",
        ),
        (
            {
                "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "nothing for layers of type sliding_attention",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "chunked_attention": None}},
            "nothing for layers of type chunked_attention",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "must also give factor, low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unsupported_configs_are_refused(changes, rule):
    raw = {key: value for key, value in old_llama(**changes).items() if value != "absent"}
    with pytest.raises(ValueError, match=rule) as error:
        config_from_hf(raw, "some/config.json")
    assert "some/config.json" in str(error.value) and "\n" not in str(error.value)


WINDOWS = [
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, True),
    ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, False),
    (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
        True,
    ),
]


@pytest.mark.parametrize(("changes", "slides"), WINDOWS)
def test_models_are_used_within_their_sliding_window(changes, slides, caplog, request):
    """That is said once for a file; the saved model, which sees all, is as long as the window."""
    raw = old_llama(**changes, sliding_window=512, max_position_embeddings=1024)
    where = request.node.name  # a file of its own
    read = [config_from_hf(raw, where).max_length for _ in range(3)]
    assert read == [512 if slides else 1024] * 3
    said = f"{where}: attention slides over 512 tokens: texts may be as long as that, and not the "
    assert caplog.messages == ([said + "model's 1024"] if slides else [])
    assert config_to_hf(config_from_hf(raw, where))["max_position_embeddings"] == read[0]
    assert config_from_hf(raw, where, max_length=256).max_length == 256
    if slides:
        with pytest.raises(ValueError, match=r"slides over 512 .* max_length=1024 must be at most"):
            config_from_hf(raw, where, max_length=1024)
    assert len(caplog.messages) == slides


@pytest.mark.parametrize(("window", "slides"), [(1024, True), (2048, False), (None, False)])
def test_scaling_beyond_the_sliding_window_is_refused(window, slides):
    raw = old_llama(architectures=["MistralForCausalLM"], model_type="mistral")
    raw |= {"sliding_window": window, "max_position_embeddings": 1024}
    raw |= {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 512}}
    if slides:
        with pytest.raises(ValueError, match="stretches to 2048 tokens, and attention slides over"):
            config_from_hf(raw)
        assert config_from_hf(raw, max_length=1024).max_length == 1024
    else:
        assert config_from_hf(raw).longest == 2048


@pytest.mark.parametrize(
    ("scaling", "longest", "sampled"),
    [
        (None, 512, 512),
        (RopeScaling("llama3", 8.0), 512, 512),
        (RopeScaling("linear", 4.0), 2048, 2048),
        (RopeScaling("yarn", 4.0, original_max_length=256), 1024, 1024),
        (RopeScaling("yarn", 4.0, original_max_length=64), 512, 512),
        (RopeScaling("dynamic", 2.0, original_max_length=512), 1024, 512),
    ],
)
def test_longest_texts(scaling, longest, sampled):
    config = ModelConfig(**SIZES, max_length=512, rope_scaling=scaling)
    assert (config.longest, config.longest_sampled) == (longest, sampled)


def test_the_length_in_the_formula_of_dynamic_scaling_is_saved():
    """Whatever length a caller has set: transformers has no other place for it."""
    raw = old_llama(rope_scaling={"type": "dynamic", "factor": 2}, max_position_embeddings=512)
    config = config_from_hf(raw, max_length=128)
    assert (config.max_length, config.rope_scaling) == (128, DYNAMIC)
    assert config_to_hf(config)["max_position_embeddings"] == 512
    assert config_from_hf(config_to_hf(config)).rope_scaling == DYNAMIC


# Bad input.


def test_every_tensor_is_accounted_for(saved):
    def spoil(tensors):
        for i in (0, 2):
            del tensors[f"model.layers.{i}.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((16, 24), np.float32)
        tensors["model.norm.weight"] = np.zeros(16, np.int8)
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)

    edit_tensors(saved, spoil)
    with pytest.raises(ValueError) as error:
        load_model(saved)
    message = str(error.value)
    assert "2 missing: model.layers.{0,2}.self_attn.q_proj.weight;" in message
    assert "1 unknown: model.layers.0.self_attn.q_proj.bias;" in message
    assert "model.layers.1.mlp.up_proj.weight [16, 24] instead of [24, 16]" in message
    assert "model.norm.weight of type I8" in message
    assert "inv_freq" not in message and "\n" not in message


def test_rotary_buffers_of_old_files_are_ignored(saved):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(saved, lambda tensors: tensors.update({name: np.zeros(2, np.float32)}))
    assert_same(random_model(), load_model(saved))


def test_a_tied_head_may_be_on_file_only_if_it_is_the_embedding(saved):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(saved, repeat)
    assert_same(random_model(), load_model(saved))
    edit_tensors(saved, lambda tensors: tensors["lm_head.weight"].__setitem__((39, 15), 0.0))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        load_model(saved)
    edit_config(saved, tie_word_embeddings=False)
    assert load_model(saved).lm_head[...].shape == (16, 40)


def test_a_scalar_head_is_new_only_with_a_key(saved):
    with pytest.raises(ValueError, match="has no scalar head: pass key="):
        load_scalar_model(saved)
    model = load_scalar_model(saved, key=jax.random.key(7))
    assert_same(model, ScalarModel(random_model(), jax.random.key(7)))


def test_a_reward_model_is_not_a_language_model(tmp_path):
    save_model(ScalarModel(random_model()), tmp_path / "model")
    with pytest.raises(ValueError, match="load_scalar_model"):
        load_model(tmp_path / "model")


def test_a_reward_model_has_one_label_for_transformers(tmp_path):
    from transformers import AutoConfig

    save_model(ScalarModel(random_model()), tmp_path / "model")
    theirs = AutoConfig.from_pretrained(tmp_path / "model")
    assert (theirs.num_labels, theirs.problem_type) == (1, "regression")


def test_more_than_one_label_is_misshapen(tmp_path):
    save_model(ScalarModel(random_model()), tmp_path / "model")
    two = {"score.weight": np.zeros((2, 16), np.float32)}
    edit_tensors(tmp_path / "model", lambda tensors: tensors.update(two))
    with pytest.raises(ValueError, match=r"score.weight \[2, 16\] instead of \[1, 16\]"):
        load_scalar_model(tmp_path / "model")


def test_reward_models_of_other_tools_have_no_lm_head(tmp_path):
    model = ScalarModel(random_model(tie_embeddings=False), jax.random.key(2))
    save_model(model, tmp_path / "model")
    edit_tensors(tmp_path / "model", lambda tensors: tensors.pop("lm_head.weight"))
    edit_config(tmp_path / "model", rlhf_jax="absent")
    loaded = load_scalar_model(tmp_path / "model")
    assert loaded.trunk.config.tie_embeddings
    del model.trunk.lm_head
    assert_same(model, loaded)


def one_line(call, *words) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_broken_folders_give_one_line(saved, tmp_path):
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 1, 1000, 4, 0):
        weights.write_bytes(whole[:size])
        one_line(lambda: load_model(saved), str(weights), "truncated")
    weights.rename(saved / "pytorch_model.bin")
    one_line(lambda: load_model(saved), "pytorch_model.bin", "pickles are never read")
    (saved / "pytorch_model.bin").unlink()
    one_line(lambda: load_model(saved), "holds no model.safetensors")
    index = saved / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    one_line(lambda: load_model(saved), "names files that are absent: model-1.safetensors")
    index.write_text("{}")
    one_line(lambda: load_model(saved), "weight_map")
    (saved / "config.json").write_text('{"hidden_size": 1')
    one_line(lambda: load_config(saved), "is not valid JSON")
    (saved / "config.json").write_text("[]")
    one_line(lambda: load_config(saved), "must hold a JSON object")
    (saved / "config.json").unlink()
    one_line(lambda: load_model(saved), "holds no config.json")
    one_line(lambda: load_model(tmp_path / "absent"), "is not a folder, nor a name on")


@pytest.mark.parametrize("shards", [True, False])
def test_one_file_goes_before_an_old_index(tmp_path, shards):
    old, new = tmp_path / "old", tmp_path / "new"
    save_model(jax.tree.map(lambda leaf: leaf + 1, random_model()), old, max_shard_bytes=1000)
    save_model(random_model(), new)
    for file in old.glob("model*" if shards else "*.index.json"):
        file.rename(new / file.name)
    assert len(list(new.glob("model-*"))) > 1 or not shards
    assert_same(random_model(), load_model(new))


def test_an_index_cannot_point_outside_of_its_folder(saved, tmp_path):
    (saved / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = saved / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
    one_line(lambda: load_model(saved), "absent: model-1.safetensors")


HUB_PROGRAM = """
import sys
from rlhf_jax.models.files.hf_weights import load_model
for name in ("maker/small", "maker/absent"):
    try:
        print("loaded", load_model(name).config.vocab_size)
    except ValueError as error:
        print("refused", error)
"""


def test_hub_names_come_from_the_cache_or_give_one_line(tmp_path):
    snapshot = tmp_path / "models--maker--small/snapshots/abc"
    save_model(random_model(), snapshot)
    (tmp_path / "models--maker--small/refs").mkdir()
    (tmp_path / "models--maker--small/refs/main").write_text("abc")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HUB_PROGRAM)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == "loaded 40"
    assert second.startswith("refused maker/absent is no local folder, and neither the Hugging")


# Saving.


class FakeTokenizer:
    """What save_model uses of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = None, 2, 0

    def __init__(self, size=40):
        self.size = size

    def __len__(self):
        return self.size

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_the_tokenizer_is_saved_too(tmp_path):
    save_model(random_model(), tmp_path / "model", FakeTokenizer())
    raw = json.loads((tmp_path / "model/config.json").read_text())
    assert (raw["eos_token_id"], raw["pad_token_id"]) == (2, 0) and "bos_token_id" not in raw
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "model/tokenizer.json").exists()
    assert_same(random_model(), load_model(tmp_path / "model"))


def test_generation_ends_where_the_sampler_stops(tmp_path):
    tokenizer = train_bpe(["the sea"], 300)
    folder = tmp_path / "model"
    model = random_model(vocab_size=320)
    save_model(model, folder, tokenizer)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<|eot|>'")
    stop = tokenizer.convert_tokens_to_ids("<|eot|>")
    save_model(model, folder, tokenizer)
    found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert found == [stop, 2] == list(stop_tokens(tokenizer))
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    check_vocabulary(FakeTokenizer(40), random_model().config)
    rule = "tokenizer has 41 tokens, but the embedding only 40 rows"
    with pytest.raises(ValueError, match=rule):
        check_vocabulary(FakeTokenizer(41), random_model().config)
    with pytest.raises(ValueError, match=rule):
        save_model(random_model(), tmp_path / "model", FakeTokenizer(41))
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_dies_leaves_the_earlier_model(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def die(*args, **kwargs):
        (args[0] / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hf_files, "write_tensors", die)
        with pytest.raises(KeyboardInterrupt):
            save_model(random_model(tie_embeddings=False), saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    # A kill leaves the half folder beside it; the next save removes it.
    (saved.parent / ".saved.partial").mkdir()
    (saved.parent / ".saved.partial/half").write_text("")
    save_model(random_model(tie_embeddings=False), saved)
    assert load_model(saved).config.tie_embeddings is False
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_saving_never_replaces_files_that_are_not_a_models(saved):
    (saved / "thesis.tex").write_text("years of work")
    one_line(lambda: save_model(random_model(), saved), "thesis.tex", "save into a new folder")
    assert (saved / "thesis.tex").exists()
    one_line(lambda: save_model(random_model(), saved / "thesis.tex"), "is a file")


def test_qwen2_and_qwen3_at_once_have_no_name(tmp_path):
    model = random_model(qkv_bias=True, qk_norm=True)
    one_line(lambda: save_model(model, tmp_path / "model"), "no Hugging Face architecture")


def test_collapse_joins_layers():
    names = ["model.layers.3.a", "model.layers.0.a", "model.layers.1.a", "model.norm"]
    assert collapse(names) == ["model.layers.{0-1,3}.a", "model.norm"]
    assert collapse(["model.layers.7.a"]) == ["model.layers.7.a"]
