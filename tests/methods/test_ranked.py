"""Reward models from scores and rankings: by hand, whatever the microbatches and the padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.candidates import Candidates, pad_candidates
from rlhf_jax.data.endless import Shape
from rlhf_jax.data.schemas import Encoded
from rlhf_jax.methods import ranked
from rlhf_jax.methods.pairwise import PairTrainConfig
from rlhf_jax.methods.reward_model import RANKED, RewardModelConfig
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import create_state
from tests import tiny

SHARDING = Sharding(make_mesh(1), "zero2")


def document(seed, length):
    tokens = np.random.default_rng(seed).integers(3, 40, length).astype(np.int32)
    return Encoded(tokens, np.arange(length) >= 2)


def groups():
    """Three responses, two, two that tie, and one alone."""
    return [
        Candidates(tuple(document(i, 6 + i) for i in range(3)), (2.0, 1.0, 1.0)),
        Candidates((document(5, 4), document(6, 9)), (0.5, -3.0)),
        Candidates((document(7, 5), document(8, 5)), (1.0, 1.0)),
        Candidates((document(9, 7),), (4.0,)),
    ]


def batch(rows=4, width=12):
    made = pad_candidates(groups(), Shape(rows, width), 3)
    return {name: jnp.asarray(value) for name, value in made.items()}


def model():
    return tiny.scalar_model(tiny.model_config(vocab_size=40))


@functools.partial(tiny.jit, static_argnames="config")
def loss_of(batch, config):
    return ranked.loss_fn(model(), ranked.prepare(batch), config=config)


@functools.cache
def rewards():
    one = model()
    return [
        [
            float(one.scores(d.tokens[None], np.ones((1, len(d.tokens)), np.int32))[0])
            for d in group.documents
        ]
        for group in groups()
    ]


def by_hand(comparisons):
    found = rewards()
    if comparisons == "pointwise":
        every = [
            (r - s) ** 2
            for some, group in zip(found, groups(), strict=True)
            for r, s in zip(some, group.scores, strict=True)
        ]
        return np.mean(every)
    a, b = found[0], found[1]
    if comparisons == "listwise":
        pairs = [np.log1p(np.exp(-(a[0] - a[i]))) for i in (1, 2)]
        return (np.mean(pairs) + np.log1p(np.exp(-(b[0] - b[1])))) / 2

    def order(values):
        return sum(np.log(np.sum(np.exp(values[k:]))) - values[k] for k in range(len(values) - 1))

    return (order(np.array(a)) + order(np.array(b))) / 2


@pytest.mark.parametrize("comparisons", RANKED)
@pytest.mark.parametrize(("rows", "width"), [(4, 12), (7, 20)])
def test_the_loss_is_the_formula_whatever_the_padding(comparisons, rows, width):
    config = RewardModelConfig(comparisons=comparisons)
    loss, metrics = loss_of(batch(rows, width), config)
    np.testing.assert_allclose(loss, by_hand(comparisons), rtol=2e-5)
    found = rewards()
    ordered = [(found[0][0], found[0][1]), (found[0][0], found[0][2]), (found[1][0], found[1][1])]
    right = np.mean([high > low for high, low in ordered])
    np.testing.assert_allclose(metrics["reward/accuracy"], right, rtol=1e-6)
    margin = np.mean([high - low for high, low in ordered])
    np.testing.assert_allclose(metrics["reward/margin"], margin, rtol=1e-4)


def test_the_lm_loss_reads_the_best_response_alone():
    config = RewardModelConfig(comparisons="listwise", lm_coef=0.5)
    whole = batch()
    loss, metrics = loss_of(whole, config)
    np.testing.assert_allclose(loss, metrics["loss/ranked"] + 0.5 * metrics["loss/lm"], rtol=1e-6)
    changed = dict(whole)
    changed["loss_mask"] = whole["loss_mask"].at[:, 1:].set(False)
    _, same = loss_of(changed, config)
    np.testing.assert_allclose(same["loss/lm"], metrics["loss/lm"], rtol=1e-6)
    changed["loss_mask"] = whole["loss_mask"].at[0, 0].set(False)
    _, other = loss_of(changed, config)
    assert abs(other["loss/lm"] - metrics["loss/lm"]) > 1e-6


@pytest.mark.parametrize("comparisons", RANKED)
def test_orders_are_learned_in_any_number_of_microbatches(comparisons):
    optimizer, _ = make_optimizer(
        OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_fraction=0.0), 30
    )
    config, losses = RewardModelConfig(comparisons=comparisons), {}
    for parts in (1, 2):
        train = PairTrainConfig(
            steps=30, max_tokens=1000, min_pairs=1, max_pairs=8, microbatches=parts
        )
        step = ranked.make_step(config, train, optimizer, SHARDING)
        state = create_state(model(), optimizer, SHARDING)
        placed = SHARDING.put_batch(jax.tree.map(np.asarray, batch()))
        losses[parts] = []
        for _ in range(30):
            state, metrics = step(state, placed)
            losses[parts].append(float(metrics["loss/ranked"]))
    np.testing.assert_allclose(losses[1][:5], losses[2][:5], rtol=1e-3)
    assert losses[1][-1] < 0.7 * losses[1][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"comparisons": "listwise", "margin_coef": 1.0}, "is of pairs"),
        ({"comparisons": "pointwise", "labels": "soft"}, "'pairs'"),
        ({"comparisons": "orders"}, "comparisons"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig(**settings)
