"""A page where people judge responses, and the rows that follow from their judgements.

  python -m experiments.annotate serve pair runs/ppo_max/quickstart --out runs/annotate/pairs.jsonl
  python -m experiments.annotate serve steps steps.jsonl --overlap 2 --out runs/annotate/steps.jsonl
  python -m experiments.annotate export runs/annotate/pairs.jsonl --out runs/annotate/pairs

`serve` shows the responses of runs (their responses.jsonl), or rows of a JSON-lines file, in one of
four modes: score, pair, ranking, steps. It listens at 127.0.0.1 alone unless a token is given, and
adds each answer to the file of --out before it is acknowledged; the same command goes on where it
stopped. `export` writes what the reward model, DPO and the process reward model read. See
docs/annotate.md.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.feedback import export, items, store
from rlhf_jax.feedback.answers import MODES
from rlhf_jax.feedback.desk import Desk
from rlhf_jax.feedback.judgements import combine
from rlhf_jax.runtime.errors import MissingPackageError, UserError

PORT = 8765
LONGEST_GUIDELINES = 20_000


def open_store(options: argparse.Namespace) -> store.Store:
    """The file of --out with the items of the sources, made where it is missing.

    Raises:
      ValueError: no source for a new file, or a file of other items, another mode or range.
    """
    path = Path(options.out)
    found = []
    if options.sources:
        drops = DropCounts()
        files = [_file(Path(name)) for name in options.sources]
        found = items.read_items(files, options.mode, drops, limit=options.limit)
        print(f"items of {', '.join(map(str, files))}: {drops.summary()}")
    if not path.exists():
        if not found:
            raise ValueError(f"{path} does not exist: give a run folder or a file of JSON lines")
        store.create(path, found, options.range)
    opened = store.Store(path)
    sheet = opened.sheet
    if sheet.note:
        print(f"note: {sheet.note}")
    same = not found or items.digest(found) == sheet.digest
    if not same or (sheet.mode, sheet.bounds) != (options.mode, tuple(options.range)):
        opened.close()
        low, high = sheet.bounds
        raise ValueError(
            f"{path} holds {len(sheet.items)} other items, mode {sheet.mode}, range {low} {high}: "
            "give another --out, or these settings and no source to go on with it"
        )
    return opened


def _file(source: Path) -> Path:
    """A file of rows, or that of a run's responses."""
    if not source.is_dir():
        return source
    from experiments.reporting import RESPONSES  # with jax, which nothing else here waits for

    return source / RESPONSES


def serve(options: argparse.Namespace) -> None:
    """Answers the page until it is stopped."""
    try:
        from rlhf_jax.feedback import server
    except ImportError:
        raise MissingPackageError(
            "the page needs starlette and uvicorn: pip install 'rlhf_jax[annotate]'"
        ) from None
    # 1. Who may reach the page, and what it says: refused before any file is made.
    access = server.Access(options.host, options.port, options.token)
    store.check_bounds(options.range)
    guidelines = ""
    if options.guidelines:
        guidelines = Path(options.guidelines).read_text(encoding="utf-8")[:LONGEST_GUIDELINES]
    port, access = server.listen(access)
    with port:
        # 2. The items, and what has been judged of them.
        opened = open_store(options)
        sheet = opened.sheet
        desk = Desk(opened, overlap=options.overlap, seed=options.seed)
        about = {
            "mode": sheet.mode,
            "range": list(sheet.bounds),
            "items": len(sheet.items),
            "guidelines": guidelines,
        }
        # 3. The page.
        judged = sum(1 for _ in sheet.ledger.answers())
        print(f"{sheet.path}: {len(sheet.items)} items, mode {sheet.mode}, {judged} answers")
        print(f"open {access.url} (Ctrl-C stops; every answer is on the disk)", flush=True)
        if options.open:
            webbrowser.open(access.url)
        server.run(server.make_app(desk, about, access), port)
        opened.close()


def write(options: argparse.Namespace) -> None:
    """Writes the rows of files of annotations."""
    judgements = combine([Path(path) for path in options.files])
    for note in judgements.notes:
        print(f"note: {note}")
    if not judgements.count:
        raise ValueError(f"{', '.join(options.files)} has no answer yet: there is nothing to write")
    drops = DropCounts()
    made = export.tables(judgements, drops, min_gap=options.min_gap)
    print(f"{judgements.count} answers of {len(judgements.annotators())} annotators")
    print(f"{'solutions' if export.SOLUTIONS in made else 'pairs'}: {drops.summary()}")
    for line in export.write(Path(options.out), made):
        print(line)


def main(options: argparse.Namespace) -> None:
    """Serves the page, or writes the rows."""
    {"serve": serve, "export": write}[options.command](options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("serve", help="open the page", formatter_class=shown)
    page.add_argument("mode", choices=MODES, help="what people are asked")
    page.add_argument("sources", nargs="*", help="run folders, or files of JSON lines")
    page.add_argument("--out", required=True, help="the file that keeps items and answers")
    page.add_argument("--range", nargs=2, type=int, default=(1, 5), help="lowest and highest score")
    page.add_argument("--overlap", type=int, default=1, help="annotators who judge each item")
    page.add_argument("--limit", type=int, default=0, help="items at most; 0 for all")
    page.add_argument("--guidelines", default="", help="a text file, shown beside the responses")
    page.add_argument("--seed", type=int, default=0, help="of the order of items and of sides")
    page.add_argument("--host", default="127.0.0.1", help="address; another one needs --token")
    page.add_argument("--port", type=int, default=PORT, help="0 for any that is free")
    page.add_argument("--token", default="", help="secret that every call must bring")
    page.add_argument("--open", action="store_true", help="open a browser as well")
    rows = commands.add_parser("export", help="write rows for training", formatter_class=shown)
    rows.add_argument("files", nargs="+", help="files of annotations of the same items")
    rows.add_argument("--out", required=True, help="folder of the rows")
    rows.add_argument("--min-gap", type=float, default=1.0, help="scores so far apart make a pair")
    options = parser.parse_args(arguments)
    options.range = tuple(options.range) if options.command == "serve" else ()
    if options.command == "serve" and (options.overlap < 1 or options.limit < 0):
        parser.error("--overlap must be at least 1 and --limit at least 0")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, UserError) as error:
        from experiments import command

        sys.exit(f"error: {command.told(error)}")
