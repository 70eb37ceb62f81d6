"""The decoder: against a slow NumPy one, and against itself under padding, packing and caching."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals

from rlhf_jax.models import layers
from rlhf_jax.models.config import ModelConfig, RopeScaling
from rlhf_jax.models.transformer import Transformer, first_layers
from tests import tiny
from tests.references import decoder

DOCUMENT = np.array([5, 17, 3, 39, 8, 21, 5], np.int32)
WIDTH = 10

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_length=16)
YARN = RopeScaling("yarn", 4.0, original_max_length=16, beta_fast=2.0, beta_slow=0.5)
DYNAMIC = RopeScaling("dynamic", 2.0, original_max_length=4)
# Switches that do not interact share a program. All have four query heads, two key heads.
FAMILY = {
    "plain": {},
    "one key head": {"num_kv_heads": 1, "tie_embeddings": False},
    "wide heads with bias": {"head_dim": 6, "qkv_bias": True, "num_kv_heads": 4},
    "norm and linear scaling": {"qk_norm": True, "rope_scaling": RopeScaling("linear", 4.0)},
    "llama3 scaling": {"rope_theta": 8.0, "rope_scaling": LLAMA3, "head_dim": 8},
    "yarn scaling": {"rope_theta": 8.0, "rope_scaling": YARN, "head_dim": 8},
    "dynamic scaling": {"rope_theta": 8.0, "rope_scaling": DYNAMIC, "head_dim": 8},
}
# Those of which keys can be cached at any length.
CACHED = [name for name in FAMILY if name != "dynamic scaling"]


def embed(document, offset: int, width: int = WIDTH, fill: int = tiny.PAD):
    """A row with the document at `offset`: tokens and segments `[1, width]`."""
    tokens, segments = np.full((1, width), fill, np.int32), np.zeros((1, width), np.int32)
    tokens[0, offset : offset + len(document)] = document
    segments[0, offset : offset + len(document)] = 1
    return tokens, segments


@pytest.mark.parametrize("name", FAMILY)
def test_equals_the_numpy_decoder(name):
    model = tiny.language_model(tiny.model_config(**FAMILY[name]))
    tokens, segments = embed(DOCUMENT, 3)
    hidden = tiny.forward(model, tokens, segments)[:, 3:]
    tiny.close(hidden[0], decoder.hidden_states(model, DOCUMENT))
    tiny.close(model.logits(hidden)[0], decoder.logits(model, DOCUMENT))


@pytest.mark.parametrize("name", ["norm and linear scaling", "llama3 scaling", "yarn scaling"])
def test_rotary_settings_change_the_frequencies(name):
    config = tiny.model_config(**FAMILY[name])
    wanted = decoder.rotary_frequencies(config)
    actual = layers.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    tiny.close(actual, np.array(wanted), 1e-6)
    plain = layers.rope_frequencies(config.head_dim, 10_000.0, None)
    assert tiny.largest_difference(actual, plain) > 1e-3


def test_llama3_scaling_keeps_blends_and_divides():
    # theta 8, width 8: wavelengths 2π·8^(i/4) = 6.3, 10.6, 17.8, 29.9; the bounds are 4 and 16.
    plain = np.array(layers.rope_frequencies(8, 8.0, None))
    scaled = np.array(layers.rope_frequencies(8, 8.0, LLAMA3))
    assert np.all(scaled[2:] == plain[2:] / 8)
    assert np.all((plain[:2] / 8 < scaled[:2]) & (scaled[:2] < plain[:2]))
    long = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_length=8192)
    assert np.all(np.array(layers.rope_frequencies(8, 8.0, long)) == plain)


def yarn(**changes):
    return layers.rope_frequencies(8, 8.0, dataclasses.replace(YARN, **changes))


def test_yarn_keeps_and_divides_along_a_ramp():
    # Theta 8, width 8: pair i turns 16 / (2π 8^(i/4)) times in 16 tokens, so twice at
    # i = 4 ln(16 / 4π) / ln 8 = 0.4647 and half a time at i = 4 ln(16 / π) / ln 8 = 3.1314.
    plain = np.array(layers.rope_frequencies(8, 8.0, None))
    whole = 1 - np.array([0, 1, 2, 3]) / 4  # of the pairs, from 0 to 4
    tiny.close(yarn(), plain * (whole + (1 - whole) / 4), 1e-6)
    exact = 1 - np.array([0, 0.2007, 0.5757, 0.9507])  # (i - 0.4647) / (3.1314 - 0.4647)
    tiny.close(yarn(truncate=False), plain * (exact + (1 - exact) / 4), 1e-4)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 1.1386),  # 0.1 ln 4 + 1
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 2.0}, 1.1386),  # nothing without mscale_all_dim
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, 1.1945),  # (0.2 ln 4 + 1) / (0.05 ln 4 + 1)
        ({"kind": "linear"}, 1.0),
    ],
)
def test_yarn_multiplies_queries_and_keys(changes, scale):
    scaling = dataclasses.replace(YARN, **changes)
    assert scaling.attention_scale == pytest.approx(scale, abs=1e-4)
    config = tiny.model_config(rope_scaling=scaling, head_dim=8)
    cos, sin = layers.rope_tables(jnp.arange(20), config)
    tiny.close(cos**2 + sin**2, np.full((20, 4), scale**2), 1e-3)


def test_dynamic_scaling_raises_the_base_with_the_length():
    lengths = jnp.array([1, 4, 8])
    got = np.array(layers.rope_frequencies(8, 8.0, DYNAMIC, lengths))
    plain = np.array(layers.rope_frequencies(8, 8.0, None))
    assert np.all(got[:2] == plain)
    # Twice the original length by a factor of 2: the base is 8 (2 x 2 - 1)^(8/6) = 34.614.
    tiny.close(got[2], 34.614 ** (-np.arange(4) / 4), 1e-5)


def test_dynamic_scaling_reads_the_length_of_each_document():
    """Whatever else is in its row, and wherever padding stands."""
    model = tiny.language_model(tiny.model_config(**FAMILY["dynamic scaling"]))
    tokens = np.array([[5, 17, 3, 39, 8, 9, 2, 4, 4, 0, 0]], np.int32)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 3, 3, 0, 0]], np.int32)
    assert np.array_equal(
        layers.lengths_of_segments(jnp.array(segments)), [[5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2]]
    )
    packed = tiny.forward(model, tokens, segments)[0]
    for start, stop in ((0, 5), (5, 7), (7, 9)):
        alone = tiny.forward(model, *embed(tokens[0, start:stop], 2))[0, 2 : 2 + stop - start]
        tiny.close(packed[start:stop], alone)


def test_dynamic_scaling_refuses_caches_beyond_the_original_length():
    """Within it nothing is scaled, and what is sampled has the numbers of the whole."""
    model = tiny.language_model(tiny.model_config(**FAMILY["dynamic scaling"]))
    plain = tiny.language_model(tiny.model_config(rope_theta=8.0, head_dim=8))
    prompt, mask = np.array([[5, 17, 3]], np.int32), np.ones((1, 3), bool)
    states = [m.prefill(prompt, mask, cache_length=4)[0] for m in (model, plain)]
    assert np.array_equal(*states)
    with pytest.raises(
        ValueError, match=r"dynamic: beyond 4 .* 5 tokens, padding included"
    ) as error:
        model.prefill(prompt, mask, cache_length=5)
    assert "\n" not in str(error.value)
    prefix = model.prefix(prompt, mask)
    tiny.close(
        model.after(prefix, prompt[:, :1], mask[:, :1]),
        plain.after(prefix, prompt[:, :1], mask[:, :1]),
    )
    with pytest.raises(ValueError, match="dynamic: beyond 4"):
        model.after(prefix, prompt[:, :2], mask[:, :2])


@pytest.mark.parametrize("name", ["plain", "dynamic scaling"])
def test_padding_side_changes_nothing(name):
    model = tiny.language_model(tiny.model_config(**FAMILY[name]))
    alone = tiny.forward(model, *embed(DOCUMENT, 0, width=len(DOCUMENT)))[0]
    for offset in (0, 1, 3):
        padded = tiny.forward(model, *embed(DOCUMENT, offset))[0]
        tiny.close(padded[offset : offset + len(DOCUMENT)], alone)


def test_garbage_in_padding_changes_neither_states_nor_gradients():
    model = tiny.language_model()

    def loss(model, tokens, segments):
        hidden = model(tokens, segments)
        real = (segments > 0)[..., None]
        logits = jnp.where(real, jnp.sin(model.logits(hidden)), 0.0)
        return logits.sum(), jnp.where(real, hidden, 0.0)

    grad = tiny.jit(jax.value_and_grad(loss, has_aux=True))
    (clean, states), clean_grad = grad(model, *embed(DOCUMENT, 2))
    tokens, segments = embed(DOCUMENT, 2, fill=33)
    assert 33 not in DOCUMENT
    (dirty, dirty_states), dirty_grad = grad(model, tokens, segments)
    assert clean == dirty
    assert np.array_equal(states, dirty_states)
    assert tiny.largest_difference(clean_grad, dirty_grad) == 0.0


def test_packed_documents_equal_separate_rows():
    model = tiny.language_model()
    rng = np.random.default_rng(1)
    documents = [rng.integers(2, tiny.VOCAB, n).astype(np.int32) for n in (3, 4, 2)]
    tokens = np.concatenate([*documents, [tiny.PAD]])[None].astype(np.int32)
    # Ids need not rise, only differ from their neighbours.
    segments = np.array([[5, 5, 5, 1, 1, 1, 1, 2, 2, 0]], np.int32)
    packed = tiny.forward(model, tokens, segments)[0]
    start = 0
    for document in documents:
        alone = tiny.forward(model, *embed(document, 0))[0, : len(document)]
        tiny.close(packed[start : start + len(document)], alone)
        start += len(document)
    changed = tokens.copy()
    changed[0, 1] = (changed[0, 1] + 1) % tiny.VOCAB
    after = tiny.forward(model, changed, segments)[0]
    assert np.array_equal(after[3:], packed[3:])
    assert np.abs(after[1:3] - packed[1:3]).min(axis=-1).max() > 0


def test_positions_restart_in_every_run():
    segments = np.array(
        [[0, 0, 1, 1, 1, 0], [1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3], [1, 2, 3, 0, 0, 4]]
    )
    wanted = np.zeros_like(segments)
    for row in range(segments.shape[0]):
        for t in range(1, segments.shape[1]):
            same = segments[row, t] == segments[row, t - 1]
            wanted[row, t] = wanted[row, t - 1] + 1 if same else 0
    assert np.array_equal(layers.positions_in_segment(jnp.asarray(segments)), wanted)


def test_mask_is_causal_and_within_segments():
    segments = np.array([[0, 1, 1, 2, 2, 0]])
    mask = np.asarray(layers.segment_mask(jnp.asarray(segments)))[0, 0]
    for t in range(6):
        for s in range(6):
            assert mask[t, s] == (s <= t and segments[0, s] == segments[0, t])


def test_decoding_with_a_cache_equals_the_full_pass():
    model = tiny.language_model(tiny.model_config(qkv_bias=True, qk_norm=True, num_layers=3))
    steps, (prompts, mask) = 4, tiny.left_padded([5, 2, 1], 5)
    rest = np.random.default_rng(0).integers(2, tiny.VOCAB, (3, steps)).astype(np.int32)
    # Row 2 ends after its second token: what it is fed later must not touch the others.
    prefill = tiny.jit(functools.partial(type(model).prefill, cache_length=5 + steps))
    hidden, cache = prefill(model, prompts, mask)
    states, decode = [hidden], tiny.jit(type(model).decode_step)
    for step in range(steps):
        rope = model.rope(mask.sum(1).astype(np.int32) + step)
        hidden, cache = decode(model, rest[:, step], rope, jnp.int32(5 + step), cache)
        states.append(hidden)
    tokens = np.concatenate([prompts, rest], axis=1)
    segments = np.concatenate([mask, np.ones_like(rest, bool)], axis=1).astype(np.int32)
    full = tiny.forward(model, tokens, segments)[:, 4:]
    tiny.close(jnp.stack(states, axis=1), full)
    assert np.array_equal(cache.mask, segments > 0)


@functools.cache
def continued(name: str = "plain"):
    """A model of the family, and `prefix` and `after` jitted."""
    model = tiny.language_model(tiny.model_config(**FAMILY[name]))
    return model, tiny.jit(Transformer.prefix), tiny.jit(Transformer.after)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("offset", [0, 2, 3])
def test_after_a_prefix_equals_the_full_pass(name, offset):
    """The prefix may be padded on either side, its rows go on from it with padding of their own."""
    model, read, after = continued(name)
    beginning, split = DOCUMENT[:3], (4, 1)
    tokens, segments = embed(beginning, offset, width=6)
    prefix = read(model, tokens, segments > 0)
    rest = [embed(DOCUMENT[3:][:length], 1, width=6) for length in split]
    states = after(model, prefix, *map(np.concatenate, zip(*rest, strict=True)))
    for row, length in enumerate(split):
        whole = tiny.forward(model, *embed(DOCUMENT[: 3 + length], 0))[0, 3 : 3 + length]
        tiny.close(states[row, 1 : 1 + length], whole)


def test_after_a_prefix_without_tokens_is_the_model_itself():
    model, read, after = continued()
    nothing = np.zeros((1, 6), np.int32)
    prefix = read(model, nothing, nothing > 0)
    tiny.close(
        after(model, prefix, *embed(DOCUMENT, 1))[0, 1 : 1 + len(DOCUMENT)],
        tiny.forward(model, *embed(DOCUMENT, 1))[0, 1 : 1 + len(DOCUMENT)],
    )


def test_documents_of_a_row_go_on_from_the_prefix_and_not_from_each_other():
    model, read, after = continued()
    prefix = read(model, DOCUMENT[None, :3], np.ones((1, 3), bool))
    tokens = np.array([[8, 21, 5, 9, 9, 0]], np.int32)
    states = after(model, prefix, tokens, np.array([[1, 1, 1, 2, 2, 0]], np.int32))
    alone = after(model, prefix, tokens[:, 3:5], np.ones((1, 2), np.int32))
    tiny.close(states[:, 3:5], alone)


def sum_of_states(model):
    return jnp.sum(jnp.sin(model(DOCUMENT[None], np.ones((1, len(DOCUMENT)), np.int32))))


@functools.cache
def remat_run(policy: str):
    """Gradient, jaxpr, and bytes kept for the backward pass under a policy."""
    model = tiny.language_model(tiny.model_config(remat=policy))
    residuals = [aval for aval, _ in saved_residuals(sum_of_states, model)]
    kept = sum(aval.size * aval.dtype.itemsize for aval in residuals)
    jaxpr = str(jax.make_jaxpr(jax.grad(sum_of_states))(model))
    return tiny.jit(jax.grad(sum_of_states))(model), jaxpr, kept


@pytest.mark.slow
def test_remat_policies_keep_less_and_give_the_same_gradient():
    none, dots, full = (remat_run(policy) for policy in ("none", "dots", "full"))
    assert full[2] < dots[2] < none[2]
    assert len({none[1], dots[1], full[1]}) == 3
    for other in (dots, full):
        tiny.close(jax.tree.leaves(other[0]), jax.tree.leaves(none[0]), 2e-5)


def test_bfloat16_follows_float32_and_keeps_norms_exact():
    exact = tiny.language_model()
    half = tiny.draw(
        jax.eval_shape(lambda: tiny.language_model(tiny.model_config(dtype="bfloat16"))), seed=0
    )
    tokens, segments = embed(DOCUMENT, 0)
    wide, narrow = tiny.forward(exact, tokens, segments), tiny.forward(half, tokens, segments)
    assert narrow.dtype == jnp.bfloat16
    assert half.logits(narrow).dtype == jnp.float32
    error = np.abs(np.asarray(narrow, np.float32) - wide)[:, : len(DOCUMENT)].max()
    assert 1e-4 < error < 0.1
    # A norm in bfloat16 would lose the mean of 256 squares; in float32 it rounds once, at the end.
    x = jnp.asarray(np.random.default_rng(0).normal(0, 30, (4, 256)), jnp.bfloat16)
    wanted = np.stack([decoder.rms_norm(r, 1.0, 1e-5) for r in np.asarray(x, np.float64)])
    got = layers.rms_norm(x, jnp.ones(256, jnp.bfloat16), 1e-5)
    assert np.array_equal(got, jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16))


def test_initial_weights():
    """Normal of the given width, residual outputs narrower, no two leaves or layers alike."""
    config = tiny.model_config(hidden_size=32, intermediate_size=32, init_std=0.1)
    model = tiny.jit(lambda key: Transformer(config, key))(jax.random.key(3))
    w, narrow = model.layers, 0.1 / (2 * config.num_layers) ** 0.5
    for leaf, std in (
        (w.q, 0.1),
        (w.up, 0.1),
        (model.embedding, 0.1),
        (w.o, narrow),
        (w.down, narrow),
    ):
        # 1,280 draws or more: their spread is known to a few per cent.
        assert abs(float(np.std(leaf[...])) / std - 1) < 0.1
        assert abs(float(np.mean(leaf[...]))) < std / 5
    assert np.all(w.attention_norm[...] == 1) and np.all(model.final_norm[...] == 1)
    layers_of = [np.asarray(leaf[...][i]) for leaf in (w.k, w.v, w.gate, w.up) for i in (0, 1)]
    rows = {matrix[0, :8].tobytes() for matrix in layers_of}
    assert len(rows) == len(layers_of)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"dtype": "float16"}, "dtype='float16' is unknown; use one of"),
        ({"remat": "some"}, "remat='some' is unknown; use one of"),
        ({"attention": "flash"}, "attention='flash' is unknown; use one of"),
    ],
)
def test_wrong_settings_are_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny.model_config(**change)
    assert "\n" not in str(error.value)


def test_unknown_keys_are_refused():
    with pytest.raises(TypeError, match="hidden_sizes"):
        ModelConfig(**{"vocab_size": 8, "hidden_sizes": 8})
    with pytest.raises(ValueError, match=r"kind='longrope' is unknown; use one of linear, dynamic"):
        RopeScaling("longrope")
    with pytest.raises(ValueError, match="head_dim=2 must be above 2 with dynamic"):
        tiny.model_config(head_dim=2, rope_scaling=DYNAMIC)


@pytest.mark.slow
def test_first_layers_are_the_model_whose_other_layers_add_nothing():
    model = tiny.language_model(tiny.model_config(num_layers=3))
    silent = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
    for name in ("o", "down"):
        weight = getattr(model.layers, name)[...]
        setattr(silent.layers, name, nnx.Param(weight.at[1:].set(0.0)))
    tokens, one = jnp.array([[5, 6, 7, 8, 1]]), jnp.ones((1, 5), jnp.int32)
    shorter = first_layers(model, 1)
    assert shorter.config.num_layers == 1 and model.config.num_layers == 3
    np.testing.assert_allclose(shorter(tokens, one), silent(tokens, one), atol=1e-5)
    assert np.abs(shorter(tokens, one) - model(tokens, one)).max() > 0.1
    with pytest.raises(ValueError, match="layers=4 must be from 1 to 3"):
        first_layers(model, 4)
