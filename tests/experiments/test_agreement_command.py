"""Agreement of made-up annotators: coefficients, known answers, habits, the list of differences."""

import json
import re

import numpy as np
import pytest

from experiments import agreement, command
from rlhf_jax.evaluation.comparison import Interval
from rlhf_jax.evaluation.krippendorff import krippendorff_alpha
from rlhf_jax.feedback.judgements import combine
from rlhf_jax.feedback.ledger import SKIP, Event
from rlhf_jax.feedback.units import units_of
from tests.annotations import event, make_file, make_items

X = np.nan


@pytest.fixture
def judged(tmp_path):
    """Writes {annotator: answers, None where there is none}, and reads them back."""

    def make(items, said, name="a.jsonl", orders=None):
        file = make_file(tmp_path / name, items)
        for who, answers in said.items():
            for number, (item, answer) in enumerate(zip(items, answers, strict=True)):
                if answer is not None:
                    order = {} if orders is None else {"order": orders[number]}
                    file.append(event(item, who, answer, seconds=number + 1.0, **order))
        file.close()
        return combine([tmp_path / name])

    return make


def test_units_of_each_mode(judged):
    pair = units_of(judged(make_items("pair", 3, gold=1), {"anna": [0, 1, "tie"]}, "p"))
    assert pair.values.tolist() == [[1, -1, 0]] and pair.clusters.tolist() == [0, 1, 2]
    np.testing.assert_equal(pair.gold, [-1, X, X])
    steps = units_of(judged(make_items("steps", 2), {"bob": [[1, None, -1], None]}, "s"))
    np.testing.assert_equal(steps.values, [[1, X, -1, X, X, X]])
    assert steps.clusters.tolist() == [0, 0, 0, 1, 1, 1]
    ranking = units_of(judged(make_items("ranking", 1), {"bob": [[2, 1, None, None]]}, "r"))
    # Pairs 01 02 03 12 13 23; nobody said anything of 2 and 3.
    np.testing.assert_equal(ranking.values, [[-1, 1, 1, 1, 1, X]])
    score = units_of(judged(make_items("score", 2), {"anna": [3, 5], "bob": [4, None]}, "c"))
    np.testing.assert_equal(score.values, [[3, 5], [4, X]])


def test_alpha_and_kappa_are_those_of_the_scores(judged):
    said = {"anna": [1, 2, 3, 4, 5, 1], "bob": [1, 2, 3, 5, 5, 2], "chen": [2, None, 3, 4, None, 1]}
    found = agreement.measure(judged(make_items("score", 6), said))
    table = [[X if v is None else v for v in row] for row in said.values()]
    for level, value in found["alpha"].items():
        assert value == krippendorff_alpha(table, level)
    kappas = {tuple(one["annotators"]): one for one in found["kappa"]}
    assert set(kappas) == {("anna", "bob"), ("anna", "chen"), ("bob", "chen")}
    # Six units, four alike; by chance anna's and bob's shares of 1 to 5.
    chance = (2 * 1 + 1 * 2 + 1 * 1 + 1 * 0 + 1 * 2) / 36
    assert kappas["anna", "bob"]["kappa"].value == pytest.approx((4 / 6 - chance) / (1 - chance))
    assert kappas["anna", "chen"]["units"] == 4
    without = found["annotators"]["chen"]["alpha_without"]
    assert without == krippendorff_alpha(table[:2], "interval")
    assert found["annotators"]["bob"]["median_seconds"] == 3.5
    # The widest difference is a single point here; items of one annotator are none.
    assert [one["range"] for one in found["disagreements"]] == [1.0, 1.0, 1.0]


def test_gold_items_and_the_first_side(judged):
    items = make_items("pair", 4, gold=1)
    orders = [(1, 0), (0, 1), (0, 1), (1, 0)]
    said = {"anna": [1, 0, 1, 1], "bob": [0, "tie", None, None]}
    found = agreement.measure(judged(items, said, orders=orders))["annotators"]
    assert found["anna"]["right_on_gold"] == Interval(1.0, 1.0, 1.0)
    assert found["bob"]["right_on_gold"].value == 0.0 and found["bob"]["gold_items"] == 1
    # Anna took the first side three times of four, bob's tie is no side.
    assert found["anna"]["first_side"].value == 0.75
    assert found["bob"]["first_side"].value == 0.0


def test_known_steps_that_are_not_marked_are_not_right(judged):
    items = make_items("steps", 1, gold=[1, None, -1])
    found = agreement.measure(judged(items, {"anna": [[1, 0, None]], "bob": [[1, 1, -1]]}))
    assert found["annotators"]["anna"]["right_on_gold"].value == 0.5
    assert found["annotators"]["bob"]["right_on_gold"].value == 1.0


def test_undefined_says_why(judged):
    found = agreement.measure(
        judged(make_items("pair", 3), {"anna": [0, 0, 0], "bob": [0, 0, None]})
    )
    assert found["alpha"]["nominal"].startswith("undefined because every rating is 1")
    assert found["kappa"][0]["kappa"] == "undefined because both always say 1"
    alone = agreement.measure(judged(make_items("pair", 2), {"anna": [0, 1]}, "b"))
    assert alone["alpha"]["ordinal"] == "undefined because no unit has ratings of two raters"
    assert alone["kappa"] == [] and alone["disagreements"] == []
    apart = judged(make_items("pair", 2), {"anna": [0, None], "bob": [None, 1]}, "c")
    (kappa,) = agreement.measure(apart)["kappa"]
    assert kappa["kappa"] == "undefined because no unit was rated by both"
    known = agreement.measure(apart)["annotators"]["anna"]["right_on_gold"]
    assert known == "undefined because no item with a known answer was judged"


def test_the_command_reads_several_files_and_modes(tmp_path, judged, capsys):
    judged(make_items("pair", 3), {"anna": [0, 1, "tie"]}, "anna.jsonl")
    judged(make_items("pair", 3), {"bob": [1, 1, 0]}, "bob.jsonl")
    judged(make_items("ranking", 1), {"bob": [[2, 1, None, 3]], "anna": [[1, 2, 3, 4]]}, "r.jsonl")
    files = [str(tmp_path / name) for name in ("anna.jsonl", "bob.jsonl", "r.jsonl")]
    agreement.main(agreement.parse([*files, "--out", str(tmp_path / "out")]))
    text = capsys.readouterr().out
    assert "## pair" in text and "## ranking" in text and "nan" not in text.lower()
    assert "Items on which annotators differ: 2, the widest first." in text
    assert "anna: policy0; bob: policy1" in text
    assert "anna: policy0 > policy1 > policy2 > policy3; bob: policy1 > policy0 > policy3" in text
    content = json.loads((tmp_path / "out/agreement.json").read_text())
    assert [one["mode"] for one in content["modes"]] == ["pair", "ranking"]
    widest = content["modes"][0]["disagreements"][0]
    assert widest["prompt"] == "prompt 0" and widest["range"] == 2.0
    assert (tmp_path / "out/agreement.md").read_text() in text
    assert re.search(r"\| nominal \*\s+\| -?\d\.\d{3} \[", text)


def told(*files):
    with pytest.raises(command.USER_ERRORS) as error:
        agreement.main(agreement.parse([*map(str, files), "--out", str(files[0].parent / "out")]))
    line = command.told(error.value)
    assert "\n" not in line
    return line


def test_what_the_command_refuses(tmp_path, judged):
    judged(make_items("pair", 3), {"anna": [0, 1, "tie"]}, "a.jsonl")
    judged(make_items("pair", 4), {"bob": [1, 1, 0, 0]}, "b.jsonl")
    judged(make_items("pair", 3), {}, "c.jsonl")
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    assert "are of different items or ranges: 3 and 4 items, 3 in both" in told(a, b)
    assert "both have anna's judgement" in told(a, a)
    assert "has no answer yet: there is nothing to measure" in told(c)
    assert "No such file" in told(tmp_path / "missing.jsonl")
    lines = a.read_text().splitlines()
    ranks = {**json.loads(lines[-1]), "answer": 5}
    a.write_text("\n".join([*lines[:-1], json.dumps(ranks)]) + "\n")
    assert "a.jsonl, line 7: choice 5 must be 0, 1 or 'tie'" in told(a)


@pytest.mark.parametrize(
    ("mode", "answer", "message"),
    [
        ("ranking", [1, 1, None, None], "gives rank 1 twice"),
        ("ranking", [1, 3, None, None], "has no rank 2"),
        ("score", 9, "must be a number from 1 to 5, the declared range"),
    ],
)
def test_answers_of_another_form_are_refused_by_line(tmp_path, judged, mode, answer, message):
    good = {"ranking": [1, 2, None, None], "score": 5}[mode]
    judged(make_items(mode, 2), {"anna": [good, good]}, "a.jsonl")
    path = tmp_path / "a.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "answer": answer})
    path.write_text("\n".join(lines) + "\n")
    line = told(path)
    assert "a.jsonl, line 4: " in line and message in line


def test_a_cut_file_counts_by_its_whole_lines_and_a_skip_is_no_answer(tmp_path, judged, capsys):
    items = make_items("pair", 3)
    judged(items, {"anna": [0, 1, None], "bob": [0, 0, 1]}, "a.jsonl")
    path = tmp_path / "a.jsonl"
    skip = Event(SKIP, items[2].id, "anna", "k", "now", (0, 1), 1.0, reason="unclear")
    with path.open("a") as end:
        end.write(json.dumps(skip.row()) + "\n" + '{"event": "ans')
    agreement.main(agreement.parse([str(path), "--out", str(tmp_path / "out")]))
    text = capsys.readouterr().out
    assert "Note: " in text and "the 10 whole lines before it count" in text
    anna = json.loads((tmp_path / "out/agreement.json").read_text())["modes"][0]["annotators"][
        "anna"
    ]
    assert (anna["answers"], anna["skips"]) == (2, 1)
