"""What every stage reads from a folder in the format of HH-RLHF, loaded or streamed."""

import importlib
import itertools

import numpy as np
import pytest

from configs import dpo, ppo_max, reward_model, sft
from experiments import command, inspect_data
from rlhf_jax.data import prepare
from rlhf_jax.data.batches import (
    fixed_prompts,
    once_packed,
    packed_batches,
    pair_batches,
    prompt_batches,
)
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.runtime import distributed
from tests import hh

STAGES = {"sft": sft, "reward_model": reward_model, "ppo_max": ppo_max, "dpo": dpo}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hh.write_folder(tmp_path_factory.mktemp("hh"))


@pytest.fixture(params=["", "stream:"], ids=["loaded", "streamed"])
def configs(request, folder):
    """The tiny config of every stage on the folder."""
    made = {n: s.get_config(f"tiny,data.source={request.param}{folder}") for n, s in STAGES.items()}
    for name in ("ppo_max", "dpo"):
        made[name].data.prompt_buckets = (16, 48)
    return made


def task_of(config):
    name = config.experiment
    settings = importlib.import_module(f"experiments.{name}").Settings
    return command.open_config(name, config, settings).task()


@pytest.fixture
def tokenizer(configs):
    """The tokenizer of a model from scratch, trained on the folder's texts."""
    texts = task_of(configs["sft"]).texts()
    assert all(set(text.strip("?").split(" ")[:-1]) <= {*hh.WORDS, ""} for text in texts)
    return train_bpe(texts, 300)


def read(tokenizer, batch):
    """The documents of packed rows."""
    return [
        tokenizer.decode(tokens[segments == number])
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True)
        for number in range(1, segments.max() + 1)
    ]


def test_fine_tuning_packs_conversations_and_trains_every_answer(configs, tokenizer, capsys):
    task, pad_id = task_of(configs["sft"]), tokenizer.pad_token_id
    documents = task.documents(tokenizer, "train", max_length=96)
    batch = next(packed_batches(documents, rows=8, length=96, seed=0, pad_id=pad_id))
    texts = read(tokenizer, batch)
    assert len(texts) > 8
    assert all(text.endswith("chosen<eos>") for text in texts)
    for tokens, segments, mask in zip(*batch.values(), strict=True):
        stops = tokens == tokenizer.eos_token_id
        assert mask[stops].all()
        assert not mask[segments == 0].any()
    held_out = task.documents(tokenizer, "validation", max_length=96)
    assert once_packed(held_out, rows=8, length=96, pad_id=pad_id)
    assert "kept 120 of 120" in capsys.readouterr().out


def test_pairs_share_their_prompt(configs, tokenizer):
    task = task_of(configs["reward_model"])
    pairs = task.preferences(tokenizer, "train", max_length=96, count=200)
    batching = {"max_tokens": 2048, "min_pairs": 8, "max_pairs": 16, "multiple_of": 1}
    pad_id = tokenizer.pad_token_id
    batch = next(pair_batches(pairs, seed=0, pad_id=pad_id, longest=96, **batching))
    assert batch["valid"].any()
    for row in np.flatnonzero(batch["valid"]):
        tokens, mask = batch["tokens"][row], batch["loss_mask"][row]
        prompts = [tokens[side, : mask[side].argmax()] for side in range(2)]
        np.testing.assert_array_equal(*prompts)
        answers = [tokenizer.decode(tokens[side, mask[side]]) for side in range(2)]
        assert answers[0].endswith("chosen<eos>")
        assert answers[1].endswith("rejected<eos>")
    assert len(task.preferences(tokenizer, "test", max_length=96, count=40)) > 5
    assert len(task.references(tokenizer, max_length=96, count=20)) == 20


def test_prompts_end_with_the_last_question(configs, tokenizer):
    task, pad_id = task_of(configs["ppo_max"]), tokenizer.pad_token_id
    prompts = task.prompts(tokenizer, "train", max_length=48)
    batch = next(prompt_batches(prompts, batch_size=16, buckets=(16, 48), seed=0, pad_id=pad_id))
    assert batch["tokens"].shape[0] == 16
    for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
        assert tokenizer.decode(tokens[mask]).endswith("?\n")
    documents = task.documents(tokenizer, "train", max_length=32)
    ptx = next(packed_batches(documents, rows=8, length=32, seed=0, pad_id=pad_id, packed=False))
    assert ptx["tokens"].shape == (8, 32)
    assert ptx["segments"].max() == 1


def test_held_out_prompts_are_not_trained_on(configs, tokenizer):
    task = task_of(configs["ppo_max"])
    splits = []
    for split in ("train", "validation", "test"):
        prompts = task.prompts(tokenizer, split, max_length=48).loaded()
        splits.append({ids.tobytes() for ids in prompts})
    assert all(splits)
    assert not any(a & b for a, b in itertools.combinations(splits, 2))


def test_dpo_reads_pairs_and_prompts(configs, tokenizer):
    task, pad_id = task_of(configs["dpo"]), tokenizer.pad_token_id
    pairs = task.preferences(tokenizer, "train", max_length=96, count=200).loaded()
    batching = {"max_tokens": 2048, "min_pairs": 8, "max_pairs": 16, "multiple_of": 1}
    batch = next(pair_batches(pairs, seed=0, pad_id=pad_id, **batching))
    for index, tokens in zip(batch["index"], batch["tokens"], strict=True):
        chosen = pairs[int(index)].chosen.tokens
        np.testing.assert_array_equal(tokens[0, : len(chosen)], chosen)
    prompts = task.prompts(tokenizer, "validation", max_length=48)
    assert len(fixed_prompts(prompts, 16, 48, pad_id, "validation")) > 0


def test_other_processes_open_what_process_0_has_encoded(configs, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare, "IN_MEMORY", 50)
    events = []
    monkeypatch.setattr(distributed, "barrier", events.append)
    first = task_of(configs["sft"]).documents(tokenizer, "train", max_length=96).loaded()
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(prepare, "encoded_rows", lambda *_, **__: events.append("encoded"))
    second = task_of(configs["sft"]).documents(tokenizer, "train", max_length=96).loaded()
    assert len(first) == len(second) == 120
    assert events == ["sft rows are encoded"] * 2
    assert second.rows.counts == first.rows.counts


@pytest.mark.parametrize("stage", STAGES)
def test_inspection_shows_the_folder(configs, stage, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inspect_data.main(configs[stage], 1, "train")
    out = capsys.readouterr().out
    assert "(train): kept" in out
    assert "examples, tokens: min" in out
    assert "--- train 0" in out
