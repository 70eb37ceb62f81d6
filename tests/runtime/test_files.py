"""Files are whole or not there, and what the system says of them names them."""

import contextlib
import errno
import json
import os
import resource
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import folders, reward_model
from rlhf_jax.data import prepare, store
from rlhf_jax.data.schemas import DropCounts, Encoded, EncodedPair
from rlhf_jax.evaluation.report import seeds_table, write_report
from rlhf_jax.models import lora
from rlhf_jax.models.files import hf_weights, lora_files
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.runtime.files import read_json, write_whole
from rlhf_jax.runtime.metrics import MetricsWriter
from rlhf_jax.training.record import read_summary
from rlhf_jax.training.run import Run
from tests import tiny

LIBRARY = Path(__file__).parents[2] / "rlhf_jax"


@contextlib.contextmanager
def full_disk(size: int):
    """No file grows beyond so many bytes: a disk that is full, for whoever runs the tests."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Killed(BaseException):
    """Ends a write where nothing can be done about it any more."""


def report(folder, text: str) -> None:
    write_report(folder, title=text, command="c", hardware="h", summary_table={"SFT": {"x": 1.0}})


def summary(folder, text: str) -> None:
    Run(folder, total=1).finish({"text": text})


def config(folder, text: str) -> None:
    (folder / "config.json").unlink(missing_ok=True)
    with Run(folder, total=1, settings={"text": text}):
        pass


WRITERS = {
    "summary.json": summary,
    "report.md": report,
    "report.json": report,
    "text.txt": lambda folder, text: write_whole(folder / "text.txt", text),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_what_is_killed_leaves_the_file_as_it_was(tmp_path, monkeypatch, name, moment):
    write = WRITERS[name]
    write(tmp_path, "before")
    before = (tmp_path / name).read_text()

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, moment, killed)
        write(tmp_path, "after")
    assert (tmp_path / name).read_text() == before
    write(tmp_path, "after")
    assert "after" in (tmp_path / "text.txt").read_text() if name == "text.txt" else True
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("name", [*WRITERS, "config.json"])
def test_a_full_disk_names_the_file_and_leaves_it_as_it_was(tmp_path, name):
    write = WRITERS.get(name, config)
    if name != "config.json":
        write(tmp_path, "before")

    def held() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != ".lock"}

    before = held()
    with full_disk(200), pytest.raises(OSError) as error:
        write(tmp_path, "after" * 100)
    # Of a report the first of its two files is in the way.
    named = "report.md" if name == "report.json" else name
    assert error.value.filename == str(tmp_path / named) and error.value.errno == errno.EFBIG
    assert held() == before


def test_a_disk_has_the_text_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_whole(tmp_path / "x", "text")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_metrics_log_on_a_full_disk_names_itself(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with full_disk(size + 10), pytest.raises(OSError) as error:
            writer.write(1, {"loss": 1.0})
        assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_full_disk_under_tensorboard_is_said_and_nothing_waits(tmp_path):
    """Its own thread would have died, and closing it waited for ever."""
    writer = MetricsWriter(tmp_path)
    with full_disk(20_000), pytest.raises(OSError) as error:
        for step in range(10_000):
            writer._mirrors[0].write(step, {"loss": 1.0})
    assert error.value.filename == str(tmp_path / "tensorboard")
    with full_disk(20_000), pytest.raises(OSError) as error:
        writer.close()
    assert error.value.filename == str(tmp_path / "tensorboard")


def test_closing_a_log_on_a_full_disk_names_it(tmp_path):
    """What could not be written is written again at the end: that error is the one that is seen."""
    with (
        full_disk(10),
        pytest.raises(OSError) as error,
        MetricsWriter(tmp_path, tensorboard=False) as writer,
    ):
        writer.write(0, {"loss": 1.0})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def save_adapters(folder):
    tuning = lora.make_tuning(tiny.language_model(), LoRAConfig(rank=3), jax.random.key(0))
    lora_files.save_adapters(tiny.draw(tuning.start, 5), folder, base="x", fingerprint="y")


SAVERS = {
    "model": lambda folder: hf_weights.save_model(tiny.language_model(), folder),
    "adapters": save_adapters,
}


@pytest.mark.parametrize("name", SAVERS)
def test_a_model_on_a_full_disk_names_its_folder_and_leaves_none(tmp_path, name):
    """Tensors are written in Rust, whose errors are of other types."""
    with full_disk(2000), pytest.raises(OSError) as error:
        SAVERS[name](tmp_path / name)
    assert error.value.filename == str(tmp_path / name) and error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("count", range(4))
def test_a_save_that_is_killed_leaves_a_whole_folder_or_none(tmp_path, monkeypatch, name, count):
    """At each of its calls to the disk, over an earlier save and without one."""
    save, folder = SAVERS[name], tmp_path / name
    done = []

    def killed_later(original):
        def call(*arguments):
            if len(done) == count:
                raise Killed
            done.append(arguments)
            return original(*arguments)

        return call

    for earlier in (False, True):
        done.clear()
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "fsync", killed_later(os.fsync))
            patch.setattr(os, "replace", killed_later(os.replace))
            save(folder)
        names = {path.name for path in folder.glob("*")}
        assert len(names) in ((2,) if earlier else (0, 2)), names
        save(folder)
        assert {path.name for path in tmp_path.iterdir()} == {name}


def test_a_replacement_killed_between_its_two_renames_is_put_right(tmp_path):
    save_adapters(tmp_path / "adapters")
    (tmp_path / "adapters").rename(tmp_path / ".adapters.old")
    with full_disk(16), pytest.raises(OSError):
        save_adapters(tmp_path / "adapters")
    assert {path.name for path in tmp_path.iterdir()} == {"adapters"}
    assert len(list((tmp_path / "adapters").iterdir())) == 2


@pytest.mark.parametrize("room", [0, 5000])
def test_encoded_rows_on_a_full_disk_name_their_store_and_leave_none(tmp_path, room):
    rows = [Encoded(np.arange(3000, dtype=np.int32), np.ones(3000, bool))] * 3
    with full_disk(room), pytest.raises(OSError) as error:
        store.write(tmp_path / "rows", "sft", rows, DropCounts())
    assert error.value.filename == str(tmp_path / "rows") and error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_row_that_cannot_be_read_is_not_the_stores_fault(tmp_path):
    def rows():
        yield Encoded(np.arange(3, dtype=np.int32), np.ones(3, bool))
        raise PermissionError(errno.EACCES, "Permission denied", "train.jsonl")

    with pytest.raises(PermissionError) as error:
        prepare._written(tmp_path / "rows", "sft", rows(), DropCounts(), "x", print)
    assert error.value.filename == "train.jsonl"


def test_scores_on_a_full_disk_name_their_file(tmp_path):
    text = Encoded(np.arange(3, dtype=np.int32), np.ones(3, bool))
    batches = [{"index": np.arange(1), "valid": np.ones(1, bool)}]
    pairs, scores = [EncodedPair(text, text, 0.0)], (np.ones(1), np.zeros(1))
    with full_disk(100), pytest.raises(OSError) as error:
        reward_model.save_scores(tmp_path / "scores.npz", pairs, batches, scores, 1.0)
    assert error.value.filename == str(tmp_path / "scores.npz")


TORN = {"empty": "", "blank": "\n", "torn": '{"seconds": 1.0, "perp', "a list": "[1]"}


@pytest.mark.parametrize("text", TORN.values(), ids=TORN)
def test_a_torn_file_of_a_run_is_one_line_with_its_path(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"remove the folder, or only this file") as error:
        Run(tmp_path, total=1, settings={"seed": 0}).__enter__()
    assert str(error.value).startswith(f"{path} ") and "\n" not in str(error.value)
    path.write_text(json.dumps({"config": {"seed": 0}}))

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match="remove it, and the command that made the run") as error:
        folders.is_whole(str(tmp_path / "model"))
    assert str(error.value).startswith(f"{tmp_path / 'summary.json'} ")

    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match="run again") as error:
        seeds_table([tmp_path])
    assert str(error.value).startswith(f"{tmp_path / 'report.json'} ")


def test_the_config_file_of_something_else_is_not_a_runs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config.json is not that of a run: choose another"):
        Run(tmp_path, total=1).__enter__()


def test_a_summary_is_json_whatever_its_numbers(tmp_path):
    numbers = {"a": float("inf"), "b": [float("-inf"), float("nan")], "c": np.float32(0.5)}
    Run(tmp_path, total=1).finish(numbers)

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "summary.json").read_text()
    read = json.loads(text, parse_constant=refuse)
    assert (read["a"], read["b"], read["c"]) == ("Infinity", ["-Infinity", "NaN"], 0.5)
    assert float(read_summary(tmp_path)["a"]) == float("inf")


def test_a_file_that_is_missing_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError) as error:
            read_json(path, "")
        assert error.value.filename == str(path)


def test_nothing_is_written_in_place():
    """Of what is read again; a file in a folder that gets its name at the end may be."""
    within = {"hf_files.py", "store.py", "archives.py"}
    for path in LIBRARY.rglob("*.py"):
        if path.name not in within and path.name != "files.py":
            assert ".write_text(" not in path.read_text(), path
