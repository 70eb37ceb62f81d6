"""Tables of figures: spread over seeds, what the judge had lost when the monitor spoke."""

import copy
import json
import math
from pathlib import Path

import pytest

from experiments import claims, figure_tables, figures

DOCS = Path(__file__).parents[2] / "docs" / "figures"


def seed(*, collapse=(), wins=(0.5, 0.8, 0.7, 0.1), reward=1.0):
    return {
        "status": "finished",
        "minutes": 2.0,
        "hardware": "two cores",
        "collapse_steps": list(collapse),
        "win_rates": {"vader": {"win_rate": 0.9}},
        "statistics": {"SFT": {"reward/mean": 0.0}, "policy": {"reward/mean": reward}},
        "curves": {claims.WIN_RATE: {"step": [4, 9, 14, 19], "value": list(wins)}},
    }


def content(**seeds):
    return {
        "figure": "4",
        "scale": "tiny",
        "seeds": [int(name) for name in seeds],
        "series": {"vanilla": {"seeds": seeds}},
    }


def test_spread_is_mean_and_extremes():
    assert figure_tables.spread([1.0, 2.0, 6.0]) == "3 [1, 6]"
    assert figure_tables.spread([0.1234]) == "0.123"
    assert figure_tables.spread([-6e-8, 5e-8]) == "0 [0, 0]"
    assert figure_tables.spread([]) == figure_tables.NONE


@pytest.mark.parametrize(
    ("collapse", "measured_at", "best", "lost"),
    [(9, 10, 0.8, 0.0), (14, 15, 0.8, 1 / 3), (18, 15, 0.8, 1 / 3), (19, 20, 0.8, 0.7 / 0.3)],
)
def test_what_the_judge_had_lost(collapse, measured_at, best, lost):
    found = figure_tables.lost_of_peak(seed(collapse=[collapse]))
    assert found == (measured_at, best, pytest.approx(lost))


def test_nothing_gained_or_nothing_measured():
    assert math.isnan(figure_tables.lost_of_peak(seed(collapse=[9], wins=(0.4, 0.3, 0, 0)))[2])
    assert figure_tables.lost_of_peak(seed(collapse=[3])) is None
    assert figure_tables.lost_of_peak(seed()) is None


@pytest.mark.parametrize(
    ("wins", "collapse", "column"),
    [
        ((0.5, 0.8, 0.7, 0.1), [9], "fell, alarm"),
        ((0.5, 0.8, 0.9, 0.85), [9], "held, false alarm"),
        ((0.5, 0.8, 0.7, 0.72), [], "fell, no alarm"),
        ((0.5, 0.8, 0.7, 0.73), [], "held, no alarm"),
        ((0.5, 0.4, 0.3, 0.44), [], "fell, no alarm"),
        ((0.5, 0.4, 0.3, 0.46), [9], "held, false alarm"),
    ],
)
def test_alarms_are_counted_by_what_the_judge_says_at_the_end(wins, collapse, column):
    one = seed(collapse=collapse, wins=wins) | {"folder": "a"}
    other = seed(wins=(0.5, 0.6, 0.7, 0.8)) | {"folder": "b"}
    failed = {"status": "status 1: no"}
    shown = content(**{"0": one, "1": other, "2": failed})
    # The run that a second figure shows is the same run.
    text = figure_tables.alarms_table([shown, content(**{"0": one})])
    head, _, row, every = ([c.strip() for c in line.split("|")] for line in text.splitlines())
    assert row[2] == every[2] == "2"
    assert row[3:] == every[3:]
    counts = dict(zip(head, map(str, row), strict=True))
    others = {"fell, alarm", "held, false alarm", "fell, no alarm", "held, no alarm"} - {column}
    assert counts[column] == ("2" if column == "held, no alarm" else "1")
    assert sum(int(counts[name]) for name in others) == 2 - int(counts[column])


def test_the_committed_claims_are_those_of_the_committed_figures(tmp_path):
    for path in DOCS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    figures.write_claims(tmp_path)
    assert (tmp_path / "claims.md").read_text() == (DOCS / "claims.md").read_text()


def test_page_of_policies():
    failed = {"status": "status 1: no"}
    text = figure_tables.page(
        content(**{"0": seed(collapse=[14]), "1": seed(reward=3.0), "2": failed})
    )
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    policy = next(row for row in rows if "vanilla (seed 2 failed)" in row)
    assert policy[2:5] == ["15, none", "90 [90, 90]", "2 [1, 3]"]
    assert next(row for row in rows if row[1:2] == ["SFT"])[4] == "0 [0, 0]"
    monitor = next(row for row in rows if row[1:3] == ["0", "15"])
    assert monitor[3:7] == ["80%", "33% at 15", "10% at 20", "10%"]
    assert "2 runs, 4 minutes in all; two cores" in text


def test_page_of_a_reward_model():
    one = {
        "status": "finished",
        "minutes": 1.0,
        "hardware": "x",
        "curves": {
            "reward/accuracy": {"step": list(range(12)), "value": [0.5] * 10 + [0.8, 0.9]},
            "eval/accuracy": {"step": [0, 9], "value": [0.5, 0.75]},
        },
        "differences": {"right": 0.7, "mean": 1.5},
    }
    text = figure_tables.page(content(**{"0": one}))
    row = next(line for line in text.splitlines() if "vanilla, seed 0" in line)
    assert [cell.strip() for cell in row.split("|")][2:6] == ["85.0", "75.0", "70.0", "1.50"]


def test_nothing_finished():
    assert figure_tables.page(content(**{"0": {"status": "not run"}})) == "No run has finished.\n"


@pytest.mark.parametrize("path", sorted(DOCS.glob("figure_*.json")), ids=lambda path: path.stem)
def test_tables_in_the_documentation_are_those_of_the_numbers(path):
    numbers = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == figure_tables.page(copy.deepcopy(numbers))


def test_the_table_of_the_readme_is_that_of_the_numbers():
    figures = [json.loads((DOCS / f"figure_{name}.json").read_text()) for name in (10, 4)]
    table = figure_tables.overview(*figures)
    for page in (DOCS.parents[1] / "README.md", DOCS.parent / "results.md"):
        assert table in page.read_text(), page
