"""What DPO and PPO cost: the ratios, their verdicts, and the peak that is measured."""

import numpy as np
import pytest

from experiments import costs
from experiments.claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED
from experiments.costs import Work

DPO = {"seconds_per_response": 1.0, "peak_gib": 1.9, "held_mib": 4.0}
PPO = {"seconds_per_response": 2.0, "peak_gib": 2.0, "held_mib": 8.0}


def test_verdicts_on_ratios():
    assert costs.verdict([0.5, 0.9]) == REPRODUCED
    assert costs.verdict([0.5]) == UNDECIDED  # one round shows nothing
    assert costs.verdict([0.5, 0.95]) == UNDECIDED
    assert costs.verdict([1.5, 0.95]) == NOT_REPRODUCED
    assert costs.verdict([]) == UNDECIDED
    found = {c["metric"]: c for c in costs.judged([{"dpo": DPO, "ppo_max": PPO}] * 2)}
    by_first_word = {metric.split()[0]: one for metric, one in found.items()}
    assert by_first_word["seconds"]["ratios"] == [0.5, 0.5]
    assert by_first_word["seconds"]["verdict"] == REPRODUCED
    assert by_first_word["peak"]["verdict"] == NOT_REPRODUCED
    assert "**reproduced**" in costs.report([{"dpo": DPO, "ppo_max": PPO}] * 2)


def test_peak_and_what_is_held_are_of_the_work():
    """300 MiB that are freed before the end of a step are in the peak, and are not held."""
    kept = np.zeros(2**20, np.float32)

    def step():
        assert np.ones(75 * 2**20, np.float32).sum() > 0
        return 10, 50

    quiet = costs.run_once(Work(lambda: (10, 50), lambda: kept), 10)
    loud = costs.run_once(Work(step, lambda: {"a": kept, "b": kept}), 15)
    assert loud["responses"] == 20 and loud["tokens_per_response"] == 5
    assert quiet["held_mib"] == loud["held_mib"] == 4.0
    assert 0.25 < loud["peak_gib"] - quiet["peak_gib"] < 0.4
    after = costs.run_once(Work(lambda: (10, 50), lambda: kept), 10)
    assert after["peak_gib"] < quiet["peak_gib"] + 0.05


def test_a_stage_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs/sft/tiny"):
        costs.main(costs.parse(["--scale", "tiny"]))
