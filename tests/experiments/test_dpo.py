"""DPO through its own `main` on the tiny scale, and its loss on a model with fixed weights."""

import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from configs import dpo as configs
from configs import ppo_max as ppo_configs
from configs import reward_model as reward_configs
from experiments import command
from experiments import dpo as experiment
from rlhf_jax.data.batches import PairBatches, once_pairs
from rlhf_jax.data.schemas import Encoded, EncodedPair
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.methods import dpo
from rlhf_jax.methods.dpo import DPOConfig
from rlhf_jax.models.files import hf_weights
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training.run import Run, Stopped
from rlhf_jax.training.step import create_state, make_train_step
from tests import tiny as models

ONE_DEVICE = Sharding(make_mesh(1))
PLAIN = DPOConfig("dpo", beta=0.1)


def tiny(chain, workdir, *changes):
    """A tiny config on the session's SFT model; it finds neither PPO-max nor a reward model."""
    config = configs.get_config(",".join(["tiny", "sharding.devices=1", *changes]))
    config.workdir = str(workdir)
    config.inputs.model = str(chain.sft)
    config.compare.update(
        ppo_max=str(workdir / "no_ppo_max"), reward_model=str(workdir / "no_reward_model")
    )
    return config


def training_pairs(config, tokenizer):
    """The pairs that a config trains on, and how they are batched."""
    settings = command.open_config("dpo", config, experiment.Settings)
    data = settings.data
    pairs = settings.task().preferences(
        tokenizer, "train", max_length=data.max_length, count=data.pairs
    )
    return pairs, settings.train.batching(1)


@pytest.fixture(scope="module")
def finished(chain, tmp_path_factory):
    """A finished tiny run."""
    workdir = tmp_path_factory.mktemp("dpo")
    experiment.main(tiny(chain, workdir))
    return workdir


@jax.jit
def log_softmax(model, tokens):
    """Log-probabilities `[T, V]` for one row of tokens: causal, so what pads it needs no mask."""
    hidden = model(tokens[None], jnp.ones_like(tokens)[None])
    return jax.nn.log_softmax(model.logits(hidden)[0].astype(jnp.float32))


def plain_log_prob(model, document: Encoded, width: int) -> float:
    """log π of the trained tokens of one document, one token at a time."""
    tokens = np.zeros(width, np.int32)
    tokens[: len(document.tokens)] = document.tokens
    table = np.asarray(log_softmax(model, tokens), np.float64)
    return sum(table[t - 1, tokens[t]] for t in np.flatnonzero(document.loss_mask))


def fixed_pairs(count: int = 7) -> list[EncodedPair]:
    """Pairs of 4 to 12 tokens, the same everywhere; the first three tokens are the prompt."""
    rng = np.random.default_rng(0)

    def document() -> Encoded:
        tokens = rng.integers(2, models.VOCAB, rng.integers(4, 13)).astype(np.int32)
        return Encoded(tokens, np.arange(len(tokens)) >= 3)

    return [EncodedPair(document(), document(), 0.0) for _ in range(count)]


@functools.cache
def fixed_batch(reference_seed: int = 1) -> dict:
    """Seven pairs and a row of filler; the policy of these tests is the model of seed 0."""
    pairs = fixed_pairs()
    (batch,) = PairBatches(
        pairs, max_tokens=256, min_pairs=8, max_pairs=8, seed=0, buckets=(16,)
    ).once()
    reference = models.language_model(seed=reference_seed)
    log_probs = dpo.log_probs_of_pairs(reference, [batch], len(pairs), ONE_DEVICE)
    return batch | {"ref_log_probs": log_probs[batch["index"]]}


loss_fn = jax.jit(functools.partial(dpo.loss_fn, config=PLAIN))


@functools.cache
def stepper(sharding: Sharding, microbatches: int):
    """One step of gradient descent at rate 0.1, compiled."""
    return make_train_step(
        functools.partial(dpo.loss_fn, config=PLAIN),
        optax.sgd(0.1),
        sharding,
        microbatches=microbatches,
        prepare=dpo.prepare,
    )


def step_once(batch: dict, *, sharding: Sharding = ONE_DEVICE, microbatches: int = 1):
    """The model and the metrics after one step."""
    state = create_state(models.language_model(), optax.sgd(0.1), sharding)
    state, metrics = stepper(sharding, microbatches)(state, sharding.put_batch(batch))
    return state.model, {name: float(value) for name, value in metrics.items()}


# The run as a whole.


def test_run_writes_what_it_promises(finished):
    for name in ("report.md", "training.png", "metrics.jsonl", "config.json", "summary.json"):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "model" / "model.safetensors").exists()
    text = (finished / "report.md").read_text()
    for words in (
        "# DPO against SFT (tiny, seed 0)",
        "implicit-reward accuracy on held-out pairs",
        "no_ppo_max is missing; `python -m experiments.ppo_max --config configs/ppo_max.py:tiny`",
        "held-out pairs: DPO ",
    ):
        assert words in text
    assert "reward model" not in text
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["pair_accuracy"]) == {"DPO", "VADER", "DPO minus VADER"}
    value, low, high = summary["pair_accuracy"]["DPO"]
    assert 0 <= low <= value <= high <= 1


def test_loss_starts_at_log_2_and_falls(chain, finished):
    log = read_metrics(finished)
    np.testing.assert_allclose(log["loss/dpo"][0], np.log(2), atol=1e-5)
    np.testing.assert_allclose(log["dpo/margin"][0], 0, atol=1e-4)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(log[f"dpo/{side}_reward"][0], 0, atol=1e-4)
    held_out = np.isfinite(log["eval/loss/dpo"])
    assert held_out.tolist() == [False, False, True, False, False, True]
    assert np.isfinite(log["win_rate/vader"]).tolist() == held_out.tolist()
    # Minibatches of a tiny run are noise: the loss falls on all pairs that it was to train on.
    config, tokenizer = tiny(chain, finished), load_tokenizer(chain.sft)
    pairs, batching = training_pairs(config, tokenizer)
    batches = once_pairs(pairs, pad_id=tokenizer.pad_token_id, **batching)
    trained = hf_weights.load_model(finished / "model")
    after = dpo.log_probs_of_pairs(trained, batches, len(pairs), ONE_DEVICE)
    ratios = after - np.load(finished / "reference_train.npz")["log_probs"]
    margins = config.dpo.beta * (ratios[:, 0] - ratios[:, 1])
    assert np.log1p(np.exp(-margins)).mean() < np.log(2) - 1e-3


def test_cached_reference_is_the_sft_policy_of_each_pair(chain, finished):
    config, tokenizer = tiny(chain, finished), load_tokenizer(chain.sft)
    pairs, _ = training_pairs(config, tokenizer)
    cached = np.load(finished / "reference_train.npz")["log_probs"]
    assert cached.shape == (len(pairs), 2) and len(pairs) > 20
    model = hf_weights.load_model(chain.sft)
    for number in range(0, len(pairs), 7):
        wanted = [plain_log_prob(model, side, 96) for side in pairs[number][:2]]
        np.testing.assert_allclose(cached[number], wanted, rtol=1e-5)


def test_same_numbers_after_a_stop_and_the_reference_is_read_back(
    chain, finished, tmp_path, monkeypatch, capsys
):
    calls = []
    original = Run.log

    def stop_in_the_middle(self, step, metrics):
        original(self, step, metrics)
        calls.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", stop_in_the_middle)
    with pytest.raises(Stopped, match="stopped at step 4 of 6"):
        experiment.main(tiny(chain, tmp_path / "again"))
    assert "reference_train.npz: " in capsys.readouterr().out
    experiment.main(tiny(chain, tmp_path / "again"))
    assert "reference_train.npz: " not in capsys.readouterr().out
    assert calls == [0, 1, 2, 3, 4, 5]
    one, other = read_metrics(finished), read_metrics(tmp_path / "again")
    assert one.keys() == other.keys()
    for name in one.keys() - {"time"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_other_policies_answer_the_same_prompts_with_the_same_keys(chain, tmp_path):
    config = tiny(chain, tmp_path, "train.steps=1", "log.tensorboard=False")
    # The SFT policy in the place of PPO-max must repeat the SFT column.
    config.compare.update(ppo_max=str(chain.sft), reward_model=str(chain.reward_model))
    experiment.main(config)
    numbers = json.loads((tmp_path / "report.json").read_text())
    accuracy = "implicit-reward accuracy on held-out pairs"
    assert numbers["summary"]["PPO-max"].pop(accuracy) == 0.5
    assert numbers["summary"]["PPO-max"] == numbers["summary"]["SFT"]
    assert "reward (reward model)" in numbers["summary"]["SFT"]
    assert numbers["win_rates"]["PPO-max against SFT, vader"]["tie"] == 1
    assert {"DPO against SFT, vader", "DPO against PPO-max, vader"} < set(numbers["win_rates"])
    assert "makes it" not in (tmp_path / "report.md").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["pair_accuracy"]["reward model"][0] < 1


def test_finished_run_is_not_run_again(chain, finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    experiment.main(tiny(chain, finished))
    assert "has finished already" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before


# The loss.


@pytest.mark.slow
def test_log_probs_of_a_batch_are_sums_over_response_tokens():
    model, pairs = models.language_model(), fixed_pairs()
    batch = fixed_batch()
    log_probs = jax.jit(dpo.sequence_log_probs)(model, batch)
    for row, index in enumerate(batch["index"][batch["valid"]]):
        wanted = [plain_log_prob(model, side, 16) for side in pairs[index][:2]]
        np.testing.assert_allclose(log_probs[row], wanted, rtol=2e-6)
    metrics = loss_fn(model, dpo.prepare(batch))[1]
    chosen = [plain_log_prob(model, pair.chosen, 16) for pair in pairs]
    np.testing.assert_allclose(metrics["dpo/chosen_log_prob"], np.mean(chosen), rtol=2e-6)


def test_pairs_come_back_in_their_order_over_several_batches():
    model, pairs = models.language_model(), fixed_pairs(23)
    batches = PairBatches(pairs, max_tokens=64, min_pairs=2, max_pairs=4, seed=0, num_buckets=1)
    log_probs = dpo.log_probs_of_pairs(model, batches.once(), 23, ONE_DEVICE)
    wanted = [[plain_log_prob(model, side, 16) for side in pair[:2]] for pair in pairs]
    np.testing.assert_allclose(log_probs, wanted, rtol=2e-6)


def test_loss_at_the_reference_is_log_2():
    loss, metrics = loss_fn(models.language_model(), dpo.prepare(fixed_batch(reference_seed=0)))
    np.testing.assert_allclose(loss, np.log(2), atol=1e-6)
    np.testing.assert_allclose(metrics["dpo/gradient_coefficient"], 0.5, atol=1e-6)


# h = log-ratio margin = 2 nats.
@pytest.mark.parametrize(
    ("variant", "loss"),
    [
        ("", 0.598139),  # log(1 + e^-0.2)
        ("ipo", 9.0),  # (2 - 1 / 0.2)^2
        ("hinge", 0.8),  # 1 - 0.1 * 2
        ("simpo", 0.313262),  # means -2 and -3: log(1 + e^-(2 * 1 - 1))
        ("kto", 0.475021),  # log-ratios 1 and -1, z = 0: twice 1 / (1 + e^0.1), halved
        ("label_smoothing", 0.618139),  # 0.9 log(1 + e^-0.2) + 0.1 log(1 + e^0.2)
        ("beta_0.05", 0.644397),  # log(1 + e^-0.1)
        ("beta_0.5", 0.313262),  # log(1 + e^-1)
    ],
)
def test_each_variant_has_its_loss(variant, loss):
    config = DPOConfig(**configs.get_config(f"tiny,{variant}").dpo)
    log_probs, reference = jnp.array([[-4.0, -9.0]]), jnp.array([[-5.0, -8.0]])
    lengths = jnp.array([[2, 3]])
    metrics = dpo.pair_metrics(log_probs, reference, jnp.ones(1), lengths, config=config)
    np.testing.assert_allclose(metrics["loss/dpo"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["dpo/margin"], 2 * config.beta, rtol=1e-6)
    np.testing.assert_allclose(metrics["dpo/rejected_reward"], -config.beta, rtol=1e-6)
    assert metrics["dpo/accuracy"] == 1


def test_sft_term_is_the_log_probability_of_chosen():
    model, batch = models.language_model(), dpo.prepare(fixed_batch())
    config = DPOConfig(**configs.get_config("tiny,sft").dpo)
    plain, metrics = loss_fn(model, batch)
    loss, same = jax.jit(functools.partial(dpo.loss_fn, config=config))(model, batch)
    # 0.01 * 33.083805, see the golden step.
    np.testing.assert_allclose(loss - plain, 0.330838, rtol=1e-4)
    models.close(same, metrics, 1e-5)


def test_the_reference_point_of_kto_is_the_mean_of_the_whole_batch_and_never_negative():
    config = DPOConfig("kto", beta=0.5, desirable_weight=2.0)
    reference = jnp.zeros((3, 2))
    # Log-ratios of two pairs and of filler, which does not count.
    for shift in (0.0, -3.0):
        log_probs = jnp.array([[1.0, -1.0], [4.0, 2.0], [90.0, 90.0]]) + shift
        weights, lengths = jnp.array([0.5, 0.5, 0.0]), jnp.ones((3, 2))
        metrics = dpo.pair_metrics(log_probs, reference, weights, lengths, config=config)
        pairs = np.array([[1.0, -1.0], [4.0, 2.0]]) + shift
        z = max(0.0, pairs.mean())
        sigmoid = 1 / (1 + np.exp(0.5 * (pairs - z) * np.array([1, -1])))
        np.testing.assert_allclose(metrics["loss/dpo"], (sigmoid * [2, 1]).mean(), rtol=1e-6)


def test_simpo_on_a_model_is_that_of_means_over_tokens():
    config, batch = DPOConfig("simpo", beta=2.0, margin=0.5), dpo.prepare(fixed_batch())
    loss, _ = jax.jit(functools.partial(dpo.loss_fn, config=config))(models.language_model(), batch)
    wanted = []
    for pair in fixed_pairs():
        means = [
            plain_log_prob(models.language_model(), side, 16) / side.loss_mask.sum()
            for side in pair[:2]
        ]
        wanted.append(np.log1p(np.exp(-(2.0 * (means[0] - means[1]) - 0.5))))
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-5)


def test_no_variant_is_left_out():
    tested = {"ipo", "hinge", "simpo", "kto", "label_smoothing", "beta_0.05", "beta_0.5", "sft"}
    data = {"half", "zh"}  # not of the method: tests/test_configs.py
    assert set(configs.VARIANTS) == tested | data


@pytest.mark.slow
def test_a_step_follows_the_gradient_of_the_paper():
    """∇L = -β σ(-u) (∇log π(y⁺) - ∇log π(y⁻)), mean over pairs (Rafailov et al. 2023, §4)."""
    batch, model, rate = fixed_batch(), models.language_model(), 0.1
    valid = np.flatnonzero(batch["valid"])

    @jax.jit
    @jax.value_and_grad
    def log_ratio(model, row):
        chosen, rejected = dpo.sequence_log_probs(model, batch)[row]
        return chosen - rejected

    total = jax.tree.map(np.zeros_like, model)
    for row in valid:
        difference, slope = log_ratio(model, row)
        reference = batch["ref_log_probs"][row]
        u = PLAIN.beta * (float(difference) - float(reference[0] - reference[1]))
        pull = PLAIN.beta / (1 + np.exp(u))
        total = jax.tree.map(lambda t, s: t + pull * np.asarray(s) / valid.size, total, slope)  # noqa: B023
    moved, _ = step_once(batch)
    models.close(moved, jax.tree.map(lambda w, t: w + rate * t, model, total), 1e-6)
    assert models.largest_difference(moved, model) > 1e-3


def test_golden_first_step():
    batch = fixed_batch()
    moved, metrics = step_once(batch)
    # Recorded on one CPU core; the loss also follows from log-probabilities taken one by one.
    golden = {
        "loss/dpo": 0.808353,
        "dpo/chosen_log_prob": -33.083805,
        "dpo/rejected_log_prob": -22.948231,
        "dpo/margin": -0.178640,
        "dpo/accuracy": 3 / 7,
        "optim/grad_norm": 1.531765,
    }
    for name, value in golden.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    policy, reference = models.language_model(), models.language_model(seed=1)
    u = [
        0.1 * sum(
            sign * (plain_log_prob(policy, side, 16) - plain_log_prob(reference, side, 16))
            for sign, side in ((1, pair.chosen), (-1, pair.rejected))
        )
        for pair in fixed_pairs()
    ]  # fmt: skip
    np.testing.assert_allclose(metrics["loss/dpo"], np.mean(np.log1p(np.exp(-np.array(u)))), 1e-5)
    after, _ = loss_fn(moved, dpo.prepare(batch))
    np.testing.assert_allclose(after, 0.640672, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_add_up(microbatches):
    batch = fixed_batch()
    model, metrics = step_once(batch)
    split, split_metrics = step_once(batch, microbatches=microbatches)
    models.close(split, model, 1e-6)
    models.close(split_metrics, metrics, 1e-5)


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one():
    batch = fixed_batch()
    model, metrics = step_once(batch)
    for mode in ("zero2", "zero3"):
        spread, spread_metrics = step_once(batch, sharding=Sharding(make_mesh(8), mode))
        models.close(spread, model, 1e-6)
        models.close(spread_metrics, metrics, 1e-5)


def test_filler_does_not_matter():
    batch = fixed_batch()
    filler = np.flatnonzero(~batch["valid"])
    assert filler.size == 1
    changed = jax.tree.map(np.array, batch)
    changed["tokens"][filler] = 5
    changed["segments"][filler] = 1
    changed["loss_mask"][filler] = True
    changed["ref_log_probs"][filler] = 1e3
    model, metrics = step_once(batch)
    other, other_metrics = step_once(changed)
    models.close(other, model, 1e-7)
    assert other_metrics == metrics


# Wrong input, and the task.


def test_reference_of_other_pairs_is_refused(tmp_path):
    model, path = models.language_model(), tmp_path / "reference.npz"

    def cached(pairs):
        batches = PairBatches(pairs, max_tokens=256, min_pairs=1, max_pairs=8, seed=0)
        return dpo.reference_log_probs(model, path, pairs, batches.once(), sharding=ONE_DEVICE)

    pairs = fixed_pairs()
    first = cached(pairs)
    np.testing.assert_array_equal(cached(pairs), first)
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]
    whole = path.read_bytes()
    for damaged in (b"", whole[:-30], whole[:80] + bytes([whole[80] ^ 1]) + whole[81:]):
        path.write_bytes(damaged)
        np.testing.assert_array_equal(cached(pairs), first)
        assert path.read_bytes() != damaged
    swapped = [pairs[1], pairs[0], *pairs[2:]]
    with pytest.raises(ValueError, match="log-probabilities of other pairs"):
        cached(swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dpo.objective=nothing", "dpo.objective='nothing' is unknown; use one of"),
        ("dpo.beta=0.0", r"dpo.beta=0.0 must be in \(0, 1e6\]"),
        ("ipo,dpo.label_smoothing=0.1", "dpo.label_smoothing=0.1 is for dpo.objective='dpo'"),
        ("dpo.label_smoothing=0.5", r"dpo.label_smoothing=0.5 must be in \[0, 0.5\)"),
        ("eval.batch=1000", "fewer than one batch of 1000"),
    ],
)
def test_wrong_settings_are_one_line(chain, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        experiment.main(tiny(chain, tmp_path / "run", change))
    assert "\n" not in str(caught.value)


def test_missing_sft_names_the_command(tmp_path):
    config = configs.get_config("paper_en,sharding.devices=1")
    config.workdir = str(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"python -m experiments\.sft --config configs/sft\.py:paper_en"
    ):
        experiment.main(config)


@pytest.mark.parametrize("scale", ["tiny", "quickstart", "paper_en"])
def test_pairs_and_prompts_are_those_of_the_other_stages(scale):
    config, pairs, prompts = (
        common.resolve(stage.get_config(f"{scale},seed=3"))
        for stage in (configs, reward_configs, ppo_configs)
    )
    assert config.inputs.model == prompts.inputs.reference
    assert config.compare.ppo_max == f"{prompts.workdir}/model"
    assert config.compare.reward_model == prompts.inputs.reward_model
    for key in ("source", "domains", "limit", "min_gap", "eval_pairs"):
        assert config.data[key] == pairs.data[key], key
    assert config.sampling == prompts.sampling
    assert config.data.prompt_buckets == prompts.data.prompt_buckets
    assert config.eval.batch == prompts.train.prompts_per_iteration
    assert config.eval.final_prompts == prompts.eval.final_prompts
