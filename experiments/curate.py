"""Alignment data from a policy's own samples: drawn, scored, kept by a rule, written as rows.

  python -m experiments.curate --config configs/curate.py:quickstart,best_of_n

N answers to each training prompt are drawn from a policy and scored by a reward model; a rule keeps
some of them. Writes `data.jsonl`, which other stages read (`data.source=jsonl:FILE`, and
`candidates.read=jsonl:FILE` of experiments.supervised), report.md with what was kept, what was
dropped and how far the kept answers are from the sampler, metrics.jsonl, config.json and
summary.json to the run folder. Samples lie in `runs/candidates` and are drawn once.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
from tabulate import tabulate

from configs import common
from experiments import command, curating, folders, reporting, stages
from experiments.curating import Sampler, SamplesConfig
from experiments.settings import Answering, sampled_lengths
from rlhf_jax.data.schemas import DropCounts, Row
from rlhf_jax.evaluation.best_of_n import best_of_n_kl
from rlhf_jax.methods import curation
from rlhf_jax.methods.curation import CurationConfig, Kept
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime import digests, distributed
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.tasks import Task
from rlhf_jax.training.run import OnStep

DATA = "data.jsonl"
SHOWN = 6  # rows of the report
# Rows of the report's table.
ROWS = {
    "curate/answers": "answers",
    "curate/prompts": "prompts",
    "curate/reward": "reward, mean",
    "curate/reward_std": "reward, standard deviation",
    "curate/length": "length (tokens)",
    "curate/ended": "share that ends by itself",
    "curate/log_prob": "log-probability under the sampler (nats per token)",
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The policy that samples, and the reward model that scores."""

    model: str
    reward_model: str
    build: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Answering):
    """Every key of configs/curate.py."""

    inputs: Inputs
    samples: SamplesConfig
    sampling: SamplingConfig
    keep: CurationConfig


def require_models(settings: Settings) -> tuple[str, str]:
    """Folders of the policy and of the reward model, once they are there."""
    found = [
        stages.require(
            folder,
            stage=stage,
            argument=common.stage_argument(stage, settings),
            build=settings.inputs.build,
        )
        for stage, folder in (
            ("sft", settings.inputs.model),
            ("reward_model", settings.inputs.reward_model),
        )
    ]
    return found[0], found[1]


def held_out(task: Task) -> set[str]:
    """Prompts of the other splits."""
    rows = (task.rows("prompt", split, DropCounts()) for split in ("validation", "test"))
    return curation.held_out_prompts(list(itertools.chain(*rows)))


def signed(rows: list[Row], models: dict[str, str], settings: Settings) -> list[Row]:
    """The rows with who wrote them and a digest of each, so that a mixture can be told apart.

    Args:
      rows: as they are written.
      models: digest of the weights by key.
      settings: say how the answers were drawn.
    """
    sampler = models | {
        "sampling": digests.of_text(repr(settings.sampling)),
        "seed": settings.seed,
    }
    return [
        {**row, "sampler": sampler, "id": digests.of_text(repr(sorted(row.items())))}
        for row in rows
    ]


def write_report(
    settings: Settings, path: Path, kept: list[Kept], rows: list[Row], drops: DropCounts
) -> dict[str, Any]:
    """What was kept and dropped of the rows that were drawn, and the first prompts; the numbers."""
    counts = [len(row["responses"]) for row in rows]
    everything = [Kept(row, tuple(range(n)), n) for row, n in zip(rows, counts, strict=True)]
    before, after = curation.statistics(everything), curation.statistics(kept)
    rule, total = settings.keep.rule, settings.samples.per_prompt
    distance = curation.moved(settings.keep, kept)
    table = tabulate(
        [[label, f"{before[name]:,.4g}", f"{after[name]:,.4g}"] for name, label in ROWS.items()],
        ["", "drawn", "kept"],
        "github",
        disable_numparse=True,
    )
    reasons = [
        [reason, f"{count:,}"]
        for reason, count in drops.most_common()
        if reason != DropCounts.KEPT and count
    ]
    dropped = tabulate(reasons, ["dropped", "answers"], "github", disable_numparse=True)
    parts = [
        f"# Curation by {rule}\n\n{table}\n\n{dropped if reasons else 'Nothing was dropped.'}\n\n"
        f"KL of the kept answers from the sampler: {distance:.3f} nats an answer, given its prompt "
        f"(the best of {total} without any other condition: {best_of_n_kl(total):.3f}).\n\n"
        "## The first rows\n"
    ]
    for one in kept[:SHOWN]:
        parts.append(f"\n`{curation.prompt_text(one.row).strip()}`\n\n")
        for place in one.places:
            said = one.row["responses"][place].replace("\n", " ").strip()
            parts.append(f"- {one.row['scores'][place]:.2f}: {said}\n")
    write_whole(path / "report.md", "".join(parts))
    return {"drawn": before, "kept": after, "kl": distance, "dropped": dict(reasons)}


def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Draws, scores, keeps and writes; what was drawn before is not drawn again."""
    distributed.require_one("curation")
    settings = command.open_config("curate", config, Settings)
    if not folders.claim(settings, "curation"):
        return
    sharding, asked = settings.sharding.make(), settings.prompt_task()

    # 1. The policy that samples, the reward model, and held-out prompts.
    folder, scorer_folder = require_models(settings)
    stages.check_lengths(
        {}, folder, sampled=sampled_lengths(settings.data, sampling=settings.sampling)
    )
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(folder, scorer_folder, date=date)
    sampler = Sampler(
        policy=stages.load_policy(folder, settings.model, sharding, frozen=True),
        policy_folder=folder,
        scorer=stages.load_scalar(scorer_folder, settings.model, sharding, frozen=True),
        scorer_folder=scorer_folder,
        tokenizer=tokenizer,
        sampling=settings.sampling,
        longest_prompt=settings.data.longest_prompt,
        seed=settings.seed,
        root=settings.root,
        sharding=sharding,
    )
    reserved = held_out(asked)
    reporting.banner(
        "Curation",
        {
            "policy": f"{stages.count_parameters(sampler.policy):,} parameters, from {folder}",
            "reward model": scorer_folder,
            "samples": f"{settings.samples.per_prompt} answers to each of "
            f"{settings.samples.prompts:,} training prompts",
            "rule": settings.keep.rule,
            "held-out prompts": f"{len(reserved):,}",
            "run folder": settings.workdir,
        },
    )

    # 2. Draw and score, or read what was drawn before; keep by the rule.
    rows, drops = sampler.candidates(asked, settings.samples), DropCounts()
    kept = curation.keep(settings.keep, rows, reserved, drops)
    written = curation.as_rows(settings.keep, kept)

    # 3. Write what other stages read.
    models = {"inputs.model": folder, "inputs.reward_model": scorer_folder}
    pinned = stages.inputs(tokenizer, asked, date=date, models=models)
    numbers = curation.statistics(kept) | {"curate/kl": curation.moved(settings.keep, kept)}
    with settings.run(1, "curation", ("curate/answers",), pinned, on_step=on_step) as run:
        place = run.restore({"step": jnp.zeros((), jnp.int32)})
        for step in run.steps():
            signatures = signed(written, pinned["weights"], settings)
            curating.write_rows(run.workdir / DATA, signatures)
            run.log(step, numbers)
            run.checkpoint(step, place)

    # 4. Report.
    report = write_report(settings, run.workdir, kept, rows, drops)
    run.finish(report | {"rows": len(written)})
    print(f"curation ({settings.keep.rule}): {drops.summary()}; {run.workdir / DATA}")


if __name__ == "__main__":
    command.cli(main, default="configs/curate.py:quickstart")
