"""Tokenizers that do not fit the models of a stage are refused before any weights are read."""

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
