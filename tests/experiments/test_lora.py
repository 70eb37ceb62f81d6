"""Every stage with adapters, through its own `main` on the tiny scale."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from configs import dpo as dpo_configs
from configs import ppo_max as ppo_configs
from configs import reward_model as reward_configs
from configs import sft as sft_configs
from experiments import dpo, harness, ppo_max, reward_model, sft
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import hf_weights
from tests import tiny as models

ADAPTERS = ("sharding.devices=1", "lora.rank=4")


def ppo_config(chain, workdir, *changes):
    """A tiny PPO config with adapters on the session's SFT and reward models."""
    config = ppo_configs.get_config(",".join(["tiny", *ADAPTERS, *changes]))
    config.workdir = str(workdir)
    config.inputs.update(
        policy=str(chain.sft), reference=str(chain.sft), reward_model=str(chain.reward_model)
    )
    return config


@pytest.fixture(scope="module")
def finished(chain, tmp_path_factory):
    """A finished tiny PPO run."""
    workdir = tmp_path_factory.mktemp("ppo_lora")
    ppo_max.main(ppo_config(chain, workdir))
    return workdir


def test_ppo_starts_on_policy_and_moves_away_from_the_reference(finished):
    log = read_metrics(finished)
    first = log["policy/approx_kl_first"][1:]  # iteration 0 trains the critic alone
    assert np.isfinite(first).all() and np.abs(first).max() < 1e-5
    np.testing.assert_allclose(log["policy/kl_ref"][:2], 0, atol=1e-5)
    assert abs(log["policy/kl_ref_sequence"][2]) > 1e-6
