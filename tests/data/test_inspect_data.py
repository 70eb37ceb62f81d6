"""The command that shows what a config trains on, on the real reviews."""

import pytest

from configs import dpo, ppo_max, reward_model, sft
from experiments import inspect_data


@pytest.fixture(autouse=True)
def no_runs(tmp_path, monkeypatch):
    """Without an earlier run in the folder there is no tokenizer to load."""
    monkeypatch.chdir(tmp_path)


def shown(capsys, config, count=2, split="test"):
    inspect_data.main(config, count, split)
    return capsys.readouterr().out


def test_documents(capsys):
    out = shown(capsys, sft.get_config("tiny"))
    assert "SFT documents (test): kept" in out
    assert "examples, tokens: min" in out
    assert out.count("--- test") == 2
    assert out.count("<bos>[[") == out.count("<eos>]]") == 2


@pytest.mark.parametrize("config", [reward_model, dpo], ids=["reward_model", "dpo"])
def test_pairs(capsys, config):
    out = shown(capsys, config.get_config("tiny"), count=1)
    assert "is missing: training the tokenizer of configs/sft.py:tiny" in out
    assert "pairs (test): kept" in out
    assert "chosen (margin " in out
    assert out.count("<eos>]]") == 2


def test_what_the_loader_dropped_is_counted_too(capsys):
    out = shown(capsys, sft.get_config("tiny,data.domains=('tweets',)"), count=0)
    assert " rated differently in two files" in out


def test_prompts_are_not_trained(capsys):
    out = shown(capsys, ppo_max.get_config("tiny"), count=3)
    assert "prompts (test): kept" in out
    assert out.count("<bos>") == 3
    assert "[[" not in out.split("read only")[1]
