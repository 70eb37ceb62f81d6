"""Probabilities of pairs travel from a row to the loss, in memory and in a store on disk."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import dpo as dpo_configs
from configs import reward_model as configs
from experiments import command, reward_model
from rlhf_jax.data import store
from rlhf_jax.data.batches import once_pairs
from rlhf_jax.data.digests import rows_digest
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair
from rlhf_jax.data.store import labels_of
from rlhf_jax.methods import dpo
from rlhf_jax.methods import reward_model as method
from rlhf_jax.methods.dpo import DPOConfig
from rlhf_jax.methods.reward_model import RewardModelConfig
from tests import dry, tiny
from tests.experiments.test_margins import SHAPES, config_of

P = (0.9, 0.5)


def document(*ids: int) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.arange(len(ids)) > 0)


def labelled() -> list[EncodedPair]:
    return [
        EncodedPair(document(5, 6, 7, 2), document(5, 8, 2), 0.0, P[0]),
        EncodedPair(document(9, 9, 2), document(4, 2), 0.0, P[1]),
        EncodedPair(document(3, 9, 2), document(3, 4, 2), 0.0),
    ]


def batch() -> dict:
    (made,) = once_pairs(
        labelled(), max_tokens=128, min_pairs=1, max_pairs=4, multiple_of=4, pad_id=0
    )
    order = np.argsort(made["index"][made["valid"]])
    rows = np.concatenate([order, np.flatnonzero(~made["valid"])])
    return {name: jnp.asarray(array[rows]) for name, array in made.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_of_every_shape_reach_the_batch_that_the_loss_reads(tmp_path, shape):
    rows = [SHAPES[shape](n) | ({"p_chosen": 0.7} if n % 2 else {}) for n in range(120)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(f"jsonl:{path}", "loss.labels=soft")
    settings = command.open_config("reward_model", config, reward_model.Settings)
    assert settings.method().labels == "soft"
    pairs, _ = reward_model.training_pairs(settings, settings.task(), dry.tokenizer())
    made = next(reward_model.training_batches(settings, pairs, dry.tokenizer(), 1))
    found = made["p_chosen"][made["valid"]]
    np.testing.assert_allclose(sorted(set(found.tolist())), [0.7, 1.0], atol=1e-6)


def test_a_store_keeps_them_and_a_digest_sees_them(tmp_path):
    pairs = labelled()
    kept = store.write(tmp_path / "store", "preference", iter(pairs), DropCounts())
    assert [pair.p_chosen for pair in kept] == labels_of(kept).tolist() == [*P, 1.0]
    assert labels_of(pairs).tolist() == [*P, 1.0]
    changed = [pairs[0]._replace(p_chosen=0.8), *pairs[1:]]
    assert rows_digest(kept) == rows_digest(pairs) != rows_digest(changed)


def test_the_reward_models_loss_by_hand():
    """-[p log σ(d) + (1 - p) log σ(-d)]; without a label it is Bradley-Terry's, filler aside."""
    model, made = tiny.scalar_model(), method.prepare(batch())
    r = np.asarray(model.scores(*(made[k].reshape(8, -1) for k in ("tokens", "segments"))))
    lead = (r.reshape(-1, 2)[:, 0] - r.reshape(-1, 2)[:, 1])[:3]

    def loss_of(config: RewardModelConfig) -> float:
        return float(tiny.jit(functools.partial(method.loss_fn, config=config))(model, made)[0])

    loss = loss_of(RewardModelConfig(labels="soft"))
    p = np.array([*P, 1.0])
    wanted = p * np.log1p(np.exp(-lead)) + (1 - p) * np.log1p(np.exp(lead))
    np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)
    hard = loss_of(RewardModelConfig())
    np.testing.assert_allclose(hard, np.log1p(np.exp(-lead)).mean(), rtol=1e-5)
    assert abs(hard - loss) > 1e-3


def test_the_loss_of_dpo_by_hand():
    log_probs = jnp.array([[-4.0, -9.0], [-4.0, -9.0]])
    reference = jnp.array([[-5.0, -8.0], [-5.0, -8.0]])
    found = dpo.pair_metrics(
        log_probs,
        reference,
        jnp.array([0.5, 0.5]),
        jnp.ones((2, 2)),
        jnp.array(P),
        config=DPOConfig(labels="soft"),
    )
    # β u = 0.2: 0.598139 for the chosen, 0.798139 for the rejected.
    wanted = np.mean([p * 0.598139 + (1 - p) * 0.798139 for p in P])
    np.testing.assert_allclose(found["loss/dpo"], wanted, rtol=1e-5)
    assert found["dpo/accuracy"] == 1


@pytest.mark.parametrize("p", [1.5, -0.1, float("nan"), "sure", None])
def test_what_is_no_probability_is_refused(tmp_path, p):
    path = tmp_path / "pairs.jsonl"
    row = SHAPES["prompt"](1) if "prompt" in SHAPES else next(iter(SHAPES.values()))(1)
    path.write_text(json.dumps(row | {"p_chosen": p}) + "\n")
    settings = command.open_config(
        "reward_model", config_of(f"jsonl:{path}"), reward_model.Settings
    )
    with pytest.raises(ValueError, match=r"p_chosen=.* must be a probability") as told:
        list(settings.task().preferences(dry.tokenizer(), "all", max_length=90, count=0))
    assert "\n" not in str(told.value)


def test_soft_labels_go_with_no_margin_and_with_the_loss_of_dpo():
    with pytest.raises(ValueError, match=r"loss.labels='soft' takes .*loss.margin_coef=1.0 must"):
        RewardModelConfig(labels="soft", margin_coef=1.0)
    with pytest.raises(ValueError, match=r"dpo.labels='soft' takes .*\(here 'ipo'\)"):
        DPOConfig("ipo", labels="soft")
    assert configs.get_config("tiny").loss.labels == "hard"
    assert dpo_configs.get_config("tiny").dpo.labels == "hard"
