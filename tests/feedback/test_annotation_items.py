"""Rows of runs and of files become items; answers have a form."""

import json

import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.feedback import items
from rlhf_jax.feedback.answers import check, from_shown, to_shown


def write(path, *found):
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found))
    return path


def read(path, mode, **options):
    return items.read_items([path], mode, DropCounts(), **options)


def test_responses_of_a_run(tmp_path):
    row = {"prompt": "Hi", "responses": {"SFT": "a", "PPO-max": "b"}, "judged": {"vader": {}}}
    path = write(tmp_path / "responses.jsonl", row)
    (pair,) = read(path, "pair")
    assert (pair.prompt, pair.texts, pair.names) == ("Hi", ("a", "b"), ("SFT", "PPO-max"))
    assert [one.texts for one in read(path, "score")] == [("a",), ("b",)]
    (ranking,) = read(path, "ranking")
    assert ranking.texts == ("a", "b") and ranking.id != pair.id


def test_three_responses_are_three_pairs_and_equal_texts_none(tmp_path):
    path = write(tmp_path / "r.jsonl", {"prompt": "Hi", "responses": ["a", "b", "c", "a"]})
    drops = DropCounts()
    found = items.read_items([path], "pair", drops)
    assert [one.texts for one in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert drops[items.SAME_TEXT] == 1


def test_several_files_meet_at_their_prompts(tmp_path):
    for name, said in (("one", "a"), ("two", "b")):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{n}", "responses": {"SFT": f"{said}{n}"}} for n in range(2)]
        write(tmp_path / name / "responses.jsonl", *rows)
    paths = [tmp_path / name / "responses.jsonl" for name in ("one", "two")]
    found = items.read_items(paths, "pair", DropCounts())
    assert [(one.prompt, one.texts) for one in found] == [("0", ("a0", "b0")), ("1", ("a1", "b1"))]
    assert found[0].names == ("one/SFT", "two/SFT")


def test_other_forms(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    path = write(
        tmp_path / "r.jsonl",
        {"prompt": chat, "chosen": "a", "rejected": "b", "gold": "chosen"},
        {"prompt": "Hi", "responses": ["c", "d"], "gold": "tie"},
    )
    found = read(path, "pair")
    assert found[0].prompt == chat and [one.gold for one in found] == [0, "tie"]
    assert len(read(path, "pair", limit=1)) == 1
    steps = write(
        tmp_path / "s.jsonl",
        {"prompt": "1 + 1", "steps": ["= 2\n", "#### 2"], "labels": [1, 1], "right": True},
        {"prompt": "1 + 2", "response": "= 3\n\n#### 3", "gold": [1, None]},
    )
    first, second = read(steps, "steps")
    assert first.texts == ("= 2\n", "#### 2") and first.right is True
    assert second.texts == ("= 3\n", "#### 3") and second.gold == [1, None]
    assert items.from_row(json.loads(json.dumps(first.row()))) == first


@pytest.mark.parametrize(
    ("mode", "row", "message"),
    [
        (
            "pair",
            {"prompt": "Hi", "responses": ["a"]},
            "line 1: mode pair compares responses, and ",
        ),
        ("ranking", {"prompt": "Hi", "response": "a"}, "mode ranking compares responses"),
        (
            "ranking",
            {"prompt": "Hi", "responses": list("abcdefghij")},
            "takes 2 to 9 texts, got 10",
        ),
        ("score", {"responses": ["a"]}, "prompt is missing; found: responses"),
        ("score", {"prompt": "Hi"}, "a row needs responses"),
        ("score", {"prompt": "Hi", "responses": [3]}, "responses: '0' must be text, not int"),
        ("steps", {"prompt": "Hi"}, "mode steps needs steps"),
        ("steps", {"prompt": "Hi", "steps": []}, "steps is empty"),
        ("steps", {"prompt": "Hi", "steps": ["a"], "right": 1}, "right=1 must be true, false or"),
        (
            "pair",
            {"prompt": "Hi", "responses": ["a", "b"], "gold": "c"},
            "must be tie or one of 0, 1",
        ),
        ("pair", {"prompt": "Hi", "responses": ["a", "b", "c"], "gold": 0}, "makes 3 items"),
        (
            "ranking",
            {"prompt": "Hi", "responses": ["a", "b"], "gold": [1, 1]},
            "gold: ranking [1, 1]",
        ),
        ("score", {"prompt": "\ud800", "response": "a"}, "half of a surrogate pair"),
        ("score", {"prompt": 3, "response": "a"}, "prompt: messages must be a list"),
    ],
)
def test_rows_of_another_form_are_refused_by_line(tmp_path, mode, row, message):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError) as error:
        read(path, mode)
    assert message in str(error.value) and "line 1" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_with_nothing_to_judge(tmp_path):
    path = write(tmp_path / "r.jsonl", {"prompt": "Hi", "responses": ["a", "a"]})
    with pytest.raises(ValueError, match=r"holds nothing to judge: .*1 identical responses"):
        read(path, "pair")


@pytest.mark.parametrize(
    ("mode", "answer", "message"),
    [
        ("score", 6, "score 6 must be a number from 1 to 5, the declared range"),
        ("score", True, "score True must be"),
        ("score", float("nan"), "score nan must be"),
        ("score", "5", "score '5' must be"),
        ("pair", 2, "choice 2 must be 0, 1 or 'tie'"),
        ("pair", True, "choice True"),
        ("pair", None, "choice None"),
        ("ranking", [1, 1, None], "gives rank 1 twice"),
        ("ranking", [1, 3, None], "has no rank 2"),
        ("ranking", [2, 3, 1, 4], "must be a list of 3 entries"),
        ("ranking", [None, None, None], "no response has a rank"),
        ("ranking", [1, 0, None], "rank 0 must be a whole number from 1 on"),
        ("ranking", [1, 1.5, None], "rank 1.5 must be"),
        ("steps", [1, 2, None], "label 1 is 2, must be -1, 0, 1 or null"),
        ("steps", [1, False, None], "label 1 is False"),
        ("steps", [None, None, None], "no step is marked"),
        ("steps", {"0": 1}, "must be a list of 3 entries"),
    ],
)
def test_answers_of_another_form_are_refused(mode, answer, message):
    with pytest.raises(ValueError) as error:
        check(mode, answer, 3, (1, 5))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_answers_by_places_and_back():
    """Places 0, 1, 2 show texts 2, 0, 1."""
    order = [2, 0, 1]
    assert from_shown("ranking", [1, None, 2], order) == [None, 2, 1]
    assert from_shown("pair", 0, [1, 0]) == 1 and from_shown("pair", "tie", [1, 0]) == "tie"
    assert from_shown("score", 4, [0]) == 4
    for mode, answer, places in (("ranking", [3, 1, 2], order), ("pair", 1, [1, 0])):
        assert to_shown(mode, from_shown(mode, answer, places), places) == answer
