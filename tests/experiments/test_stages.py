"""Tokens and lengths that do not fit the models of a stage are refused before weights are read."""

import json
import shutil
from pathlib import Path

import pytest

from configs import dpo as dpo_configs
from configs import ppo_max as ppo_configs
from configs import reward_model as reward_configs
from configs import sft as sft_configs
from experiments import dpo, ppo_max, reward_model, sft, stages
from rlhf_jax.data.tokenizer import load_tokenizer
from tests.data.test_tokenizer import without_spare


def resized(folder: Path, to: Path, rows: int) -> str:
    """A copy of a model whose config states another number of rows; the weights are gone."""
    shutil.copytree(folder, to)
    file = to / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": rows}))
    for weights in to.glob("*.safetensors"):
        weights.unlink()
    return str(to)


# Stage, its config file, and the input that names the model in question.
STAGES = (
    (sft, sft_configs, "model"),
    (reward_model, reward_configs, "model"),
    (dpo, dpo_configs, "model"),
    (ppo_max, ppo_configs, "reward_model"),
)


@pytest.mark.parametrize(("stage", "configs", "name"), STAGES)
def test_every_stage_refuses_a_tokenizer_with_more_tokens_than_rows(
    chain, tmp_path, stage, configs, name
):
    size = len(load_tokenizer(chain.sft))
    source = chain.reward_model if name == "reward_model" else chain.sft
    folder = resized(source, tmp_path / "model", size - 1)
    config = configs.get_config("tiny")
    config.workdir = str(tmp_path / "run")
    if stage is ppo_max:
        config.inputs.update(model=str(chain.sft), reference=str(chain.sft))
    config.inputs[name] = folder
    with pytest.raises(ValueError) as error:
        stage.main(config)
    assert str(error.value) == (
        f"{folder}: the tokenizer has {size} tokens, but the embedding only {size - 1} rows; "
        "use the tokenizer that the model was trained with"
    )


def test_a_new_pad_token_takes_a_row_that_every_model_has(chain, tmp_path):
    tokenizer = without_spare()
    size = len(tokenizer)
    folders = [
        resized(chain.sft, tmp_path / name, rows) for name, rows in (("a", size + 4), ("b", size))
    ]
    tokenizer.save_pretrained(folders[0])
    assert stages.load_tokenizer(folders[0]).pad_token_id == size
    with pytest.raises(ValueError, match=f"new one would be id {size} of an embedding with {size}"):
        stages.load_tokenizer(*folders)


# As on the hub, without the keys that nothing here reads.
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def mistral(folder: Path, **changes) -> str:
    """A folder with nothing but the configuration of Mistral-7B-v0.1."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MISTRAL | changes))
    return str(folder)


SAMPLED = "max(data.prompt_buckets) + eval.sampling.max_new_tokens"
LONG_PROMPTS = "data.prompt_buckets=(2048,4096)"


@pytest.mark.parametrize(
    ("stage", "configs", "setting", "key", "tokens"),
    [
        (sft, sft_configs, "data.max_length=4097", "data.max_length", 4097),
        (reward_model, reward_configs, "data.max_length=4097", "data.max_length", 4097),
        (dpo, dpo_configs, "data.max_length=4097", "data.max_length", 4097),
        (dpo, dpo_configs, LONG_PROMPTS, SAMPLED, 4104),
        (ppo_max, ppo_configs, "data.ptx_length=5000", "data.ptx_length", 5000),
        (
            ppo_max,
            ppo_configs,
            "sampling.max_new_tokens=4090",
            "max(data.prompt_buckets) + sampling.max_new_tokens",
            4106,
        ),
        (ppo_max, ppo_configs, "eval.sampling.max_new_tokens=4090", SAMPLED, 4106),
    ],
)
def test_every_stage_refuses_texts_beyond_a_sliding_window(
    tmp_path, caplog, stage, configs, setting, key, tokens
):
    """And says once that the window is the limit."""
    folder = mistral(tmp_path / "model")
    config = configs.get_config(f"tiny,{setting}")
    config.workdir, config.inputs.model = str(tmp_path / "run"), folder
    if stage is ppo_max:
        config.inputs.update(reference=folder, reward_model=folder)
    with pytest.raises(ValueError) as error:
        stage.main(config)
    assert str(error.value) == (
        f"{key}={tokens} must be at most 4096, the longest text that {folder} "
        f"{'samples' if 'max_new_tokens' in key else 'reads'} (see its config.json)"
    )
    assert caplog.text.count("attention slides over 4096 tokens") == 1


def test_texts_within_the_window_are_read(tmp_path):
    folder = mistral(tmp_path / "model")
    stages.check_lengths({"data.max_length": 4096}, folder, sampled={"longest": 4096})


def test_models_with_dynamic_scaling_read_longer_texts_than_they_sample(tmp_path):
    changes = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "sliding_window": None}
    folder = mistral(tmp_path / "model", **changes, max_position_embeddings=512)
    stages.check_lengths({"data.max_length": 1024}, folder, sampled={"longest": 512})
    with pytest.raises(ValueError, match=r"data.max_length=1025 must be at most 1024, .* reads"):
        stages.check_lengths({"data.max_length": 1025}, folder)
    with pytest.raises(ValueError, match=r"longest=513 must be at most 512, .* samples"):
        stages.check_lengths({}, folder, sampled={"longest": 513})


def test_a_model_from_scratch_is_as_long_as_its_texts(tmp_path):
    config = sft_configs.get_config("tiny,data.max_length=257")
    config.workdir = str(tmp_path)
    with pytest.raises(
        ValueError, match=r"data.max_length=257 must be at most sizes.max_length=256"
    ):
        sft.main(config)
