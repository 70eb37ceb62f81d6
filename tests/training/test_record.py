"""config.json pins what a run reads."""

import json

import pytest

from rlhf_jax.training.record import check_settings, pin_inputs, pinned_inputs
from rlhf_jax.training.run import Run

INPUTS = {"date": "2026-01-31", "weights": {"inputs.model": "a1"}, "rows": {"sft train": "b2"}}


@pytest.fixture
def path(tmp_path):
    """config.json of a run that has begun."""
    path = tmp_path / "config.json"
    check_settings(path, {"seed": 0})
    pin_inputs(path, INPUTS)
    return path


def test_inputs_are_written_once_beside_the_settings(path):
    before = path.read_text()
    record = json.loads(before)
    assert record["inputs"] == INPUTS == pinned_inputs(path) and record["config"] == {"seed": 0}
    pin_inputs(path, INPUTS)
    check_settings(path, {"seed": 0})
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"inputs.model": "a2"}}, r"weights of inputs.model was a1, now a2\)"),
        ({"rows": {"sft train": "b3"}}, r"rows of sft train was b2, now b3\)"),
        ({"rows": {}}, r"rows of sft train was b2, now not read\)"),
        ({"rows": {"sft test": "c", "sft train": "b2"}}, r"rows of sft test was not read, now c\)"),
        (
            {"weights": {"inputs.model": "a2"}, "rows": {"sft train": "b3"}},
            r"weights of inputs.model was a1, now a2; 1 more differ\)",
        ),
    ],
)
def test_what_has_changed_is_named_cause_first(path, change, message):
    before = path.read_text()
    with pytest.raises(ValueError, match=message) as caught:
        pin_inputs(path, INPUTS | change)
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_text() == before


def test_folders_are_compared_as_seen_from_the_root(tmp_path):
    """A run of the command line goes on in a notebook elsewhere, and the other way round."""
    path = tmp_path / "config.json"
    begun = {"root": "", "workdir": "runs/x", "inputs": {"model": "runs/sft/model"}}
    check_settings(path, begun)
    placed = {"root": "/me", "workdir": "/me/runs/x", "inputs": {"model": "/me/runs/sft/model"}}
    check_settings(path, placed)
    other = placed | {"inputs": {"model": "/you/runs/sft/model"}}
    with pytest.raises(ValueError, match=r"inputs.model was 'runs/sft/model', now '/you"):
        check_settings(path, other)
    without = {key: value for key, value in begun.items() if key != "root"}  # of an earlier version
    check_settings(path, without)


def test_a_run_that_was_killed_before_its_inputs_were_known_takes_them_now(tmp_path):
    with Run(tmp_path, total=1, settings={"seed": 0}):
        pass
    assert pinned_inputs(tmp_path / "config.json") == {}
    with Run(tmp_path, total=1, settings={"seed": 0}, inputs=INPUTS):
        pass
    other = Run(tmp_path, total=1, settings={"seed": 0}, inputs=INPUTS | {"rows": {}})
    with pytest.raises(ValueError, match="began with other inputs"):
        other.__enter__()
    # And its lock is gone.
    with Run(tmp_path, total=1, settings={"seed": 0}, inputs=INPUTS):
        pass


def test_inputs_that_are_none_are_named(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": ["a"]}))
    with pytest.raises(ValueError, match=r"inputs=\['a'\] must be an object"):
        pin_inputs(path, INPUTS)
