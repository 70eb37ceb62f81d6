"""The house: which room may import which, what takes a config object, how long the loop is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top to the ground. A room imports from its own or from lower ones.
ROOMS = (
    "preflight",
    "methods",
    "tasks",
    "feedback",
    "rollouts",
    "training",
    "evaluation",
    "models",
    "data",
    "runtime",
    "losses",
)
# Anything may use these.
OPEN = {"runtime", "losses"}
LIBRARY = sorted((ROOT / "rlhf_jax").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def functions(path: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]


def loops(function: ast.FunctionDef) -> list[ast.For]:
    return [node for node in ast.walk(function) if isinstance(node, ast.For)]


def test_every_module_is_in_a_room():
    rooms = {path.relative_to(ROOT / "rlhf_jax").parts[0] for path in LIBRARY}
    assert rooms - {"__init__.py"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_points_up(room):
    allowed = {*ROOMS[ROOMS.index(room) :], *OPEN}
    for path in (ROOT / "rlhf_jax" / room).rglob("*.py"):
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "rlhf_jax" and len(parts) > 1 and parts[1] in ROOMS:
                assert parts[1] in allowed, f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in ("experiments", "configs"), path


def test_no_config_object_below_main():
    """The library imports none; in experiments `main`, the opener and notebooks' `run` take one."""
    for path in LIBRARY:
        assert not any(name.startswith("ml_collections") for name in imports_of(path)), path
    takes = {
        f"{path.stem}.{function.name}"
        for path in EXPERIMENTS
        for function in functions(path)
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None
        and "ConfigDict" in ast.unparse(argument.annotation).split(" | ")
    }
    mains = {name for name in takes if name.endswith(".main")}
    # They hand the config to what derives one from another, and take nothing else out of it.
    assert takes - mains == {"command.open_config", "notebook.run"}


def test_the_loop_of_ppo_max_reads_like_algorithm_1():
    (main,) = [f for f in functions(ROOT / "experiments" / "ppo_max.py") if f.name == "main"]
    (loop,) = [n for n in loops(main) if ast.unparse(n.iter) == "run.steps()"]
    assert loop.end_lineno - loop.lineno + 1 <= 20
    calls = [
        ast.unparse(node.func)
        for node in ast.walk(loop)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("method.")
    ]
    # One call for each line of the algorithm.
    for line in ("method.sample", "method.score", "method.minibatches", "method.update"):
        assert calls.count(line) == 1, line
    assert not {"trunk", "lora", "tuning"} & {
        node.attr for node in ast.walk(loop) if isinstance(node, ast.Attribute)
    }


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_main_is_at_most_120_lines(path):
    for function in functions(path):
        if function.name == "main":
            assert function.end_lineno - function.lineno + 1 <= 120


def test_only_tasks_ask_which_source():
    """What differs between sources is a method of a task."""
    for path in [*LIBRARY, *EXPERIMENTS]:
        if "tasks" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                left = ast.unparse(node.left)
                assert not left.endswith("data.source"), f"{path}: {ast.unparse(node)}"


def test_no_module_is_named_for_what_did_not_fit():
    names = {path.stem for path in [*LIBRARY, *EXPERIMENTS]}
    assert not {n for n in names if n.endswith("_setup") or n.startswith(("other_", "util"))}
