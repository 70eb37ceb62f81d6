"""Findings of runs whose fault is known."""

import numpy as np
import pytest

from rlhf_jax.evaluation import diagnosis
from rlhf_jax.evaluation.diagnosis import FAULT, FINE, WARNING, HeldOutPairs

STEPS = 20
GOOD_PPO = {
    "policy/ratio_max_first": (1.0, 1.0),
    "policy/ratio_min_first": (1.0, 1.0),
    "critic/explained_variance": (0.0, 0.7),
    "policy/kl_ref_sequence": (0.0, 5.0),
    "response/eos_rate": (0.6, 0.9),
    "reward/mean": (0.0, 1.0),
    "win_rate/vader": (0.5, 0.8),
}


def log(**ends):
    names = {name: np.linspace(*pair, STEPS) for name, pair in ends.items()}
    return {"step": np.arange(STEPS), **names}


def pairs(**changes):
    """Scores that order three quarters of pairs, mean what they say, and know no length."""
    random = np.random.default_rng(0)
    gap = random.uniform(0.5, 3.0, 4000)
    right = random.random(4000) < 1 / (1 + np.exp(-gap))
    margin = np.where(right, gap, -gap)
    lengths = random.integers(5, 40, (2, 4000))
    fields = {
        "chosen": margin / 2,
        "rejected": -margin / 2,
        "scale": 1.0,
        "chosen_length": lengths[0],
        "rejected_length": lengths[1],
        "gap": gap,
    }
    return HeldOutPairs(**(fields | changes))


def levels(findings):
    return {finding.what: finding.level for finding in findings}


def ppo(change=None, held_out=None):
    return levels(diagnosis.diagnose_ppo(log(**(GOOD_PPO | (change or {}))), held_out))


def test_a_good_run_is_fine():
    assert set(ppo(held_out=pairs()).values()) == {FINE}
    assert len(ppo(held_out=pairs())) == 7


@pytest.mark.parametrize(
    ("change", "what", "level"),
    [
        ({"policy/ratio_max_first": (1.0, 1.2)}, "the first update is off policy", FAULT),
        ({"policy/ratio_min_first": (1.0, 0.9)}, "the first update is off policy", FAULT),
        ({"critic/explained_variance": (0.0, 0.02)}, "the critic knows little", WARNING),
        ({"policy/kl_ref_sequence": (0.0, 60.0)}, "the policy is far away", WARNING),
        ({"policy/kl_ref_sequence": (0.0, 0.0)}, "the policy has hardly moved", WARNING),
        ({"response/eos_rate": (0.6, 0.1)}, "most responses are cut", WARNING),
        ({"reward/mean": (0.0, 9.0)}, "the reward is over-optimised", WARNING),
        ({"win_rate/vader": (0.8, 0.6)}, "vader liked it better before", WARNING),
        ({"win_rate/vader": (0.3, 0.4)}, "vader prefers SFT", WARNING),
    ],
)
def test_each_fault_of_ppo_is_found(change, what, level):
    assert ppo(change, pairs())[what] == level


def test_a_collapse_is_a_fault():
    found = ppo({"response/distinct_2": (0.9, 0.0), "policy/perplexity": (100.0, 1.0)})
    assert found["the policy collapses"] == FAULT


def reward_model(summary=None, held_out=None, **ends):
    good = {"accuracy": 0.77, "accuracy_interval": [0.75, 0.79], "judges_accuracy": {"vader": 0.7}}
    return levels(
        diagnosis.diagnose_reward_model(
            log(**{name.replace("__", "/"): pair for name, pair in ends.items()}),
            good | (summary or {}),
            held_out,
        )
    )


def test_a_good_reward_model_is_fine():
    found = reward_model(held_out=pairs(), reward__accuracy=(0.5, 0.8), eval__accuracy=(0.5, 0.77))
    assert set(found.values()) == {FINE} and len(found) == 5


def test_each_fault_of_a_reward_model_is_found():
    found = reward_model({"accuracy": 0.54, "accuracy_interval": [0.52, 0.56]})
    assert found["it hardly knows what people prefer"] == FAULT
    assert reward_model({"accuracy": 0.65})["a judge knows it better"] == WARNING
    curves = {"reward__accuracy": (0.98, 0.98), "eval__accuracy": (0.7, 0.7)}
    assert reward_model(**curves)["it overfits"] == WARNING
    assert reward_model(held_out=pairs(scale=4.0))["its margins say too much"] == WARNING
    good = pairs()
    longer = np.sign(good.chosen_length - good.rejected_length) * 3.0
    biased = pairs(chosen=good.chosen + longer, rejected=good.rejected - longer)
    assert reward_model(held_out=biased)["it likes length"] == WARNING
    flat = pairs(chosen=np.ones(4000), rejected=np.zeros(4000))
    assert reward_model(held_out=flat)["clear pairs are no easier"] == WARNING


def sft(perplexity=(110.0, 100.0), summary=None, answers=None):
    ends = {"eval/perplexity": perplexity}
    return levels(diagnosis.diagnose_sft(log(**ends), summary or {}, answers or {}))


def test_findings_on_sft():
    assert sft() == {"it has learned the text": FINE}
    assert sft((90.0, 100.0))["it overfits"] == WARNING
    assert sft((400.0, 10.0))["it has not learned enough"] == WARNING
    assert sft(summary={"trained_share": 0.01})["the loss mask"] == WARNING
    ends = sft(answers={"response/eos_rate": 0.05})
    assert ends["it does not end its responses"] == FAULT


def test_the_page_says_first_what_is_worst_and_earliest():
    findings = [
        *diagnosis.diagnose_sft(log(), {}, {"response/eos_rate": 0.05}),
        *diagnosis.diagnose_ppo(log(**(GOOD_PPO | {"win_rate/vader": (0.8, 0.2)})), None),
    ]
    text = diagnosis.page(findings)
    assert text.startswith("Look first at SFT: it does not end its responses.\nChange first: samp")
    assert text.index("FAULT") < text.index("warning") < text.index("fine")
    good = diagnosis.diagnose_ppo(log(**GOOD_PPO), None)
    assert diagnosis.page(good).startswith("Nothing stands out")
