"""Win, tie, lose of two finished runs on the same held-out prompts, by several judges.

  python -m experiments.judge --a runs/ppo_max/quickstart --b runs/ppo_max/quickstart-vanilla \\
      --by vader language_model compare
  python -m experiments.judge --a runs/ppo_max/quickstart --b runs/ppo_max/quickstart:SFT

Reads what the runs wrote at their end (responses.jsonl); `RUN:NAME` is another policy of a run's
report, such as its SFT. A judge that scores texts compares two scores. `compare` (or
`compare:FOLDER`) shows a language model both responses, in both orders: a win counts if it survives
the swap, else it is a tie. Beside the shares: how often the order decides, how often the longer one
is preferred, the win rate at equal lengths, and how far the judges agree beyond chance. Writes
judge.json, judge.md and judge.png, one stacked bar a judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from configs.common import SMOLLM2
from experiments import command, drawing, judges, reporting, stages
from rlhf_jax.data.jsonl import read_jsonl
from rlhf_jax.evaluation.agreement import cohen_kappa
from rlhf_jax.evaluation.comparison import Interval, WinRate, paired_outcomes, win_tie_lose
from rlhf_jax.evaluation.language_model import short_name
from rlhf_jax.evaluation.length_control import length_controlled_win_rate
from rlhf_jax.evaluation.plots import save_figure
from rlhf_jax.methods import ai_feedback
from rlhf_jax.methods.ai_feedback import Comparison
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler
from rlhf_jax.runtime.files import make_folder, write_whole
from rlhf_jax.runtime.run_info import run_info, to_json
from rlhf_jax.training.record import read_config, read_summary

COMPARE = "compare"
OUTCOMES = (("A wins", "win"), ("tie", "tie"), ("A loses", "lose"))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says of A against B.

    Attributes:
      judge: its name.
      outcomes: `[N]`: 1 where A wins, 0 where it loses, 1/2 for a tie.
      habits: of a judge that compares: position bias, flips, ...; see `ai_feedback.Compared`.
    """

    judge: str
    outcomes: np.ndarray
    habits: dict[str, float]


def read_run(where: str) -> tuple[str, list[tuple[str, str]]]:
    """What a run answered to its held-out prompts.

    Args:
      where: folder of the run; or `FOLDER:NAME` for another policy of its report.

    Returns:
      What it is called, and its prompts with their responses.

    Raises:
      ValueError: no finished run that wrote responses, or it has no such policy.
    """
    folder, name = where, ""
    if not Path(where).is_dir() and ":" in where:
        folder, _, name = where.rpartition(":")
    path = Path(folder) / reporting.RESPONSES
    if read_summary(folder) is None or not path.exists():
        raise ValueError(
            f"{folder} holds no finished run with {reporting.RESPONSES}: give that of "
            "experiments.ppo_max or experiments.dpo"
        )
    name = name or read_config(Path(folder) / "config.json")["config"]["label"]
    rows = list(read_jsonl(path))
    if rows and name not in rows[0]["responses"]:
        known = ", ".join(rows[0]["responses"])
        raise ValueError(f"{folder} has no answers of {name!r}: it has {known}")
    return f"{folder} ({name})", [(row["prompt"], row["responses"][name]) for row in rows]


def on_the_same_prompts(
    one: Sequence[tuple[str, str]], other: Sequence[tuple[str, str]], most: int = 0
) -> list[Comparison]:
    """Responses of two runs to the prompts that both answered, in the order of the first.

    Args:
      one: prompts with their responses; a prompt that is asked again is another one.
      other: the same of the other run.
      most: prompts; 0 is all.

    Raises:
      ValueError: no prompt is in both.
    """

    def numbered(answers: Sequence[tuple[str, str]]) -> dict[tuple[str, int], str]:
        seen: Counter[str] = Counter()
        found = {}
        for prompt, response in answers:
            found[prompt, seen[prompt]] = response
            seen[prompt] += 1
        return found

    mine, theirs = numbered(one), numbered(other)
    both = [Comparison(key[0], mine[key], theirs[key]) for key in mine if key in theirs]
    if not both:
        raise ValueError("the two runs answered no prompt in common: give runs on the same data")
    return both[: most or None]


def ask(name: str, pairs: Sequence[Comparison], options: argparse.Namespace) -> Verdict:
    """What one judge says.

    Args:
      name: "compare", "compare:FOLDER", or as `make_judge` takes it.
      pairs: responses of A and of B.
      options: of the command line.
    """
    kind, _, folder = name.partition(":")
    if kind == COMPARE:
        folder = folder or SMOLLM2
        stages.require(folder)
        model = ai_feedback.load_feedback_model(folder, name=short_name(folder))
        template = ai_feedback.load_template(options.template)
        return by_comparison(model, pairs, template)
    judge = judges.build(name, examples=True, scale=options.scale)
    scores = [
        judge([f"{pair.prompt}{response}" for pair, response in zip(pairs, side, strict=True)])
        for side in ([pair.first for pair in pairs], [pair.second for pair in pairs])
    ]
    return Verdict(judge.name, paired_outcomes(*scores), {})


def by_comparison(
    model: ai_feedback.FeedbackModel,
    pairs: Sequence[Comparison],
    template: ai_feedback.Template,
) -> Verdict:
    """Comparisons in both orders: only what survives the swap is a win."""
    compared = ai_feedback.compare(model, pairs, template)
    return Verdict(f"{model.name} compares", compared.survives, compared.statistics())


def prefers_longer(outcomes: np.ndarray, longer: np.ndarray) -> float:
    """Share of the decided pairs of two lengths in which the longer response wins; ½ of none.

    Args:
      outcomes: `[N]`.
      longer: `[N]`, length of A's response less that of B's.
    """
    decided = (outcomes != 0.5) & (longer != 0)
    if not decided.any():
        return 0.5
    return float(np.mean((outcomes[decided] > 0.5) == (longer[decided] > 0)))


def measured(verdict: Verdict, pairs: Sequence[Comparison]) -> dict[str, Any]:
    """Shares and win rates of a judge, plain and at equal lengths, in characters."""
    lengths = np.array([[len(pair.first), len(pair.second)] for pair in pairs]).T
    outcomes = verdict.outcomes
    rate: WinRate = win_tie_lose(outcomes, 1 - outcomes)
    return {
        "judge": verdict.judge,
        **rate._asdict(),
        "length_controlled": length_controlled_win_rate(outcomes, *lengths),
        "prefers_longer": prefers_longer(outcomes, lengths[0] - lengths[1]),
        "habits": verdict.habits,
    }


def table(content: dict[str, Any]) -> str:
    """A row a judge, and the agreement of each two of them."""
    rows = [
        [
            one["judge"],
            f"{one['win']:.1%} / {one['tie']:.1%} / {one['lose']:.1%}",
            _percent(Interval(one["win_rate"], one["low"], one["high"])),
            _percent(Interval(*one["length_controlled"])),
            f"{one['prefers_longer']:.0%}",
            _share(one["habits"], "feedback/prefers_first"),
            _share(one["habits"], "feedback/flip_rate"),
        ]
        for one in content["judges"]
    ]
    head = ["judge", "win / tie / lose", "win rate", "at equal lengths", "prefers the longer"]
    head += ["prefers the first", "flips"]
    parts = [
        f"A is {content['a']}, B is {content['b']}; {content['prompts']} held-out prompts.",
        tabulate(rows, head, "github", disable_numparse=True),
    ]
    if content["kappa"]:
        agree = [
            [one["judges"][0], one["judges"][1], "{:.2f} [{:.2f}, {:.2f}]".format(*one["kappa"])]
            for one in content["kappa"]
        ]
        head = ["judge", "judge", "Cohen's kappa of win, tie, lose"]
        parts.append(tabulate(agree, head, "github", disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def _percent(one: Interval) -> str:
    return f"{one.value:.1%} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _share(habits: dict[str, float], name: str) -> str:
    return f"{habits[name]:.0%}" if name in habits else ""


def main(options: argparse.Namespace) -> None:
    """Asks every judge about the same pairs, and writes the three files."""
    guard_cpu_compiler()
    command.enable_compilation_cache()
    out = Path(options.out)
    make_folder(out)  # before the work
    (a, mine), (b, theirs) = read_run(options.a), read_run(options.b)
    pairs = on_the_same_prompts(mine, theirs, options.prompts)
    verdicts = [ask(name, pairs, options) for name in options.by]
    found: dict[str, Any] = {
        "a": a,
        "b": b,
        "prompts": len(pairs),
        "judges": [measured(verdict, pairs) for verdict in verdicts],
        "kappa": [
            {
                "judges": (one.judge, other.judge),
                "kappa": cohen_kappa(one.outcomes, other.outcomes),
            }
            for one, other in itertools.combinations(verdicts, 2)
        ],
    }
    content = to_json(run_info(vars(options)) | found)
    write_whole(out / "judge.json", json.dumps(content, indent=1) + "\n")
    write_whole(out / "judge.md", table(found))
    bars = [(one["judge"], one) for one in found["judges"]]
    figure = drawing.stacked_bars(bars, f"A: {a}, B: {b}", OUTCOMES)
    print(table(found))
    print(save_figure(figure, out / "judge.png"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--a", required=True, metavar="RUN[:NAME]", help="a finished run")
    parser.add_argument("--b", required=True, metavar="RUN[:NAME]", help="what it is held against")
    parser.add_argument("--by", nargs="+", default=["vader"], metavar="JUDGE", help="judges")
    parser.add_argument("--template", default="compare_reviews", help="what compare is asked")
    parser.add_argument("--prompts", type=int, default=0, help="the most; 0 is all")
    parser.add_argument("--scale", default="quickstart", help="of the judge gold")
    parser.add_argument("--out", default="runs/judge", help="folder of the three files")
    options = parser.parse_args(arguments)
    if options.prompts < 0:
        parser.error(f"--prompts {options.prompts} must be at least 0")
    if len(set(options.by)) < len(options.by):
        parser.error(f"--by {' '.join(options.by)} names a judge twice")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit(130)
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
