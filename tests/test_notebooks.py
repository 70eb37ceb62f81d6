"""Notebooks run from top to bottom, define no algorithm, and show what they print."""

import ast
import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rlhf_jax.runtime.compiler_guard import FLAG

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MAX_FUNCTION_LINES = 10
MAX_IMAGE_BYTES = 100_000


def sources(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def printed(notebook) -> list[str]:
    """What each code cell prints, in order."""
    return [
        "".join(out.text for out in cell.outputs if out.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def long_functions(source: str, limit: int) -> list[str]:
    nodes = ast.walk(ast.parse(source))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
    return [f.name for f in functions if f.end_lineno - f.lineno + 1 > limit]


def same_text(shown: str, now: str) -> bool:
    """Equal words, and numbers equal to 2%: another machine may round differently."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", now).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(now), strict=True)
    return all(float(b) == pytest.approx(float(a), rel=0.02, abs=0.002) for a, b in pairs)


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_and_prints_what_it_shows(path, tmp_path, monkeypatch):
    # One device, programs that compile fast, and this checkout from a folder that is not it.
    monkeypatch.setenv("XLA_FLAGS", f"--xla_backend_optimization_level=0 {FLAG}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(fresh, timeout=600, resources=resources, coalesce_streams=True)
    client.execute()  # raises at the first cell that fails
    for shown, now in zip(printed(committed), printed(fresh), strict=True):
        assert same_text(shown, now), f"the notebook shows\n{shown}\nbut prints\n{now}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_defines_no_algorithm(path):
    source = sources(nbformat.read(path, as_version=4))
    imported = r"^from (rlhf_jax[.\w]* import \w+|experiments import notebook)$"
    assert re.search(imported, source, re.M)
    assert long_functions(source, MAX_FUNCTION_LINES) == []
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(source)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_committed_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert not any(out.output_type == "error" or out.get("name") == "stderr" for out in outputs)
    images = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert images
    assert all(len(base64.b64decode(image)) <= MAX_IMAGE_BYTES for image in images)


def test_the_checks_can_fail():
    assert long_functions("def f():\n" + "    x = 1\n" * 10, 10) == ["f"]
    assert not same_text("std 1.24", "std 1.31")
    assert not same_text("std 1.24", "mean 1.24")
    assert same_text("std 1.24 -0.440", "std 1.25 -0.441")
