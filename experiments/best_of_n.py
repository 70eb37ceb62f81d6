"""Best-of-n by the reward model against PPO-max, at equal KL to the SFT policy.

  python -m experiments.best_of_n runs/ppo_max/quickstart
  python -m experiments.best_of_n runs/ppo_max/quickstart* --samples 64

Best-of-n needs no training: the SFT policy answers n times, and the reward model chooses. Its KL to
the SFT policy is log n - (n - 1) / n, so that it can be laid beside a policy that was trained to
please the same reward model. Every run gives its SFT policy, its reward model, its test prompts and
its judges; several runs may be seeds or variants. What is measured: the reward, which both improve
by looking at it, and how often a judge that neither saw prefers the answer to one of SFT. Writes
`best_of_n.json`, `best_of_n.md` and `best_of_n.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from experiments import command, folders, judging, ppo_max, stages
from experiments.settings import judge_names
from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.evaluation.best_of_n import best_of_n_kl, expected_best_of_n
from rlhf_jax.evaluation.comparison import bootstrap_interval, paired_outcomes
from rlhf_jax.evaluation.panels import COLORS, new_figure
from rlhf_jax.evaluation.plots import save_figure
from rlhf_jax.rollouts.respond import Respondent, Responses
from rlhf_jax.rollouts.rollout import make_generate
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler
from rlhf_jax.runtime.files import make_folder, write_whole
from rlhf_jax.runtime.run_info import run_info, to_json
from rlhf_jax.training.record import read_config

REWARD = "reward"


def answers(
    folder: Path, settings: ppo_max.Settings, samples: int, seed: int
) -> tuple[list[Responses], Responses]:
    """What SFT and the trained policy write on the run's test prompts.

    Args:
      folder: of the run.
      settings: its own.
      samples: answers of SFT to each prompt, and one more to compare with.
      seed: of the draws.

    Returns:
      `samples + 1` times SFT's answers, and once those of the policy.
    """
    inputs, sharding, task = settings.inputs, settings.sharding.make(), settings.prompt_task()
    model, date = str(folder / folders.MODEL), folders.date(str(folder))
    tokenizer = stages.load_tokenizer(inputs.reference, inputs.reward_model, model, date=date)
    reference = stages.load_policy(inputs.reference, settings.model, sharding, frozen=True)
    sampling = settings.eval.sampling.of(settings.sampling)
    respond: Respondent = ppo_max.make_respondents(
        settings,
        task,
        tokenizer,
        settings.train.rollout_batch,
        generate=make_generate(
            sampling,
            eos_ids=tuple(stop_tokens(tokenizer)),
            pad_id=tokenizer.pad_token_id,
            sharding=sharding,
        ),
        temperature=sampling.policy_temperature,
        judges=judging.load_judges(judge_names(settings.judges, task), settings),
        reference=reference,
        reward_model=stages.load_scalar(inputs.reward_model, settings.model, sharding, frozen=True),
        sharding=sharding,
    )["test"]
    key, count = jax.random.key(seed), settings.eval.final_prompts
    drawn = []
    for number in range(samples + 1):
        drawn.append(respond(reference, jax.random.fold_in(key, number), count))
        if number % 8 == 0:
            print(f"{folder}: {number} of {samples} answers to each of {count} prompts", flush=True)
    policy = stages.load_policy(model, settings.model, sharding, frozen=True)
    return drawn, respond(policy, jax.random.fold_in(key, samples + 1), count)


def compare(drawn: Sequence[Responses], trained: Responses) -> dict[str, Any]:
    """Best-of-n for every n, the policy, and their difference at its KL.

    Args:
      drawn: N + 1 times SFT's answers to P prompts; the last are what win rates are against.
      trained: the policy's answers to the same.

    Returns:
      "kl": of each n; "n": 1 to N; by "reward" and by judge: the "curve" `[N]` with its "low" and
      "high", the "policy" with its interval, and the "difference" policy minus best-of-n at equal
      KL, or at N where the policy is farther than the best of N.
    """
    *samples, baseline = drawn
    scores = np.stack([one.rewards for one in samples], axis=1)  # [P, N]
    total = scores.shape[1]
    kls = np.array([best_of_n_kl(n) for n in range(1, total + 1)])
    kl = trained.statistics["policy/kl_ref_sequence"]
    wanted: dict[str, tuple[np.ndarray, np.ndarray]] = {REWARD: (scores, trained.rewards)}
    for name, before in baseline.judged.items():
        each = [paired_outcomes(one.judged[name], before) for one in samples]
        outcome = paired_outcomes(trained.judged[name], before)
        wanted[f"win_rate/{name}"] = np.stack(each, axis=1), outcome
    measured = {}
    for name, (values, mine) in wanted.items():
        by_n = np.stack([expected_best_of_n(scores, values, n + 1) for n in range(total)])
        at = np.array([np.interp(kl, kls, one) for one in by_n.T])  # at the ends beyond them
        ends = [bootstrap_interval(one) for one in by_n]
        measured[name] = {
            "curve": [one.value for one in ends],
            "low": [one.low for one in ends],
            "high": [one.high for one in ends],
            "policy": bootstrap_interval(mine),
            "at_equal_kl": float(at.mean()),
            "difference": bootstrap_interval(mine - at),
        }
    return {
        "n": list(range(1, total + 1)),
        "kl": kls.tolist(),
        "policy_kl": kl,
        "reached": bool(kl <= kls[-1]),
        "prompts": len(scores),
        "measured": measured,
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run, whole."""
    settings = ppo_max.finished(folder)
    record = read_config(folder / "config.json")
    drawn, trained = answers(folder, settings, options.samples, options.seed)
    about = {
        "run": str(folder),
        "seed": settings.seed,
        "variants": list(settings.variants),
        "commit": record["git"]["commit"],
        "command": record["command"],
    }
    return about | compare(drawn, trained)


def name_of(run: Mapping[str, Any]) -> str:
    """A run in tables."""
    return ", ".join([*(run["variants"] or ["PPO-max"]), f"seed {run['seed']}"])


def table(content: Mapping[str, Any]) -> str:
    """A table of every run at its KL, and one of best-of-n by n."""
    rows, curves = [], []
    for run in content["runs"]:
        for name, one in run["measured"].items():
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one["difference"])
            bound = "" if run["reached"] else f" (of N = {run['n'][-1]}, KL {run['kl'][-1]:.2f})"
            rows.append(
                [
                    name_of(run),
                    name,
                    f"{run['policy_kl']:.2f}",
                    f"{one['policy'][0]:.3f}",
                    f"{one['at_equal_kl']:.3f}{bound}",
                    difference,
                ]
            )
            shown = [n for n in run["n"] if n & (n - 1) == 0]
            curves.append([name_of(run), name, *(f"{one['curve'][n - 1]:.3f}" for n in shown)])
    head = ["run", "measured", "KL in nats", "policy", "best-of-n there", "policy minus best-of-n"]
    by_n = ["best of n", "measured", *map(str, shown)]
    make = [tabulate(rows, head, "github", disable_numparse=True)]
    make.append(tabulate(curves, by_n, "github", disable_numparse=True))
    return "\n\n".join(make) + "\n"


def draw(content: Mapping[str, Any], path: Path) -> Path:
    """What is measured against KL: best-of-n as a line with its band, the policies as points."""
    runs = content["runs"]
    names = list(runs[0]["measured"])
    figure = new_figure(1, len(names), width=5.0 * len(names), height=4.2)
    for axes, name in zip(figure.axes, names, strict=True):
        for number, run in enumerate(runs):
            one, color = run["measured"][name], COLORS[number % len(COLORS)]
            axes.plot(run["kl"], one["curve"], color=color, label=f"best of n, {name_of(run)}")
            axes.fill_between(run["kl"], one["low"], one["high"], color=color, alpha=0.12)
            value, low, high = one["policy"]
            axes.errorbar(
                [run["policy_kl"]],
                [value],
                yerr=[[value - low], [high - value]],
                fmt="o",
                color=color,
                label=name_of(run),
            )
        axes.set_xlabel("KL to SFT, nats per answer")
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=7)
    return save_figure(figure, path)


def main(options: argparse.Namespace) -> None:
    """Measures every run, and writes the three files."""
    guard_cpu_compiler()
    command.enable_compilation_cache()
    runs = [measure(Path(run), options) for run in options.runs]
    content = to_json(run_info({"samples": options.samples, "seed": options.seed}) | {"runs": runs})
    folder = Path(options.out)
    make_folder(folder)
    write_whole(folder / "best_of_n.json", json.dumps(content, indent=1) + "\n")
    write_whole(folder / "best_of_n.md", table(content))
    print(table(content))
    print(draw(content, folder / "best_of_n.png"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of finished runs of experiments.ppo_max")
    parser.add_argument("--samples", type=int, default=32, help="N, answers of SFT to each prompt")
    parser.add_argument("--seed", type=int, default=1, help="of the draws")
    parser.add_argument("--out", default="runs/best_of_n", help="folder of the three files")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error(f"--samples {options.samples} must be at least 1")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit(130)
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
