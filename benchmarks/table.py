"""The results as a Markdown table."""

import json
from pathlib import Path

from tabulate import tabulate

from benchmarks.cases import CASES, MODELS
from benchmarks.flops import useful_flops

NAMES = {"ours": "rlhf_jax", "torch": "torch (transformers, TRL)", "tunix": "Tunix"}
HEAD = ["case", "rlhf_jax", "peer", "their time / ours", "asked", "share of the matmul peak"]


def load(folder: Path) -> dict[str, dict]:
    """Results by the name of the case, in the order of `CASES`."""
    files = {path.stem: path for path in sorted(folder.glob("*.json"))}
    order = [case.name for case in CASES if case.name in files]
    order += [name for name in files if name not in order]
    loaded = {name: json.loads(files[name].read_text()) for name in order}
    return {name: result for name, result in loaded.items() if "results" in result}


def markdown(folder: Path) -> str:
    """One row for each peer of each case."""
    cells = [row for result in load(folder).values() for row in rows(result)]
    return tabulate(cells, headers=HEAD, tablefmt="pipe", disable_numparse=True)


def rows(result: dict) -> list[list[str]]:
    """The cells of one case, a row for each peer; one without a peer if none was run."""
    libraries = result["results"]
    ours = libraries.get("ours")
    title = f"{result['spec']['model']}: {result['title']}"
    our_time = cell(ours, result["tokens"]) if ours else "–"
    peak = result["machine"]["matmul_peak"]
    flops = useful_flops(result["spec"], MODELS[result["spec"]["model"]])
    share = f"{flops / ours['median_s'] / peak:.0%}" if ours else "–"
    peers = [name for name in libraries if name != "ours"]
    cells = []
    for name in peers or [""]:
        peer = libraries.get(name)
        theirs = f"{NAMES[name]}: {cell(peer, result['tokens'])}" if peer else "–"
        ratio = f"{peer['median_s'] / ours['median_s']:.2f}" if peer and ours else "–"
        asked = str(result["asked"].get(name) or "–")
        cells.append([title, our_time, theirs, ratio, asked, share])
    return cells


def cell(result: dict, tokens: int) -> str:
    """Median [fastest, slowest] seconds, and tokens per second."""
    return (
        f"{result['median_s']:.3f} s [{result['fastest_s']:.3f}, {result['slowest_s']:.3f}], "
        f"{tokens / result['median_s']:,.0f} tok/s"
    )
