"""From scores to rewards, advantages and returns: every choice against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.rollouts import experience
from rlhf_jax.rollouts.experience import AdvantageConfig, Evaluation, RewardConfig
from rlhf_jax.rollouts.rollout import Rollout
from tests import tiny

LENGTHS = [4, 1, 3, 4]
WHERE = np.arange(4)[None] < np.array(LENGTHS)[:, None]
ENDED = np.array([False, True, True, True])
SCORES = np.array([0.73, -1.25, 2.5, 0.31], np.float32)
RNG = np.random.default_rng(4)
LOG_PROBS, REF, VALUES, REWARDS = RNG.normal(-1, 0.5, (4, 4, 4)).astype(np.float32)
KL_COEF, DISCOUNT = 0.3, 0.9


def make(fill: float = 0.0) -> tuple[Rollout, Evaluation]:
    """Four responses of 4, 1, 3 and 4 tokens, the first one cut; `fill` is on padding."""

    def fields(x):
        return jnp.asarray(np.where(WHERE, x, np.float32(fill)))

    prompt = np.ones((4, 2), bool)
    rollout = Rollout(
        tokens=jnp.ones((4, 6), jnp.int32),
        mask=jnp.asarray(np.concatenate([prompt, WHERE], axis=1)),
        log_probs=fields(LOG_PROBS),
        entropies=fields(-LOG_PROBS),
        ended=jnp.asarray(ENDED),
    )
    return rollout, Evaluation(fields(REF), jnp.asarray(SCORES), fields(VALUES))


def shape(config: RewardConfig, moments=None, *, kl_coef: float = KL_COEF, fill: float = 0.0):
    moments = losses.RunningMoments.zeros() if moments is None else moments
    return experience.shape_rewards(
        *make(fill), moments, config=config, discount=DISCOUNT, kl_coef=kl_coef
    )


def place(scores, kl_coef: float = KL_COEF) -> np.ndarray:
    """KL penalty on every real token, the score on the last one."""
    rewards = np.zeros((4, 4))
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            rewards[row, t] = -kl_coef * (float(LOG_PROBS[row, t]) - float(REF[row, t]))
        rewards[row, length - 1] += scores[row]
    return rewards


def test_a_fractional_score_lands_on_the_last_real_token():
    rewards, _ = shape(RewardConfig("none"), kl_coef=0.0)
    assert rewards.dtype == jnp.float32
    wanted = np.zeros((4, 4), np.float32)
    wanted[0, 3], wanted[1, 0], wanted[2, 2], wanted[3, 3] = SCORES
    assert np.array_equal(rewards, wanted)


def test_kl_penalty_is_on_every_token():
    tiny.close(shape(RewardConfig("none"))[0], place(SCORES), 1e-6)


def test_penalty_for_a_missing_end_hits_cut_responses_only():
    plain, _ = shape(RewardConfig("none"))
    fined, _ = shape(RewardConfig("none", missing_eos_penalty=2.0))
    wanted = np.zeros((4, 4))
    wanted[0, 3] = -2.0
    tiny.close(fined - plain, wanted, 1e-6)


@pytest.mark.parametrize("name", experience.REWARD_TRANSFORMS)
def test_penalty_for_a_missing_end_is_neither_scaled_nor_clipped_nor_learned(name):
    plain, moments = shape(RewardConfig(name, clip=0.8))
    fined, fined_moments = shape(RewardConfig(name, clip=0.8, missing_eos_penalty=2.0))
    wanted = np.zeros((4, 4))
    wanted[0, 3] = -2.0
    tiny.close(fined - plain, wanted, 1e-6)
    assert tuple(map(float, moments)) == tuple(map(float, fined_moments))


def transformed(name: str, history: list[np.ndarray]) -> np.ndarray:
    """The last batch of scores after a transform, from the whole history."""
    seen, scores = np.concatenate(history).astype(float), history[-1].astype(float)
    if name == "normalize":
        return (scores - seen.mean()) / seen.std()
    if name == "scale":
        return scores / seen.std()
    if name == "scale_discounted":
        # Rewards are at the end, so the rolling sum is 0 before it and the score there.
        rolling = [
            s
            for batch in history
            for row, s in enumerate(batch)
            for s in (*[0.0] * (LENGTHS[row] - 1), float(s))
        ]
        return scores / np.std(rolling)
    return scores


@pytest.mark.parametrize("clip", [0.0, 0.8])
@pytest.mark.parametrize("name", experience.REWARD_TRANSFORMS)
def test_transforms_use_the_whole_history(name, clip):
    config = RewardConfig(name, clip=clip)
    first, moments = shape(config)
    second, _ = shape(config, moments)
    for rewards, history in ((first, [SCORES]), (second, [SCORES, SCORES])):
        scores = transformed(name, history)
        tiny.close(rewards, place(np.clip(scores, -clip, clip) if clip else scores))
    # A shifted history gives other numbers, unless the scores are left as they are.
    shifted, _ = shape(config, losses.update_moments(moments, jnp.array([9.0, -9.0])))
    assert (tiny.largest_difference(shifted, first) > 1e-3) == (name != "none")


def test_every_transform_is_another():
    results = [np.asarray(shape(RewardConfig(name))[0]) for name in experience.REWARD_TRANSFORMS]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert np.abs(one - other).max() > 1e-2


def test_first_batch_of_equal_scores_is_finite():
    rollout, evaluation = make()
    evaluation = evaluation.replace(scores=jnp.full(4, 0.5))
    for name in experience.REWARD_TRANSFORMS:
        rewards, _ = experience.shape_rewards(
            rollout,
            evaluation,
            losses.RunningMoments.zeros(),
            config=RewardConfig(name),
            discount=1.0,
            kl_coef=0.0,
        )
        assert np.isfinite(rewards).all()


advantages_of = tiny.jit(experience.advantages, static_argnames=("config", "samples_per_prompt"))


def phi(config: AdvantageConfig, fill: float = 0.0, values=VALUES):
    rewards, values = (np.where(WHERE, x, np.float32(fill)) for x in (REWARDS, values))
    return advantages_of(rewards, values, WHERE, config=config, samples_per_prompt=2)


def delta(row: int, t: int) -> float:
    following = VALUES[row, t + 1] if t + 1 < LENGTHS[row] else 0.0
    return REWARDS[row, t] + DISCOUNT * following - VALUES[row, t]


def to_go(row: int, t: int) -> float:
    return sum(DISCOUNT ** (s - t) * REWARDS[row, s] for s in range(t, LENGTHS[row]))


def wanted_phi(method: str, row: int, t: int) -> float:
    """Φ_t as the slides define it, by sums."""
    rest = range(t, LENGTHS[row])
    total = to_go(row, 0)
    pair = [to_go(row - row % 2 + i, 0) for i in range(2)]
    return {
        "gae": lambda: sum((DISCOUNT * 0.8) ** (s - t) * delta(row, s) for s in rest),
        "total_return": lambda: total,
        "reward_to_go": lambda: to_go(row, t),
        "reward_to_go_baseline": lambda: to_go(row, t) - VALUES[row, t],
        "td": lambda: delta(row, t),
        "k_step": lambda: sum(DISCOUNT ** (s - t) * delta(row, s) for s in rest if s < t + 2),
        "batch_mean": lambda: total - np.mean([to_go(r, 0) for r in range(4)]),
        "rloo": lambda: total - pair[1 - row % 2],
        "grpo": lambda: (total - np.mean(pair)) / (np.std(pair) + 1e-4),
    }[method]()


def config_of(method: str, **changes) -> AdvantageConfig:
    settings = {"discount": DISCOUNT, "lambda_": 0.8, "k": 2}
    return AdvantageConfig(method, **(settings | changes))


@pytest.mark.parametrize("method", experience.ADVANTAGES)
def test_every_phi_against_its_definition(method):
    advantages, returns = phi(config_of(method))
    assert advantages.dtype == returns.dtype == jnp.float32
    for row in range(4):
        for t in range(4):
            real = WHERE[row, t]
            tiny.close(advantages[row, t], wanted_phi(method, row, t) if real else 0.0)
            if method == "gae":
                target = wanted_phi("gae", row, t) + VALUES[row, t]
            else:
                target = to_go(row, t)
            tiny.close(returns[row, t], target if real else 0.0)


def test_every_phi_is_another_and_every_number_matters():
    results = {m: np.asarray(phi(config_of(m))[0]) for m in experience.ADVANTAGES}
    names = list(results)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert np.abs(results[one] - results[other]).max() > 1e-2, (one, other)
    for method, change in (
        ("gae", {"lambda_": 0.5}),
        ("gae", {"discount": 0.5}),
        ("k_step", {"k": 3}),
        ("k_step", {"k": 1}),
        ("total_return", {"discount": 0.5}),
    ):
        changed = np.asarray(phi(config_of(method, **change))[0])
        assert np.abs(changed - results[method]).max() > 1e-2, (method, change)


def test_monte_carlo_returns_are_rewards_to_go():
    _, returns = phi(config_of("gae", returns="monte_carlo"))
    wanted = [[to_go(r, t) if WHERE[r, t] else 0.0 for t in range(4)] for r in range(4)]
    tiny.close(returns, np.array(wanted))
    assert tiny.largest_difference(returns, phi(config_of("gae"))[1]) > 1e-2


def test_nan_on_padding_reaches_nothing():
    for name in experience.REWARD_TRANSFORMS:
        config = RewardConfig(name, clip=0.8)
        (clean, _), (poisoned, moments) = shape(config), shape(config, fill=np.nan)
        assert np.array_equal(clean, poisoned)
        assert np.isfinite(np.stack(moments)).all()
    for method in experience.ADVANTAGES:
        clean, poisoned = phi(config_of(method)), phi(config_of(method), fill=np.nan)
        assert all(map(np.array_equal, clean, poisoned)), method


def test_shaped_rewards_and_advantages_are_constants():
    def total(log_probs, ref, scores, values):
        rollout, evaluation = make()
        rollout = rollout.replace(log_probs=log_probs)
        evaluation = evaluation.replace(ref_log_probs=ref, scores=scores)
        rewards, _ = experience.shape_rewards(
            rollout,
            evaluation,
            losses.RunningMoments.zeros(),
            config=RewardConfig("normalize"),
            discount=DISCOUNT,
            kl_coef=KL_COEF,
        )
        advantages, _ = experience.advantages(
            rewards, values, jnp.asarray(WHERE), config=config_of("gae")
        )
        return jnp.sum(jnp.square(advantages))

    grads = jax.grad(total, argnums=(0, 1, 2, 3))(LOG_PROBS, REF, jnp.asarray(SCORES), VALUES)
    assert not any(np.any(g) for g in grads)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: RewardConfig("norm"), "transform='norm' is unknown; use one of"),
        (lambda: AdvantageConfig("a2c"), "method='a2c' is unknown; use one of"),
        (lambda: AdvantageConfig("rloo").check_samples(1), "samples_per_prompt=1 must be at"),
        (lambda: AdvantageConfig(returns="td"), "returns='td' is unknown; use one of gae"),
    ],
)
def test_wrong_settings_are_one_line(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()


def test_which_phi_needs_a_critic():
    """Those that change with the values."""
    for method in experience.ADVANTAGES:
        config = config_of(method)
        before, after = phi(config)[0], phi(config, values=VALUES + 1)[0]
        assert config.needs_critic == (tiny.largest_difference(before, after) > 1e-3), method
