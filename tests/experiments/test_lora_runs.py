"""Every stage with adapters, through its own `main` on the tiny scale."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import dpo as dpo_configs
from configs import ppo_max as ppo_configs
from configs import reward_model as reward_configs
from configs import sft as sft_configs
from experiments import command, dpo, ppo_max, preflight, reward_model, sft
from rlhf_jax.models.files import hf_weights
from rlhf_jax.preflight.topologies import parse_topology
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.training.run import Run, Stopped
from tests import tiny as models

CHANGES = ("tiny", "sharding.devices=1", "lora.rank=4", "log.tensorboard=False")


@pytest.fixture(scope="module")
def reward_folder(chain, tmp_path_factory) -> Path:
    """A reward model that was trained as adapters beside the session's SFT model."""
    config = reward_configs.get_config(",".join(CHANGES))
    config.workdir = str(tmp_path_factory.mktemp("reward_lora"))
    config.inputs.model = str(chain.sft)
    reward_model.main(config)
    return Path(config.workdir) / "model"


def ppo_config(chain, reward_folder, workdir, *changes):
    """A tiny PPO config with adapters."""
    config = ppo_configs.get_config(",".join([*CHANGES, *changes]))
    config.workdir = str(workdir)
    config.inputs.update(
        model=str(chain.sft), reference=str(chain.sft), reward_model=str(reward_folder)
    )
    return config


@pytest.fixture(scope="module")
def finished(chain, reward_folder, tmp_path_factory) -> Path:
    """A finished tiny PPO run, policy, critic, reference and reward model on one trunk."""
    workdir = tmp_path_factory.mktemp("ppo_lora")
    ppo_max.main(ppo_config(chain, reward_folder, workdir))
    return workdir


def load_all(config):
    """The four models of PPO, as `main` loads them."""
    settings = command.open_config("ppo_max", config, ppo_max.Settings)
    sharding = settings.sharding.make()
    policy, reference = ppo_max.load_policies(settings, sharding)
    reward = ppo_max.load_reward_model(settings, policy, sharding)
    critic = ppo_max.load_critic(settings, policy.trunk, reward, sharding)
    return policy, reference, reward, critic


def held_bytes(*trees) -> int:
    """Bytes of all distinct buffers."""
    buffers = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(trees)}
    return sum(buffers.values())


def test_four_models_stand_on_one_trunk(chain, reward_folder, tmp_path):
    policy, reference, reward, critic = load_all(ppo_config(chain, reward_folder, tmp_path))
    assert reference is policy.trunk
    held = held_bytes(policy.start, policy.trunk, reference, reward, critic.start, critic.trunk)
    # The critic starts at the reward model's adapters, whose buffers it shares until it trains.
    head = 4 * (reference.config.hidden_size + 1)
    assert held == held_bytes(policy.trunk) + 2 * held_bytes(policy.start) + head
    tokens, mask = models.left_padded([5, 3], 6)
    scores = [
        jax.jit(lambda m: m.scores(tokens, mask.astype(np.int32)))(model)
        for model in (
            reward,
            critic.model(critic.start),
            hf_weights.load_scalar_model(reward_folder),
        )
    ]
    models.close(scores[1], scores[0], 0.0)
    models.close(scores[2], scores[0], 1e-5)


def test_a_reward_model_of_its_own_keeps_its_weights(chain, tmp_path):
    """Trained in every weight: the critic's adapters use the reward model's trunk."""
    policy, reference, reward, critic = load_all(ppo_config(chain, chain.reward_model, tmp_path))
    assert reference is policy.trunk
    assert critic.trunk is reward.trunk
    assert held_bytes(reward, critic.trunk) == held_bytes(reward)
    np.testing.assert_array_equal(critic.start.kernel[...], reward.kernel[...])


def test_adapters_beside_other_weights_are_not_taken_for_ours(
    chain, reward_folder, finished, tmp_path
):
    """The trained policy is not the trunk that the reward model was trained on."""
    config = ppo_config(chain, reward_folder, tmp_path)
    config.inputs.model = str(finished / "model")
    policy, reference, reward, _ = load_all(config)
    assert reference is not policy.trunk
    assert models.largest_difference(reference, policy.trunk) > 0
    shared = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(policy.trunk)}
    assert not shared & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(reward)}


def test_ppo_starts_on_policy_and_moves_away_from_the_reference(finished):
    log = read_metrics(finished)
    first = log["policy/approx_kl_first"][1:]  # iteration 0 trains the critic alone
    assert np.isfinite(first).all() and np.abs(first).max() < 1e-5
    for name in ("policy/ratio_max_first", "policy/ratio_min_first"):
        np.testing.assert_allclose(log[name][1:], 1, atol=1e-5)
    np.testing.assert_allclose(log["policy/kl_ref"][:2], 0, atol=1e-5)
    assert abs(log["policy/kl_ref_sequence"][2]) > 1e-6
    assert log["loss/value"][-1] != log["loss/value"][0]


def test_ppo_saves_a_merged_model_and_its_adapters(chain, finished):
    start, model = (hf_weights.load_model(f) for f in (chain.sft, finished / "model"))
    moved = {
        jax.tree_util.keystr(path).split(".")[-2]
        for (path, one), other in zip(
            jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(model), strict=True
        )
        if (np.asarray(one) != np.asarray(other)).any()
    }
    assert moved == {"q", "k", "v", "o", "gate", "up", "down"}
    assert (finished / "adapters" / "adapter_model.safetensors").exists()
    # The checkpoint holds adapters and moments, not the trunk: six of these fit into one model.
    state = sum(f.stat().st_size for f in (finished / "checkpoints").rglob("*") if f.is_file())
    assert state < 6 * (finished / "model" / "model.safetensors").stat().st_size


def test_same_numbers_also_after_a_stop(chain, reward_folder, finished, tmp_path, monkeypatch):
    original = Run.log
    stopped = []

    def stop_in_the_middle(self, step, metrics):
        original(self, step, metrics)
        if step == 1 and not stopped:
            stopped.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", stop_in_the_middle)
    with pytest.raises(Stopped, match="stopped at step 2 of 4"):
        ppo_max.main(ppo_config(chain, reward_folder, tmp_path))
    ppo_max.main(ppo_config(chain, reward_folder, tmp_path))
    one, other = read_metrics(finished), read_metrics(tmp_path)
    assert one.keys() == other.keys()
    for name in one.keys() - {"time"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("mode", ["zero0", "zero2"])
def test_ppo_runs_on_several_devices(chain, reward_folder, finished, tmp_path, mode):
    changes = ("train.iterations=2", f"sharding.mode={mode}", "sharding.devices=4")
    ppo_max.main(ppo_config(chain, reward_folder, tmp_path, *changes))
    one, other = read_metrics(finished), read_metrics(tmp_path)
    assert np.abs(other["policy/approx_kl_first"][1:]).max() < 1e-5
    # The critic has made two updates by then; sampled tokens are the same.
    for name in ("reward/mean", "loss/value", "response/length"):
        np.testing.assert_allclose(other[name][0], one[name][0], rtol=1e-3, err_msg=name)


def test_sft_and_dpo_train_adapters(chain, tmp_path):
    config = sft_configs.get_config(",".join(CHANGES))
    config.workdir, config.inputs.model = str(tmp_path / "sft"), str(chain.sft)
    sft.main(config)
    before = read_metrics(tmp_path / "sft")["loss/lm"]
    assert before[-1] != before[0]
    config = dpo_configs.get_config(",".join(CHANGES))
    config.workdir, config.inputs.model = str(tmp_path / "dpo"), str(chain.sft)
    config.compare.update(ppo_max=str(tmp_path / "no"), reward_model=str(tmp_path / "no"))
    dpo.main(config)
    log = read_metrics(tmp_path / "dpo")
    np.testing.assert_allclose(log["loss/dpo"][0], np.log(2), atol=1e-5)
    assert abs(log["loss/dpo"][-1] - np.log(2)) > 1e-5
    for stage in ("sft", "dpo"):
        start, model = (hf_weights.load_model(f) for f in (chain.sft, tmp_path / stage / "model"))
        assert models.largest_difference(start.layers, model.layers) > 1e-5
        assert models.largest_difference(start.embedding, model.embedding) == 0.0


@pytest.mark.parametrize(
    ("main", "configs", "changes", "message"),
    [
        (sft.main, sft_configs, (), "needs a model to adapt: set inputs.model"),
        (ppo_max.main, ppo_configs, ("trpo", "train.minibatch=16"), "set lora.rank=0"),
    ],
)
def test_what_adapters_cannot_do_is_one_line(tmp_path, main, configs, changes, message):
    config = configs.get_config(",".join([*CHANGES, *changes]))
    config.workdir = str(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        main(config)
    assert "\n" not in str(caught.value)


def test_the_preflight_does_not_count_adapters_as_weights():
    config = ppo_configs.get_config(",".join(CHANGES))
    settings = command.open_config("ppo_max", config, ppo_max.Settings)
    with pytest.raises(ValueError, match=r"pass --config.lora.rank=0 for an upper bound"):
        preflight.make_run(settings, parse_topology("host:8"))
