"""What is said in two places agrees: versions, pinned tools, imports that moved."""

import importlib.util
import re
from pathlib import Path

import yaml

import rlhf_jax

ROOT = Path(__file__).parent.parent


def constraints() -> dict[str, str]:
    """Package -> version that CI installs."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rlhf_jax.__version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == rlhf_jax.__version__


def test_hooks_run_the_tools_of_ci_and_clone_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert {"ruff-check", "ruff-format", "mypy"} <= set(hooks)
    pins = [pin for hook in hooks.values() for pin in hook.get("additional_dependencies", [])]
    assert all("==" in pin for pin in pins)
    assert {pin for pin in pins if pin.startswith("ruff")} == {f"ruff=={constraints()['ruff']}"}


def test_imports_that_moved_lead_to_modules():
    rows = re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert len(rows) > 30
    for before, now in rows:
        assert importlib.util.find_spec(now), f"{before} is said to be {now} now"
