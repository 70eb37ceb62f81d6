"""Labels by a language model: what is written, how it is measured, who reads it."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import ai_labels as configs
from configs import common
from experiments import ai_labels
from experiments.ai_labels import Pair, agreement_with_people, as_row, longer_preferred
from rlhf_jax.evaluation.agreement import cohen_kappa
from rlhf_jax.methods.ai_feedback import Compared
from rlhf_jax.training.record import read_summary


def labels(*p: float, second=None) -> Compared:
    """Labels as if by a judge; in the other order `second`."""
    first = np.array(p)
    other = first if second is None else np.array(second)
    return Compared(first, other, (first + other) / 2, np.zeros(len(p), bool))


def pair(first: str, second: str, margin: float = 0.0, **row) -> Pair:
    return Pair({"prompt": "q"} | row, (first, second), margin)


def run(chain, folder: Path, argument: str = "", **settings) -> Path:
    parts = ["tiny", argument, "sharding.devices=1", "log.tensorboard=False"]
    config = configs.get_config(",".join(part for part in parts if part))
    config.workdir = str(folder)
    config.inputs.policy = str(chain.sft)
    for key, value in settings.items():
        common.set_key(config, key.replace("__", "."), value)
    ai_labels.main(config)
    return folder


def rows_of(folder: Path, split: str = "train") -> list[dict]:
    with (folder / "labels" / f"{split}.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def test_what_the_judge_prefers_is_chosen_with_its_probability():
    told = labels(0.9, 0.2, 0.5)
    rows = [as_row(pair(" a", " bb", 1.5), told, number) for number in range(3)]
    assert [row["chosen"] for row in rows] == [" a", " bb", " a"]
    assert [row["p_chosen"] for row in rows] == [0.9, 0.8, 0.5]
    assert [row["people_gap"] for row in rows] == [1.5, -1.5, 1.5]
    begun = pair(" a", " b", opening="The film")
    # A turn that has begun is judged by its words, and learned from as a whole.
    assert begun.asked() == ("The film", " a", " b")
    assert as_row(begun, told, 1)["chosen"] == "The film b"
    flipped = as_row(pair(" a", " b"), labels(0.8, second=[0.3]), 0)
    assert flipped["flipped"] and "people_gap" not in flipped


def test_agreement_with_people_counts_ties_one_half_and_parts_by_gap():
    pairs = [pair("a", "b", margin) for margin in (1.0, -1.0, 2.0, -2.0, 3.0, -3.0)]
    found = agreement_with_people(pairs, labels(0.4, 0.6, 0.5, 0.1, 0.9, 0.2))
    assert found.share.value == (0 + 0 + 0.5 + 1 + 1 + 1) / 6
    assert [share.value for _, share, _ in found.by_gap] == [0.0, 0.75, 1.0]
    assert sum(count for *_, count in found.by_gap) == found.num_pairs == 6
    assert "58.3%" in found.line()


def test_kappa_is_agreement_beyond_chance():
    one, other = np.array([1, 1, 1, 0, 0, 0, 1, 0, 1, 1]), np.array([1, 1, 0, 0, 0, 1, 1, 0, 1, 0])
    # 7 of 10 agree; by chance .6 x .5 + .4 x .5.
    found = cohen_kappa(one, other)
    np.testing.assert_allclose(found.value, (0.7 - 0.5) / 0.5)
    assert found.low < found.value < found.high <= 1
    assert cohen_kappa(one, one).value == 1
    assert cohen_kappa(np.ones(5), np.ones(5)).value == 0
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2, (2, 4000))
    assert abs(cohen_kappa(*drawn).value) < 0.05
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        cohen_kappa([1, 0], [1, 0, 1])


def test_pairs_of_equal_lengths_say_nothing_of_a_love_of_length():
    pairs = [pair("long one", "short"), pair("a", "longer"), pair("same", "four")]
    assert longer_preferred(pairs, labels(0.9, 0.9, 0.9)) == 0.5
    assert longer_preferred(pairs, labels(0.9, 0.1, 0.9)) == 1
    assert longer_preferred(pairs[2:], labels(0.9)) == 0.5


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("labels.template=nothing", "labels.template: no template 'nothing'"),
        ("rate,labels.reasons=True", "labels.reasons=True needs a template that asks for reasons"),
        ("labels.template=compare_cai", "needs a constitution"),
        ("labels.clamp=0.6", r"labels.clamp=0.6 must be in \(0, 0.5\]"),
        ("data.max_length=8", "data.max_length=8 leaves no room for a prompt"),
    ],
)
def test_what_does_not_go_together_is_refused_at_the_start(argument, message):
    config = configs.get_config(f"tiny,{argument}")
    with pytest.raises(ValueError, match=message) as told:
        ai_labels.main(config)
    assert "\n" not in str(told.value)


def test_samples_of_a_policy_are_labelled_and_people_asked(chain, tmp_path, capsys):
    folder = run(chain, tmp_path / "run")
    rows = rows_of(folder)
    assert 0 < len(rows) <= 40 and len(rows_of(folder, "test")) <= 8
    assert all(0.5 <= row["p_chosen"] < 1 and row["chosen"] != row["rejected"] for row in rows)
    assert len({row["p_chosen"] for row in rows}) > 1
    summary = read_summary(folder)
    assert summary["people"]["num_pairs"] == 12
    assert 0 <= summary["people"]["share"][0] <= 1
    assert summary["measured"]["train"]["feedback/pairs"] == len(rows)
    assert 0 <= summary["measured"]["people's"]["feedback/flip_rate"] <= 1
    report = (folder / "report.md").read_text()
    assert "Cohen's kappa" in report and "feedback/position_bias" in report
    # What is done is not done again.
    before = (folder / "labels" / "train.jsonl").stat().st_mtime_ns
    run(chain, folder)
    assert "has finished already" in capsys.readouterr().out
    assert (folder / "labels" / "train.jsonl").stat().st_mtime_ns == before


def test_pairs_of_people_are_labelled_each_side_first_about_as_often(chain, tmp_path):
    folder = run(
        chain, tmp_path / "run", "pairs", eval__people=0, data__pairs=24, labels__clamp=1e-5
    )
    rows = rows_of(folder)
    assert len(rows) == 24 and all(row["prompt"] == "" for row in rows)
    gaps = np.array([row["people_gap"] for row in rows])
    assert (np.abs(gaps) >= 1).all() and (gaps > 0).any() and (gaps < 0).any()
    assert read_summary(folder)["people"] is None
    assert max(row["p_chosen"] for row in rows) == 0.50001
