"""The tiny chain through the experiments' own `main`: results, invariants, resume, wrong input."""

import gc
import json
import os
import signal

import jax
import numpy as np
import pytest

from configs import ppo_max as configs
from experiments import best_of_n, notebook, ppo_max
from rlhf_jax.methods import ppo_max as method
from rlhf_jax.methods.ppo_max import PPOMax
from rlhf_jax.models.files import hf_weights
from rlhf_jax.runtime.metrics import NonFiniteError, read_metrics
from rlhf_jax.training.run import Run, Stopped
from tests.programs import compiled_programs


def tiny(chain, workdir, *changes):
    """A tiny PPO config on the session's SFT and reward models."""
    config = configs.get_config(",".join(["tiny", "sharding.devices=1", *changes]))
    config.workdir = str(workdir)
    config.inputs.update(
        model=str(chain.sft), reference=str(chain.sft), reward_model=str(chain.reward_model)
    )
    return config


@pytest.fixture(scope="module")
def finished(chain, tmp_path_factory):
    """A finished tiny run."""
    workdir = tmp_path_factory.mktemp("ppo")
    ppo_max.main(tiny(chain, workdir))
    return workdir


def test_run_writes_what_it_promises(finished):
    for name in ("report.md", "training.png", "metrics.jsonl", "config.json", "summary.json"):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "model" / "model.safetensors").exists()
    text = (finished / "report.md").read_text()
    for word in ("PPO-max against SFT", "KL to SFT per sequence", "distinct-2", "## Samples"):
        assert word in text


def test_a_notebook_opens_the_run_with_every_response(finished):
    result = notebook.open_run(finished)
    rows = [json.loads(line) for line in (finished / "responses.jsonl").read_text().splitlines()]
    assert len(result.samples) == len(rows) == 16
    first, row = result.samples[0], rows[0]
    assert list(first) == ["prompt", "SFT", "PPO-max", "SFT, vader", "PPO-max, vader"]
    assert row["responses"] == {name: first[name] for name in ("SFT", "PPO-max")}
    assert any(sample["SFT"] != sample["PPO-max"] for sample in result.samples)
    mean = np.mean([sample["PPO-max, vader"] for sample in result.samples])
    assert mean == pytest.approx(result.numbers["judge score (VADER, -1 to 1)"], abs=1e-6)
    wins = [sample["PPO-max, vader"] > sample["SFT, vader"] for sample in result.samples]
    assert np.mean(wins) == result.summary["win_rates"]["vader"]["win"]
    assert f"{first['prompt']}" in (finished / "report.md").read_text().replace("\\", "")
    assert set(result.pictures) == {"training"}


def test_best_of_n_is_measured_beside_a_finished_run(finished, tmp_path):
    """On its test prompts, by its judges and its reward model."""
    options = best_of_n.parse([str(finished), "--samples", "3", "--out", str(tmp_path / "out")])
    best_of_n.main(options)
    (run,) = json.loads((tmp_path / "out" / "best_of_n.json").read_text())["runs"]
    reward = run["measured"]["reward"]
    assert reward["curve"] == sorted(reward["curve"]) and len(reward["curve"]) == 3
    assert run["policy_kl"] > 0 and "win_rate/vader" in run["measured"]
    assert (tmp_path / "out" / "best_of_n.png").stat().st_size > 10_000
    assert "best-of-n" in (tmp_path / "out" / "best_of_n.md").read_text()
    with pytest.raises(ValueError, match="holds no finished run"):
        best_of_n.main(best_of_n.parse([str(tmp_path)]))


def test_first_minibatch_of_every_iteration_is_on_policy(finished):
    log = read_metrics(finished)
    # Iteration 0 trains the critic alone. The KL is of second order in the ratio's error.
    wanted = {"approx_kl": (0, 1e-9), "ratio_max": (1, 1e-5), "ratio_min": (1, 1e-5)}
    for name, (value, tolerance) in wanted.items():
        first = log[f"policy/{name}_first"][1:]
        np.testing.assert_allclose(first, value, rtol=0, atol=tolerance, err_msg=name)
    assert np.abs(log["policy/ratio_max"][2:] - 1).max() > 1e-4  # after an update it moves


def test_kl_to_the_reference_starts_at_zero(finished):
    log = read_metrics(finished)
    # Iterations 0 and 1 sample from the SFT policy: the critic trains alone in iteration 0.
    np.testing.assert_allclose(log["policy/kl_ref"][:2], 0, atol=1e-5)
    assert abs(log["policy/kl_ref_sequence"][2]) > 1e-6


def test_same_numbers_also_after_a_stop(chain, finished, tmp_path, monkeypatch):
    """And the same memory: two models with two moments each, and two that do not train."""
    sizes = hf_weights.load_config(chain.sft)

    def copies() -> int:
        shape = (sizes.vocab_size, sizes.hidden_size)
        return sum(array.shape == shape for array in jax.live_arrays())

    gc.collect()
    before, calls = copies(), []
    original = Run.log

    def stop_in_the_middle(self, step, metrics):
        original(self, step, metrics)
        assert copies() - before == 2 * 3 + 2
        calls.append(step)
        if step == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", stop_in_the_middle)
    with pytest.raises(Stopped, match="stopped at step 2 of 4"):
        ppo_max.main(tiny(chain, tmp_path / "again"))
    gc.collect()  # the exception holds the frames of the stopped run
    ppo_max.main(tiny(chain, tmp_path / "again"))
    assert calls == [0, 1, 2, 3]
    one, other = read_metrics(finished), read_metrics(tmp_path / "again")
    assert one.keys() == other.keys()
    for name in one.keys() - {"time"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_collapse_is_rolled_back_and_the_rest_learns_half_as_fast(chain, tmp_path, monkeypatch):
    original, calls, tries = PPOMax.metrics, [], []

    def collapsing(self, experience, updates):
        metrics = original(self, experience, updates)
        calls.append(len(tries))
        if not tries and len(calls) > 1:
            metrics |= {"response/distinct_2": 0.01, "response/length": 1e3}
        return metrics

    def start(self, begin=PPOMax.start):
        if (tmp_path / "collapse.json").exists():
            tries.append(self)
        return begin(self)

    monkeypatch.setattr(PPOMax, "metrics", collapsing)
    monkeypatch.setattr(PPOMax, "start", start)
    settings = ("collapse.action=rollback", "collapse.start=1", "collapse.patience=1")
    config = tiny(chain, tmp_path, *settings, "optimizer.schedule=constant")
    ppo_max.main(config)
    rate = read_metrics(tmp_path)["optim/learning_rate"]
    np.testing.assert_allclose(rate[-3:], config.optimizer.learning_rate / 2, rtol=1e-6)
    assert calls == [0, 0, 1, 1, 1, 1]
    report = (tmp_path / "report.md").read_text()
    assert "COLLAPSE at step 2" in report and "went back to step 0" in report


def test_a_finished_run_is_not_run_again(chain, finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    ppo_max.main(tiny(chain, finished))
    assert "has finished already" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before


def test_other_settings_in_the_same_folder_are_refused(chain, finished):
    (finished / "summary.json").rename(finished / "summary.bak")
    try:
        with pytest.raises(ValueError, match=r"other settings \(ppo.clip_eps was 0.2, now 0.1"):
            ppo_max.main(tiny(chain, finished, "ppo.clip_eps=0.1"))
    finally:
        (finished / "summary.bak").rename(finished / "summary.json")


def test_missing_inputs_name_the_command(tmp_path):
    config = configs.get_config("paper_en")
    config.sharding.devices = 1
    config.workdir = str(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"python -m experiments\.sft --config configs/sft\.py:paper_en"
    ):
        ppo_max.main(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.minibatch=6", "must be divisible by 6"),
        ("train.microbatches=3", "must be divisible by 3"),
        ("advantage.method=rloo", "samples_per_prompt=1 must be at least 2"),
        ("advantage.method=nothing", "advantage.method='nothing' is unknown"),
        ("train.critic_init=none", "needs a critic"),
        ("ppo.objective=nothing", "ppo.objective='nothing' is unknown"),
        ("reward.transform=nothing", "reward.transform='nothing' is unknown"),
        ("sampling.top_p=0.0", "must be in"),
        ("train.minibatch=0", "must be at least 1"),
        ("train.iterations=0", "train.iterations=0 must be at least 1"),
        ("eval.every=0", "eval.every=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_one_line(chain, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        ppo_max.main(tiny(chain, tmp_path / "run", change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        ("vanilla",),
        ("rloo", "train.prompts_per_iteration=8", "train.samples_per_prompt=2"),
        ("penalty_adaptive",),
        ("entropy", "adaptive_kl", "kl.coef=0.05"),
        ("critic_sft", "importance_sample", "sampling.top_p=0.9", "sampling.temperature=0.7"),
    ],
)
def test_variants_run(chain, tmp_path, changes):
    config = tiny(chain, tmp_path, *changes, "train.iterations=2", "log.tensorboard=False")
    ppo_max.main(config)
    log = read_metrics(tmp_path)
    assert np.nanmax(np.abs(log["policy/approx_kl_first"])) < 1e-9
    if config.ppo.ratio_denominator == "old":
        ratios = np.stack([log[f"policy/ratio_{end}_first"] for end in ("min", "max")])
        assert np.nanmax(np.abs(ratios - 1)) < 1e-5
    report = (tmp_path / "report.md").read_text()
    assert ("paper's Figure 4" in report) == (config.kl.coef == 0)
    assert (
        json.loads((tmp_path / "summary.json").read_text())["win_rates"]["vader"]["num_prompts"]
        == 16
    )


def test_samples_of_a_prompt_are_adjacent(chain, tmp_path, monkeypatch):
    seen = []
    original = PPOMax.score

    def watched(self, state, rollout):
        rows = np.where(rollout.mask, rollout.tokens, -1)
        seen.append((rows[:, : rollout.prompt_length], rows[:, rollout.prompt_length :]))
        return original(self, state, rollout)

    monkeypatch.setattr(PPOMax, "score", watched)
    changes = ("rloo", "train.prompts_per_iteration=4", "train.samples_per_prompt=4")
    ppo_max.main(tiny(chain, tmp_path, *changes, "train.iterations=1", "log.tensorboard=False"))
    ((prompts, responses),) = seen
    assert len(prompts) == 16
    assert len({row.tobytes() for row in prompts}) == 4
    for group in range(0, 16, 4):
        assert (prompts[group : group + 4] == prompts[group]).all()
        assert len({row.tobytes() for row in responses[group : group + 4]}) > 1


def test_trust_region_variant_keeps_its_bound(chain, tmp_path):
    config = tiny(chain, tmp_path, "trpo", "train.minibatch=16", "log.tensorboard=False")
    ppo_max.main(config)
    log = read_metrics(tmp_path)
    accepted = log["policy/accepted"][1:]  # iteration 0 trains the critic alone
    assert accepted.sum() >= 1
    assert (log["policy/kl"][1:] <= 0.01).all()
    assert (log["policy/improvement"][1:][accepted == 1] > 0).all()
    assert "optim/learning_rate" not in log  # it has none


def test_programs_are_as_many_as_buckets_and_no_iteration_repeats_a_key(
    chain, tmp_path, monkeypatch
):
    """Training and evaluation, policy and reference, share one sampler for each bucket."""
    keys, make_generate = set(), method.make_generate

    def watched_generate(*arguments, **settings):
        generate = make_generate(*arguments, **settings)

        def sample(model, tokens, mask, key):
            keys.add(tuple(jax.random.key_data(key).tolist()))
            return generate(model, tokens, mask, key)

        return sample

    monkeypatch.setattr(method, "make_generate", watched_generate)
    config = tiny(chain, tmp_path, "data.prompt_buckets=(12,16)", "log.tensorboard=False")
    with compiled_programs() as programs:
        ppo_max.main(config)
    assert programs["generate"] == 2
    assert programs["step"] == 2 * 2  # policy and critic
    # Four iterations have a key each; evaluations, of one batch, share one.
    assert len(keys) == 4 + 1


def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    chain, tmp_path, monkeypatch
):
    original = PPOMax.minibatches

    def poisoned(self, experience, iteration):
        if iteration == 2:
            experience = experience.replace(advantages=experience.advantages * np.nan)
        return original(self, experience, iteration)

    config = tiny(chain, tmp_path, "checkpoint.every=1", "no_critic_pretrain")
    with monkeypatch.context() as patch:
        patch.setattr(PPOMax, "minibatches", poisoned)
        with pytest.raises(NonFiniteError, match=r"loss/policy = nan.* at step 2") as caught:
            ppo_max.main(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "summary.json").exists()
    # The same command goes on from before the poisoned step.
    ppo_max.main(config)
    log = read_metrics(tmp_path)
    assert log["step"].tolist() == [0, 1, 2, 3]
    assert np.isfinite(log["loss/policy"]).all()
