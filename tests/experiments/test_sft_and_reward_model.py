"""SFT and reward model through their own `main`, on the tiny scale."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from configs import reward_model as reward_configs
from configs import sft as sft_configs
from experiments import command, reward_model, sft, stages
from rlhf_jax.data.tokenizer import load_tokenizer, train_bpe
from rlhf_jax.methods import reward_model as reward_method
from rlhf_jax.methods import sft as sft_method
from rlhf_jax.methods.reward_model import RewardModelConfig
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.heads import next_token_log_probs
from rlhf_jax.runtime.metrics import read_metrics


def padded(tokens: np.ndarray, length: int = 96) -> tuple[jax.Array, jax.Array]:
    """One document as `[1, length]` tokens and mask: one compiled program for all lengths."""
    row = np.zeros((1, length), np.int32)
    row[0, : len(tokens)] = tokens
    return jnp.asarray(row), jnp.asarray(np.arange(length)[None] < len(tokens), jnp.int32)


def test_sft_learns_and_saves_what_it_evaluated(chain):
    log = read_metrics(chain.sft.parent)
    perplexity = log["eval/perplexity"][~np.isnan(log["eval/perplexity"])]
    assert perplexity[-1] < perplexity[0] < 512  # a uniform guess
    settings = command.open_config("sft", sft_configs.get_config("tiny"), sft.Settings)
    tokenizer = load_tokenizer(chain.sft)
    model = hf_weights.load_model(chain.sft)
    distributions = jax.jit(
        lambda tokens, mask: jax.nn.log_softmax(model.logits(model(tokens, mask)))
    )
    nll = count = 0.0
    for document in settings.task().documents(tokenizer, "validation", max_length=96):
        table = np.asarray(distributions(*padded(document.tokens)))[0]
        for t in np.flatnonzero(document.loss_mask):
            nll -= float(table[t - 1, document.tokens[t]])
            count += 1
    np.testing.assert_allclose(math.exp(nll / count), perplexity[-1], rtol=1e-4)


def test_the_bias_that_other_tools_lack_is_in_the_summary(chain):
    folder = chain.reward_model
    summary = json.loads((folder.parent / "summary.json").read_text())
    assert (
        summary["score_bias"]
        == json.loads((folder / "config.json").read_text())["rlhf_jax"]["score_bias"]
    )
    assert summary["score_bias"] != 0.0


@pytest.mark.parametrize("found", [0, 1])
def test_too_few_reference_texts_are_refused_before_training(tmp_path, monkeypatch, found):
    """A source may have fewer than `data.reference_texts` asks for."""

    class Few:
        def references(self, tokenizer, *, max_length, count):
            assert count == 32
            return ["one"] * found

    config = reward_configs.get_config("tiny,data.reference_texts=32")
    settings = command.open_config("reward_model", config, reward_model.Settings)
    with pytest.raises(ValueError, match=rf"gives {found} reference responses.*normalize_scores"):
        reward_model.reference_texts(settings, Few(), None)
    settings = dataclasses.replace(settings, normalize_scores=False)
    assert reward_model.reference_texts(settings, Few(), None) == []


def test_sft_loss_ignores_what_is_not_trained(chain):
    tokens = jnp.array([[5, 6, 7, 8, 2, 0]])
    batch = sft_method.prepare(
        {
            "tokens": tokens,
            "segments": jnp.array([[1, 1, 1, 1, 1, 0]]),
            "loss_mask": jnp.array([[False, False, False, True, True, False]]),
        }
    )
    model = hf_weights.load_model(chain.sft)
    log_probs, _ = next_token_log_probs(model, tokens, batch["segments"])
    loss, _ = sft_method.loss_fn(model, batch)
    np.testing.assert_allclose(loss, -(log_probs[0, 2] + log_probs[0, 3]) / 2, rtol=1e-6)


def test_reward_model_is_normalised_on_its_references(chain):
    config = reward_configs.get_config("tiny")
    config.data.update(chain.reward_data)
    settings = command.open_config("reward_model", config, reward_model.Settings)
    tokenizer = load_tokenizer(chain.reward_model)
    model = hf_weights.load_scalar_model(chain.reward_model)
    score = jax.jit(model.scores)
    scores = [
        float(score(*padded(document.tokens))[0])
        for document in settings.task().references(tokenizer, max_length=96, count=20)
    ]
    np.testing.assert_allclose([np.mean(scores), np.std(scores)], [0, 1], atol=1e-3)


def test_reward_model_report(chain):
    workdir = chain.reward_model.parent
    summary = json.loads((workdir / "summary.json").read_text())
    low, high = summary["accuracy_interval"]
    assert 0 <= low <= summary["accuracy"] <= high <= 1
    assert 0.5 < summary["judges_accuracy"]["vader"] <= 1
    for name in ("reward_histogram.png", "accuracy.png"):
        assert (workdir / name).stat().st_size > 1000


def test_reward_loss_by_hand(chain):
    model = hf_weights.load_scalar_model(chain.reward_model)
    tokens = jnp.array([[[5, 6, 7, 2], [5, 8, 2, 0]], [[9, 9, 2, 0], [4, 2, 0, 0]]])
    segments = (tokens > 0).astype(jnp.int32)
    loss_mask = (segments > 0).at[:, :, 0].set(False)
    batch = reward_method.prepare(
        {
            "tokens": tokens,
            "segments": segments,
            "loss_mask": loss_mask,
            "valid": jnp.array([True, False]),
        }
    )
    loss, _ = reward_method.loss_fn(model, batch, config=RewardModelConfig(lm_coef=0.5))
    r = [float(model.scores(tokens[0, i][None], segments[0, i][None])[0]) for i in (0, 1)]
    log_probs, _ = next_token_log_probs(model.trunk, tokens[:1, 0], segments[:1, 0])
    # The second pair is filler: only the first counts, for both terms.
    expected = math.log1p(math.exp(r[1] - r[0])) - 0.5 * float(log_probs.mean())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_reward_loss_with_a_margin_by_hand(chain):
    """-log σ(r_w - r_l - c m), Llama 2's equation 2; filler and its margin do not count."""
    model = hf_weights.load_scalar_model(chain.reward_model)
    tokens = jnp.array([[[5, 6, 7, 2], [5, 8, 2, 0]], [[9, 9, 2, 0], [4, 2, 0, 0]]])
    tokens = jnp.concatenate([tokens, tokens[:1]])
    segments = (tokens > 0).astype(jnp.int32)
    batch = reward_method.prepare(
        {
            "tokens": tokens,
            "segments": segments,
            "loss_mask": segments > 0,
            "valid": jnp.array([True, True, False]),
            "margin": jnp.array([1.5, 0.0, 90.0]),
        }
    )
    r = np.asarray(model.scores(tokens.reshape(6, 4), segments.reshape(6, 4))).reshape(3, 2)
    lead = (r[:, 0] - r[:, 1])[:2]
    for coef in (0.0, 2.0):
        loss, metrics = reward_method.loss_fn(
            model, batch, config=RewardModelConfig(margin_coef=coef)
        )
        expected = np.log1p(np.exp(-(lead - coef * np.array([1.5, 0.0])))).mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        # What is reported is the lead itself, as ever.
        np.testing.assert_allclose(metrics["reward/margin"], lead.mean(), rtol=1e-5)


def test_missing_model_is_built_only_where_asked(tmp_path):
    assert stages.require("org/hub-name", stage="sft", argument="tiny")
    with pytest.raises(FileNotFoundError, match=r"runs/sft/none/model is missing: run `python -m"):
        stages.require("runs/sft/none/model", stage="sft", argument="none")
    # Also where runs/ is not in the current folder; the command can be typed as it is shown.
    below, argument = f"{tmp_path}/my folder/runs/sft/none/model", f"tiny,root={tmp_path}/my folder"
    with pytest.raises(FileNotFoundError, match=r"/none/model is missing") as caught:
        stages.require(below, stage="sft", argument=argument)
    assert f"--config 'configs/sft.py:{argument}'`" in str(caught.value)


@pytest.mark.parametrize(
    ("experiment", "configs", "change", "message"),
    [
        (sft, sft_configs, "train.microbatches=3", "train.minibatch=8 must be divisible by 3"),
        (sft, sft_configs, "train.steps=0", "one says how long, the other must be 0"),
        (sft, sft_configs, "eval.every=0", "eval.every=0 must be at least 1"),
        (reward_model, reward_configs, "train.steps=0", "train.steps=0 must be at least 1"),
    ],
)
def test_wrong_sizes_are_refused(tmp_path, experiment, configs, change, message):
    config = configs.get_config(f"tiny,{change},sharding.devices=1")
    config.workdir = str(tmp_path)
    with pytest.raises(ValueError, match=message):
        experiment.main(config)


def test_a_model_whose_tokenizer_has_neither_pad_nor_template(chain, tmp_path, caplog):
    """One unused row of the embedding becomes the pad token, and the log says so."""
    folder = tmp_path / "model"
    shutil.copytree(chain.sft, folder)
    tokenizer = load_tokenizer(chain.sft)
    bare = train_bpe(["a b c"], 300)
    tokens = json.loads(bare.backend_tokenizer.to_str())
    tokens["added_tokens"] = [t for t in tokens["added_tokens"] if t["content"] != "<pad>"]
    del tokens["model"]["vocab"]["<pad>"]
    vocab = sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get)
    tokens["model"]["vocab"] = {token: number for number, token in enumerate(vocab)}
    for token in tokens["added_tokens"]:
        token["id"] = tokens["model"]["vocab"][token["content"]]
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokens)),
        bos_token="<bos>",
        eos_token="<eos>",
    )
    assert bare.pad_token is None and len(bare) < len(tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    bare.save_pretrained(folder)

    config = sft_configs.get_config("tiny,train.steps=1,sharding.devices=1")
    config.workdir = str(tmp_path / "run")
    config.inputs.model = str(folder)
    sft.main(config)
    saved = load_tokenizer(tmp_path / "run" / "model")
    assert saved.pad_token_id == len(bare) != saved.eos_token_id
    assert saved.chat_template
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "no pad token; pad is now the new" in logged and "no chat template; now" in logged
