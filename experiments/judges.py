"""Measures how often judges agree with people, on held-out reviews that people rated.

  python -m experiments.judges --judge vader language_model:runs/pretrained/smollm2/model

Prints one line a judge, with what it is and its seconds per text, and writes them as JSON. What was
measured before is read from the cache folder; the time is measured each time. `--fool 500` also
shows what each judge makes of texts that are written to fool it, 500 of each kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tabulate

from configs.common import SMOLLM2
from experiments import command, judging, stages
from rlhf_jax.data.sets import archives, reviews
from rlhf_jax.evaluation.adversaries import OPENING_WORDS, Fooled, how_fooled
from rlhf_jax.evaluation.agreement import measured_agreement
from rlhf_jax.evaluation.judges import GOLD, LANGUAGE_MODEL, REWARD_MODEL, Judge, make_judge
from rlhf_jax.evaluation.language_model import SENTIMENT, LanguageModelJudge
from rlhf_jax.evaluation.log_odds import log_odds
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler
from rlhf_jax.runtime.files import make_folder, write_whole
from rlhf_jax.runtime.run_info import run_info, to_json

TIMED_TEXTS = 128
# What the texts of a domain are, as a report says it.
KINDS = {
    "movie": "movie reviews",
    "amazon": "product reviews",
    "nyt": "sentences of editorials",
    "tweets": "tweets",
}


def build(
    name: str, *, examples: bool, repetition_cost: float | None = None, scale: str = "quickstart"
) -> Judge:
    """A judge by name; a model that is missing is converted from its package, or trained.

    Args:
      name: As `make_judge` takes it; "language_model" alone is SmolLM2.
      scale: Of the gold reward model.
      examples: Whether a language model is shown labelled examples.
      repetition_cost: Of a language model; None is its default.
    """
    kind, _, model = name.partition(":")
    if kind in (REWARD_MODEL, GOLD):
        argument = "" if model else judging.gold_argument(scale)
        folder = model or judging.model_folder(argument)
        return make_judge(name, **judging.reward_model_keywords(folder, argument, build=True))
    if kind != LANGUAGE_MODEL:
        return make_judge(name)
    folder = model or SMOLLM2
    if folder in stages.PRETRAINED:
        stages.require(folder)
    question = SENTIMENT if examples else dataclasses.replace(SENTIMENT, examples=())
    settings = {} if repetition_cost is None else {"repetition_cost": repetition_cost}
    return make_judge(name, default_model=SMOLLM2, question=question, **settings)


def seconds_per_text(judge: Any, texts: Sequence[str]) -> float:
    """Time of the second of two equal calls: without reading the model and compiling."""
    for _ in range(2):
        start = time.perf_counter()
        judge(texts)
        seconds = time.perf_counter() - start
    return seconds / len(texts)


def without_shared_prefix(judge: LanguageModelJudge, texts: Sequence[str]) -> None:
    """Reads the same log-odds with the examples run again for every text: what sharing saves."""
    question = judge.question
    whole = [question.prefix + text for text in texts]
    log_odds(judge.model, judge.tokenizer, "", whole, question.suffix, question.answers)


def table(fooled: Sequence[Fooled]) -> str:
    """A Markdown table of what a judge makes of each kind of text."""
    rows = [
        (
            row.kind,
            f"{row.mean.value:.2f} [{row.mean.low:.2f}, {row.mean.high:.2f}]",
            f"{row.preferred.value:.0%} [{100 * row.preferred.low:.0f}, "
            f"{100 * row.preferred.high:.0f}]",
        )
        for row in fooled
    ]
    headers = ("text", "mean score", "above what the person wrote")
    return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def measure(judge: Judge, options: argparse.Namespace, rated: list[reviews.Review]) -> dict:
    """Agreement and cost of one judge, printed and returned for the JSON file."""
    texts = [review.text for review in rated]
    measured = measured_agreement(
        judge,
        KINDS[options.domain],
        texts,
        [review.rating for review in rated],
        archives.cache_dir() / "judges",
        min_gap=options.min_gap,
        num_texts=options.texts,
        seed=options.seed,
    )
    timed = texts[:TIMED_TEXTS]
    result = dataclasses.asdict(measured) | {
        "describe": judge.describe(),
        "scale": judge.scale,
        "seconds_per_text": seconds_per_text(judge, timed),
    }
    print(f"\n{measured.line()}\n  {judge.describe()}")
    print(f"  {result['seconds_per_text']:.4f} s a text")
    if options.fool:
        # Drawn: neighbours in the files are rated alike.
        order = np.random.default_rng(options.seed).permutation(len(texts))
        drawn = [texts[i] for i in order if len(texts[i].split()) > OPENING_WORDS]
        long = drawn[: options.fool]
        fooled = how_fooled(judge, long, seed=options.seed)
        result["fooled"] = [dataclasses.asdict(row) for row in fooled]
        print(f"\n{judge.name}, {len(long)} texts of each kind:\n\n{table(fooled)}\n")
    if isinstance(judge, LanguageModelJudge) and options.unshared:
        slow = seconds_per_text(lambda texts: without_shared_prefix(judge, texts), timed)
        result["seconds_per_text_unshared"] = slow
        print(f"  {slow:.4f} s a text with the examples run for every text")
    return result


def main(options: argparse.Namespace) -> None:
    """Measures every judge on the same texts."""
    guard_cpu_compiler()
    command.enable_compilation_cache()
    out = Path(options.out)
    make_folder(out.parent)  # before the work
    rated = reviews.load_reviews(options.split, domains=(options.domain,))
    settings = {
        "examples": not options.no_examples,
        "repetition_cost": options.repetition_cost,
        "scale": options.scale,
    }
    judges = [build(name, **settings) for name in options.judge]
    results = [measure(judge, options, rated) for judge in judges]
    info = run_info(vars(options)) | {"judges": results}
    write_whole(out, json.dumps(to_json(info), indent=2, allow_nan=False) + "\n")
    print(f"\n{out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", nargs="+", default=["vader"], metavar="NAME")
    parser.add_argument(
        "--scale",
        default="quickstart",
        choices=("tiny", "quickstart", "smollm2"),
        help="of the judge gold",
    )
    parser.add_argument("--domain", default="movie", choices=tuple(KINDS))
    parser.add_argument("--texts", type=int, default=600, help="how many reviews are judged")
    parser.add_argument("--min-gap", type=float, default=1.0, help="least difference of ratings")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and the bootstrap")
    parser.add_argument(
        "--fool",
        type=int,
        default=0,
        metavar="N",
        help="also N texts of each fooling kind",
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "validation", "test"), help="of the reviews"
    )
    parser.add_argument(
        "--repetition-cost",
        type=float,
        metavar="NATS",
        help="of language models",
    )
    parser.add_argument(
        "--no-examples", action="store_true", help="ask language models without labelled examples"
    )
    parser.add_argument(
        "--unshared", action="store_true", help="also time them with nothing shared between texts"
    )
    parser.add_argument("--out", default="runs/judges/agreement.json", help="JSON file")
    try:
        main(parser.parse_args())
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
