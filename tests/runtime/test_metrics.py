"""The log of a run: what is written, what a resume drops, what stops a run."""

import json
import math
import struct
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rlhf_jax.runtime import metrics
from rlhf_jax.runtime.metrics import MetricsWriter, NonFiniteError, check_finite, read_metrics


def _write(workdir, steps, **options):
    with MetricsWriter(workdir, tensorboard=False, **options) as writer:
        for step in steps:
            writer.write(step, {"loss/policy": 0.5 * step, "reward/mean": -1.0 * step})


def _lines(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_one_json_line_a_step(tmp_path):
    _write(tmp_path, range(2))
    assert _lines(tmp_path) == [
        {"step": 0, "loss/policy": 0.0, "reward/mean": 0.0},
        {"step": 1, "loss/policy": 0.5, "reward/mean": -1.0},
    ]


def test_a_line_is_on_disk_before_the_next_one(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"a": 1.0})
        assert len(_lines(tmp_path)) == 1


@pytest.mark.parametrize("one", [1, 1.0, True, np.float32(1), np.ones((1, 1)), jnp.ones(())])
def test_scalars_of_any_kind(tmp_path, one):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"a": one})
    assert _lines(tmp_path) == [{"step": 0, "a": 1.0}]


def test_bfloat16_keeps_its_value(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"a": jnp.asarray(0.75, jnp.bfloat16)})
    assert read_metrics(tmp_path)["a"].tolist() == [0.75]


def test_non_finite_values_are_legal_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(text, parse_constant=refuse)
    columns = read_metrics(tmp_path)
    assert math.isnan(columns["a"][0])
    assert columns["b"].tolist() == [math.inf]
    assert columns["c"].tolist() == [-math.inf]


def test_array_is_refused_by_name_and_nothing_is_written(tmp_path):
    with (
        MetricsWriter(tmp_path, tensorboard=False) as writer,
        pytest.raises(ValueError, match=r"'reward/all' must be a scalar.*\(2,\)"),
    ):
        writer.write(0, {"a": 1.0, "reward/all": np.ones(2)})
    assert _lines(tmp_path) == []


@pytest.mark.parametrize("name", ["step", "time"])
def test_reserved_names(tmp_path, name):
    with (
        MetricsWriter(tmp_path, tensorboard=False) as writer,
        pytest.raises(ValueError, match=name),
    ):
        writer.write(0, {name: 1.0})


def test_resumed_log_equals_uninterrupted_log(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _write(whole, range(10))
    _write(killed, range(8))  # the checkpoint is at step 5
    assert _lines(killed) != _lines(whole)
    _write(killed, range(5, 10), resume_step=5)
    assert _lines(killed) == _lines(whole)


def test_resume_keeps_the_steps_before_it_untouched(tmp_path):
    _write(tmp_path, range(4))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    _write(tmp_path, [], resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:3]


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    _write(tmp_path, range(4))
    _write(tmp_path, range(1))
    assert [row["step"] for row in _lines(tmp_path)] == [0]


@pytest.mark.parametrize("cut", ['{"step": 2, "ti', '{"step": 2, "time": 1.0, "a": 3.0}', ""])
def test_last_line_cut_short_by_a_kill(tmp_path, cut):
    _write(tmp_path, range(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    complete = cut.endswith("}")
    assert read_metrics(tmp_path)["step"].tolist() == ([0, 1, 2] if complete else [0, 1])
    _write(tmp_path, [3], resume_step=3)
    assert [row["step"] for row in _lines(tmp_path)] == ([0, 1, 2, 3] if complete else [0, 1, 3])


@pytest.mark.parametrize("line", ["not json", '{"a": 1}', "[1]", '{"step": "1"}'])
def test_foreign_line_is_named(tmp_path, line):
    _write(tmp_path, range(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3"):
        read_metrics(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3"):
        _write(tmp_path, [], resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_columns_align_with_steps_and_later_lines_count(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"a": 1.0})
        writer.write(2, {"a": 3.0, "b": 7.0})
        writer.write(2, {"a": 4.0, "c": 8.0})
    columns = read_metrics(tmp_path / "metrics.jsonl")
    assert set(columns) == {"step", "time", "a", "b", "c"}
    assert columns["step"].tolist() == [0, 2]
    np.testing.assert_array_equal(columns["a"], [1.0, 4.0])
    np.testing.assert_array_equal(columns["b"], [np.nan, 7.0])
    np.testing.assert_array_equal(columns["c"], [np.nan, 8.0])
    assert np.isfinite(columns["time"]).all()


def test_reading_no_log(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


def test_check_finite_names_metric_value_and_step():
    check_finite({"a": 1.0, "b": np.float32(2)}, 3)
    metrics = {"a": 1.0, "loss/policy": jnp.asarray(jnp.nan), "loss/value": math.inf}
    with pytest.raises(NonFiniteError) as caught:
        check_finite(metrics, 17)
    message = str(caught.value)
    assert "loss/policy = nan" in message
    assert "loss/value = inf" in message
    assert "step 17" in message
    assert "a = " not in message.split(":")[0]
    assert isinstance(caught.value, FloatingPointError)


def _events(folder):
    """Events of every file of a folder, in order: records of tfrecord files, without checksums."""
    found = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += 12 + length + 4
    return found


def test_tensorboard_gets_the_finite_scalars(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"a/b": 1.5, "c": math.nan})
    first, event = _events(tmp_path / "tensorboard")
    assert first.file_version == "brain.Event:2" and first.session_log.status == 0
    (value,) = event.summary.value
    assert (event.step, value.tag, value.simple_value) == (3, "a/b", 1.5)
    assert abs(event.wall_time - time.time()) < 100


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    MetricsWriter(tmp_path, resume_step=2).close()
    _, start = _events(tmp_path / "tensorboard")
    assert start.session_log.status == SessionLog.START and start.step == 2


def test_tensorboard_is_left_out_on_request(tmp_path):
    _write(tmp_path / "quiet", range(1))
    assert not (tmp_path / "quiet" / "tensorboard").exists()


def test_what_tensorboard_shows_is_on_disk_before_long(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"a": 1.0})
        assert len(_events(tmp_path / "tensorboard")) == 0
        monkeypatch.setattr(metrics._TensorBoard, "_FLUSH_SECONDS", -1.0)
        writer.write(1, {"a": 1.0})
        assert [event.step for event in _events(tmp_path / "tensorboard")] == [0, 0, 1]


def _fake_wandb():
    module = types.ModuleType("wandb")
    module.calls, module.logged, module.finished = [], [], []

    def init(**options):
        module.calls.append(options)
        return types.SimpleNamespace(
            id="abc123",
            log=lambda metrics, step: module.logged.append((step, metrics)),
            finish=lambda: module.finished.append(True),
        )

    module.init = init
    return module


def test_wandb_continues_its_run_on_resume(tmp_path, monkeypatch):
    wandb = _fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = {"wandb": True, "wandb_project": "project", "config": {"lr": 1.0}}
    _write(tmp_path, [0], **options)
    _write(tmp_path, [1], resume_step=1, **options)
    assert [call["id"] for call in wandb.calls] == [None, "abc123"]
    assert wandb.calls[0]["project"] == "project"
    assert wandb.calls[0]["config"] == {"lr": 1.0}
    assert wandb.logged[1] == (1, {"loss/policy": 0.5, "reward/mean": -1.0})
    assert wandb.finished == [True, True]


@pytest.mark.parametrize(
    ("package", "options"), [("wandb", {"wandb": True}), ("tensorboardX", {"tensorboard": True})]
)
def test_missing_mirror_gives_one_line_and_keeps_the_log(tmp_path, monkeypatch, package, options):
    _write(tmp_path, range(3))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install") as caught:
        MetricsWriter(tmp_path, **{"tensorboard": False, **options})
    assert "\n" not in str(caught.value)
    assert len(_lines(tmp_path)) == 3


def test_log_is_closed_when_the_run_fails(tmp_path):
    with pytest.raises(NonFiniteError), MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"a": math.nan})
        check_finite({"a": math.nan}, 0)
    assert writer._file.closed
    assert len(_lines(tmp_path)) == 1
