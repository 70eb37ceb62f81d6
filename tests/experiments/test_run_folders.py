"""A run folder that cannot be used is refused before any work, by one line with its path."""

import errno
import importlib
import os

import pytest

from experiments import command, folders, judging, sft, stages
from rlhf_jax.runtime import lock
from tests import dry
from tests.test_configs import EXPERIMENTS

MAINS = dry.MAINS
CONFIGS = {name: __import__(f"configs.{name}", fromlist=["get_config"]) for name in MAINS}


class Began(Exception):
    """The work of a run has begun."""


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    def began(*_, **__):
        raise Began

    monkeypatch.setattr(stages, "require", began)
    monkeypatch.setattr(judging, "load_judges", began)
    monkeypatch.setattr(sft, "train_bpe", began)


def refuse(monkeypatch, folder, code):
    """No file can be made in a folder, whoever runs the tests: root may write anywhere."""
    opened = os.open

    def refusing(path, flags, *rest, **named):
        absolute, unnamed = os.path.abspath(path), getattr(os, "O_TMPFILE", os.O_CREAT)
        new = os.path.dirname(absolute) == str(folder) and not os.path.isfile(path)
        if (new and flags & os.O_CREAT) or (absolute == str(folder) and flags & unnamed == unnamed):
            raise OSError(code, os.strerror(code), path)
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)


def a_file(path, monkeypatch):
    path.write_text("mine")
    return f"{path}: a file is there, and no folder"


def below_a_file(path, monkeypatch):
    path.parent.rmdir()
    path.parent.write_text("mine")
    return f"{path}: Not a directory"


def read_only(path, monkeypatch):
    path.mkdir()
    refuse(monkeypatch, path, errno.EACCES)
    return f"{path}: Permission denied"


def read_only_with_a_lock_file(path, monkeypatch):
    """As a run leaves it whose folder was closed to writers since: its lock can still be taken."""
    path.mkdir()
    (path / ".lock").touch()
    refuse(monkeypatch, path, errno.EROFS)
    return f"{path}: Read-only file system"


def a_file_for_its_checkpoints(path, monkeypatch):
    path.mkdir()
    (path / "checkpoints").write_text("mine")
    return f"{path / 'checkpoints'}: a file is there, and no folder"


def a_file_for_its_model(path, monkeypatch):
    path.mkdir()
    (path / "model").write_text("mine")
    return f"{path / 'model'}: a file is there, and no folder"


def files_of_others_for_its_model(path, monkeypatch):
    (path / "model").mkdir(parents=True)
    (path / "model" / "thesis.tex").write_text("mine")
    return f"{path / 'model'} holds thesis.tex, which is no part of a saved model and would be lost"


FAULTS = (
    a_file,
    below_a_file,
    read_only,
    read_only_with_a_lock_file,
    a_file_for_its_checkpoints,
    a_file_for_its_model,
    files_of_others_for_its_model,
)


@pytest.mark.parametrize("experiment", MAINS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_in_the_way_is_one_line_before_any_work(tmp_path, monkeypatch, experiment, fault):
    path = tmp_path / "runs" / "one"
    path.parent.mkdir()
    config = CONFIGS[experiment].get_config("tiny")
    config.workdir = str(path)
    with monkeypatch.context() as patch:
        line = fault(path, patch)
        with pytest.raises(command.USER_ERRORS) as error:
            MAINS[experiment](config)
    assert command.told(error.value).startswith(line)
    assert not lock._is_ours(path.absolute())
    for kept in tmp_path.rglob("*"):
        assert kept.is_dir() or kept.read_text() in ("mine", "") or kept.name == ".lock"


@pytest.mark.parametrize("experiment", MAINS)
def test_a_name_that_is_too_long_says_which_key(tmp_path, experiment):
    config = CONFIGS[experiment].get_config("tiny")
    config.workdir = str(tmp_path / ("x" * 256))
    with pytest.raises(OSError) as error:
        MAINS[experiment](config)
    line = command.told(error.value)
    assert line.startswith(config.workdir)
    assert line.endswith(": File name too long, set --config.workdir")


@pytest.mark.parametrize("experiment", MAINS)
def test_a_folder_that_can_be_used_is_not_refused(tmp_path, experiment):
    """One where a run was stopped, too."""
    config = CONFIGS[experiment].get_config("tiny")
    config.workdir = str(tmp_path / "runs" / "one")
    for name in ("checkpoints", "tensorboard", folders.MODEL):
        (tmp_path / "runs" / "one" / name).mkdir(parents=True)
    with pytest.raises(Began):
        MAINS[experiment](config)
    lock.release(config.workdir)


def test_errors_of_other_libraries_are_one_line_too():
    assert command.told(OSError("no such model\n  at the hub,\n\n nor here")) == (
        "no such model at the hub, nor here"
    )
    assert command.told(ValueError()) == "ValueError"


def test_the_experiments_are_all_of_them():
    assert sorted(MAINS) == EXPERIMENTS
    for name, main in MAINS.items():
        assert main is importlib.import_module(f"experiments.{name}").main
