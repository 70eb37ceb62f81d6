"""The committed table of rounds is that of its JSON; what is no run is refused."""

import json
from pathlib import Path

import pytest

from experiments import rounds

FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def test_the_committed_table_is_made_from_the_committed_numbers():
    content = json.loads((FIGURES / "expert_iteration.json").read_text())
    assert (FIGURES / "expert_iteration.md").read_text() == rounds.table(content)
    assert {run["method"] for run in content["runs"]} >= {"final_answer", "control"}


def test_sft_stands_once_and_every_round_of_every_run():
    one = {"method": "orm", "seed": 1, "best_round": 1, "gain": [0.1, 0.0, 0.2], "minutes": 2}
    one["rounds"] = [{"solve/pass_at_1": 0.25}, {"solve/pass_at_1": 0.5, "improve/pool": 1024.0}]
    lines = rounds.table({"runs": [one, one | {"seed": 2}]}).splitlines()
    assert sum("| SFT" in line for line in lines) == 1
    assert sum(line.startswith("| orm, seed") for line in lines) == 4
    assert any("+0.100 [+0.000, +0.200]" in line for line in lines)


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        rounds.collect([tmp_path])
