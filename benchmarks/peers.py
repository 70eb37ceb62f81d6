"""Side by side with the peers: the same shapes, in turn, each library in an environment of its own.

    python -m benchmarks.peers                      every case (about half an hour on two cores)
    python -m benchmarks.peers --cases small-ppo    some of them
    python -m benchmarks.peers --only ours          without peers: nothing is installed
    python -m benchmarks.peers --table              only prints the table of the saved results

The first run makes virtual environments in the cache folder and installs, from the package index,
torch, TRL and transformers into one and Tunix into the other: several gigabytes. All libraries do
the same work in float32 on the same number of cores, no token ends a response, and they take turns
in processes that stay alive: first run (with compilation), warm-up, then the runs that count.
"""

import argparse
import json
from pathlib import Path

from benchmarks import machine, table
from benchmarks.cases import CASES, TINY
from benchmarks.driver import measure

RESULTS = Path(__file__).parent / "results"


def cores_name(cores: int) -> str:
    """The folder of results on this many cores."""
    return "1-core" if cores == 1 else f"{cores}-cores"


def main(argv: list[str] | None = None) -> None:
    """Measures, writes one JSON file per case, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--only", nargs="+", help="libraries: ours, torch, tunix")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/N-cores")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    folder = args.results or RESULTS / cores_name(args.cores)
    known = {case.name: case for case in CASES + TINY}
    unknown = sorted(set(args.cases) - set(known))
    if unknown:
        parser.error(f"unknown cases {unknown}; known: {sorted(known)}")
    if not args.table:
        folder.mkdir(parents=True, exist_ok=True)
        hardware = machine.describe(args.cores)
        for name in args.cases:
            case = known[name]
            libraries = [x for x in ("ours", *case.peers) if not args.only or x in args.only]
            result = measure(
                case, libraries, cores=args.cores, warmup=args.warmup, repeats=args.repeats
            )
            result |= {"machine": hardware, "asked": case.peers}
            (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table.markdown(folder))


if __name__ == "__main__":
    main()
