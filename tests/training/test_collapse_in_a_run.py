"""A run whose policy collapses: it goes on, stops saved, or goes back and learns more slowly."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.evaluation.collapse import Collapse, CollapseConfig, CollapseMonitor
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.training.rollback import Collapsed, note_rollback, retried, rollbacks
from rlhf_jax.training.run import CheckpointConfig, Run

HEALTHY = {"response/distinct_2": 0.9, "policy/perplexity": 100.0}
COLLAPSED = {"response/distinct_2": 0.1, "policy/perplexity": 1.1}
TOTAL, FIRST_BAD = 9, 5


def from_the_sixth(step, tries):
    return step >= FIRST_BAD


def toy(folder, action, *, until=TOTAL, collapses=from_the_sixth, seen=None, every=2, retries=2):
    """Counts steps; its metrics are those of a collapse where `collapses` says so."""
    config = CollapseConfig(action=action, start=2, retries=retries)
    tries = len(rollbacks(folder))
    with Run(
        folder,
        total=TOTAL,
        desc="toy",
        checkpoint=CheckpointConfig(every=every, keep=4),
        monitor=CollapseMonitor(config),
    ) as run:
        state = run.restore({"count": jnp.zeros(())})
        for step in run.steps():
            if step >= until:
                raise KeyboardInterrupt
            if seen is not None:
                seen.append((tries, step, int(state["count"])))
            state = {"count": state["count"] + 1}
            run.log(step, COLLAPSED if collapses(step, tries) else HEALTHY)
            run.checkpoint(step, state)
        return run.collapses()


def test_log_says_so_and_goes_on(tmp_path, capsys):
    (line,) = toy(tmp_path, "log")
    assert line.startswith("COLLAPSE at step 7: response/distinct_2 0.1 (0.9 at the start), ")
    assert capsys.readouterr().out.count(f"toy: {line}\n") == 1
    log = read_metrics(tmp_path)
    assert log["collapse/witnesses"].tolist() == [0] * 5 + [2] * 4
    assert log["collapse/event"].tolist() == [0] * 6 + [1, 0, 0]


def test_a_run_that_was_killed_between_sees_the_same(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, "log", until=6)
    # Resumed at step 6: that step 5 was bad stands in the log alone.
    (line,) = toy(tmp_path, "log")
    assert line.startswith("COLLAPSE at step 7: ")
    assert read_metrics(tmp_path)["collapse/event"].tolist() == [0] * 6 + [1, 0, 0]


def test_stop_saves_and_stops_again_until_it_may_go_on(tmp_path):
    for _ in range(2):
        with pytest.raises(Collapsed, match=r"COLLAPSE at step 7: .*--config.collapse.action=log"):
            toy(tmp_path, "stop")
    seen = []
    toy(tmp_path, "log", seen=seen)
    # The collapse of step 6 is noticed when the metrics are read, one step later.
    assert seen == [(0, 8, 8)]


def test_stop_in_the_last_step(tmp_path):
    with pytest.raises(Collapsed, match="COLLAPSE at step 9"):
        toy(tmp_path, "stop", collapses=lambda step, tries: step >= 7)


def test_rollback_goes_on_from_the_checkpoint_before_and_the_rest_is_gone(tmp_path, capsys):
    seen = []

    def once(step, tries):
        return step >= FIRST_BAD and not tries

    lines = retried(lambda _: toy(tmp_path, "rollback", collapses=once, seen=seen))(None)
    assert seen == [(0, s, s) for s in range(8)] + [(1, s, s) for s in range(4, 9)]
    assert lines[0].endswith("; went back to step 4") and len(lines) == 1
    assert "toy: back to step 4 of 9, with 1/2 of the learning rate (try 1 of 2)" in (
        capsys.readouterr().out
    )
    log = read_metrics(tmp_path)
    assert log["step"].tolist() == list(range(9))
    np.testing.assert_array_equal(log["response/distinct_2"], 0.9)
    assert json.loads((tmp_path / "collapse.json").read_text())["rollbacks"][0]["resumed_at"] == 4


def test_without_a_checkpoint_before_it_begins_anew(tmp_path):
    seen = []

    def early(step, tries):
        return step >= 2 and not tries

    settings = {"collapses": early, "seen": seen, "every": 0}
    (line,) = retried(lambda _: toy(tmp_path, "rollback", **settings))(None)
    assert line.endswith("went back to step 0")
    assert seen[5:8] == [(1, 0, 0), (1, 1, 1), (1, 2, 2)]


def test_rollbacks_that_do_not_help_end_in_a_stop(tmp_path):
    with pytest.raises(Collapsed, match=r"COLLAPSE at step 7.*; 2 rollbacks did not help"):
        retried(lambda _: toy(tmp_path, "rollback"))(None)
    assert [noted["resumed_at"] for noted in rollbacks(tmp_path)] == [4, 4]


def test_after_the_last_rollback_the_same_command_does_not_go_on(tmp_path, capsys):
    seen = []
    with pytest.raises(Collapsed):
        retried(lambda _: toy(tmp_path, "rollback"))(None)
    before = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    for _ in range(2):
        with pytest.raises(Collapsed, match=r"COLLAPSE at step 7.*; 2 rollbacks did not help"):
            retried(lambda _: toy(tmp_path, "rollback", seen=seen))(None)
    assert not seen and len(rollbacks(tmp_path)) == 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == before
    assert capsys.readouterr().out.count("back to step") == 2
    # What the line says goes on: the collapse is kept.
    lines = toy(tmp_path, "log", seen=seen)
    assert seen == [(2, 8, 8)] and len(lines) == 3


def test_more_retries_go_back_once_more(tmp_path):
    def twice(step, tries):
        return step >= FIRST_BAD and tries < 2

    with pytest.raises(Collapsed, match=r"; 1 rollback did not help"):
        retried(lambda _: toy(tmp_path, "rollback", collapses=twice, retries=1))(None)
    seen = []
    lines = retried(lambda _: toy(tmp_path, "rollback", collapses=twice, retries=2, seen=seen))(
        None
    )
    assert seen == [(2, step, step) for step in range(4, 9)]
    assert len(lines) == 2 and all(line.endswith("; went back to step 4") for line in lines)


def test_a_run_that_went_past_a_collapse_goes_back_when_told_to(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, "log", until=8)
    seen = []
    retried(lambda _: toy(tmp_path, "rollback", collapses=lambda step, tries: False, seen=seen))(
        None
    )
    assert [tries for tries, *_ in seen] == [1] * len(seen) and seen[0] == (1, 4, 4)


def test_the_note_is_json_also_of_a_metric_that_did_not_begin_with_the_run(tmp_path):
    start = {"policy/entropy": 2.0, "response/distinct_2": 0.9}
    monitor = CollapseMonitor(CollapseConfig(start=1, patience=1))
    monitor.see(0, start)
    event = monitor.see(1, {"response/distinct_2": 0.1, "policy/kl_ref": 9.0, "reward/mean": 1.5})
    assert [math.isnan(witness.start) for witness in event.witnesses] == [False, True]
    note_rollback(tmp_path, event, 0)

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "collapse.json").read_text()
    (noted,) = json.loads(text, parse_constant=refuse)["rollbacks"]
    assert repr(Collapse.from_dict(noted["collapse"])) == repr(event)
    assert Collapse.from_dict(noted["collapse"]).text() == event.text()


def test_a_damaged_note_is_one_line(tmp_path):
    (tmp_path / "collapse.json").write_text("{")
    with pytest.raises(ValueError, match=r"collapse\.json"):
        toy(tmp_path, "log")
