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

# What is installed: the library, and the experiments for notebooks elsewhere.
PACKAGES = ("rlhf_jax", "experiments", "configs")

IMPORT_ALL = f"""
import importlib, importlib.metadata, pkgutil
import rlhf_jax

def refuse(name):
    raise ImportError(name)

for name in {PACKAGES}:
    package = importlib.import_module(name)
    print("module", name, package.__file__)
    for module in pkgutil.walk_packages(package.__path__, name + ".", onerror=refuse):
        print("module", module.name, importlib.import_module(module.name).__file__)
print("version", rlhf_jax.__version__, importlib.metadata.version("rlhf_jax"))
"""

# A run in a folder that has nothing to do with the checkout, in a thread of a kernel that has used
# jax.
RUN = """
import threading
from pathlib import Path
import jax
jax.jit(lambda x: x + 1)(1.0)
from experiments import notebook

seen, made = [], []

def cell():
    made.append(notebook.run("sft", "tiny", {"train.steps": 3}, root="mine",
                             on_step=lambda step, metrics: seen.append((step, metrics))))

thread = threading.Thread(target=cell)
thread.start()
thread.join()
(result,) = made
assert [step for step, _ in seen] == [0, 1, 2] == result.curves["step"].tolist()
assert [metrics["loss/lm"] for _, metrics in seen] == result.curves["loss/lm"].tolist()
assert result.numbers["held-out perplexity"] == result.summary["perplexity"] > 1
assert result.settings["train.steps"] == 3
assert len(list(Path("mine/runs/.compilation_cache").iterdir())) > 3
print("made", result.folder)
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
        aside = ("XLA_FLAGS", "PYTHONHOME", "JAX_COMPILATION_CACHE_DIR")
        environment = {k: v for k, v in os.environ.items() if k not in aside}
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
    sources = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {file.relative_to(installed.site) for file in modules.values()} == sources
    ((_, version, metadata),) = [line for line in lines if line[0] == "version"]
    assert version == metadata


def test_it_holds_types_and_licence_and_nothing_else(installed):
    assert (installed.site / "rlhf_jax" / "py.typed").exists()
    (info,) = installed.site.glob("rlhf_jax-*.dist-info")
    assert {path.name for path in installed.site.iterdir()} == {*PACKAGES, info.name}
    assert list(info.rglob("LICENSE"))


def test_every_stage_trains_through_imports_alone(installed):
    installed.python(str(TRAIN))


def test_a_notebook_runs_an_experiment_in_its_own_folder(installed):
    made = installed.python("-c", RUN).splitlines()[-1]
    folder = installed.elsewhere / "mine/runs/sft/tiny-train.steps=3"
    assert made == f"made {folder}"
    assert {path.name for path in installed.elsewhere.iterdir()} == {"mine"}


def test_an_editable_install_has_the_same_packages(installed, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = installed.site.parent / "source"
    install = [*pip, "install", "--no-deps", "--ignore-installed", "--prefix", str(tmp_path)]
    subprocess.run([*install, "-e", str(source)], check=True, timeout=300)
    (site,) = tmp_path.rglob("site-packages")
    program = f"""
import importlib.util, site
site.addsitedir({str(site)!r})
for name in {PACKAGES}:
    print(importlib.util.find_spec(name).origin)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(source / name / "__init__.py") for name in PACKAGES]
