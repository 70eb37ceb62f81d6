"""Policy-gradient estimators on a problem of 36 responses, whose expectations are enumerated."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.evaluation.gradients import (
    CountSketch,
    GradientMoments,
    between_prompts,
    compare_gradients,
    percentile_interval,
    sketched_gradients,
)
from rlhf_jax.losses import kl_shaped_rewards
from rlhf_jax.rollouts.experience import AdvantageConfig, advantages
from tests import bigram, tiny
from tests.bigram import VOCAB

KL_COEF = 0.5
PROMPT_END = 2  # the last token of the prompt
# Every response of two tokens, [36, 2].
RESPONSES = np.array(list(itertools.product(range(VOCAB), repeat=2)))
TOKENS = np.concatenate([np.full((len(RESPONSES), 1), PROMPT_END), RESPONSES], 1).astype(np.int32)
SCORES = np.random.default_rng(3).normal(0, 1, len(RESPONSES)) + 2.0
WHERE = np.ones(RESPONSES.shape, bool)
SIZE = VOCAB * VOCAB


def identity_sketch():
    """Keeps a gradient as it is."""
    return CountSketch(jnp.arange(SIZE), jnp.ones(SIZE), SIZE)


def log_probs(table):
    """log π of each token of each response, `[36, 2]`, differentiable."""
    every = jax.nn.log_softmax(jnp.asarray(table, jnp.float32), axis=1)
    return every[TOKENS[:, :-1], TOKENS[:, 1:]]


def probabilities() -> np.ndarray:
    return np.exp(np.asarray(log_probs(bigram.policy().table), np.float64).sum(1))


def objective(table):
    """J = Σ_y π(y) (score(y) − η Σ_t log π/π_ref), differentiated through everything."""
    of_policy = log_probs(table)
    log_ratio = (of_policy - log_probs(bigram.policy(1).table)).sum(1)
    return jnp.sum(jnp.exp(of_policy.sum(1)) * (SCORES - KL_COEF * log_ratio))


@functools.cache
def exact() -> np.ndarray:
    return np.asarray(jax.grad(objective)(bigram.policy().table)).reshape(-1)


def rewards() -> np.ndarray:
    """r_t, `[36, 2]`, as the trainer makes them."""
    return kl_shaped_rewards(
        jnp.asarray(SCORES, jnp.float32),
        log_probs(bigram.policy().table),
        log_probs(bigram.policy(1).table),
        kl_coef=KL_COEF,
        where=jnp.asarray(WHERE),
    )


def exact_values() -> np.ndarray:
    """V^π of the state before each token, `[36, 2]`."""
    weights, to_go = probabilities(), np.cumsum(np.asarray(rewards())[:, ::-1], 1)[:, ::-1]
    values = np.full(RESPONSES.shape, np.sum(weights * to_go[:, 0]))
    for first in range(VOCAB):
        rows = RESPONSES[:, 0] == first
        values[rows, 1] = np.sum((weights * to_go[:, 1])[rows]) / weights[rows].sum()
    return values


def phi(method, values=None, first=0.0, **changes):
    """Φ of every response, `[36, 2]`; with `first` as an additional reward of the first token."""
    values = np.zeros(RESPONSES.shape) if values is None else values
    config = AdvantageConfig(method=method, **changes)
    found, _ = advantages(
        rewards() + jnp.array([[first, 0.0]]),
        jnp.asarray(values, jnp.float32),
        jnp.asarray(WHERE),
        config=config,
    )
    return np.asarray(found)


def gradients(weights) -> np.ndarray:
    """Of every response for each `[36, V, 2]` of weights: `[36, V, 36]`."""
    return _gradients(jnp.asarray(weights, jnp.float32))[0]


@jax.jit
def _gradients(weights):
    ones = jnp.ones(TOKENS.shape, jnp.int32)
    return sketched_gradients(
        bigram.policy(), jnp.asarray(TOKENS), ones, weights, start=1, sketch=identity_sketch()
    )


def expected(weights) -> np.ndarray:
    """The expected gradient for Φ `[36, 2]`, `[36]`: every response by its probability."""
    found = np.asarray(gradients(np.asarray(weights)[:, None]), np.float64)[:, 0]
    return probabilities() @ found


def scatter(weights) -> float:
    """tr Cov of the gradient of one response for Φ `[36, 2]`."""
    found = np.asarray(gradients(np.asarray(weights)[:, None]), np.float64)[:, 0]
    return float(probabilities() @ np.square(found).sum(1) - np.square(expected(weights)).sum())


CRITIC = np.random.default_rng(8).normal(0, 1, VOCAB + 1)


def wrong_values() -> np.ndarray:
    """A critic that knows the state and nothing of its value, `[36, 2]`."""
    return np.stack([np.full(len(RESPONSES), CRITIC[-1]), CRITIC[RESPONSES[:, 0]]], 1)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("total_return", None),
        ("reward_to_go", None),
        ("reward_to_go_baseline", "wrong"),
        ("reward_to_go_baseline", "exact"),
        ("td", "exact"),
        ("gae", "exact"),
        ("k_step", "exact"),
    ],
)
def test_unbiased_estimators_expect_the_gradient_of_the_objective(method, values):
    critic = {"exact": exact_values, "wrong": wrong_values}.get(values, lambda: None)()
    # The KL reward is part of the objective: -0.5 times a log-ratio of about 1 on each token.
    np.testing.assert_allclose(expected(phi(method, critic)), exact(), atol=1e-5)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.9])
def test_a_wrong_critic_biases_gae_by_what_it_is_wrong(lambda_):
    """Â_1 = R_1 − V_1 − (1−λ)(R_2 − V_2), and Â_2 = R_2 − V_2 for every λ."""
    values = wrong_values()
    to_go = np.cumsum(np.asarray(rewards())[:, ::-1], 1)[:, ::-1]
    missing = np.zeros(values.shape)
    missing[:, 0] = (1 - lambda_) * (to_go[:, 1] - values[:, 1])
    bias = expected(phi("gae", values, lambda_=lambda_)) - exact()
    np.testing.assert_allclose(bias, -expected(missing), atol=1e-5)
    assert np.square(bias).sum() > 0.3 * (1 - lambda_) ** 2 * np.square(exact()).sum()


def test_bias_falls_and_variance_rises_with_lambda():
    values, lambdas = exact_values() + 0.3 * wrong_values(), (0.0, 0.5, 0.9, 1.0)
    every = [phi("gae", values, lambda_=lambda_) for lambda_ in lambdas]
    biases = [np.square(expected(one) - exact()).sum() for one in every]
    variances = [scatter(one) for one in every]
    assert biases == sorted(biases, reverse=True) and biases[-1] < 1e-9 < biases[0]
    assert variances == sorted(variances)


def test_total_return_scatters_more_than_rewards_to_go_and_a_baseline_less():
    """What a token has received before it is chosen says nothing of it, and scatters."""
    total, to_go = (scatter(phi(name, first=1.0)) for name in ("total_return", "reward_to_go"))
    assert to_go < 0.9 * total
    to_go = scatter(phi("reward_to_go"))
    assert scatter(phi("reward_to_go_baseline", exact_values())) < 0.5 * to_go


def pairs_expected(method: str) -> np.ndarray:
    """Expected gradient where two responses to the prompt are compared, over all 36² pairs."""
    totals, weights = phi("total_return")[:, 0], probabilities()
    every = np.asarray(gradients(np.ones((len(RESPONSES), 1, 2))), np.float64)[:, 0]
    rows = [(i, j) for i in range(len(RESPONSES)) for j in range(len(RESPONSES))]
    pairs = totals[np.array(rows)].reshape(-1)
    found, _ = advantages(
        jnp.asarray(np.stack([np.zeros_like(pairs), pairs], 1), jnp.float32),
        jnp.zeros((len(pairs), 2)),
        jnp.ones((len(pairs), 2), bool),
        config=AdvantageConfig(method=method),
        samples_per_prompt=2,
    )
    first = np.asarray(found, np.float64).reshape(-1, 2, 2)[:, 0, 0]
    i, j = np.array(rows).T
    return (weights[i] * weights[j] * first) @ every[i]


def test_rloo_is_unbiased_and_grpo_has_another_scale_and_direction():
    np.testing.assert_allclose(pairs_expected("rloo"), exact(), atol=1e-5)
    grpo, target = pairs_expected("grpo"), exact()
    scale = grpo @ target / (target @ target)
    assert np.square(grpo - target).sum() > 0.1 * (target @ target)
    assert np.square(grpo - scale * target).sum() > 0.01 * (target @ target)


def test_a_mean_that_holds_the_sample_shortens_the_gradient():
    """b = (R_1 + R_2) / 2: R_1 − b = (R_1 − R_2) / 2, half of what rloo has."""
    totals, weights = phi("total_return")[:, 0], probabilities()
    every = np.asarray(gradients(np.ones((len(RESPONSES), 1, 2))), np.float64)[:, 0]
    found = np.zeros(SIZE)
    for j in range(len(RESPONSES)):
        batch = np.stack([np.zeros((36, 2)), np.stack([totals, np.full(36, totals[j])], 1)], 2)
        for i in range(len(RESPONSES)):
            one, _ = _batch_mean(jnp.asarray(batch[i], jnp.float32))
            found += weights[i] * weights[j] * float(one[0, 0]) * every[i]
    np.testing.assert_allclose(found, exact() / 2, atol=1e-5)


@jax.jit
def _batch_mean(rewards):
    return advantages(
        rewards,
        jnp.zeros((2, 2)),
        jnp.ones((2, 2), bool),
        config=AdvantageConfig(method="batch_mean"),
    )


def test_gradients_of_a_decoder_are_those_of_autodiff():
    from rlhf_jax.models.heads import next_token_log_probs

    rollout, model = tiny.rollout(), tiny.language_model()
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 1, (8, 3, tiny.RESPONSE)) * np.asarray(rollout.response_mask)[:, None]
    weights = jnp.asarray(weights, jnp.float32)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    sketch = CountSketch(jnp.arange(count), jnp.ones(count), count)
    found, squares, log_probs = jax.jit(
        functools.partial(sketched_gradients, start=tiny.PROMPT, sketch=sketch)
    )(model, rollout.tokens, rollout.segments, weights)
    real = np.asarray(rollout.response_mask)
    tiny.close(np.asarray(log_probs)[real], np.asarray(rollout.log_probs)[real], 1e-4)

    @jax.jit
    def wanted(row, phi):
        def weighted(model):
            values, _ = next_token_log_probs(
                model,
                rollout.tokens[row][None],
                rollout.segments[row][None],
                start=tiny.PROMPT,
            )
            return jnp.sum(values[0] * phi)

        leaves = jax.tree.leaves(jax.grad(weighted)(model))
        return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])

    for row, choice in ((0, 0), (3, 2)):
        slow = wanted(row, weights[row, choice])
        tiny.close(found[row, choice], slow, 1e-4)
        assert float(squares[row, choice]) == pytest.approx(float(slow @ slow), rel=1e-4)


def test_a_sketch_keeps_lengths_and_inner_products_to_the_root_of_two_over_m():
    rng, size, draws = np.random.default_rng(0), 256, 400
    # Heavy tails, as gradients have: a few numbers carry most of the length.
    # All of one sign: buckets without signs of their own would add these up.
    x, y = np.abs(rng.standard_t(3, (2, 2000))).astype(np.float32)
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    both = jnp.asarray(np.stack([x, y, x - 0.7 * y]))
    apply = jax.jit(lambda key: CountSketch.draw(key, 2000, size)(both))
    made = np.asarray(jax.vmap(apply)(jax.random.split(jax.random.key(1), draws)), np.float64)
    lengths = np.square(made).sum(2)
    inner = (made[:, 0] * made[:, 1]).sum(1)
    bound = np.sqrt(2 / size)
    for found, wanted in ((lengths[:, 0], 1.0), (lengths[:, 1], 1.0), (inner, float(x @ y))):
        assert abs(found.mean() - wanted) < 4 * found.std() / np.sqrt(draws)
        assert found.std() < 1.15 * bound
    assert lengths[:, 0].std() > 0.5 * bound
    # It is linear.
    tiny.close(made[:, 2], made[:, 0] - 0.7 * made[:, 1], 1e-5)


def test_sketch_sizes():
    with pytest.raises(ValueError, match="size=0"):
        CountSketch.draw(jax.random.key(0), 10, 0)


NAMES = ("reference", "biased", "shorter", "noisier")


def drawn(seed: int, prompts: int = 150, noise: float = 1.5):
    """Gaussian gradients of four estimators with a known answer: means `[P, A, m]`, squares."""
    rng, size, samples = np.random.default_rng(seed), 40, 3
    signal = np.zeros(size)
    signal[0] = 1.0
    bias = np.zeros(size)
    bias[1] = 0.5
    shared = rng.normal(0, noise / np.sqrt(size), (prompts, samples, size))
    extra = rng.normal(0, noise / np.sqrt(size), (prompts, samples, size))
    each = np.stack(
        [signal + shared, signal + bias + shared, 0.5 * (signal + shared), signal + shared + extra],
        axis=2,
    )
    return each.mean(1), np.square(each).sum(3).mean(1)


def compared(seed: int, **settings):
    found = GradientMoments.of(NAMES, "reference", *drawn(seed, **settings))
    return compare_gradients(found, unit="reference", num_resamples=300, seed=seed)


def test_bias_and_variance_of_known_gradients():
    wanted = {
        "bias": [0.0, 0.25, 0.25, 0.0],
        "scale": [1.0, 1.0, 0.5, 1.0],
        "off_direction": [0.0, 0.25, 0.0, 0.0],
        "signal": [1.0, 1.25, 0.25, 1.0],
        "variance": [1.0, 1.0, 0.25, 2.0],
        "noise": [2.25, 1.8, 2.25, 4.5],
        "cosine": [1.0, 1 / np.sqrt(1.25), 1.0, 1.0],
    }
    seeds = [compared(seed) for seed in range(30)]
    for name, numbers in wanted.items():
        values = np.array([one[name][0] for one in seeds])
        error = values.std(0) / np.sqrt(len(seeds))
        # A ratio of estimates is biased by a few parts in 150.
        np.testing.assert_array_less(np.abs(values.mean(0) - numbers), 4 * error + 0.02, name)


def test_squared_bias_is_free_of_its_own_noise():
    """The plain square would be |mean|² = 1.5²/450 too large for `noisier`: 0.005."""
    values = np.array([compared(seed, prompts=20, noise=4.0)["bias"][0, 3] for seed in range(200)])
    # The plain square: 16 / 60 = 0.27 on average.
    assert abs(np.median(values)) < 0.05 and (values < 0).mean() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_intervals_hold_the_truth_at_least_as_often_as_they_say(noise):
    held = np.zeros(3)
    for seed in range(100):
        result = compared(seed, prompts=80, noise=noise)
        intervals = [
            percentile_interval(result["bias"][:, 1]),
            percentile_interval(result["bias"][:, 3]),
            percentile_interval(result["variance"][:, 3]),
        ]
        for i, truth in enumerate((0.25, 0.0, 2.0)):
            held[i] += intervals[i].low <= truth <= intervals[i].high
    assert held.min() >= 88, held


def test_products_between_prompts_against_a_loop():
    rng = np.random.default_rng(0)
    products = rng.normal(0, 1, (2, 5, 5))
    products = products + products.transpose(0, 2, 1)
    weights = np.array([[1.0, 1, 1, 1, 1], [2, 0, 3, 0, 0]])
    found = between_prompts(products, weights)
    for r, w in enumerate(weights):
        for a in range(2):
            pairs = [(p, q) for p in range(5) for q in range(5) if p != q]
            total = sum(w[p] * w[q] * products[a, p, q] for p, q in pairs)
            assert found[r, a] == pytest.approx(total / sum(w[p] * w[q] for p, q in pairs))


def test_bootstrap_is_the_same_for_the_same_seed_and_refuses_nonsense():
    np.testing.assert_array_equal(compared(3)["bias"], compared(3)["bias"])
    means, squares = drawn(0)
    with pytest.raises(ValueError, match="reference='x' must be one of"):
        GradientMoments.of(NAMES, "x", means, squares)
    with pytest.raises(ValueError, match="must be of 4 estimators"):
        GradientMoments.of(NAMES, "reference", means[:, :3], squares)
    with pytest.raises(ValueError, match="1 prompts"):
        GradientMoments.of(NAMES, "reference", means[:1], squares[:1])
    with pytest.raises(ValueError, match="unit='x'"):
        compare_gradients(GradientMoments.of(NAMES, "reference", means, squares), unit="x")


def test_an_expectation_that_is_not_told_from_zero_has_no_interval():
    resampled = np.array([0.5, *np.full(90, 1.0), *np.full(10, np.nan)])
    assert percentile_interval(resampled) == (0.5, -np.inf, np.inf)
    assert percentile_interval(np.linspace(0, 1, 101)).low == pytest.approx(0.0345, abs=0.01)
