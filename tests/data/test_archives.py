import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from rlhf_jax.data.sets import archives
from tests.data.conftest import make_tar

TRAP = "import os, pathlib\npathlib.Path(os.environ['TRAP']).write_text('ran')\n"


def serve_sdist(folder, monkeypatch, *, sha256=None, files=None):
    """Puts a source archive whose build script springs a trap into the index, and pins it."""
    content = make_tar(
        {
            "toy-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
            "toy-1.0/setup.py": TRAP + "from setuptools import setup\nsetup(name='toy')\n",
            "toy-1.0/data/words.txt": "one two",
            **(files or {}),
        }
    )
    (folder / "toy-1.0.tar.gz").write_bytes(content)
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    asset = archives.Asset("toy", "1.0", "toy-1.0.tar.gz", sha256)
    monkeypatch.setitem(archives.ASSETS, "toy", asset)
    monkeypatch.setenv("TRAP", str(folder.parent / "trap"))
    return asset


def serve_wheel(folder, monkeypatch):
    """Puts a wheel into the index, and pins it."""
    path = folder / "box-2.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: box\nVersion: 2.0\n"
    tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("box/data.txt", "inside")
        wheel.writestr("box/more.txt", "too")
        wheel.writestr("box-2.0.dist-info/METADATA", about)
        wheel.writestr("box-2.0.dist-info/WHEEL", tag)
    asset = archives.Asset("box", "2.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(archives.ASSETS, "box", asset)
    return asset


def test_wheel_is_fetched_once_and_read_in_memory(local_index, monkeypatch):
    serve_wheel(local_index, monkeypatch)
    path = archives.fetch("box")
    assert path == archives.cache_dir() / "box-2.0-py3-none-any.whl"
    for file in local_index.iterdir():
        file.unlink()
    assert archives.fetch("box") == path
    assert archives.read_member("box", "data.txt") == b"inside"
    assert set(archives.read_members("box", ".txt")) == {"box/data.txt", "box/more.txt"}
    assert [p.name for p in archives.cache_dir().iterdir()] == [path.name]


def test_member_must_be_one(local_index, monkeypatch):
    serve_wheel(local_index, monkeypatch)
    with pytest.raises(archives.AssetError, match=r"2 members ending in '\.txt', not one"):
        archives.read_member("box", ".txt")


def test_build_script_of_a_source_archive_never_runs(local_index, monkeypatch, tmp_path):
    serve_sdist(local_index, monkeypatch)
    assert archives.read_member("toy", "words.txt") == b"one two"
    assert not (tmp_path / "trap").exists()


def test_build_backend_named_by_a_source_archive_never_runs(local_index, monkeypatch, tmp_path):
    backend = "[build-system]\nrequires = ['hatchling']\nbuild-backend = 'hatchling.build'\n"
    serve_sdist(local_index, monkeypatch, files={"toy-1.0/pyproject.toml": backend})
    assert archives.read_member("toy", "words.txt") == b"one two"
    assert not (tmp_path / "trap").exists()


def test_index_with_another_archive_is_one_clear_line(local_index, monkeypatch):
    serve_sdist(local_index, monkeypatch, sha256="0" * 64)
    with pytest.raises(archives.AssetError) as caught:
        archives.fetch("toy")
    message = str(caught.value)
    assert "\n" not in message
    assert "another sha256" in message
    assert str(archives.cache_dir()) in message
    assert "pip download --no-deps --no-binary :all: toy==1.0" in message
    assert not (archives.cache_dir() / "toy-1.0.tar.gz").exists()


def test_damaged_file_in_the_cache_is_one_clear_line(local_index, monkeypatch):
    asset = serve_sdist(local_index, monkeypatch)
    path = archives.fetch("toy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(archives.AssetError) as caught:
        archives.fetch("toy")
    message = str(caught.value)
    assert "\n" not in message
    assert asset.sha256 in message
    assert f"{path} has sha256" in message
    assert "delete it" in message


def test_no_index_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nonexistent")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    with pytest.raises(archives.AssetError) as caught:
        archives.fetch("vaderSentiment")
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot get vaderSentiment==3.3.2" in message
    assert str(tmp_path) in message
    assert "python -m pip download" in message


def test_unknown_package_names_the_known_ones():
    with pytest.raises(ValueError, match="'nothing' is not pinned; choose one of vaderSentiment"):
        archives.fetch("nothing")


def test_two_processes_at_a_time(local_index, monkeypatch):
    asset = serve_wheel(local_index, monkeypatch)
    code = (
        "from rlhf_jax.data.sets import archives\n"
        f"archives.ASSETS['box'] = archives.Asset(*{tuple(asset)!r})\n"
        "print(archives.read_member('box', 'data.txt').decode())\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in running] == [b"inside\n"] * 2
    assert [path.name for path in archives.cache_dir().iterdir()] == [asset.filename]
