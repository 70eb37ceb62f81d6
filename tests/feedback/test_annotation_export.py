"""What people said becomes rows that tasks and methods read."""

import datasets
import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.solutions import read_solutions
from rlhf_jax.feedback import export
from rlhf_jax.feedback.items import Item
from rlhf_jax.feedback.judgements import combine
from rlhf_jax.tasks import TaskConfig, make_task
from tests.annotations import event, make_file, make_items, rows


@pytest.fixture
def judged(tmp_path):
    """Judgements of items by answers: a list of {annotator: answer}, one for each item."""

    def make(items, answers, **options):
        file = make_file(tmp_path / "a.jsonl", items)
        for item, said in zip(items, answers, strict=True):
            for name, answer in said.items():
                file.append(event(item, name, answer))
        file.close()
        drops = DropCounts()
        return export.tables(combine([tmp_path / "a.jsonl"]), drops, **options), drops

    return make


def test_pairs_by_majority(judged):
    answers = [
        {"anna": 0},
        {"anna": 1, "bob": 1, "chen": 0},
        {"anna": "tie"},
        {"anna": 0, "bob": 1},
        {},
        {"anna": "tie", "bob": 1},
    ]
    made, drops = judged(make_items("pair", 6), answers)
    assert [(row["chosen"], row["rejected"]) for row in made["pairs"]] == [
        ("0: text 0", "0: text 1"),
        ("1: text 1", "1: text 0"),
        ("5: text 1", "5: text 0"),
    ]
    assert set(made) == {"pairs"} and set(made["pairs"][0]) == {"prompt", "chosen", "rejected"}
    assert drops == {"kept": 3, export.TIED: 1, export.SPLIT: 1, export.NOT_JUDGED: 1}


def test_scores_are_averaged_and_differences_are_margins(judged):
    items = [Item("score", "Hi", (text,), ("x",)) for text in "abc"]
    items.append(Item("score", "Bye", ("d",), ("x",)))
    answers = [{"anna": 5, "bob": 4}, {"anna": 3}, {"anna": 4}, {"anna": 1}]
    made, drops = judged(items, answers, min_gap=1.0)
    assert made["scores"] == [
        {"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [4.5, 3.0, 4.0]},
        {"prompt": "Bye", "responses": ["d"], "scores": [1.0]},
    ]
    assert made["pairs"] == [
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 1.5},
        {"prompt": "Hi", "chosen": "c", "rejected": "b", "margin": 1.0},
    ]
    assert drops == {"kept": 2, "scores less than 1 apart": 1}


def test_a_partial_ranking_gives_the_pairs_that_it_says(judged):
    """Ranks 2, 1, -, -: 1 beats all, 0 beats the two without a rank, which nobody compared."""
    made, drops = judged(make_items("ranking", 1), [{"anna": [2, 1, None, None]}])
    sides = {(row["chosen"][-1], row["rejected"][-1]) for row in made["pairs"]}
    assert sides == {("1", "0"), ("1", "2"), ("1", "3"), ("0", "2"), ("0", "3")}
    assert drops == {"kept": 5, export.NOT_JUDGED: 1}
    texts = [f"0: text {i}" for i in range(4)]
    assert made["rankings"] == [
        {"prompt": "prompt 0", "responses": texts, "ranking": [2, 1, None, None]}
    ]


def test_rankings_of_several_people_vote_pair_by_pair(judged):
    said = {"anna": [1, 2, 3, 4], "bob": [1, 3, 2, 4], "chen": [2, 1, 3, None]}
    made, drops = judged(make_items("ranking", 1), [said])
    sides = {(row["chosen"][-1], row["rejected"][-1]) for row in made["pairs"]}
    assert sides == {("0", "1"), ("0", "2"), ("0", "3"), ("1", "2"), ("1", "3"), ("2", "3")}
    assert len(made["rankings"]) == 3 and drops["kept"] == 6


def test_steps_by_majority_and_unmarked_is_not_zero(judged):
    answers = [
        {"anna": [1, 0, None]},
        {"anna": [1, -1, None], "bob": [1, -1, 1], "chen": [0, 1, None]},
        {"anna": [1, -1, None], "bob": [-1, 1, None]},
    ]
    made, drops = judged(make_items("steps", 3), answers)
    assert [row["labels"] for row in made["solutions"]] == [[1, 0, None], [1, -1, 1]]
    assert drops == {"kept": 2, export.SPLIT: 1}


def test_tasks_read_what_is_written(judged, tmp_path):
    """`jsonl:FILE` reads pairs with their margins, `solutions:FILE` rated steps, datasets both."""
    items = [Item("score", f"prompt {n // 2}", (f"text {n}",), ("x",)) for n in range(80)]
    made, _ = judged(items, [{"anna": 1 + 3 * (n % 2)} for n in range(80)])
    lines = export.write(tmp_path / "out", made)
    assert any("pairs.jsonl: 40 rows" in line for line in lines)
    task = make_task(TaskConfig(source=f"jsonl:{tmp_path}/out/pairs.jsonl"))
    read = [*task.rows("preference", "all", DropCounts())]
    assert read == made["pairs"] and read[0]["margin"] == 3.0
    saved = datasets.load_from_disk(str(tmp_path / "out/datasets/pairs"))
    assert sum(map(len, saved.values())) == 40
    for split, table in saved.items():
        belongs = [*task.rows("preference", split, DropCounts())]
        assert sorted(table["prompt"]) == sorted(row["prompt"] for row in belongs)
    scores = datasets.load_from_disk(str(tmp_path / "out/datasets/scores"))
    assert scores["train"][0]["scores"] == [1.0, 4.0]
    # Written anew where it was.
    export.write(tmp_path / "out", made)


def test_solutions_are_read_by_process_reward_models(judged, tmp_path):
    items = [Item("steps", "1 + 2 =\n", ("= 3\n", "#### 3"), right=True), *make_items("steps", 1)]
    made, _ = judged(items, [{"anna": [1, None]}, {"anna": [1, 0, -1]}])
    export.write(tmp_path / "out", made)
    first, second = read_solutions(tmp_path / "out/solutions.jsonl")
    assert first.labels == (1, None) and first.right is True and first.prompt == "1 + 2 =\n"
    assert second.first_error == 2 and second.right is None
    saved = datasets.load_from_disk(str(tmp_path / "out/datasets/solutions"))
    labels = {tuple(row["labels"]) for table in saved.values() for row in table}
    assert labels == {(1, None), (1, 0, -1)}


def test_chats_are_kept_and_prompts_of_two_forms_are_no_table(judged, tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    items = [Item("pair", chat, ("a", "b"), ("x", "y"))]
    made, _ = judged(items, [{"anna": 1}])
    export.write(tmp_path / "one", made)
    assert rows(tmp_path / "one/pairs.jsonl") == [{"prompt": chat, "chosen": "b", "rejected": "a"}]
    mixed = {"pairs": [*made["pairs"], {"prompt": "Hi", "chosen": "a", "rejected": "b"}]}
    lines = export.write(tmp_path / "two", mixed)
    assert lines[-1] == "pairs: texts and messages as prompts are no datasets folder"
    assert not (tmp_path / "two/datasets").exists()
