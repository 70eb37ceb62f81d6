"""One tiny SFT model and one tiny reward model for all tests of experiments."""

from pathlib import Path
from typing import NamedTuple

import pytest

from configs import reward_model as reward_configs
from configs import sft as sft_configs
from experiments import reward_model, sft


class Chain(NamedTuple):
    """Folders of trained models."""

    sft: Path
    reward_model: Path
    reward_data: dict


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items):
    """Whatever needs trained models is slow."""
    for item in items:
        if "chain" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    """Runs the tiny SFT and reward-model stages once."""
    root = tmp_path_factory.mktemp("chain")
    config = sft_configs.get_config("tiny,sharding.devices=1")
    config.workdir = str(root / "sft")
    sft.main(config)
    config = reward_configs.get_config("tiny,sharding.devices=1")
    config.workdir = str(root / "reward_model")
    config.inputs.model = str(root / "sft" / "model")
    reward_model.main(config)
    return Chain(root / "sft" / "model", root / "reward_model" / "model", config.data.to_dict())
