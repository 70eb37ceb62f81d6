"""report.md, report.json and the summary on screen."""

import io
import json
import math
import re

import numpy as np
import pytest

from rlhf_jax.evaluation.comparison import Interval, WinRate, win_tie_lose
from rlhf_jax.evaluation.report import (
    Target,
    escape_markdown,
    format_value,
    print_summary,
    seeds_table,
    write_report,
)

WIN_RATE = WinRate(0.6, 0.1, 0.3, 0.65, 0.605, 0.694, 512)
TABLE = {
    "SFT": {"reward": Interval(0.1, 0.05, 0.15), "perplexity": 20.34567},
    "PPO-max": {"reward": 1.25, "perplexity": 31, "distinct-2": 0.5},
    "DPO": {"perplexity": None, "judge": "n/a"},
}


def _report(workdir, **changes):
    arguments = {
        "title": "PPO-max on reviews",
        "command": "python -m experiments.ppo_max",
        "hardware": "2 CPU cores",
        "summary_table": TABLE,
    }
    return write_report(workdir, **(arguments | changes)).read_text(encoding="utf-8")


def _tables(text):
    """The Markdown tables of a text, as lists of rows of cells, split at unescaped bars."""
    tables, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            tables.append(rows)
            rows = []
    for table in tables:
        assert len({len(row) for row in table}) == 1
        assert all(re.fullmatch(r":?-+:?", cell) for cell in table.pop(1))
    return tables


def test_summary_has_a_column_a_policy_and_a_row_a_metric(tmp_path):
    ((head, *rows),) = _tables(_report(tmp_path))
    assert head == ["", "SFT", "PPO-max", "DPO"]
    assert rows == [
        ["reward", "0.1 [0.05, 0.15]", "1.25", "–"],
        ["perplexity", "20.35", "31", "–"],
        ["distinct-2", "–", "0.5", "–"],
        ["judge", "–", "–", "n/a"],
    ]


def test_report_is_complete_and_in_order(tmp_path):
    text = _report(
        tmp_path,
        win_rates={"PPO-max against SFT": WIN_RATE},
        samples=[{"prompt": "The film", "SFT": "was", "PPO-max": "is great"}],
        figures={"Training": tmp_path / "figures" / "ppo max.png"},
        targets=[
            Target("KL", "< 15 nats", "3.1", True),
            Target("win rate", "> 70%", "65.0%", False),
        ],
        notes=["One judge, one task."],
        seeds=[0, 1, 2],
        wall_seconds={"sft": 60.04, "ppo": 100.0},
    )
    assert text.startswith("# PPO-max on reviews\n")
    assert "```\npython -m experiments.ppo_max\n```" in text
    assert "Hardware: 2 CPU cores. Seeds: 0, 1, 2." in text
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings == [
        "Targets",
        "Summary",
        "Win rates",
        "Figures",
        "Samples",
        "Wall time",
        "Notes",
    ]
    targets, _, win_rates, samples, wall_time = _tables(text)
    # The missed one comes first.
    assert [row[0] for row in targets] == ["target", "win rate", "KL"]
    assert [row[3] for row in targets[1:]] == ["**missed**", "reached"]
    expected = ["60.0%", "10.0%", "30.0%", "65.0%", "[60.5%, 69.4%]", "512"]
    assert win_rates[1] == ["PPO-max against SFT", *expected]
    assert samples == [["prompt", "SFT", "PPO-max"], ["The film", "was", "is great"]]
    assert wall_time[1:] == [["sft", "60.0"], ["ppo", "100.0"], ["total", "160.0"]]
    assert "![Training](<figures/ppo max.png>)" in text
    assert text.endswith("- One judge, one task.\n")


def test_empty_sections_are_left_out(tmp_path):
    assert re.findall(r"^## (.*)$", _report(tmp_path), flags=re.MULTILINE) == ["Summary"]
    assert "Seeds" not in _report(tmp_path)


def test_figures_are_linked_relative_to_the_report(tmp_path):
    text = _report(tmp_path / "run", figures={"Other": tmp_path / "sft" / "a.png"})
    assert "](<../sft/a.png>)" in text


def test_policies_of_samples_need_not_agree(tmp_path):
    samples = [{"prompt": "a", "SFT": "b"}, {"prompt": "c", "SFT": "d", "DPO": "e"}]
    table = _tables(_report(tmp_path, samples=samples))[1]
    assert table == [["prompt", "SFT", "DPO"], ["a", "b", "–"], ["c", "d", "e"]]


@pytest.mark.parametrize(
    "text",
    [
        "a | b || c",
        "line\nline\r\nline\rline\n\nline",
        "# heading\n- item\n```\ncode",
        "<script>alert(1)</script> &amp; <br> <!-- x",
        "[link](http://x) ![i](y) *b* _i_ `c` ~~s~~ $x$",
        "back\\slash \\| bar",
        "\x00\x0b\x1b[31mred\x85\u2028",
        "\ud800 lone surrogate",
        "",
    ],
)
def test_samples_cannot_break_the_table(tmp_path, text):
    samples = [{"prompt": text, "SFT": text}, {"prompt": "plain", "SFT": "text"}]
    report = _report(tmp_path, samples=samples)
    table = _tables(report)[1]
    assert len(table) == 3
    assert table[2] == ["plain", "text"]
    assert table[1][0] == table[1][1] == escape_markdown(text).strip()


@pytest.mark.parametrize("text", ["001", "1e5", "0.10", "1,234", "nan", "True", "0x10", "-0"])
def test_text_that_looks_like_a_number_is_not_read_as_one(tmp_path, text):
    samples = [{"prompt": text, "SFT": "12.5"}, {"prompt": "2", "SFT": "3"}]
    targets = [Target("KL", text, text, True)]
    table, _, sampled = _tables(_report(tmp_path, samples=samples, targets=targets))
    assert table[1] == ["KL", text, text, "reached"]
    assert sampled[1] == [escape_markdown(text), "12.5"]
    stream = io.StringIO()
    print_summary({"SFT": {"judge": text, "reward": 0.5}}, stream=stream)
    assert stream.getvalue().splitlines()[1].split() == ["judge", text]


def test_escaped_text_by_hand():
    assert escape_markdown("a|b\n<i> *c* & \\") == r"a\|b<br>&lt;i&gt; \*c\* &amp; \\"
    assert escape_markdown("a\r\nb\rc") == "a<br>b<br>c"
    assert escape_markdown("a\tb\x00") == "a b\N{REPLACEMENT CHARACTER}"
    assert escape_markdown('it\'s "so" good, 100%.') == 'it\'s "so" good, 100%.'


def test_markdown_characters_are_never_bare():
    escaped = escape_markdown("\\`*_{}[]()#+-!|~$")
    assert re.fullmatch(r"(\\[^a-z\s]){17}", escaped)


def test_long_samples_are_cut_before_escaping_and_say_so():
    assert escape_markdown("|" * 10, max_chars=4) == r"\|\|\|\| … (6 more characters)"
    assert escape_markdown("abcd", max_chars=4) == "abcd"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (512, "512"),
        (123456, "123456"),
        (123456.7, "123,457"),
        (-123456.7, "-123,457"),
        (1e-7, "1e-07"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        (None, "–"),
        ("text", "text"),
        (Interval(0.5, 0.25, 12345.6), "0.5 [0.25, 12,346]"),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text


def test_json_holds_the_numbers_in_full(tmp_path):
    table = {"SFT": {"reward": np.float32(0.1), "nan": math.nan, "i": Interval(1.0, 0.5, 1.5)}}
    _report(
        tmp_path,
        summary_table=table,
        win_rates={"a against b": WIN_RATE},
        seeds=[3],
        wall_seconds={"sft": 1.25},
        targets=[Target("KL", "< 15", "3", True)],
    )
    text = (tmp_path / "report.json").read_text()
    numbers = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    row = numbers["summary"]["SFT"]
    assert row["reward"] == float(np.float32(0.1))
    assert row["nan"] == "NaN"
    assert row["i"] == {"value": 1.0, "low": 0.5, "high": 1.5}
    assert numbers["win_rates"]["a against b"]["win_rate"] == 0.65
    assert numbers["win_rates"]["a against b"]["num_prompts"] == 512
    assert numbers["seeds"] == [3]
    assert numbers["wall_seconds"] == {"sft": 1.25}
    assert numbers["targets"][0]["reached"] is True


def test_printed_summary_is_aligned():
    stream = io.StringIO()
    print_summary(
        {"SFT": {"reward": 0.5, "KL per response": 0.0}, "PPO-max": {"reward": 12.0}},
        {"PPO-max against SFT": WIN_RATE},
        title="Result",
        targets=[Target("KL", "< 15", "3", True), Target("win rate", "> 70%", "65.0%", False)],
        stream=stream,
    )
    assert stream.getvalue() == (
        "Result\n"
        "                 SFT  PPO-max\n"
        "reward           0.5       12\n"
        "KL per response    0        –\n"
        "PPO-max against SFT: " + WIN_RATE.summary() + "\n"
        "missed: win rate 65.0%, wanted > 70%\n"
    )


def test_summary_goes_to_standard_output(capsys):
    print_summary({"SFT": {"reward": 1.0}})
    assert "reward" in capsys.readouterr().out


def test_win_rates_come_straight_from_the_comparison(tmp_path):
    rate = win_tie_lose([1.0, 1.0, 0.0], [0.0, 1.0, 1.0])
    text = _report(tmp_path, win_rates={"a against b": rate})
    assert _tables(text)[1][1][1:5] == ["33.3%", "33.3%", "33.3%", "50.0%"]


def test_seeds_side_by_side(tmp_path):
    folders = [tmp_path / str(seed) for seed in range(3)]
    rewards, rates = (1.0, 2.0, 6.0), (0.6, 0.65, 0.7)
    for folder, reward, rate in zip(folders, rewards, rates, strict=True):
        table = {
            "SFT": {"reward": 0.5, "note": "text"},
            "PPO-max": {"reward": Interval(reward, 0.0, 9.0), "KL": None if rate == 0.65 else 3.0},
        }
        _report(
            folder,
            summary_table=table,
            win_rates={"PPO-max against SFT": WIN_RATE._replace(win_rate=rate)},
        )
    summary, wins = _tables(seeds_table(folders))
    assert summary == [
        ["", "SFT", "PPO-max"],
        ["reward", "0.5 [0.5, 0.5]", "3 [1, 6]"],
        ["note", "–", "–"],
        ["KL", "–", "–"],
    ]
    assert wins[1] == ["PPO-max against SFT", "0.65 [0.6, 0.7]"]


def test_seeds_without_win_rates_or_reports(tmp_path):
    _report(tmp_path / "0")
    assert len(_tables(seeds_table([tmp_path / "0"]))) == 1
    with pytest.raises(FileNotFoundError):
        seeds_table([tmp_path / "1"])
    with pytest.raises(ValueError, match="at least one folder"):
        seeds_table([])
