"""What all tasks share: names, streams, stores, and a task of one's own out of the docs."""

import re
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.data import prepare
from rlhf_jax.data.batches import PackedBatches, packed_batches
from rlhf_jax.data.store import TokenStore
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.runtime import distributed
from rlhf_jax.tasks import TASKS, Examples, Task, TaskConfig, make_task
from tests import hh

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("books", r"source='books' must be one of reviews, reviews_zh, hh, jsonl, harm"),
        ("pyrit", r"source='pyrit' .* use harm"),
        ("stream:reviews", r"'stream:reviews' cannot be streamed: only hh and jsonl can"),
        ("stream:harm", r"'stream:harm' cannot be streamed"),
        ("llamafactory:fr", r"'llamafactory:fr' must be llamafactory:en or llamafactory:zh"),
    ],
)
def test_wrong_sources_name_the_right_ones(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_task(TaskConfig(source))
    assert "\n" not in str(caught.value)


def test_only_reviews_have_a_rule_that_judges_them():
    assert {name: task.judges for name, task in TASKS.items() if task.judges} == {
        "reviews": ("vader",)
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    return hh.write_folder(tmp_path / "hh", train=40, test=30)


def documents(source, tokenizer, split="train", **settings):
    return make_task(TaskConfig(source, **settings)).documents(tokenizer, split, max_length=64)


def test_a_split_that_does_not_exist_is_refused(folder, plain):
    for source in ("reviews", folder):
        with pytest.raises(ValueError, match="split='dev' must be one of train, validation, test"):
            documents(source, plain, "dev")


def test_nobody_rated_conversations(folder, plain):
    task = make_task(TaskConfig(folder))
    assert task.rated_texts("test") is None
    with pytest.raises(ValueError, match=r"needs ratings: data\.source='hh:.* has none"):
        task.rated(plain, "train", max_length=64, count=3)


def test_prompts_are_shown_whole(folder, plain):
    assert make_task(TaskConfig(folder)).shown(plain)("Human: hi") == "Human: hi"


def test_references_are_the_chosen_answers(folder, plain):
    task = make_task(TaskConfig(folder))
    pairs = task.preferences(plain, "train", max_length=64, count=7)
    found = task.references(plain, max_length=64, count=7)
    assert len(found) == 7
    for document, pair in zip(found, pairs, strict=True):
        np.testing.assert_array_equal(document.tokens, pair.chosen.tokens)


def test_only_training_rows_are_streamed(folder, plain):
    streamed = documents(f"stream:{folder}", plain)
    assert streamed.streamed and not documents(f"stream:{folder}", plain, "validation").streamed
    for look in (len, iter, lambda examples: examples[0]):
        with pytest.raises(ValueError, match=r"is read as the run trains.* leave out stream:"):
            look(streamed)
    loaded, expected = streamed.loaded(), documents(folder, plain)
    assert not loaded.streamed and len(loaded) == len(expected) == 80
    for a, b in zip(loaded, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_a_stream_is_limited_and_reported_block_by_block(folder, plain, capsys):
    examples = documents(f"stream:{folder}", plain, limit=30)
    assert capsys.readouterr().out == ""
    next(packed_batches(examples, rows=2, length=64, seed=0, pad_id=0))
    found = capsys.readouterr().out
    assert found == f"sft rows, the next 30 of stream:{folder}: kept 30 of 30, truncated 7\n"


def test_the_seed_decides_what_a_stream_draws(folder, plain):
    def order(seed):
        examples = documents(f"stream:{folder}", plain)
        batches = packed_batches(examples, rows=4, length=64, seed=seed, pad_id=0)
        return [next(batches)["tokens"].tobytes() for _ in range(3)]

    assert order(0) == order(0) != order(1)


def test_a_position_of_another_source_or_kind_is_refused(folder, plain, tmp_path):
    def batches(source, kind="documents"):
        examples = getattr(make_task(TaskConfig(source)), kind)(plain, "train", max_length=64)
        return examples.batches(PackedBatches, seed=0, batch_size=2, length=64)

    other = "stream:" + hh.write_folder(tmp_path / "other", train=40, test=30)
    state = batches(f"stream:{folder}").state()
    batches(f"stream:{folder}").restore(state)
    for one in (batches(other), batches(f"stream:{folder}", "prompts")):
        with pytest.raises(ValueError, match="the saved position has source="):
            one.restore(state)


def test_examples_are_the_rows_below_them(folder, plain):
    examples = documents(folder, plain)
    assert isinstance(examples, Examples) and examples.loaded() is examples
    assert [e.tokens.tolist() for e in examples[:3]] == [
        examples[i].tokens.tolist() for i in (0, 1, 2)
    ]
    assert list(examples)[4] is examples.rows[4]
    made = examples.batches(lambda rows, *, seed, width: (rows, seed, width), seed=3, width=5)
    assert made == (examples.rows, 3, 5)


def test_many_rows_go_to_a_store_that_the_next_task_opens(folder, plain, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "IN_MEMORY", 50)
    first = documents(folder, plain)
    monkeypatch.setattr(prepare, "encoded_rows", None)
    second = documents(folder, plain)
    assert isinstance(first.rows, TokenStore) and isinstance(second.rows, TokenStore)
    out = capsys.readouterr().out
    assert "written to" in out and "encoded before" in out
    assert out.count("SFT documents (train): kept 80 of 80") == 2


def test_batches_plan_by_the_lengths_of_a_store_and_read_no_row(folder, plain, monkeypatch):
    monkeypatch.setattr(prepare, "IN_MEMORY", 50)
    examples = documents(folder, plain)
    read = []
    get = TokenStore.__getitem__
    monkeypatch.setattr(TokenStore, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    batches = PackedBatches(examples, batch_size=2, length=64, seed=0)
    assert batches.steps_per_epoch > 1 and read == []
    next(batches)
    assert 0 < len(read) < 20


def test_rows_without_a_fingerprint_stay_in_memory(folder, plain, monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "IN_MEMORY", 5)
    monkeypatch.setattr(TASKS["hh"], "fingerprint", lambda self, split: None)
    assert isinstance(documents(folder, plain).rows, list)
    assert not (tmp_path / "cache").exists()


def test_whatever_decides_the_rows_makes_another_store(
    folder, plain, folding, monkeypatch, tmp_path
):
    monkeypatch.setattr(prepare, "IN_MEMORY", 5)

    def stores():
        return len(list((tmp_path / "cache" / "tokens").iterdir()))

    def made(config, task=None, kind="documents", split="train", tokenizer=plain, **limits):
        task = task or make_task(TaskConfig(**{"source": folder} | config))
        getattr(task, kind)(tokenizer, split, **{"max_length": 64} | limits)
        return stores()

    class Other(type(make_task(TaskConfig(folder)))):
        """The same rows, of another file of code."""

    assert [
        made({}),
        made({}),
        made({"limit": 70}),
        made({}, kind="prompts"),
        made({}, kind="preferences", count=0),
        made({}, kind="preferences", count=60),
        made({}, split="validation"),
        made({}, max_length=65),
        made({"seed": 5}),  # decides nothing here
        made({}, task=Other(TaskConfig(folder))),
        # The same template and special tokens: only what the tokenizer does to text differs.
        made({}, tokenizer=folding),
    ] == [1, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]


def test_other_processes_wait_for_process_0_and_open_what_it_has_encoded(
    folder, plain, monkeypatch
):
    monkeypatch.setattr(prepare, "IN_MEMORY", 50)
    encode, events = prepare.encoded_rows, []
    main = [False]

    def encoded_rows(*arguments, **settings):
        events.append(f"process {0 if main[0] else 1} encodes")
        return encode(*arguments, **settings)

    def barrier(name):
        events.append(name)
        if not main[0]:  # process 0 gets there as well
            main[0] = True
            events.append(documents(folder, plain))
            main[0] = False

    monkeypatch.setattr(distributed, "is_main", lambda: main[0])
    monkeypatch.setattr(distributed, "barrier", barrier)
    monkeypatch.setattr(prepare, "encoded_rows", encoded_rows)
    second = documents(folder, plain)
    *said, first = events
    assert said == ["sft rows are encoded", "process 0 encodes", "sft rows are encoded"]
    assert len(first) == len(second) == 80
    assert second.rows.counts == first.rows.counts


def test_the_task_of_the_docs(capsys, monkeypatch):
    """The page promises 25 lines; they run, and every stage gets what it asks for."""
    page = (ROOT / "docs" / "data.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 25
    monkeypatch.setitem(TASKS, "sums", None)  # taken out again after the test
    exec(compile(code, "docs/data.md", "exec"), {"__name__": "its_own_module"})
    task = make_task(TaskConfig("sums"))
    tokenizer = train_bpe(task.texts(), 300)
    documents = task.documents(tokenizer, "train", max_length=64)
    assert len(documents) == 711 and "= ?" in tokenizer.decode(documents[0].tokens)
    pairs = task.preferences(tokenizer, "test", max_length=64, count=10)
    assert len(pairs) == 10
    assert len(task.prompts(tokenizer, "validation", max_length=64)) == 105
    assert len(task.references(tokenizer, max_length=64, count=5)) == 5
    assert "SFT documents (train): kept 711 of 711\n" in capsys.readouterr().out


def test_nothing_but_tasks_asks_for_the_source():
    asks = re.compile(r"\bsource\s*(==|!=|in\b|not in\b)|\.source\.startswith")
    for room in ("rlhf_jax", "experiments"):
        for path in (ROOT / room).rglob("*.py"):
            if "tasks" not in path.parts:
                assert not asks.search(path.read_text()), path


def test_a_task_needs_rows():
    with pytest.raises(TypeError, match=r"abstract method '?rows"):
        Task(TaskConfig("reviews"))
