"""Mixtures: which rows of which source, in which order, and what is refused."""

import json

import pytest

from configs import ppo_max as ppo_configs
from configs import sft as sft_configs
from experiments import command, ppo_max
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.tasks import TaskConfig, make_task
from rlhf_jax.tasks.reviews import Reviews
from tests.tasks.rows import load_rows


@pytest.fixture
def folders(tmp_path):
    """Two folders with 100 and 40 training rows, 20 and 10 held out, and one row in common."""
    for name, train, held in (("a", 100, 20), ("b", 40, 10)):
        (tmp_path / name).mkdir()
        for split, count in (("train", train), ("validation", held), ("test", held)):
            rows = [{"prompt": f"{name} {split} {n}", "response": f"{n}"} for n in range(count - 1)]
            rows.append({"prompt": f"common {split}", "response": "0"})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / name / f"{split}.jsonl").write_text(text)
    return f"jsonl:{tmp_path}/a", f"jsonl:{tmp_path}/b"


def mixed(folders, weights, kind="sft", split="train", **settings):
    a, b = folders
    return load_rows(kind, f"mix:{weights[0]}@{a}+{weights[1]}@{b}", split, **settings)


def parts(rows):
    """How many rows of each part; of documents, the common one is in both."""
    return [sum(row["prompt"].startswith(name) for row in rows) for name in ("a ", "b ")]


@pytest.mark.parametrize(
    ("weights", "split", "expected"),
    [
        (("0.5", "0.5"), "train", (40, 40)),
        ((".75", ".25"), "train", (100, 33)),  # 133.3 rows; of the second not one too many
        (("0.1", "0.9"), "train", (4, 40)),
        (("0.5", "0.5"), "test", (10, 10)),
        (("60", "20"), "train", (60, 20)),
        (("100", "40"), "train", (100, 40)),
        (("8", "4"), "test", (8, 4)),
        (("80", "40"), "test", (20, 10)),  # in the shares of the numbers, as far as there are rows
    ],
)
def test_shares_and_numbers_are_kept(folders, weights, split, expected, capsys):
    rows = mixed(folders, weights, split=split)
    texts = [row["prompt"] for row in rows]
    assert len(rows) == sum(expected)
    common = texts.count(f"common {split}")
    assert len(set(texts)) == len(rows) - (common == 2)  # no row twice
    assert sum(parts(rows)) == sum(expected) - common
    assert all(0 <= n - found <= 1 for n, found in zip(expected, parts(rows), strict=True))
    assert f"mixture ({split}): {expected[0]} of " in capsys.readouterr().out


@pytest.mark.parametrize(
    "weights", [("8000", "20000"), ("3", "7"), ("1", "6"), ("0.3", "0.7"), ("0.07", "0.93")]
)
def test_weights_that_are_no_binary_fractions_lose_no_row(weights, tmp_path):
    for name, weight in zip("ab", weights, strict=True):
        number = int(weight) if weight.isdecimal() else round(float(weight) * 100)
        rows = [{"prompt": f"{name} {n}", "response": "x"} for n in range(number)]
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "train.jsonl").write_text(text)
    rows = mixed([f"jsonl:{tmp_path}/{name}" for name in "ab"], weights)
    assert len(rows) == (sum(map(int, weights)) if weights[0].isdecimal() else 100)


def test_every_beginning_has_the_shares(folders):
    rows = mixed(folders, ("0.75", "0.25"))
    whole = ["a" if "a " in row["prompt"] else "b" for row in rows if "common" not in row["prompt"]]
    for size in range(1, len(whole)):
        assert abs(whole[:size].count("a") - 0.75 * size) <= 2  # 1, and the common rows
    limited = mixed(folders, ("0.75", "0.25"), limit=20)
    assert len(limited) == 20 and 14 <= parts(limited)[0] <= 15 and 4 <= parts(limited)[1] <= 5


def test_the_seed_draws_which_rows(folders):
    one, same, other = (mixed(folders, ("0.2", "0.8"), seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    of_a = [int(row["prompt"].split()[-1]) for row in one if row["prompt"].startswith("a ")]
    assert len(of_a) >= 9 and max(of_a) > 20  # not the first of them


def test_a_prompt_of_two_parts_is_asked_once(folders):
    drops = DropCounts()
    rows = mixed(folders, ("100", "40"), "prompt", drops=drops)
    assert len(rows) == 139 and drops["duplicate prompt"] == 1
    assert sum(row["prompt"] == "common train" for row in rows) == 1


def test_everything_else_follows(folders, plain):
    a, b = folders
    task = make_task(TaskConfig(f"mix:0.5@{a}+0.5@{b}"))
    assert len(task.documents(plain, "train", max_length=64)) == 80
    assert len(task.prompts(plain, "test", max_length=64)) in (19, 20)
    assert any("a train" in text for text in task.texts()) and task.judges == ()
    assert set(task.digests) == {"sft train", "prompt test"}
    first = task.fingerprint("train")
    assert first and first != make_task(TaskConfig(f"mix:0.5@{a}+0.5@{b}", seed=1)).fingerprint(
        "train"
    )
    assert make_task(TaskConfig(f"mix:0.5@{a}+0.5@reviews")).fingerprint("train") is None


def test_only_who_may_judge_every_part_judges(folders, monkeypatch):
    def judges(*sources):
        return make_task(TaskConfig("mix:" + "+".join(f"1@{one}" for one in sources))).judges

    assert judges("reviews", "reviews") == ("vader",)
    assert judges("reviews", folders[0]) == () == judges(folders[0], "reviews")
    monkeypatch.setattr(Reviews, "judges", ("vader", "length"))
    assert judges("reviews", "reviews") == ("vader", "length")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", r"source='mix:' must be WEIGHT@SOURCE, two or more with \+ between them"),
        ("1@reviews", r"must be WEIGHT@SOURCE, two or more"),
        ("0.5@reviews+harm", r"must be WEIGHT@SOURCE|must be one of"),
        ("0.5@reviews+0.4@harm", r"weights 0.5, 0.4: .* add up to 1 \(here 0.9\)"),
        ("1.5@reviews+0.5@harm", r"weights 1.5, 0.5"),
        ("0@reviews+1@harm", r"weights 0, 1: "),
        ("0.5@reviews+5@harm", r"weights 0.5, 5"),
        ("0.5@reviews+0.5@books", r"source='books' must be one of"),
        (
            "0.5@reviews+0.5@stream:hh",
            r"'stream:hh' cannot be part of a mixture, only reviews, reviews_zh",
        ),
        ("0.5@reviews+0.5@mix:1@hh", r"'mix:1@hh' cannot be part of a mixture"),
    ],
)
def test_what_is_no_mixture_is_one_line(where, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_task(TaskConfig(f"mix:{where}"))
    assert "\n" not in str(caught.value)


def test_a_part_without_the_rows_is_named(folders, tmp_path):
    a, b = folders
    with pytest.raises(
        ValueError, match=r"asks 'jsonl:.*b' for 41 rows \(sft, train\), and it has 40"
    ):
        mixed(folders, ("10", "41"))
    alone = tmp_path / "prompts.jsonl"
    alone.write_text('{"prompt": "alone"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl in a mixture: row 0: .*response"):
        load_rows("sft", f"mix:0.5@{a}+0.5@jsonl:{alone}", "train")
    with pytest.raises(ValueError, match=r"/b in a mixture: row 0: .*chosen"):
        load_rows("preference", f"mix:0.5@{b}+0.5@reviews", "train", limit=4)


def test_a_gap_is_asked_of_parts_that_draw_pairs(folders):
    a, b = folders
    make_task(TaskConfig(f"mix:0.5@{a}+0.5@{b}", min_gap=0.0))
    with pytest.raises(ValueError, match=r"data.min_gap=0.0 must be above 0"):
        make_task(TaskConfig(f"mix:0.5@{a}+0.5@reviews", min_gap=0.0))


def test_a_mixture_survives_the_command_line():
    source = "mix:8000@hh:harmless-base+20000@hh:helpful-base"
    config = ppo_configs.get_config(f"tiny,data.prompt_source={source},data.prompt_buckets=(16,)")
    assert config.data.prompt_source == source
    config.workdir, config.inputs.model = "runs/x", "runs/sft/x/model"
    task = command.open_config("ppo_max", config, ppo_max.Settings).prompt_task()
    assert task.numbers == [8000, 20000] and task.weights == [8000 / 28000, 20000 / 28000]
    assert [part.config.source for part in task.parts] == ["hh:harmless-base", "hh:helpful-base"]
    shares = sft_configs.get_config(
        "tiny,data.source=mix:0.4@hh:helpful-base+harmless-base+.6@hh:A"
    )
    parts = make_task(TaskConfig(shares.data.source)).parts
    assert [part.where for part in parts] == ["helpful-base+harmless-base", "A"]
