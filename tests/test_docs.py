"""The documentation names what the code has: modules, metrics, losses, equations."""

import ast
import doctest
import inspect
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.judges import VADER
from rlhf_jax.methods import ppo_max

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS): path.read_text() for path in DOCS.rglob("*.md")}
GROUPS = "loss|policy|critic|reward|judge|optim|response|dpo|pairs|eval"
METRIC = re.compile(rf"({GROUPS})/[a-z0-9_]+")

sys.path.append(str(DOCS / "_ext"))
import equations  # noqa: E402


def modules() -> set[str]:
    """Every module of the package that has something to read."""
    names = set()
    for path in (ROOT / "rlhf_jax").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path.name == "__init__.py":
            if re.search(r"^(def|class) ", path.read_text(), re.MULTILINE):
                names.add(".".join(parts[:-1]))
        elif not path.name.startswith("_"):
            names.add(".".join(parts))
    return names


def strings(folder: str) -> set[str]:
    """All string constants in the code of a folder."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def logged_metrics() -> set[str]:
    """Names of metrics in the code, and those that are put together when it runs."""
    found = {
        text for text in strings("rlhf_jax") | strings("experiments") if METRIC.fullmatch(text)
    }
    where, tokens = np.ones((2, 3), bool), np.arange(6).reshape(2, 3)
    found |= set(statistics.response_statistics(tokens, where=where, ended=np.ones(2, bool)))
    found |= set(statistics.kl_statistics(np.zeros((2, 3)), np.zeros((2, 3)), where=where))
    found |= {f"{name}_first" for name in ppo_max.FIRST} | {f"judge/{VADER}"}
    # `optim/` is renamed where the critic's metrics join the policy's.
    return found | {"critic/grad_norm"}


def equation_blocks(doc: str) -> list[list[str]]:
    """Blocks indented by four after a blank line, up to the first section."""
    paragraphs = re.split(r"\n\s*\n", re.split(r"\n(?:Args|Returns|Fields|>>>)", doc)[0])
    return [part.split("\n") for part in paragraphs if part.startswith("    ")]


def test_every_module_has_a_place():
    documented = set(re.findall(r"automodule:: (\S+)", "\n".join(PAGES.values())))
    missing = modules() - documented
    assert not missing, f"add `.. automodule::` to a page of docs/api for {sorted(missing)}"
    # Of the experiments the one that is called from a notebook.
    assert not documented - modules() - {"experiments.notebook", "rlhf_jax.preflight"}


def test_every_metric_is_explained():
    page = PAGES[Path("metrics.md")]
    named = {text for text in re.findall(r"`([^`]+)`", page) if METRIC.fullmatch(text)}
    assert not logged_metrics() - named, "explain them in docs/metrics.md"
    assert not named - logged_metrics(), "docs/metrics.md explains what nothing logs"


def test_every_config_is_shown():
    shown = set(re.findall(r"\{config\} (\w+)", PAGES[Path("configs.md")]))
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {
        "__init__",
        "common",
        "unread",
    }
    assert shown == files


def test_slides_lead_to_functions_that_exist():
    targets = re.findall(r"`~rlhf_jax\.losses\.(\w+)\.(\w+)`", PAGES[Path("losses/index.md")])
    assert len(targets) > 30
    for module, name in targets:
        assert inspect.getmodule(getattr(losses, name)).__name__ == f"rlhf_jax.losses.{module}"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_code_is_one_loss_in_a_plain_script(page, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
    imported = set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))
    assert imported == {"jax", "rlhf_jax"} and "from rlhf_jax.losses import" in code
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
    gradient = np.array(re.findall(r"-?\d+\.\d*(?:e[-+]\d+)?", capsys.readouterr().out), float)
    assert gradient.size == 3 and np.all(np.isfinite(gradient)) and np.any(gradient)


@pytest.mark.parametrize("page", ["README.md", "docs/run.md"])
def test_the_loop_shown_is_the_one_that_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (shown,) = [block for block in blocks if block.startswith("for iteration in run.steps():")]
    code = (ROOT / "experiments" / "ppo_max.py").read_text()
    assert textwrap.indent(shown, " " * 8) in code


def test_the_results_of_the_readme_are_those_of_the_docs():
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## What comes out\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    assert len(rows) > 5
    assert set(rows) <= set(PAGES[Path("results.md")].splitlines())


@pytest.mark.parametrize("name", [n for n in losses.__all__ if callable(getattr(losses, n))])
def test_equations_are_typeset(name):
    blocks = equation_blocks(inspect.getdoc(getattr(losses, name)))
    for block in blocks:
        latex = equations.block_to_latex(block)
        assert latex.count("{") == latex.count("}")
        assert latex.isascii()


@pytest.mark.parametrize(
    ("line", "latex"),
    [
        (
            "r̃ = clip((r − r̄) / σ, −δ, δ)",
            r"\tilde{r}=\operatorname{clip}\left(\frac{r-\bar{r}}{\sigma},-\delta ,\delta\right)",
        ),
        ("L = −Σ_{k=1}^{K−1} r_(k)", r"L=-\sum_{k=1}^{K-1}r_{(k)}"),
        ("b = 1/(K−1) Σ_{j≠i} r_j", r"b=\frac{1}{K-1}\sum_{j\ne i}r_{j}"),
        ("π(y⁺|x) ÷ |y|", r"\pi (y^{+}\mid x)\div \lvert y\rvert"),
        ("m = 1[t = last]", r"m=\mathbf{1}[t=\text{last}]"),
        ("x ≈ F⁻¹ g", r"x\approx F^{-1}\,g"),
        ("a / b c + d", r"\frac{a}{b\,c}+d"),
        ("a/b c + d", r"\frac{a}{b}\,c+d"),
    ],
)
def test_notation(line, latex):
    assert equations.to_latex(line) == latex


def test_the_example_of_the_converter():
    assert doctest.testmod(equations) == (0, 1)


@pytest.mark.parametrize("line", ["(a", "a)", "a ☃ b", "a /"])
def test_what_is_no_equation_is_refused(line):
    with pytest.raises(equations.EquationError):
        equations.to_latex(line)
