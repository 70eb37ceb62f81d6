"""Files of adapters: round trips, names, and whose they are."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax.models import lora
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.files.lora_files import (
    fingerprint,
    load_adapters,
    save_adapters,
    trained_beside,
)
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from tests import tiny


def trained(model, **settings):
    """A tuning and adapters that are not 0."""
    tuning = lora.make_tuning(model, LoRAConfig(rank=3, alpha=6.0, **settings), jax.random.key(0))
    return tuning, tiny.draw(tuning.start, 5)


@pytest.mark.parametrize("make", [tiny.language_model, tiny.scalar_model])
def test_adapters_come_back_to_the_bit(make, tmp_path):
    tuning, adapters = trained(make(), targets=("q", "o", "down"))
    save_adapters(adapters, tmp_path, base="some/model", fingerprint="abc")
    again = load_adapters(tmp_path, tuning.trunk)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert tiny.largest_difference(again, adapters) == 0.0
    assert trained_beside(tmp_path) == "abc" and trained_beside(tmp_path / "none") == ""
    tiny.close(tuning.merged(again), tuning.merged(adapters), 0.0)


def test_names_and_shapes_are_those_of_peft(tmp_path):
    _, adapters = trained(tiny.scalar_model(), targets=("k", "up"))
    save_adapters(adapters, tmp_path, base="some/model", fingerprint="")
    shapes = {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers"
    # Width 16, two key heads of 4, MLP width 24, rank 3.
    wanted = {"base_model.model.score.weight": (1, 16)}
    for layer in (0, 1):
        wanted |= {
            f"{prefix}.{layer}.self_attn.k_proj.lora_A.weight": (3, 16),
            f"{prefix}.{layer}.self_attn.k_proj.lora_B.weight": (8, 3),
            f"{prefix}.{layer}.mlp.up_proj.lora_A.weight": (3, 16),
            f"{prefix}.{layer}.mlp.up_proj.lora_B.weight": (24, 3),
        }
    assert shapes == wanted
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 6.0, "SEQ_CLS")
    assert config["target_modules"] == ["k_proj", "up_proj"]
    assert config["base_model_name_or_path"] == "some/model"


def test_merged_models_are_ordinary_folders(tmp_path):
    tuning, adapters = trained(tiny.language_model())
    merged = tuning.merged(adapters)
    hf_weights.save_model(merged, tmp_path / "model")
    again = hf_weights.load_model(tmp_path / "model")
    assert tiny.largest_difference(again, merged) == 0.0
    assert tiny.largest_difference(again, tuning.trunk) > 0.1


def test_adapters_of_another_model_are_refused(tmp_path):
    _, adapters = trained(tiny.language_model())
    save_adapters(adapters, tmp_path, base="", fingerprint="")
    wider = tiny.language_model(tiny.model_config(intermediate_size=32))
    with pytest.raises(ValueError, match=r"does not fit the model: .*mlp.down_proj.lora_A.weight"):
        load_adapters(tmp_path, wider)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated"):
        load_adapters(tmp_path, tiny.language_model())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fingerprint_distinguishes_models(dtype):
    model = tiny.language_model(tiny.model_config(dtype=dtype))
    known = fingerprint(model)
    assert known == fingerprint(jax.tree.map(np.array, model))
    spread = jax.device_put(model, Sharding(make_mesh(8)).frozen(model))
    assert fingerprint(spread) == known
    others = [tiny.language_model(tiny.model_config(dtype=dtype), seed=1)]
    leaves, structure = jax.tree.flatten(model)
    for index in (0, 3):
        bits = np.array(leaves[index])
        flipped, swapped = bits.copy(), bits.copy()
        flipped.view(np.uint8).reshape(-1)[7] ^= 1
        swapped[..., [0, 1]] = swapped[..., [1, 0]]
        for changed in (flipped, swapped):
            others.append(
                jax.tree.unflatten(structure, [*leaves[:index], changed, *leaves[index + 1 :]])
            )
    digests = {fingerprint(other) for other in others}
    assert len(digests) == 5 and known not in digests
