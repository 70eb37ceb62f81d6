"""The wheel, as those without a checkout install it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
# What the wheel is made of, and what must stay out of it.
SOURCES = ("rlhf_jax", "experiments", "configs", "benchmarks", "scripts")
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# Trains SFT, a reward model, PPO-max and DPO for two steps each through `rlhf_jax` alone.
TRAIN = Path(__file__).with_name("train_by_import.py")

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib, importlib.metadata, importlib.util, pkgutil
import rlhf_jax

def refuse(name):
    raise ImportError(name)

for module in pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax.", onerror=refuse):
    print("module", module.name, importlib.import_module(module.name).__file__)
print("module", "rlhf_jax", rlhf_jax.__file__)
for name in ("experiments", "configs"):
    print("found", name, importlib.util.find_spec(name))
print("version", rlhf_jax.__version__, importlib.metadata.version("rlhf_jax"))
"""


class Installed(NamedTuple):
    """A wheel that was unpacked into a folder, and a folder that has nothing to do with it."""

    site: Path
    elsewhere: Path

    def python(self, *arguments: str) -> str:
        """Runs Python in `elsewhere` with the wheel and what it requires; returns its output.

        `-S` leaves .pth files unread, among them those of editable installs, so that a checkout
        cannot stand in for the wheel; `-P` leaves out the folders of script and shell.
        """
        requirements = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONHOME")}
        environment["PYTHONPATH"] = os.pathsep.join([str(self.site), *requirements])
        done = subprocess.run(
            [sys.executable, "-S", "-P", *arguments],
            cwd=self.elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """Builds the wheel from a copy: building leaves folders behind, and takes in old ones."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "results")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=skip)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site, elsewhere = folder / "wheels", folder / "site", folder / "elsewhere"
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(folder / "source")]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = wheels.glob("rlhf_jax-*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    elsewhere.mkdir()
    return Installed(site, elsewhere)


def test_every_module_is_there_and_imports(installed):
    lines = [line.split(" ", 2) for line in installed.python("-c", IMPORT_ALL).splitlines()]
    modules = {name: Path(file) for kind, name, file in lines if kind == "module"}
    assert all(file.is_relative_to(installed.site) for file in modules.values())
    sources = {path.relative_to(ROOT) for path in (ROOT / "rlhf_jax").rglob("*.py")}
    assert {file.relative_to(installed.site) for file in modules.values()} == sources
    others = {name: spec for kind, name, spec in lines if kind == "found"}
    assert others == dict.fromkeys(("experiments", "configs"), "None")
    ((_, version, metadata),) = [line for line in lines if line[0] == "version"]
    assert version == metadata


def test_it_holds_types_and_licence_and_nothing_else(installed):
    assert (installed.site / "rlhf_jax" / "py.typed").exists()
    (info,) = installed.site.glob("rlhf_jax-*.dist-info")
    assert {path.name for path in installed.site.iterdir()} == {"rlhf_jax", info.name}
    assert list(info.rglob("LICENSE"))


def test_every_stage_trains_through_imports_alone(installed):
    installed.python(str(TRAIN))
