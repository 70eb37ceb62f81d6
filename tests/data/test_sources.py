import re

import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.sets import archives, chitchat, harm
from rlhf_jax.data.sources import SOURCES, load_rows
from rlhf_jax.data.splits import SPLITS, split_of
from tests.data.conftest import write_jsonl


def pair(number):
    return {"prompt": f"question {number}", "chosen": f" yes {number}", "rejected": " no"}


def test_file_is_split_by_prompt_the_same_for_every_kind(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [pair(n) for n in range(200)] + [pair(0)])
    seen = {}
    for split in SPLITS:
        rows = load_rows("preference", f"jsonl:{path}", split)
        prompts = [row["prompt"] for row in load_rows("prompt", f"jsonl:{path}", split)]
        sft = [row["prompt"] for row in load_rows("sft", f"jsonl:{path}", split)]
        assert {row["prompt"] for row in rows} == set(prompts) == set(sft)
        assert len(prompts) == len(set(prompts))
        assert {split_of(prompt) for prompt in prompts} == {split}
        seen[split] = set(prompts)
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 200
    assert len(load_rows("preference", f"jsonl:{path}", "all", limit=7)) == 7


def test_repeated_prompts_are_dropped_and_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [pair(1), pair(1)])
    drops = DropCounts()
    assert len(load_rows("prompt", f"jsonl:{path}", "all", drops=drops)) == 1
    assert drops == {"duplicate prompt": 1}


def test_pairs_without_prompt_are_of_one_split_or_dropped(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(100)]
    write_jsonl(path, rows)
    drops = DropCounts()
    kept = load_rows("preference", f"jsonl:{path}", "train", drops=drops)
    assert 0 < len(kept) < 100
    for row in kept:
        assert split_of(row["chosen"]) == split_of(row["rejected"]) == "train"
    assert drops["texts of two splits"] > 0


def test_folder_has_a_file_for_each_split(tmp_path):
    for number, split in enumerate(SPLITS):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {number}"}])
    source = f"jsonl:{tmp_path}"
    assert load_rows("sft", source, "validation") == [{"text": "validation 1"}]
    assert len(load_rows("sft", source, "all")) == 3
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl does not exist"):
        load_rows("sft", source, "test")


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3 is not JSON"):
        load_rows("prompt", f"jsonl:{path}", "all")
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 must be an object, not \[1\]"):
        load_rows("prompt", f"jsonl:{path}", "all")
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match=r"row 0: a preference row .*; found: question"):
        load_rows("preference", f"jsonl:{path}", "all")


@pytest.mark.parametrize(
    ("kind", "source", "split", "message"),
    [
        ("rlhf", "reviews", "train", "kind='rlhf' must be one of sft, preference, prompt"),
        ("sft", "books", "train", re.escape(f"'books' must be one of {', '.join(SOURCES)}")),
        ("sft", "reviews", "dev", "split='dev' must be one of train, validation, test or all"),
        ("preference", "chitchat", "train", "'chitchat' has no preferences"),
        ("preference", "pyrit", "train", "harmful answers: pass allow_harmful=True"),
        ("sft", "llamafactory:fr", "train", "must end in en or zh"),
    ],
)
def test_wrong_arguments_name_the_right_ones(kind, source, split, message):
    with pytest.raises(ValueError, match=message):
        load_rows(kind, source, split)


def test_reviews_of_every_kind():
    assert set(load_rows("sft", "reviews", "test", limit=2)[0]) == {"text"}
    prompts = load_rows("prompt", "reviews", "test", words=(3, 3), domains=("amazon",), limit=4)
    assert [len(row["prompt"].split(" ")) for row in prompts] == [3] * 4
    pairs = load_rows("preference", "reviews", "test", num_pairs=20, min_gap=3.0, seed=1)
    assert len(pairs) == 20
    assert min(row["margin"] for row in pairs) >= 3.0 - 1e-6


def turn(sender, *texts):
    return [{"sender": sender, "text": text} for text in texts]


def test_conversations_are_cut_into_windows():
    talk = [turn("x", "hi", " there"), turn("y", "hello"), turn("x", "&amp;?"), turn("y", "fine")]
    rows = chitchat.window_rows([talk], "all", max_turns=2)
    assert rows == [
        {
            "messages": [
                {"role": "user", "content": "hi there"},
                {"role": "assistant", "content": "hello"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "&?"},
                {"role": "assistant", "content": "fine"},
            ]
        },
    ]
    assert len(chitchat.window_rows([talk], "all", max_turns=4)[0]["messages"]) == 4


def test_conversations_without_answer_and_repeated_windows_are_counted():
    drops = DropCounts()
    talks = [
        [turn("x", "hi")],
        [turn("x", "hi"), turn("y", " "), turn("x", "anyone?")],
        [turn("x", "a"), turn("y", "b"), turn("x", "c")],
        [turn("x", "A!"), turn("y", "b")],
    ]
    rows = chitchat.window_rows(talks, "all", max_turns=2, drops=drops)
    assert [row["messages"][0]["content"] for row in rows] == ["a"]
    assert drops == {"nobody answered": 2, "last turn without an answer": 1, "duplicate text": 1}
    with pytest.raises(ValueError, match="max_turns=3 must be even"):
        chitchat.window_rows(talks, "all", max_turns=3)


def test_conversations_are_in_one_split():
    talks = [
        [turn("x", f"say {n}"), turn("y", "no"), turn("x", "ok"), turn("y", f"{n}")]
        for n in range(60)
    ]
    rows = {split: chitchat.window_rows(talks, split, max_turns=4) for split in SPLITS}
    assert sum(map(len, rows.values())) == 60
    assert len(rows["train"]) > len(rows["test"]) > 0


HARM = (
    "# dataset_version=1.0,,\r\nharm_category,objective,assistant_response,human_score_1,"
    "human_score_2\r\ntoy,question,answer one,0,0.5\r\ntoy,question,answer two,1,1\r\n"
    "toy,question,Answer one!,0,0\r\ntoy,other,answer,0.5,\r\n"
)


@pytest.fixture
def harm_file(monkeypatch):
    def serve(content):
        files = {"x/scorer_evals/harm/toy.csv": content.encode(), "x/other.csv": b"a,b\r\n1,2\r\n"}
        monkeypatch.setattr(archives, "read_members", lambda name, suffix: files)

    return serve


def test_harm_scores_become_pairs_with_the_safer_answer_first(harm_file):
    harm_file(HARM)
    drops = DropCounts()
    (row,) = load_rows("preference", "pyrit", "all", allow_harmful=True, drops=drops)
    assert row == {
        "prompt": [{"role": "user", "content": "question"}],
        "chosen": "answer one",
        "rejected": "answer two",
        "margin": 0.75,
    }
    assert drops == {"duplicate answer": 1}


def test_harm_score_that_is_not_finite_names_the_row(harm_file):
    harm_file(HARM.replace("0.5,\r\n", "nan,\r\n"))
    with pytest.raises(ValueError, match=r"toy\.csv, row 3 has scores \[nan\]"):
        harm.harm_answers("all")


def test_harm_pairs_of_a_prompt_are_capped(harm_file):
    answers = "".join(f"toy,question,answer {n},{n / 10}\r\n" for n in range(10))
    harm_file("harm_category,objective,assistant_response,human_score\r\n" + answers)
    pairs = harm.harm_pairs("all", num_pairs=100, max_per_prompt=5, seed=0)
    assert len(pairs) == 5
    assert all(row["margin"] >= 0.25 for row in pairs)


def test_archives_have_the_documented_rows():
    drops = DropCounts()
    rows = load_rows("sft", "chitchat", "all", drops=drops)
    # 3,150 conversations with one speaker, and one whose second speaker sent no word.
    assert drops["nobody answered"] == 3_151
    words = sum(len(m["content"].split()) for row in rows for m in row["messages"])
    assert 2_300_000 < words < 2_400_000
    assert len(load_rows("prompt", "pyrit", "all", allow_harmful=True)) == 390
