"""What the smollm2 scales need: a converted GGUF, all comparisons of a batch, a shorter trunk."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import ppo_max as ppo_configs
from configs import reward_model as reward_configs
from experiments import command, ppo_max, reward_model, stages
from rlhf_jax.data.sets import archives
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.methods.reward_model import all_comparisons
from rlhf_jax.models.files import hf_weights
from rlhf_jax.runtime.metrics import read_metrics
from tests.models.test_gguf import assert_same, random_model, write_gguf

CHAT = ("sharding.devices=1", "lora.rank=4", "data.instruction=Write a review.")


@pytest.mark.parametrize("root", ["", "below"])
def test_a_gguf_from_a_package_is_converted_once(tmp_path, monkeypatch, capsys, root):
    model = random_model()
    file = tmp_path / "model.gguf"
    write_gguf(file, model, tmp_path)
    place = "runs/pretrained/made-up/model"
    folder = str(tmp_path / root / place) if root else place
    asked = []

    def read_member(package, member):
        asked.append((package, member))
        return file.read_bytes()

    monkeypatch.setitem(stages.PRETRAINED, place, "a-package")
    monkeypatch.setattr(archives, "read_member", read_member)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        found = stages.require(folder)
    assert found == folder and asked == [("a-package", ".gguf")]
    assert_same(hf_weights.load_model(folder), model)
    assert capsys.readouterr().out.count("converting the GGUF file of a-package, once") == 1


def test_all_comparisons_by_hand():
    scores = jnp.array([[0.5, -1.0], [2.0, 0.25], [9.0, -9.0]])
    ratings = jnp.array([[2.0, 0.5], [1.0, -0.2], [3.0, -3.0]])
    valid = jnp.array([True, True, False])
    flat = list(zip(np.ravel(scores[:2]), np.ravel(ratings[:2]), strict=True))
    terms = [
        math.log1p(math.exp(low - high))
        for high, above in flat
        for low, below in flat
        if above - below >= 1 - 1e-5
    ]
    assert len(terms) == 4  # 2 over .5, 1 and -.2; 1 over -.2; filler is not compared
    loss = all_comparisons(scores, ratings, valid, min_gap=1.0)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-6)
    with_margin = [
        math.log1p(math.exp(low - high + 0.5 * (above - below)))
        for high, above in flat
        for low, below in flat
        if above - below >= 1 - 1e-5
    ]
    loss = all_comparisons(scores, ratings, valid, min_gap=1.0, margin_coef=0.5)
    np.testing.assert_allclose(loss, np.mean(with_margin), rtol=1e-6)


def open_reward_model(config):
    return command.open_config("reward_model", config, reward_model.Settings)


@pytest.fixture(scope="module")
def reward_run(chain, tmp_path_factory):
    """A reward model of one layer, all texts of a batch compared, reviews in a chat."""
    config = reward_configs.get_config(
        ",".join(["tiny", *CHAT, "loss.comparisons=batch", "loss.lm_coef=0.0", "inputs.layers=1"])
    )
    config.data.domains = ("movie",)
    config.workdir = str(tmp_path_factory.mktemp("reward_model"))
    config.inputs.model = str(chain.sft)
    reward_model.main(config)
    return config


def test_reward_model_keeps_the_first_layers_and_its_normalisation(reward_run):
    folder = f"{reward_run.workdir}/model"
    model = hf_weights.load_scalar_model(folder)
    assert model.trunk.config.num_layers == 1
    tokenizer, task = load_tokenizer(folder), open_reward_model(reward_run).task()
    scores = [
        float(model.scores(jnp.asarray(d.tokens)[None], jnp.ones((1, len(d.tokens)), jnp.int32))[0])
        for d in task.references(tokenizer, max_length=96, count=20)
    ]
    np.testing.assert_allclose([np.mean(scores), np.std(scores)], [0, 1], atol=1e-3)
    summary = json.loads(Path(reward_run.workdir, "summary.json").read_text())
    held_out = task.preferences(tokenizer, "test", max_length=96, count=40)
    assert summary["held_out_pairs"] == len(held_out)


def test_ppo_answers_in_the_chat_and_shows_the_opening_words(chain, reward_run, tmp_path):
    config = ppo_configs.get_config(",".join(["tiny", *CHAT]))
    config.data.prompt_buckets = (40,)
    config.workdir = str(tmp_path)
    config.inputs.update(
        model=str(chain.sft),
        reference=str(chain.sft),
        reward_model=f"{reward_run.workdir}/model",
    )
    config.ppo.ptx_coef = 0.0
    ppo_max.main(config)
    assert len(read_metrics(tmp_path)["step"]) == config.train.iterations
    report = (tmp_path / "report.md").read_text()
    assert "Write a review." not in report.split("Samples")[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.comparisons=all", "loss.comparisons='all' is unknown; use one of pairs, batch"),
        ("loss.comparisons=batch", "needs ratings: data.source='reviews'"),
        ("loss.comparisons=batch,train.microbatches=2", "train.microbatches=2 must be 1"),
    ],
)
def test_wrong_comparisons_are_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        open_reward_model(reward_configs.get_config(f"tiny,{change}"))
