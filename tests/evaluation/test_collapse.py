"""What counts as a collapse: two kinds of evidence at once, in a row, relative to the start."""

import json

import numpy as np
import pytest

from rlhf_jax.evaluation.collapse import (
    BOUNDS,
    CollapseConfig,
    CollapseMonitor,
    find_collapses,
)
from rlhf_jax.runtime.metrics import read_metrics

HEALTHY = {
    "response/distinct_2": 0.9,
    "response/repetition_4": 0.0,
    "policy/perplexity": 100.0,
    "policy/entropy": 4.0,
    "policy/kl_ref": 0.0,
    "response/length": 24.0,
    "response/eos_rate": 0.6,
    "policy/clip_fraction": 0.02,
    "reward/mean": -0.1,
}
POOR, SURE = {"response/distinct_2": 0.5}, {"policy/perplexity": 20.0}


AFTER_3 = CollapseConfig(start=3)


def columns(steps):
    """Metrics of steps in a row, as a log is read."""
    names = steps[0]
    read = {name: np.array([step[name] for step in steps], float) for name in names}
    return {"step": np.arange(len(steps)), **read}


def run(*changes, config=AFTER_3):
    """Events of a run that starts healthy for three iterations and goes on with changes."""
    return find_collapses(columns([HEALTHY | change for change in ({}, {}, {}, *changes)]), config)


def test_two_kinds_of_evidence_twice_in_a_row_are_a_collapse():
    (event,) = run({}, POOR | SURE, POOR | SURE | {"reward/mean": 3.0}, POOR | SURE)
    assert (event.step, event.since) == (5, 4)
    assert {w.metric: (w.value, w.start) for w in event.witnesses} == {
        "response/distinct_2": (0.5, 0.9),
        "policy/perplexity": (20.0, 100.0),
    }
    # 0.6 x 0.9 and 100 / 4.
    assert [w.bound for w in event.witnesses] == pytest.approx([0.54, 25.0])
    assert event.also == {"reward/mean": 3.0}
    assert event.text() == (
        "COLLAPSE at step 6: response/distinct_2 0.5 (0.9 at the start), "
        "policy/perplexity 20 (100 at the start)"
    )
    assert json.loads(json.dumps(event.as_dict()))["since"] == 4


@pytest.mark.parametrize(
    "changes",
    [
        [POOR, POOR, POOR],  # one kind
        [POOR | {"response/repetition_4": 0.5}] * 3,  # one kind, twice
        [SURE | {"policy/entropy": 1.0}] * 3,  # the same
        [POOR | SURE, {}, POOR | SURE, {}],  # never in a row
        [POOR, SURE, POOR, SURE],  # never at once
    ],
)
def test_less_than_that_is_none(changes):
    assert run(*changes) == []


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: f"{bound.metric} {bound.times:.2g}")
def test_each_bound_is_a_witness_beyond_it_and_not_at_it(bound):
    limit = bound.limit(HEALTHY)
    other = POOR if bound.kind != "variety" else SURE
    beyond = limit + (1e-3 if bound.above else -1e-3)
    assert run(*[other | {bound.metric: limit}] * 2) == []
    (event,) = run(*[other | {bound.metric: beyond}] * 2)
    assert bound.metric in [witness.metric for witness in event.witnesses]


def test_the_start_is_a_median_and_is_not_judged():
    odd = [HEALTHY | POOR | SURE, HEALTHY, HEALTHY]
    monitor = CollapseMonitor(AFTER_3)
    assert [monitor.see(i, metrics) for i, metrics in enumerate(odd)] == [None] * 3
    assert monitor.start["response/distinct_2"] == 0.9


def test_one_collapse_is_one_event_until_it_has_passed():
    bad = POOR | SURE
    assert len(run(bad, bad, {}, bad, bad, bad)) == 1  # one calm iteration is no recovery
    assert [event.step for event in run(bad, bad, {}, {}, bad, bad)] == [4, 8]


def test_patience_and_kinds_are_settings():
    assert [e.step for e in run(POOR, config=CollapseConfig(start=3, kinds=1, patience=1))] == [3]
    assert run(*[POOR | SURE] * 3, config=CollapseConfig(start=3, kinds=3)) == []
    assert run(*[POOR | SURE] * 3, config=CollapseConfig(start=3, patience=4)) == []


def test_what_is_not_logged_says_nothing():
    assert find_collapses(columns([{"loss/lm": 4.0}] * 9), CollapseConfig(start=1)) == []
    # Without entropy there is no bound on KL per token: NaN, which no value passes.
    without = {k: v for k, v in HEALTHY.items() if k != "policy/entropy"}
    steps = [without] * 3 + [without | POOR | {"policy/kl_ref": 9.0}] * 3
    assert find_collapses(columns(steps), AFTER_3) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "panic"}, "action='panic'"),
        ({"retries": -1}, "retries=-1"),
        ({"start": 0}, "start=0"),
        ({"patience": 0}, "patience=0"),
        ({"kinds": 6}, "kinds=6"),
        ({"kinds": 0}, "kinds=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CollapseConfig(**change)


def test_a_log_is_read_as_it_was_written(tmp_path):
    steps = [HEALTHY] * 5 + [HEALTHY | POOR | SURE] * 2
    lines = [json.dumps({"step": i, "time": 1.0, **v}) for i, v in enumerate(steps)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (event,) = find_collapses(read_metrics(tmp_path))
    assert event.step == 6
