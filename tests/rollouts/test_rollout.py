"""Rollouts: sampler and trainer agree, EOS is an action, nothing follows it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rollouts import sampling
from rlhf_jax.rollouts.rollout import SamplingConfig, generate
from tests import tiny
from tests.programs import compiled_programs
from tests.references import decoder

GRID = list(tiny.SETTINGS)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logits_of(rollout) -> np.ndarray:
    """`[B, G, V]` from the training pass."""
    model = tiny.language_model()
    hidden = tiny.forward(model, rollout.tokens, rollout.segments)
    return np.asarray(model.logits(hidden[:, rollout.prompt_length - 1 : -1]))


@pytest.mark.parametrize("setting", GRID)
def test_sampler_and_trainer_give_the_same_log_probs(setting):
    rollout, config = tiny.rollout(setting), tiny.SETTINGS[setting]
    log_probs, entropies = tiny.teacher_forced(
        tiny.language_model(),
        rollout.tokens,
        rollout.segments,
        config.policy_temperature,
        start=rollout.prompt_length,
    )
    where = np.asarray(rollout.response_mask)
    tiny.close(rollout.log_probs, np.where(where, log_probs, 0.0))
    tiny.close(rollout.entropies, np.where(where, entropies, 0.0))
    # The grid holds what it promises: early ends, cut responses, ragged prompts.
    assert where.sum(1).min() < tiny.RESPONSE
    assert np.ptp(np.asarray(rollout.mask)[:, : tiny.PROMPT].sum(1)) > 0


def test_the_grid_has_early_ends_and_cut_responses():
    ended = np.concatenate([np.asarray(tiny.rollout(setting).ended) for setting in GRID])
    assert ended.any() and not ended.all()


@pytest.mark.parametrize("setting", GRID)
def test_eos_is_the_last_real_token_and_counts(setting):
    rollout = tiny.rollout(setting)
    tokens, where = np.asarray(rollout.responses), np.asarray(rollout.response_mask)
    for row in range(tokens.shape[0]):
        stops = [
            t for t in range(tiny.RESPONSE) if tokens[row, t] in tiny.EOS_IDS and where[row, t]
        ]
        length = stops[0] + 1 if stops else tiny.RESPONSE
        assert where[row].tolist() == [t < length for t in range(tiny.RESPONSE)]
        assert bool(rollout.ended[row]) == bool(stops)
        assert np.all(tokens[row, length:] == tiny.pad_of(setting))
        assert np.all(np.asarray(rollout.log_probs)[row, length:] == 0)
        assert np.all(np.asarray(rollout.log_probs)[row, :length] < 0)
    prompts, mask = tiny.prompts()
    assert np.array_equal(rollout.tokens[:, : tiny.PROMPT], prompts)
    assert np.array_equal(rollout.mask[:, : tiny.PROMPT], mask)
    assert rollout.prompt_length == tiny.PROMPT


def test_every_eos_id_ends_a_response():
    lasts = set()
    for setting in GRID:
        rollout = tiny.rollout(setting)
        last = np.asarray(rollout.response_mask).sum(1) - 1
        ends = np.asarray(rollout.responses)[np.arange(len(last)), last]
        lasts |= {int(token) for token in ends[np.asarray(rollout.ended)]}
    assert len(lasts) > 2 and lasts <= set(tiny.EOS_IDS)


def test_filters_restrict_what_is_drawn():
    """Each token lies in the top k and in the nucleus at the sampling temperature."""
    inside = {}
    for setting in ("cold top-k", "hot nucleus", "plain"):
        rollout, config = tiny.rollout(setting), tiny.SETTINGS[setting]
        filtered = jnp.asarray(logits_of(rollout) / config.policy_temperature)
        if config.top_k:
            filtered = sampling.top_k_filter(filtered, config.top_k)
        # What was drawn without a filter does not pass one: the test can fail.
        filtered = sampling.top_p_filter(filtered, 0.8 if setting == "plain" else config.top_p)
        drawn = np.asarray(rollout.responses)[..., None]
        chosen = np.take_along_axis(np.asarray(filtered), drawn, axis=-1)[..., 0]
        inside[setting] = bool((chosen > -1e29)[np.asarray(rollout.response_mask)].all())
    assert inside == {"cold top-k": True, "hot nucleus": True, "plain": False}


def test_greedy_with_a_repetition_penalty_by_a_loop():
    """The likeliest token once those of the response so far were made less likely."""
    rollout, penalty = tiny.rollout("greedy"), tiny.SETTINGS["greedy"].repetition_penalty
    logits, responses = logits_of(rollout), np.asarray(rollout.responses)
    changed = 0
    for row, t in zip(*np.nonzero(np.asarray(rollout.response_mask)), strict=True):
        candidates = logits[row, t].copy()
        for token in set(responses[row, :t].tolist()):
            candidates[token] *= 1 / penalty if candidates[token] > 0 else penalty
        assert responses[row, t] == candidates.argmax()
        changed += candidates.argmax() != logits[row, t].argmax()
    assert changed > 0


def test_greedy_ignores_the_key():
    again = tiny.sampler("greedy")(tiny.language_model(), *tiny.prompts(), jax.random.key(99))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, tiny.rollout("greedy")))


def test_keys_make_samples_and_only_keys():
    run, model = tiny.sampler("plain"), tiny.language_model()
    again = run(model, *tiny.prompts(), jax.random.key(5))
    other = run(model, *tiny.prompts(), jax.random.key(6))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, tiny.rollout("plain")))
    assert not np.array_equal(other.tokens, again.tokens)


def test_each_row_and_each_step_has_its_own_randomness():
    """A model without weights is uniform: equal rows or columns would mean a key used twice."""
    blank = jax.tree.map(jnp.zeros_like, tiny.language_model())
    drawn = tiny.sampler("plain")(blank, *tiny.prompts(), jax.random.key(4))
    responses, where = np.asarray(drawn.responses), np.asarray(drawn.response_mask)
    tiny.close(drawn.log_probs, np.where(where, -np.log(tiny.VOCAB), 0.0))
    tiny.close(drawn.entropies, np.where(where, np.log(tiny.VOCAB), 0.0))
    rows = [tuple(row[real]) for row, real in zip(responses, where, strict=True)]
    assert len(set(rows)) > len(rows) // 2
    long = [row for row in rows if len(row) > 2]
    assert long and all(len(set(row)) > 1 for row in long)


def test_neither_the_batch_nor_more_padding_changes_a_row():
    """Two rows alone, their prompts padded by three more columns: the second program of greedy."""
    tokens, mask = (np.pad(x[2:4], ((0, 0), (3, 0))) for x in tiny.prompts())
    run, whole = tiny.sampler("greedy"), tiny.rollout("greedy")
    with compiled_programs() as programs:
        few = run(tiny.language_model(), tokens, mask, jax.random.key(0))
    assert programs["generate"] == 1
    assert np.array_equal(few.responses, whole.responses[2:4])
    assert np.array_equal(few.response_mask, whole.response_mask[2:4])
    tiny.close(few.log_probs, whole.log_probs[2:4])
    # One program for each prompt length: other weights, prompts and keys need none.
    with compiled_programs() as programs:
        run(tiny.language_model(seed=3), tokens + 1, mask, jax.random.key(1))
        run(tiny.language_model(seed=3), *tiny.prompts(), jax.random.key(2))
    assert not programs["generate"]


def test_a_row_without_prompt_gives_numbers_and_leaves_the_others_alone():
    tokens, mask = (x.copy() for x in tiny.prompts())
    mask[0] = False
    filler = tiny.sampler("greedy")(tiny.language_model(), tokens, mask, jax.random.key(5))
    assert np.isfinite(filler.log_probs).all()
    assert np.array_equal(filler.responses[1:], tiny.rollout("greedy").responses[1:])


@pytest.mark.slow
def test_one_token_responses_follow_the_distribution():
    """4,096 first tokens of one prompt; chi-square below its 0.999 quantile for 39 degrees."""
    tokens, mask = (np.repeat(x[:1], 4096, axis=0) for x in tiny.prompts())
    model, config = tiny.language_model(), SamplingConfig(1, temperature=1.5)
    run = tiny.jit(
        functools.partial(generate, config=config, eos_ids=tiny.EOS_IDS, pad_id=tiny.PAD)
    )
    rollout = run(model, tokens, mask, jax.random.key(8))
    assert rollout.tokens.shape == (4096, tiny.PROMPT + 1)
    assert np.array_equal(rollout.ended, np.isin(rollout.responses[:, 0], tiny.EOS_IDS))
    log_pi = log_softmax(decoder.logits(model, tokens[0])[-1] / 1.5)
    tiny.close(rollout.log_probs[:, 0], log_pi[rollout.responses[:, 0]])
    expected = 4096 * np.exp(log_pi)
    counts = np.bincount(np.asarray(rollout.responses)[:, 0], minlength=tiny.VOCAB)
    common = expected > 5
    pooled = np.append(expected[common], expected[~common].sum())
    seen = np.append(counts[common], counts[~common].sum())
    assert np.sum((seen - pooled) ** 2 / np.maximum(pooled, 1e-9)) < 72.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, r"temperature=-0.1 must be in \[0, 100\]"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0 must be in \(0, 100\]"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**({"max_new_tokens": 4} | settings))
