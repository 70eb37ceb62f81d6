"""The benchmarks at tiny sizes: our side of every case, the turns, the table, the arithmetic."""

import json
import sys

import jax
import numpy as np
import pytest
from matplotlib.axes import Axes

from benchmarks import cases, driver, flops, growth, peers, shared_prefill, table
from benchmarks.workers import ours
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import Transformer

# A worker that needs no library: its runs take as long as the case says.
FAKE = """
import sys, time
sys.path.insert(0, {folder!r})
from turns import Turns, repeat
turns = Turns()
print("chatter of a library")
turns.hello(version="1")
repeat(turns, lambda: time.sleep(turns.spec["sleep"]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Models are written to a folder of the test session."""
    monkeypatch.setenv("RLHF_JAX_BENCHMARKS", str(tmp_path_factory.getbasetemp() / "benchmarks"))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.TINY, ids=lambda case: case.name)
def test_our_side_of_every_case_runs(case):
    work = ours.CASES[case.spec["case"]](case.spec | {"model": str(driver.model_folder("tiny"))})
    work()
    work()


def test_the_tiny_cases_are_of_the_kinds_that_are_measured():
    assert {case.spec["case"] for case in cases.TINY} == {c.spec["case"] for c in cases.CASES}


@pytest.mark.slow
def test_the_command_writes_results_and_a_table(tmp_path, capsys):
    argv = ["--cases", "tiny-generate-2", "--only", "ours", "--warmup", "0", "--repeats", "2"]
    peers.main([*argv, "--results", str(tmp_path)])
    result = json.loads((tmp_path / "tiny-generate-2.json").read_text())
    measured = result["results"]["ours"]
    assert len(measured["seconds"]) == 2
    assert measured["fastest_s"] <= measured["median_s"] <= measured["slowest_s"]
    assert measured["first_s"] > measured["slowest_s"]  # it compiles
    assert measured["jax"] == jax.__version__
    assert measured["peak_bytes"] > 2**20
    assert result["machine"]["matmul_peak"] > 1e8
    assert "| tiny: generate, batch 2, 4 + 3 tokens |" in capsys.readouterr().out


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        peers.main(["--cases", "small-gpo"])
    assert "small-ppo" in capsys.readouterr().err


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Two libraries of which one is slower; a third that fails."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(folder=str(driver.ROOT / "benchmarks" / "workers")))
    monkeypatch.setattr(driver, "WORKERS", dict.fromkeys(("ours", "slow"), (str(script),)))
    monkeypatch.setattr(driver, "python_of", lambda name: sys.executable)
    return script


def test_libraries_take_turns(fakes, tmp_path, monkeypatch):
    order = []
    turn = driver.Worker.turn
    monkeypatch.setattr(
        driver.Worker, "turn", lambda self: order.append(self.library) or turn(self)
    )
    workers = [
        driver.Worker(name, {"sleep": sleep}, 1, tmp_path / name)
        for name, sleep in (("ours", 0.01), ("slow", 0.05))
    ]
    times = driver.alternate(workers, 3)
    assert order == ["ours", "slow"] * 3
    assert all(0.01 <= seconds < 0.05 for seconds in times["ours"])
    assert all(seconds >= 0.05 for seconds in times["slow"])
    assert all(worker.end()["peak_bytes"] > 2**20 for worker in workers)
    assert workers[0].facts == {"version": "1"}


def test_a_worker_that_fails_says_where_to_look(fakes, tmp_path):
    log = tmp_path / "log"
    fakes.write_text("raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match=r"slow failed: \['no such model'\]; see .*log"):
        driver.Worker("slow", {}, 1, log)


def test_the_first_and_the_warm_up_runs_do_not_count():
    numbers = driver.summary(9.0, [3.0, 1.0, 2.0])
    assert numbers["median_s"] == 2.0
    assert (numbers["fastest_s"], numbers["slowest_s"], numbers["first_s"]) == (1.0, 3.0, 9.0)


def test_the_table_holds_ratios_and_shares():
    spec = {"case": "sft", "model": "small", "batch": 8, "length": 128}
    work = flops.useful_flops(spec, cases.MODELS["small"])
    runs = {"ours": 2.0, "torch": 3.0}
    result = {
        "title": "SFT step",
        "tokens": 1024,
        "spec": spec,
        "asked": {"torch": 1.0},
        "machine": {"matmul_peak": work},  # one run a second would be all of it
        "results": {name: driver.summary(0.0, [seconds]) for name, seconds in runs.items()},
    }
    (row,) = table.rows(result)
    assert row[3:] == ["1.50", "1.0", "50%"]


def test_arithmetic_of_one_token_by_hand():
    """Width 4, one head, MLP 8, two layers, one row of one token."""
    model = {"hidden_size": 4, "num_heads": 1, "intermediate_size": 8, "num_layers": 2}
    model["vocab_size"] = 10
    # A layer: q, k, v, o of 16 weights, three of 32; scores and sum over one position, 4 each.
    assert flops.forward(model, 1, 1) == 2 * 2 * (4 * 16 + 3 * 32 + 2 * 4)
    assert flops.head(model, 3) == 2 * 3 * 40


def test_arithmetic_is_the_weights_twice_when_nothing_is_attended_to():
    """Against the parameters of a model, with grouped queries; attention adds a known share."""
    model = cases.MODELS["smollm2"]
    shapes = jax.eval_shape(lambda: Transformer(ModelConfig(**model), jax.random.key(0)))
    layers = jax.tree.leaves(shapes.layers)
    weights = sum(int(np.prod(leaf.shape)) for leaf in layers if leaf.ndim == 3)
    attention = 4 * model["num_layers"] * model["hidden_size"] * sum(range(1, 6))
    assert flops.forward(model, 1, 5) == 2 * 5 * weights + attention


def test_the_growth_plot_shows_every_point(tmp_path, monkeypatch):
    drawn = []
    real = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda axes, x, y, *a, **k: drawn.append(y) or real(axes, x, y, *a, **k),
    )
    result = driver.summary(0.0, [2.0]) | {"peak_bytes": 2**30}
    points = [
        {"axis": axis, "value": value, "tokens": case.tokens, "spec": case.spec}
        | {"results": {"ours": result, "torch": result}}
        for axis, value, case in cases.growth()
    ]
    growth.plot(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert len(drawn) == 2 * 2 * 4  # speed and memory; batch and length; two cases of two libraries
    assert sorted(n for line in drawn for n in line if n != 1.0) == sorted(
        p["tokens"] / 2 for p in points for _ in ("ours", "torch")
    )


@pytest.mark.slow
def test_samples_of_a_prompt_are_timed_with_both_ways_to_read_it(capsys):
    shared_prefill.main(["--cases", "tiny", "--repeats", "1"])
    head, _, row = capsys.readouterr().out.strip().splitlines()
    found = dict(
        zip(*([cell.strip() for cell in r.split("|")[1:-1]] for r in (head, row)), strict=True)
    )
    assert found["case"] == "tiny"
    assert float(found["apart, s"]) > 0 < float(found["together, s"])
    made = shared_prefill.sides("tiny")
    assert made["together"][1] < made["apart"][1]
