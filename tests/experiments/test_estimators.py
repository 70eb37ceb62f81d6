"""The command that measures policy-gradient estimators: rewards that are fixed, kept numbers."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ppo_max as configs
from experiments import estimators, ppo_max
from experiments.estimators import KEPT, Options
from rlhf_jax.evaluation.gradients import CountSketch
from rlhf_jax.losses import RunningMoments, update_moments
from rlhf_jax.rollouts.experience import AdvantageConfig, RewardConfig, advantages
from rlhf_jax.rollouts.rollout import SamplingConfig
from tests import bigram


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 5}, "top_k=5"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"temperature": 0.0}, "greedily"),
    ],
)
def test_samples_of_another_distribution_are_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        estimators.check_sampling(SamplingConfig(8, **changed))
    estimators.check_sampling(SamplingConfig(8, temperature=0.7))


def test_rewards_do_not_depend_on_the_other_responses():
    experience = bigram.experience()
    moments = update_moments(RunningMoments.zeros(), jnp.array([0.0, 2.0, 4.0]))

    def rewards(rows, **changes):
        some = jax.tree.map(lambda x: x[rows], experience)
        scores = jnp.arange(8.0)[jnp.asarray(rows)]
        return estimators.fixed_rewards(
            some.rollout,
            some.evaluation.replace(scores=scores),
            moments,
            config=RewardConfig(**changes),
            kl_coef=0.3,
        )

    every, few = np.arange(8), np.array([2, 5])
    for changes in ({"transform": "normalize", "clip": 0.8}, {"transform": "scale"}):
        np.testing.assert_array_equal(rewards(every, **changes)[few], rewards(few, **changes))
    plain = np.asarray(rewards(every, transform="none"))
    normalized = np.asarray(rewards(every, transform="normalize", clip=0.8))
    last = [length - 1 for length in bigram.LENGTHS]
    # Mean 2 and variance 8/3; the KL penalty is the same in both.
    wanted = np.clip((np.arange(8) - 2) / np.sqrt(8 / 3), -0.8, 0.8) - np.arange(8)
    np.testing.assert_allclose((normalized - plain)[np.arange(8), last], wanted, rtol=0, atol=1e-5)
    assert np.abs(np.where(bigram.where(), plain, 0)[:, 0]).min() > 1e-3


def test_gradients_of_sequence_weights_are_those_of_weighing_every_token():
    """What is computed once for total_return, rloo, batch_mean and grpo is what each would get."""
    experience, samples = bigram.experience(), 4
    size = bigram.VOCAB**2
    sketch = CountSketch(jnp.arange(size), jnp.ones(size), size)
    choices = {
        name: AdvantageConfig(method=name)
        for name in ("reward_to_go", "rloo", "grpo", "batch_mean", "total_return", "td")
    }
    means, squares, _ = estimators.gradients_of_prompts(
        bigram.policy(),
        experience.rollout,
        experience.rewards,
        experience.evaluation.values,
        sketch,
        choices=choices,
        samples=samples,
        temperature=1.0,
    )
    log_probs = bigram.table_log_probs(bigram.policy().table, 1.0)
    tokens = np.asarray(experience.rollout.tokens)
    for i, config in enumerate(choices.values()):
        phi, _ = advantages(
            experience.rewards,
            experience.evaluation.values,
            experience.rollout.response_mask,
            config=config,
            samples_per_prompt=samples,
        )
        slow = np.zeros((8, bigram.VOCAB, bigram.VOCAB))
        for row, length in enumerate(bigram.LENGTHS):
            for t in range(length):
                state, action = tokens[row, bigram.PROMPT + t - 1 : bigram.PROMPT + t + 1]
                score = -np.exp(log_probs[state])
                score[action] += 1
                slow[row, state] += float(phi[row, t]) * score
        flat = slow.reshape(2, samples, -1)
        np.testing.assert_allclose(means[:, i], flat.mean(1), rtol=0, atol=1e-5)
        np.testing.assert_allclose(squares[:, i], np.square(flat).sum(2).mean(1), rtol=1e-4)


def test_prompts_come_in_buffers_that_their_samples_fill():
    batch = {"tokens": np.arange(8)[:, None], "mask": np.ones((8, 1), bool)}
    options = Options(prompts=6, samples=4)
    made = list(estimators.buffers(iter([batch, batch]), options, 8))
    assert [one["tokens"][:, 0].tolist() for one in made] == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    more = list(estimators.buffers(iter([batch, batch]), Options(prompts=10, samples=4), 8))
    assert len(more) == 5 and more[-1]["tokens"][:, 0].tolist() == [0, 1]


def settings(**train):
    config = configs.get_config("tiny")
    config.train.update(train)
    return ppo_max.command.open_config("ppo_max", config, ppo_max.Settings)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="has no critic"):
        no_critic = types.SimpleNamespace(
            sampling=SamplingConfig(8),
            train=dataclasses.replace(
                settings().train, critic_init="none", critic_pretrain_iterations=0
            ),
        )
        estimators.method_config(no_critic, Options())
    with pytest.raises(ValueError, match="must fill buffers of 16 responses"):
        estimators.method_config(settings(), Options(prompts=10, samples=4))
    config = estimators.method_config(settings(), Options(prompts=8, critic_iterations=2))
    assert config.train.critic_pretrain_iterations == 2 < config.train.iterations
    assert config.seed != settings().seed


def test_the_command_measures_once_and_reports(chain, tmp_path, capsys):
    config = configs.get_config("tiny,sharding.devices=1")
    config.workdir = str(tmp_path / "run")
    config.inputs.model = config.inputs.reference = str(chain.sft)
    config.inputs.reward_model = str(chain.reward_model)
    ppo_max.main(config)
    arguments = [config.workdir, "--prompts", "8", "--critic_iterations", "2", "--sketch", "256"]
    options = estimators.parse([*arguments, "--out", str(tmp_path / "out")])
    estimators.main(options)
    content = json.loads((tmp_path / "out" / "estimators.json").read_text())
    run = content["runs"]["0"]
    found = run["estimators"]
    assert run["measured"]["responses"] == 32 and run["measured"]["sampler_error"] < 1e-3
    assert abs(run["measured"]["kl"]) > 0
    assert found["reward_to_go"]["variance"] == [1.0, 1.0, 1.0]
    assert found["reward_to_go_baseline"]["bias"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert {claim["verdict"] for claim in content["claims"]} <= {
        "undecided",
        "not reproduced",
    }
    assert (tmp_path / "out" / "estimators.png").stat().st_size > 10_000
    assert "grpo" in (tmp_path / "out" / "estimators.md").read_text()
    written = (tmp_path / "run" / KEPT).stat().st_mtime
    estimators.main(options)
    assert (tmp_path / "run" / KEPT).stat().st_mtime == written
    with pytest.raises(ValueError, match="was measured with"):
        estimators.main(estimators.parse([config.workdir, "--prompts", "12"]))
    with pytest.raises(ValueError, match="holds no finished run"):
        estimators.main(estimators.parse([str(tmp_path / "out")]))
