"""Sources of rated steps: splits that share no problem, right documents, what is refused."""

import json

import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.solutions import Solution, write_solutions
from rlhf_jax.data.splits import SPLITS, split_of
from rlhf_jax.tasks import TaskConfig, make_task
from tests.data.conftest import write_jsonl
from tests.tasks.rows import load_rows


def prm_row(problem, rating=1, reason="solution", **more):
    """Two steps towards a problem; of the second another was on offer."""
    completions = [{"text": "So 3.", "rating": rating}, {"text": "So 4.", "rating": -1}]
    steps = [
        {"completions": [{"text": f"Think {problem}.", "rating": 0}], "chosen_completion": 0},
        {"completions": completions, "chosen_completion": 0},
    ]
    label = {"steps": steps, "finish_reason": reason}
    return {"question": {"problem": problem}, "label": label} | more


def shepherd_row(number):
    text = f"How many are {number}? Step 1: Count. ки\nStep 2: {number} ки"
    marks = ("+", "+" if number % 2 else "-")
    return {"input": text, "label": text.replace("ки", marks[0], 1).replace("ки", marks[1], 1)}


def stepwise_row(number):
    labels = [True, number % 2 == 1]
    row = {"prompt": f"How many are {number}?", "completions": ["Count.", "So."], "labels": labels}
    return row | ({"right": number % 2 == 1} if number < 150 else {})


def solution(number):
    right = number % 2 == 1 if number < 150 else None
    return Solution(f"How many are {number}?\n", ("Count.\n", f"{number}"), (1, None), right)


@pytest.fixture
def folder(tmp_path):
    """PRM800K: 200 problems of training, each twice, and 30 of the test, 5 of which are in both."""
    train = [prm_row(f"Problem {n}", -1 if n % 2 else 1) for n in range(200)]
    again = [prm_row(f"Problem  {n}", 0) for n in range(200)]
    test = [prm_row(f"Problem {n}") for n in range(195, 225)]
    write_jsonl(tmp_path / "prm" / "phase1_train.jsonl", train)
    write_jsonl(tmp_path / "prm" / "phase2_train.jsonl.gz", again)
    write_jsonl(tmp_path / "prm" / "phase1_test.jsonl", test[:10])
    write_jsonl(tmp_path / "prm" / "phase2_test.jsonl", test[10:])
    return tmp_path / "prm"


@pytest.fixture(params=["math_shepherd", "stepwise", "solutions"])
def source(request, tmp_path):
    """200 problems in a file, every other one solved."""
    path = tmp_path / "rows.jsonl"
    if request.param == "solutions":
        write_solutions(path, map(solution, range(200)))
    else:
        make = shepherd_row if request.param == "math_shepherd" else stepwise_row
        write_jsonl(path, map(make, range(200)))
    return f"{request.param}:{path}"


def solutions(source, split, drops=None):
    task = make_task(TaskConfig(source))
    return list(task.solutions(split, DropCounts() if drops is None else drops))


def problems(found):
    return {" ".join(solution.prompt.split()) for solution in found}


def test_a_file_is_split_by_its_prompts(source):
    seen = {split: problems(solutions(source, split)) for split in SPLITS}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 200
    assert len(solutions(source, "all")) == 200
    assert all(split_of(prompt) == split for split, found in seen.items() for prompt in found)


def test_documents_are_right_and_prompts_are_all(source):
    drops = DropCounts()
    documents = load_rows("sft", source, "all", drops=drops)
    unknown = 0 if source.startswith("math_shepherd") else 50
    right = 100 - unknown // 2
    assert len(documents) == right
    for document in documents:
        assert int(document["prompt"].split()[-1].strip("?")) % 2 == 1
        assert document["prompt"].endswith("?\n") and "\n" in document["response"]
    expected = {"final answer is wrong": right}
    if unknown:
        expected["nobody knows whether the final answer is right"] = unknown
    assert drops == expected
    assert len(load_rows("prompt", source, "all")) == 200


def test_a_split_that_does_not_exist(source, folder):
    for one in (source, f"prm800k:{folder}"):
        with pytest.raises(ValueError, match="split='dev' must be one of train"):
            solutions(one, "dev")


def test_a_problem_of_the_test_is_in_no_other_split(folder):
    drops, source = DropCounts(), f"prm800k:{folder}"
    seen = {split: solutions(source, split, drops) for split in SPLITS}
    test = problems(seen["test"])
    assert test == {f"Problem {n}" for n in range(195, 225)}
    # Each twice, looked at for two splits.
    assert drops == {"problem of the test set": 5 * 2 * 2}
    train, validation = problems(seen["train"]), problems(seen["validation"])
    assert train | validation == {f"Problem {n}" for n in range(195)}
    assert not train & validation and len(train) > 5 * len(validation) > 0
    assert len(seen["train"]) == 2 * len(train)


def test_all_is_both_files(folder):
    assert len(solutions(f"prm800k:{folder}", "all")) == 430


def test_files_that_are_not_there_are_not_needed(folder, tmp_path):
    for name in ("phase1_train.jsonl", "phase1_test.jsonl", "phase2_test.jsonl"):
        (folder / name).unlink()
    source = f"prm800k:{folder}"
    assert sum(len(solutions(source, split)) for split in ("train", "validation")) == 200
    with pytest.raises(FileNotFoundError, match=r"no phase1_test\.jsonl or phase2_test\.jsonl"):
        solutions(source, "test")
    with pytest.raises(FileNotFoundError, match=r"no phase1_train\.jsonl or .* prm800k/data of"):
        solutions(f"prm800k:{tmp_path}", "train")


def test_of_a_file_and_its_gzipped_twin_one_is_read(folder):
    write_jsonl(folder / "phase1_test.jsonl.gz", [prm_row("an older copy")])
    assert len(solutions(f"prm800k:{folder}", "test")) == 30


def test_alternatives_are_asked_for(folder):
    plain, more = (
        solutions(f"prm800k:{folder}{suffix}", "test") for suffix in ("", ":alternatives")
    )
    assert len(more) == 2 * len(plain) == 60
    assert more[0] == plain[0] and more[1].labels == (None, -1)
    assert len(load_rows("sft", f"prm800k:{folder}:alternatives", "test")) == 30


def test_documents_of_prm800k(folder):
    rows = [prm_row("a"), prm_row("b", -1, "found_error"), prm_row("c", reason="give_up")]
    rows += [prm_row("a", is_quality_control_question=True), prm_row("d", -1)]
    write_jsonl(folder / "phase1_test.jsonl", rows)
    (folder / "phase2_test.jsonl").unlink()
    drops, source = DropCounts(), f"prm800k:{folder}"
    assert load_rows("sft", source, "test", drops=drops) == [
        {"prompt": "a\n", "response": "Think a.\nSo 3.\n"}
    ]
    assert drops == {
        "final answer is wrong": 1,
        "labeller gave up": 1,
        "quality-control question": 1,
        "nobody knows whether the final answer is right": 1,
    }
    found = load_rows("prompt", source, "test")
    assert found == [{"prompt": "a\n"}, {"prompt": "b\n"}, {"prompt": "d\n"}]


def test_prompts_are_distinct(folder):
    drops = DropCounts()
    rows = load_rows("prompt", f"prm800k:{folder}", "train", drops=drops)
    assert len({" ".join(row["prompt"].split()) for row in rows}) > 100
    assert len({row["prompt"] for row in rows}) == len(rows)
    again = [prm_row("a"), prm_row("a")]
    write_jsonl(folder / "phase1_test.jsonl", again)
    (folder / "phase2_test.jsonl").unlink()
    assert load_rows("prompt", f"prm800k:{folder}", "test", drops=drops) == [{"prompt": "a\n"}]
    assert drops["duplicate prompt"] == 1


def test_documents_are_encoded(source, folder, plain, capsys):
    for one in (source, f"prm800k:{folder}"):
        documents = make_task(TaskConfig(one, limit=7)).documents(plain, "train", max_length=128)
        assert len(documents) == 7 and all(d.loss_mask.any() for d in documents)
    assert "SFT documents (train): kept 7 of" in capsys.readouterr().out


def test_fingerprints_follow_the_files(source, folder):
    for one in (source, f"prm800k:{folder}"):
        task = make_task(TaskConfig(one))
        before = task.fingerprint("train")
        assert before == make_task(TaskConfig(one)).fingerprint("train")
        changed = folder / "phase2_test.jsonl" if one.startswith("prm") else task.where
        with open(changed, "a") as file:
            file.write("\n")
        assert task.fingerprint("train") != before


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("prm800k", "FOLDER"),
        ("math_shepherd:", "FILE"),
        ("stepwise", "FILE"),
        ("solutions", "FILE"),
    ],
)
def test_a_source_says_where_it_is(source, place):
    with pytest.raises(ValueError, match=rf"must say where it is: {source.strip(':')}:{place}"):
        make_task(TaskConfig(source))


def test_what_they_have_not(source, folder):
    for one in (source, f"prm800k:{folder}"):
        with pytest.raises(ValueError, match="has no preferences: its steps are rated one by one"):
            load_rows("preference", one, "train")
        with pytest.raises(ValueError, match="cannot be streamed"):
            make_task(TaskConfig(f"stream:{one}"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        solutions(f"stepwise:{tmp_path / 'none.jsonl'}", "train")


def test_a_wrong_row_is_named_by_file_and_line(folder):
    with (folder / "phase2_test.jsonl").open("a") as file:
        file.write(json.dumps({"question": {}, "label": {"finish_reason": "solution"}}))
    with pytest.raises(ValueError, match=r"phase2_test\.jsonl, line 21: label\.steps is missing"):
        solutions(f"prm800k:{folder}", "test")


def test_other_sources_have_no_rated_steps(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"prompt": "a", "response": "b"}])
    message = r"has no labelled steps: give prm800k:FOLDER, math_shepherd:FILE, stepwise:FILE or"
    with pytest.raises(ValueError, match=rf"source='jsonl:.*' {message} solutions:FILE"):
        solutions(f"jsonl:{path}", "train")
