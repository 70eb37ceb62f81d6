"""Log-probabilities and scalar heads: values, what the backward pass keeps, where scores lie."""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Transformer
from tests import tiny
from tests.references import decoder

ROWS, WIDTH, START = 3, 12, 4


def batch():
    """Right-padded rows of 12, 9 and 5 tokens: tokens and segments."""
    tokens, mask = tiny.left_padded([WIDTH, 9, 5], WIDTH)
    return np.flip(tokens, 1).copy(), np.flip(mask, 1).astype(np.int32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_log_probs_and_entropy_against_numpy():
    model, (tokens, segments), temperature = tiny.language_model(), batch(), 0.7
    log_probs, entropies = tiny.teacher_forced(model, tokens, segments, temperature, start=START)
    assert log_probs.shape == entropies.shape == (ROWS, WIDTH - START)
    for row in range(ROWS):
        length = int(segments[row].sum())
        wanted = log_softmax(decoder.logits(model, tokens[row, :length]) / temperature)
        for t in range(START, length):
            tiny.close(log_probs[row, t - START], wanted[t - 1, tokens[row, t]])
            entropy = -np.sum(np.exp(wanted[t - 1]) * wanted[t - 1])
            tiny.close(entropies[row, t - START], entropy)


def hidden_and_targets():
    """What the decoder hands over: `[B, W, D]`, `[B, W]`, with the same W as the batch."""
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(ROWS, WIDTH - START, 16))
    targets = rng.integers(0, tiny.VOCAB, (ROWS, WIDTH - START))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(targets, jnp.int32)


def loss(model, hidden, targets, chunk: int):
    """Uses every log-probability and entropy with a different weight."""
    log_probs, entropies = heads.log_probs_of(
        model, hidden, targets, temperature=0.7, with_entropy=True, chunk=chunk
    )
    weights = jnp.cos(jnp.arange(log_probs.size)).reshape(log_probs.shape)
    return jnp.sum(weights * log_probs) + jnp.sum(weights * entropies), (log_probs, entropies)


def test_chunks_change_nothing():
    """Eight columns in chunks of three: the last chunk is short."""
    grad = tiny.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=3)
    args = tiny.language_model(), *hidden_and_targets()
    (_, whole), whole_grad = grad(*args, 128)
    (_, parts), parts_grad = grad(*args, 3)
    tiny.close(parts, whole, 1e-6)
    tiny.close(parts_grad, whole_grad)
    assert tiny.largest_difference(whole_grad, jax.tree.map(jnp.zeros_like, whole_grad)) > 0.1


def test_chunks_fit_the_memory_for_logits():
    assert heads.fitting_columns(32, 128_256) == 2**29 // (4 * 32 * 128_256)
    assert heads.fitting_columns(10**6, 128_256) == 1


def vocabulary_residuals(function, *args) -> list[tuple[int, ...]]:
    """Shapes with a vocabulary axis that the forward pass leaves for the backward pass."""
    kept = [
        aval.shape for aval, where in saved_residuals(function, *args) if "argument" not in where
    ]
    return [shape for shape in kept if tiny.VOCAB in shape]


def plain_loss(model, hidden, targets):
    """The same log-probabilities written without care."""
    log_probs = jax.nn.log_softmax(model.logits(hidden) / 0.7)
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1).sum()


@pytest.mark.parametrize("chunk", [128, 3])
def test_no_vocabulary_sized_array_lives_into_the_backward_pass(chunk):
    args = tiny.language_model(), *hidden_and_targets()
    assert (ROWS, WIDTH - START, tiny.VOCAB) in vocabulary_residuals(plain_loss, *args)
    assert not vocabulary_residuals(lambda *args: loss(*args, chunk)[0], *args)

    def through_the_model(model):
        return heads.next_token_log_probs(model, *batch(), start=START, chunk=chunk)[0].sum()

    assert not vocabulary_residuals(through_the_model, args[0])


def logit_rows(jaxpr) -> list[int]:
    """Numbers of rows of every array whose last axis is the vocabulary, nested jaxprs included."""
    rows = []
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")]
        rows += [int(np.prod(s[:-1])) for s in shapes if len(s) > 1 and s[-1] == tiny.VOCAB]
        for inner in jex_core.jaxprs_in_params(equation.params):
            rows += logit_rows(inner)
    return rows


def most_logit_rows(start: int, chunk: int) -> int:
    model, (tokens, segments) = tiny.language_model(tiny.model_config(hidden_size=8)), batch()

    def forward(model):
        return heads.next_token_log_probs(
            model, tokens, segments, start=start, with_entropy=True, chunk=chunk
        )

    # The transposed embedding has 8 rows, fewer than any block of logits here.
    return max(logit_rows(jax.make_jaxpr(forward)(model).jaxpr))


def test_logits_exist_for_the_asked_columns_only():
    assert most_logit_rows(1, 128) == ROWS * (WIDTH - 1)
    assert most_logit_rows(START, 128) == ROWS * (WIDTH - START)
    assert most_logit_rows(START, 3) == ROWS * 3


def test_bfloat16_logits_are_normalised_in_float32():
    model = half_model()
    hidden, targets = hidden_and_targets()
    hidden = hidden.astype(jnp.bfloat16)
    log_probs, entropies = heads.log_probs_of(model, hidden, targets, with_entropy=True)
    assert log_probs.dtype == entropies.dtype == jnp.float32
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.embedding[...], np.float64).T
    wanted = log_softmax(logits)
    chosen = np.take_along_axis(wanted, np.asarray(targets)[..., None], axis=-1)[..., 0]
    tiny.close(log_probs, chosen)
    tiny.close(entropies, -np.sum(np.exp(wanted) * wanted, axis=-1))
    # Logits that were rounded to bfloat16, or normalised there, would be far off.
    rounded = log_softmax(np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64))
    assert tiny.largest_difference(rounded, wanted) > 1e-3


def half_model() -> Transformer:
    config = tiny.model_config(dtype="bfloat16")
    return tiny.draw(jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0)), 0)


@tiny.jit
def scores_and_values(model, tokens, segments):
    return model.scores(tokens, segments), model.values(tokens, segments)


def scores(model, tokens, segments):
    return scores_and_values(model, tokens, segments)[0]


def test_scores_are_read_at_the_last_real_token_on_either_side():
    model = tiny.scalar_model()
    left_tokens, left_mask = tiny.left_padded([WIDTH, 9, 5], WIDTH)
    left = scores(model, left_tokens, left_mask.astype(np.int32))
    right_tokens, right_mask = np.zeros_like(left_tokens), np.zeros_like(left_mask, np.int32)
    for row, length in enumerate((WIDTH, 9, 5)):
        document = left_tokens[row, WIDTH - length :]
        right_tokens[row, :length], right_mask[row, :length] = document, 1
        hidden = decoder.hidden_states(model.trunk, document)[-1]
        tiny.close(left[row], hidden @ np.asarray(model.kernel[...]) + float(model.bias[...]))
    tiny.close(scores(model, right_tokens, right_mask), left)
    garbage = np.where(right_mask, right_tokens, 33)
    assert np.array_equal(
        scores(model, garbage, right_mask), scores(model, right_tokens, right_mask)
    )
    # A filler row has no last token: whatever comes out must at least be a number.
    assert np.isfinite(scores(model, right_tokens, right_mask * np.array([[1], [0], [1]]))).all()


def test_last_real_index():
    mask = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]], bool)
    assert heads.last_real_index(mask).tolist() == [3, 1, 1, 0, 2]


def test_values_end_in_the_score():
    model, (tokens, segments) = tiny.scalar_model(), batch()
    read, values = scores_and_values(model, tokens, segments)
    assert values.shape == (ROWS, WIDTH) and values.dtype == jnp.float32
    lengths = segments.sum(1)
    tiny.close(values[np.arange(ROWS), lengths - 1], read)


def test_normalized_shifts_and_divides():
    model, (tokens, segments) = tiny.scalar_model(), batch()
    before = scores(model, tokens, segments)
    changed = model.normalized(jnp.float32(1.5), jnp.float32(4.0))
    tiny.close(scores(changed, tokens, segments), (np.asarray(before) - 1.5) / 4.0)
    assert np.array_equal(scores(model, tokens, segments), before)


def test_new_heads_and_shared_trunk():
    trunk = tiny.language_model(tiny.model_config(hidden_size=64, num_heads=4))
    zero, drawn = heads.ScalarModel(trunk), heads.ScalarModel(trunk, jax.random.key(0))
    assert not np.any(zero.kernel[...]) and not np.any(zero.bias[...])
    # 64 draws of N(0, 1/65): their spread is within a quarter of 0.124.
    assert abs(np.std(drawn.kernel[...]) * 65**0.5 - 1) < 0.25
    assert drawn.trunk.embedding[...] is trunk.embedding[...]


def test_head_is_read_in_float32():
    model = heads.ScalarModel(half_model(), jax.random.key(1))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16)), jnp.bfloat16)
    read = model.read(hidden)
    assert read.dtype == jnp.float32
    tiny.close(
        read, np.asarray(hidden, np.float64) @ np.asarray(model.kernel[...], np.float64), 1e-6
    )
