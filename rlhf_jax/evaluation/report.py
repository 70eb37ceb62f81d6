"""The report of a run: `report.md` for people, `report.json` for scripts, a summary on screen."""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tabulate import tabulate

from rlhf_jax.evaluation.comparison import Interval, WinRate
from rlhf_jax.runtime.files import read_json, write_whole
from rlhf_jax.runtime.run_info import to_json

# Policy -> metric -> value; an Interval prints with its ends, None as a dash.
SummaryTable = Mapping[str, Mapping[str, Any]]
Sample = Mapping[str, str]

_MISSING = "–"
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-!|~$])")


class Target(NamedTuple):
    """A number that was aimed at: `Target("win rate", "> 60%", "63.1%", True)`."""

    name: str
    wanted: str
    got: str
    reached: bool


def write_report(
    workdir: str | os.PathLike[str],
    *,
    title: str,
    command: str,
    hardware: str,
    summary_table: SummaryTable,
    win_rates: Mapping[str, WinRate] | None = None,
    samples: Sequence[Sample] = (),
    figures: Mapping[str, str | os.PathLike[str]] | None = None,
    targets: Sequence[Target] = (),
    notes: Sequence[str] = (),
    seeds: Sequence[int] = (),
    wall_seconds: Mapping[str, float] | None = None,
) -> Path:
    """Writes `workdir/report.md` and the same numbers as `workdir/report.json`.

    Args:
      workdir: folder of the run; created where missing.
      title: heading.
      command: the command that made the run.
      hardware: one line, e.g. "2 CPU cores, 8 GiB".
      summary_table: policy ("SFT", "PPO-max", "DPO") -> metric name -> number, `Interval`, text or
        None; one column per policy, one row per metric in the order of first mention.
      win_rates: "PPO-max against SFT" -> `WinRate`.
      samples: one mapping per prompt: "prompt" first, then one response per policy.
      figures: caption -> PNG, linked relative to `workdir`.
      targets: what was aimed at; missed ones are listed first.
      notes: what the numbers do not show, as lines of Markdown.
      seeds: the seeds of the run.
      wall_seconds: stage -> seconds.

    Returns:
      Path of `report.md`.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    win_rates, figures, wall_seconds = win_rates or {}, figures or {}, wall_seconds or {}
    sections = [
        _header(title, command, hardware, seeds),
        _targets_section(targets),
        _section("Summary", _summary_markdown(summary_table)),
        _section("Win rates", _win_rates_markdown(win_rates)),
        _figures_section(figures, workdir),
        _section("Samples", _samples_markdown(samples)),
        _section("Wall time", _wall_time_markdown(wall_seconds)),
        _section("Notes", "\n".join(f"- {note}" for note in notes)),
    ]
    path = workdir / "report.md"
    write_whole(path, "\n\n".join(part for part in sections if part) + "\n")
    run = {"title": title, "command": command, "hardware": hardware, "seeds": list(seeds)}
    results = {
        "summary": {policy: _plain(row) for policy, row in summary_table.items()},
        "win_rates": _plain(win_rates),
        "targets": [target._asdict() for target in targets],
        "wall_seconds": dict(wall_seconds),
    }
    _write_json(workdir / "report.json", run | results)
    return path


def print_summary(
    summary_table: SummaryTable,
    win_rates: Mapping[str, WinRate] | None = None,
    *,
    title: str = "",
    targets: Sequence[Target] = (),
    stream: TextIO | None = None,
) -> None:
    """Prints the summary, the win rates and missed targets in aligned columns.

    Args:
      summary_table: as in `write_report`.
      win_rates: as in `write_report`.
      title: first line.
      targets: as in `write_report`.
      stream: standard output where None.
    """
    rows = _summary_rows(summary_table)
    sides = ["left"] + ["right"] * (len(rows[0]) - 1)
    lines = [title] if title else []
    lines.append(tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides))
    lines += [f"{name}: {rate.summary()}" for name, rate in (win_rates or {}).items()]
    missed = [target for target in targets if not target.reached]
    lines += [f"missed: {t.name} {t.got}, wanted {t.wanted}" for t in missed]
    print("\n".join(lines), file=stream or sys.stdout, flush=True)


def seeds_table(workdirs: Sequence[str | os.PathLike[str]]) -> str:
    """Several runs of one experiment as one Markdown table: mean [lowest, highest] over the runs.

    Args:
      workdirs: folders that `write_report` wrote to, one per seed.

    Returns:
      A table with a column per policy and a row per metric, then a row per win rate; a number that
      a run lacks becomes a dash.

    Raises:
      ValueError: no folder.
      FileNotFoundError: a folder without report.json.
    """
    if not workdirs:
        raise ValueError("seeds_table needs at least one folder with a report.json")
    paths = [Path(workdir) / "report.json" for workdir in workdirs]
    reports = [read_json(path, "remove its folder's summary.json and run again") for path in paths]
    first = reports[0]["summary"]
    summary = {
        policy: {
            metric: over_seeds([r["summary"].get(policy, {}).get(metric) for r in reports])
            for metric in row
        }
        for policy, row in first.items()
    }
    tables = [_summary_markdown(summary)]
    names = list(reports[0]["win_rates"])
    if names:
        rates = {
            name: [r["win_rates"].get(name, {}).get("win_rate") for r in reports] for name in names
        }
        rows = [["", "win rate (ties one half)"]]
        tables.append(_table(rows + [[name, over_seeds(values)] for name, values in rates.items()]))
    return "\n\n".join(tables)


def over_seeds(values: Sequence[Any]) -> str:
    """Mean [lowest, highest] of numbers from report.json, as text; a dash where one is missing.

    Of a single number only that.
    """
    numbers = [value["value"] if isinstance(value, dict) else value for value in values]
    try:
        array = [float(number) for number in numbers]
    except (TypeError, ValueError):
        return _MISSING
    if len(array) == 1:
        return _number(array[0])
    return format_value(Interval(sum(array) / len(array), min(array), max(array)))


def escape_markdown(text: str, *, max_chars: int = 600) -> str:
    """Text as the cell of a Markdown table: shown as it is, never read as Markdown or HTML.

    Line breaks become `<br>`; text beyond `max_chars` is cut, and its length given.
    """
    # A lone surrogate cannot be written as UTF-8, and control characters break tables.
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    cut = len(text) - max_chars
    shown = text[:max_chars] if cut > 0 else text
    shown = _MARKDOWN.sub(r"\\\1", html.escape(shown, quote=False))
    shown = shown.replace("\n", "<br>")
    return shown + (f" … ({cut} more characters)" if cut > 0 else "")


def format_value(value: Any) -> str:
    """A number in four significant digits, an `Interval` with its ends, None as a dash.

    Numbers of 10,000 and more are rounded to whole ones.
    """
    if value is None:
        return _MISSING
    if isinstance(value, Interval):
        return f"{_number(value.value)} [{_number(value.low)}, {_number(value.high)}]"
    if isinstance(value, str | bool | int):
        return str(value)
    return _number(float(value))


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def _header(title: str, command: str, hardware: str, seeds: Sequence[int]) -> str:
    lines = [f"# {title}", "", "```", command, "```", "", f"Hardware: {hardware}"]
    if seeds:
        lines[-1] += f". Seeds: {', '.join(map(str, seeds))}"
    return "\n".join([*lines[:-1], lines[-1] + "."])


def _section(heading: str, body: str) -> str:
    return f"## {heading}\n\n{body}" if body else ""


def _targets_section(targets: Sequence[Target]) -> str:
    if not targets:
        return ""
    ordered = sorted(targets, key=lambda target: target.reached)
    rows = [["target", "wanted", "got", ""]]
    rows += [[t.name, t.wanted, t.got, "reached" if t.reached else "**missed**"] for t in ordered]
    return _section("Targets", _table(rows))


def _summary_rows(summary_table: SummaryTable) -> list[list[str]]:
    policies = list(summary_table)
    metrics = dict.fromkeys(name for row in summary_table.values() for name in row)
    rows = [["", *policies]]
    for name in metrics:
        rows.append([name, *(format_value(summary_table[p].get(name)) for p in policies)])
    return rows


def _summary_markdown(summary_table: SummaryTable) -> str:
    return _table(_summary_rows(summary_table)) if summary_table else ""


def _win_rates_markdown(win_rates: Mapping[str, WinRate]) -> str:
    if not win_rates:
        return ""
    rows = [["", "win", "tie", "lose", "win rate (ties one half)", "95% interval", "prompts"]]
    for name, rate in win_rates.items():
        shares = [f"{share:.1%}" for share in (rate.win, rate.tie, rate.lose, rate.win_rate)]
        interval = f"[{rate.low:.1%}, {rate.high:.1%}]"
        rows.append([name, *shares, interval, str(rate.num_prompts)])
    return _table(rows)


def _figures_section(figures: Mapping[str, str | os.PathLike[str]], workdir: Path) -> str:
    links = []
    for caption, path in figures.items():
        relative = Path(os.path.relpath(path, workdir)).as_posix()
        links.append(f"![{caption}](<{relative}>)\n\n*{caption}*")
    return _section("Figures", "\n\n".join(links))


def _samples_markdown(samples: Sequence[Sample]) -> str:
    columns = list(dict.fromkeys(name for sample in samples for name in sample))
    if not columns:
        return ""
    rows = [columns]
    for sample in samples:
        rows.append([escape_markdown(sample.get(name, _MISSING)) for name in columns])
    return _table(rows)


def _wall_time_markdown(wall_seconds: Mapping[str, float]) -> str:
    if not wall_seconds:
        return ""
    rows = [["stage", "seconds"]]
    rows += [[stage, f"{seconds:.1f}"] for stage, seconds in wall_seconds.items()]
    rows.append(["total", f"{sum(wall_seconds.values()):.1f}"])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head. Cells hold no line break and no bare `|`."""
    # Cells are text, also where they look like numbers: nothing may be reformatted.
    return tabulate(rows, headers="firstrow", tablefmt="pipe", disable_numparse=True)


def _write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    write_whole(
        path, json.dumps(to_json(numbers), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals and win rates as dicts, so that JSON keeps the names of their fields."""
    named = (Interval, WinRate)
    return {k: v._asdict() if isinstance(v, named) else v for k, v in values.items()}
