"""The preflight as a command: on host devices, and of runs written down by hand."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import ppo_max as configs
from experiments import command, preflight
from experiments.ppo_max import Settings
from rlhf_jax.models.presets import preset
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.preflight import verdict
from rlhf_jax.preflight.ppo_run import PPORun
from rlhf_jax.preflight.topologies import CHIPS
from rlhf_jax.runtime.sharding import Sharding, make_mesh


def settings_of(argument: str) -> Settings:
    return command.open_config("ppo_max", configs.get_config(argument), Settings)


def run_of(settings: Settings, how: Sharding) -> PPORun:
    """The run as shapes, on devices that are here."""
    return PPORun(
        settings.method(),
        preflight.model_sizes(settings),
        how,
        prompt_length=settings.data.longest_prompt,
        ptx_length=settings.data.ptx_length,
    )


def test_llama_7b_without_files_or_network():
    """The paper's model, from its config alone: 6.74 billion parameters."""
    settings = settings_of("paper_en")
    sizes = preflight.model_sizes(settings)
    assert (sizes.dtype, sizes.remat, sizes.attention) == ("bfloat16", "full", "cudnn")
    model = jax.eval_shape(lambda: Transformer(sizes, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 6_738_415_616
    assert preset("LLAMA-7B") == preset("huggyllama/llama-7b")
    with pytest.raises(ValueError, match="the sizes of nowhere are not known here: pass --model"):
        preflight.model_sizes(settings, "nowhere")


def test_what_the_paper_run_holds_by_hand():
    """bfloat16 weights on every device; an eighth of master, moments and frozen models."""
    settings = settings_of("paper_en,model.attention=xla")  # cudnn needs its wheel
    how = Sharding(make_mesh(8), settings.sharding.mode)
    held = {item.name: item.per_device for item in run_of(settings, how).holdings()}
    del held["experience buffer"]
    count, head = 6_738_415_616, 4096 + 1  # the head of a scalar model is float32, its bias whole
    assert held == {
        "policy/parameters": 2 * count,
        "policy/master": 4 * count // 8,
        "policy/moments": 2 * 4 * count // 8 + 8,
        "critic/parameters": 2 * count + 4 * head,
        "critic/master": 4 * (count + 4096) // 8 + 4,
        "critic/moments": 2 * (4 * (count + 4096) // 8 + 4) + 8,
        "reference": 2 * count // 8,
        "reward model": (2 * count + 4 * 4096) // 8 + 4,
    }


@pytest.fixture(scope="module")
def tiny_report(tmp_path_factory) -> dict:
    """A preflight of the tiny run on eight host devices."""
    # An empty folder: no earlier stage has left a model whose sizes would be read.
    with contextlib.chdir(tmp_path_factory.mktemp("preflight")):
        preflight.main(configs.get_config("tiny"), "host:8", out="report/tiny.json")
        return json.loads(Path("report/tiny.json").read_text())


@pytest.mark.slow
def test_the_tiny_run_is_measured_as_a_whole(tiny_report):
    """Every program of an iteration, on a run small enough to compile here."""
    names = [program["name"] for program in tiny_report["programs"]]
    expected = ["create critic", "generate", "generate (reference)", "score"]
    assert names == [*expected, "policy step", "critic step"]
    assert [program["calls"] for program in tiny_report["programs"]] == [0, 1, 0, 1, 2, 2]
    assert tiny_report["fits"] and tiny_report["samples"] == 16
    held = tiny_report["resident_bytes"]
    # Weights of 32 x 2 layers and 512 words; float32 has no master; two moments, an eighth each.
    assert held["policy/parameters"] == 4 * (512 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 64) + 32)
    assert held["policy/moments"] == 2 * held["policy/parameters"] // 8 + 8
    assert held["reference"] == held["policy/parameters"] // 8
    for measured in tiny_report["programs"]:
        assert measured["flops"] > 0 or measured["name"] == "create critic"
        assert measured["seconds_at_least"] > 0
        assert measured["peak_bytes"] > sum(held.values())
    # Beside what stays there is the loaded model: weights, a head of 32 and a bias.
    loaded = held["policy/parameters"] + 4 * 33
    assert tiny_report["programs"][0]["extra_bytes"] >= loaded
    for step in tiny_report["programs"][4:]:
        # The host's compiler makes no reduce-scatters, and the vocabulary weighs much here.
        assert 1 < step["update_traffic"]["ratio"] < 3


@pytest.mark.slow
def test_work_of_the_tiny_steps_by_hand(tiny_report):
    """6 operations for each weight in a layer's products and each token, and attention."""
    flops = {program["name"]: program["flops"] for program in tiny_report["programs"]}
    tokens, layer = 24, 4 * 32 * 32 + 3 * 32 * 64  # a row on each of the eight devices
    attention = 4 * tokens * tokens * 32
    # Sampling: two rows; the prompt and all but the last token go through the layers once.
    assert flops["critic step"] == pytest.approx(2 * 3 * (2 * tokens * layer + attention), rel=0.01)


@pytest.mark.slow
def test_frozen_models_are_gathered_in_the_layer_loop(tiny_report):
    """The score program of the report says so."""
    score = next(p for p in tiny_report["programs"] if p["name"] == "score")
    inside = [c for c in score["collectives"] if c["kind"] == "all-gather" and 2 in c["loops"]]
    assert {c["size"] for c in inside} >= {4 * 32 * 32, 4 * 32 * 64}
    assert {c["place"] for c in inside} == {"in the loop over layers"}


@pytest.mark.slow
def test_what_does_not_fit_ends_with_status_one(monkeypatch, tmp_path, capsys):
    """A device of three MiB beside the reserve; the remedies are compiled and reported."""
    monkeypatch.chdir(tmp_path)
    small = dataclasses.replace(CHIPS["host"], memory=verdict.RESERVE + 3 * 2**20)
    monkeypatch.setitem(CHIPS, "host", small)
    config = configs.get_config("tiny,train.prompts_per_iteration=64,train.minibatch=64")
    config.sampling.max_new_tokens = 64
    only = functools.partial(only_programs, ("policy step",))
    monkeypatch.setattr(PPORun, "programs", only(PPORun.programs))
    with pytest.raises(SystemExit) as status:
        preflight.main(config, "host:8", out="out.json")
    assert status.value.code == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT: peak" in text and "MiB more than the" in text
    assert "with --config.model.remat=full: " in text
    assert "--config.model.remat=full --config.train.microbatches=2" in text
    assert not json.loads(Path("out.json").read_text())["fits"]


def only_programs(names, programs):
    """`PPORun.programs` without the others."""
    return lambda run: (p for p in programs(run) if p.name in names)


def test_batches_that_do_not_divide_name_the_flag():
    """32 rows on 64 devices: the error of the run itself."""
    settings = settings_of("paper_en,train.microbatches=8")
    with pytest.raises(ValueError, match=r"rows of a microbatch \(over devices\)=4 must be div"):
        run_of(settings, Sharding(make_mesh(8), "zero2"))
    train = preflight.scale_batch(settings, 2).train
    assert (train.microbatch, train.prompts_per_iteration) == (8, 256)


def test_bytes_fall_as_devices_are_added():
    """Flat for what every device holds whole, falling for what is spread: 2 against 8 devices."""
    settings = settings_of("tiny")
    held = [
        {h.name: h.per_device for h in run_of(settings, how).holdings()}
        for how in (Sharding(make_mesh(n), "zero2") for n in (2, 8))
    ]
    assert held[0]["policy/parameters"] == held[1]["policy/parameters"]
    for name in ("policy/moments", "critic/moments", "reference", "reward model"):
        assert np.isclose(held[0][name], 4 * held[1][name], rtol=1e-2), name
