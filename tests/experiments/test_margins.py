"""A pair's margin on its way from a file to the loss; nobody who gives one is left to guess."""

import json

import numpy as np
import pytest

from configs import dpo as dpo_configs
from configs import reward_model as configs
from experiments import command, reporting, reward_model
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.store import margins_of, write
from tests import dry

SHAPES = {
    "sharegpt": lambda n: {
        "conversations": [{"from": "human", "value": f"question {n}"}],
        "chosen": {"from": "gpt", "value": "a good answer"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "messages": lambda n: {
        "prompt": [{"role": "user", "content": f"question {n}"}],
        "chosen": "a good answer",
        "rejected": "bad",
    },
    "turns": lambda n: {
        "chosen": [f"question {n}", "a good answer"],
        "rejected": [f"question {n}", "bad"],
    },
    "transcripts": lambda n: {
        "chosen": f"\n\nHuman: question {n}\n\nAssistant: a good answer",
        "rejected": f"\n\nHuman: question {n}\n\nAssistant: bad",
    },
}


def source(folder, shape, margin=None):
    """A file of 120 pairs; every second one has a margin, if any has."""
    rows = [SHAPES[shape](n) for n in range(120)]
    if margin is not None:
        rows = [row | ({"margin": margin} if n % 2 else {}) for n, row in enumerate(rows)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def config_of(where, *assignments):
    short = ("train.steps=1", "eval.every=1", "train.max_tokens=8000", "sharding.devices=1")
    return configs.get_config(",".join(["tiny", f"data.source={where}", *short, *assignments]))


@pytest.fixture
def banner(monkeypatch):
    """What the banner of a dry run says."""
    said: dict[str, str] = {}
    monkeypatch.setattr(reporting, "banner", lambda title, numbers: said.update(numbers))
    return said


@pytest.mark.parametrize("shape", SHAPES)
def test_margins_of_every_shape_reach_the_batch_that_the_loss_reads(tmp_path, shape):
    config = config_of(source(tmp_path, shape, 1.5), "loss.margin_coef=2.0")
    settings = command.open_config("reward_model", config, reward_model.Settings)
    assert settings.method().margin_coef == 2.0
    tokenizer = dry.tokenizer()
    pairs, _ = reward_model.training_pairs(settings, settings.task(), tokenizer)
    batch = next(reward_model.training_batches(settings, pairs, tokenizer, 1))
    found = batch["margin"][batch["valid"]]
    assert set(found.tolist()) == {0.0, 1.5}


def test_a_run_says_that_margins_are_not_read(tmp_path, banner):
    where = source(tmp_path, "sharegpt", 1.5)
    dry.Dry(tmp_path / "run").notes("reward_model", config_of(where))
    assert "pairs have one, not in the loss: loss.margin_coef is 0" in banner["margins"]
    number, count = banner["margins"].split(" pairs")[0].split(" of ")
    assert 0 < int(number) < int(count)
    dry.Dry(tmp_path / "run").notes("reward_model", config_of(where, "loss.margin_coef=2.0"))
    assert banner["margins"].endswith("pairs have one, times 2 in the loss")


def test_a_run_without_margins_is_refused_where_they_are_asked_for(tmp_path, banner):
    where = source(tmp_path, "messages")
    run = dry.Dry(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^loss.margin_coef=1.0 needs pairs with a margin") as no:
        run.notes("reward_model", config_of(where, "loss.margin_coef=1.0"))
    assert where in str(no.value) and "\n" not in str(no.value)
    run.notes("reward_model", config_of(where))
    assert banner["margins"] == "none"


def test_dpo_says_that_it_reads_none(tmp_path, banner):
    short = "train.steps=1,eval.every=1,train.max_tokens=8000,sharding.devices=1"
    short += ",eval.batch=8,eval.prompts=8,eval.final_prompts=8,eval.samples=0"
    config = dpo_configs.get_config(f"tiny,data.source={source(tmp_path, 'turns', 1.5)},{short}")
    dry.Dry(tmp_path / "run").notes("dpo", config)
    assert banner["margins"].endswith("pairs have one; DPO reads none")
    assert int(banner["margins"].split()[0]) > 0


def test_pairs_held_out_speak_for_a_stream(tmp_path):
    where = f"stream:{source(tmp_path, 'messages')}"
    config = config_of(where, "loss.margin_coef=1.0")
    settings = command.open_config("reward_model", config, reward_model.Settings)
    pairs, _ = reward_model.training_pairs(settings, settings.task(), dry.tokenizer())
    held_out = settings.task().preferences(dry.tokenizer(), "test", max_length=96, count=40)
    with pytest.raises(ValueError, match=r"none of the \d+ held out of data.source='stream:"):
        reward_model.margins_line(settings, pairs, held_out)


def test_margins_are_those_of_memory_and_of_a_store(tmp_path):
    config = config_of(source(tmp_path, "turns", -0.5))
    settings = command.open_config("reward_model", config, reward_model.Settings)
    pairs, _ = reward_model.training_pairs(settings, settings.task(), dry.tokenizer())
    store = write(tmp_path / "store", "preference", pairs, DropCounts())
    np.testing.assert_array_equal(margins_of(pairs), margins_of(store))
    np.testing.assert_array_equal(margins_of(Examples(store)), margins_of(pairs))
    assert set(margins_of(store).tolist()) == {0.0, -0.5}
