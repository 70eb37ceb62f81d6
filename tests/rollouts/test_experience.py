"""Scoring a rollout: what each model reads, at which token, and how scores become rewards."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.rollouts import experience
from rlhf_jax.rollouts.experience import Evaluation, RewardConfig
from rlhf_jax.rollouts.rollout import Rollout
from tests import tiny
from tests.references import decoder

evaluate = tiny.jit(experience.evaluate, static_argnames="microbatches")


def score(rollout, *, reference=0, critic=8, temperature=1.0, microbatches=1) -> Evaluation:
    """Evaluates with models of these seeds; seed 0 is the policy."""
    return evaluate(
        rollout,
        tiny.language_model(seed=reference),
        tiny.scalar_model(seed=7),
        None if critic is None else tiny.scalar_model(seed=critic),
        temperature=temperature,
        microbatches=microbatches,
    )


@functools.cache
def evaluation(setting: str = "plain") -> Evaluation:
    """The reference is the policy itself."""
    return score(tiny.rollout(setting), temperature=tiny.SETTINGS[setting].policy_temperature)


@pytest.mark.slow
@pytest.mark.parametrize("setting", tiny.SETTINGS)
def test_kl_to_an_equal_reference_is_zero(setting):
    rollout, result = tiny.rollout(setting), evaluation(setting)
    where = np.asarray(rollout.response_mask)
    tiny.close(np.where(where, result.ref_log_probs, 0.0), rollout.log_probs)
    rewards, _ = experience.shape_rewards(
        rollout,
        dataclasses.replace(result, scores=jnp.zeros_like(result.scores)),
        losses.RunningMoments.zeros(),
        config=RewardConfig("none"),
        discount=1.0,
        kl_coef=1.0,
    )
    tiny.close(rewards, np.zeros(where.shape))


def test_another_reference_has_another_kl():
    other = score(tiny.rollout(), reference=1)
    assert tiny.largest_difference(other.ref_log_probs, evaluation().ref_log_probs) > 0.1


def real_row(rollout: Rollout, row: int) -> np.ndarray:
    return np.asarray(rollout.tokens)[row][np.asarray(rollout.mask)[row]]


def test_scores_and_values_against_the_numpy_decoder():
    """The score is read after the last real token, V(s_t) before response token t."""
    rollout, result = tiny.rollout(), evaluation()
    prompt_lengths = np.asarray(rollout.mask)[:, : tiny.PROMPT].sum(1)
    for row in range(4):
        tokens = real_row(rollout, row)
        for model, seed in ((tiny.scalar_model(seed=7), 7), (tiny.scalar_model(seed=8), 8)):
            hidden = decoder.hidden_states(model.trunk, tokens)
            read = hidden @ np.asarray(model.kernel[...], np.float64) + float(model.bias[...])
            if seed == 7:
                tiny.close(result.scores[row], read[-1])
                continue
            length = len(tokens) - prompt_lengths[row]
            wanted = read[prompt_lengths[row] - 1 : len(tokens) - 1]
            tiny.close(result.values[row, :length], wanted)


def test_values_do_not_see_the_action_at_their_own_position():
    rollout, column = tiny.rollout(), 1
    tokens = np.asarray(rollout.tokens).copy()
    tokens[:, tiny.PROMPT + column] = (tokens[:, tiny.PROMPT + column] + 1) % tiny.VOCAB
    before, after = evaluation().values, score(rollout.replace(tokens=jnp.asarray(tokens))).values
    assert np.array_equal(after[:, : column + 1], before[:, : column + 1])
    seen = np.asarray(rollout.response_mask)[:, column]
    assert np.all(np.asarray(after != before)[seen, column + 1])


def test_microbatches_keep_rows_in_their_place_and_no_critic_gives_zeros():
    parts, whole = score(tiny.rollout(), critic=None, microbatches=4), evaluation()
    tiny.close((parts.scores, parts.ref_log_probs), (whole.scores, whole.ref_log_probs))
    assert parts.values.shape == whole.values.shape and not np.any(parts.values)


def test_microbatches_must_divide():
    with pytest.raises(ValueError, match="8 must be divisible by 3"):
        score(tiny.rollout(), microbatches=3)


def padded(rollout: Rollout, left: int, right: int) -> Rollout:
    """More padding before the prompts and after the responses, full of garbage."""
    rng = np.random.default_rng(9)

    def widen(x, before: int, fill):
        x = np.pad(np.asarray(x), ((0, 0), (before, right)))
        outside = np.ones(x.shape, bool)
        outside[:, before : x.shape[1] - right] = False
        return jnp.asarray(np.where(outside, fill(x.shape), x).astype(x.dtype))

    def zeros(shape):
        return np.zeros(shape)

    return rollout.replace(
        tokens=widen(rollout.tokens, left, lambda shape: rng.integers(0, tiny.VOCAB, shape)),
        mask=widen(rollout.mask, left, zeros),
        log_probs=widen(rollout.log_probs, 0, zeros),
        entropies=widen(rollout.entropies, 0, zeros),
    )


@functools.cache
def padded_pair() -> tuple[Rollout, Evaluation]:
    """The same rollout with more padding, scored anew."""
    rollout = padded(tiny.rollout(), 2, 3)
    return rollout, score(rollout)


@pytest.mark.slow
def test_padding_changes_no_log_prob_score_or_value():
    where = np.asarray(tiny.rollout().response_mask)
    narrow, (_, wide) = evaluation(), padded_pair()
    tiny.close(wide.scores, narrow.scores)
    for name in ("ref_log_probs", "values"):
        kept = getattr(wide, name)[:, : tiny.RESPONSE]
        tiny.close(np.where(where, kept, 0.0), np.where(where, getattr(narrow, name), 0.0))


def test_take_takes_rows_of_everything():
    rows = jnp.array([3, 0])
    taken = experience.take((tiny.rollout(), evaluation()), rows)
    assert np.array_equal(taken[0].tokens, np.asarray(tiny.rollout().tokens)[[3, 0]])
    assert np.array_equal(taken[1].scores, np.asarray(evaluation().scores)[[3, 0]])
