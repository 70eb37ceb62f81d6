"""Anthropic/hh-rlhf: from the hub, from a saved data set, or from a folder of its files.

What follows `hh:` in a source names the place and the parts, `PLACE:PART+PART`, either of
which may be left out:
    hh                              all four parts, from the hub
    hh:helpful-base+harmless-base   two of them
    hh:FOLDER                       a copy: PART/train.jsonl.gz and test.jsonl.gz (or .jsonl),
                                    or what `DatasetDict.save_to_disk` wrote
    hh:FOLDER:helpful-base          one part of a copy

Rows are read one by one: a file is never in memory as a whole.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.jsonl import read_jsonl, stamps
from rlhf_jax.data.schemas import Row
from rlhf_jax.data.sets.archives import AssetError

NAME = "Anthropic/hh-rlhf"
PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
_SAVED = ("dataset_dict.json", "state.json")  # What `save_to_disk` leaves in its folder.

Reader = functools.partial[Any]  # Returns the rows of one file, or one part.


def readers(where: str, name: str, *, streaming: bool = False) -> list[Reader]:
    """Returns one reader for each file or part that holds rows of `name`.

    Args:
      where: what follows `hh:`, see the module.
      name: "train" or "test".
      streaming: rows of the hub are read over the network as they are needed, and nothing is
        written to the cache of `datasets`. Local files are read that way in any case.

    Raises:
      ValueError: a part that does not exist.
      FileNotFoundError: the folder has no such file.
      AssetError: no network and no cache; names the ways out.
    """
    folder, parts = _place_and_parts(where)
    if not folder:
        # The parts one by one where rows are drawn from all of them, else one table.
        wanted = list(parts or PARTS) if streaming or parts else [""]
        return [functools.partial(_from_hub, part, name, streaming) for part in wanted]
    saved = [path for marker in _SAVED if (path := Path(folder) / marker).exists()]
    if saved:
        if parts:
            raise ValueError(f"source='hh:{where}': a saved data set has no parts to choose from")
        return [functools.partial(_from_disk, folder, name)]
    return [functools.partial(read_jsonl, path) for path in files(folder, parts, name)]


def fingerprint(where: str, names: Sequence[str], *, streaming: bool = False) -> list[Any]:
    """Returns what decides the rows: of files path, size and time, of tables their fingerprints.

    Of what is streamed from the hub only the name is known.
    """
    found: list[Any] = []
    for name in names:
        for reader in readers(where, name, streaming=streaming):
            if reader.func is _from_hub and streaming:
                found.append([NAME, *reader.args])
            elif reader.func is read_jsonl:
                found += stamps(reader.args)
            else:
                found.append(reader()._fingerprint)
    return found


def files(folder: str, parts: tuple[str, ...], name: str) -> list[Path]:
    """Returns the files of a copy; of FILE.jsonl and FILE.jsonl.gz side by side the first.

    Raises:
      FileNotFoundError: the folder, or one of the parts in it, has no such file.
    """
    found: dict[Path, Path] = {}
    for ending in (".jsonl.gz", ".jsonl"):
        found |= {path.parent: path for path in sorted(Path(folder).rglob(f"{name}{ending}"))}
    for part in parts or ("",):
        if not any(not part or part in place.parts for place in found):
            inside = f" in {part}" if part else ""
            raise FileNotFoundError(
                f"source='hh:{folder}' has no {name}.jsonl or {name}.jsonl.gz{inside}: give a "
                f"folder of the format of {NAME}, or some of {'+'.join(PARTS)}"
            )
    kept = [p for place, p in found.items() if not parts or set(parts) & set(place.parts)]
    return sorted(kept)


def _place_and_parts(where: str) -> tuple[str, tuple[str, ...]]:
    """Splits what follows `hh:` into a folder ("" is the hub) and parts."""
    folder, colon, last = where.rpartition(":")
    names = tuple(name.strip() for name in re.split(r"[+,]", last) if name.strip())
    if set(names) & set(PARTS) or (colon and not Path(where).exists()):
        unknown = [part for part in names if part not in PARTS]
        if unknown or not names:
            raise ValueError(
                f"source='hh:{where}' names the part {unknown[0] if unknown else ''!r}: the parts "
                f"are {', '.join(PARTS)}; join several with +"
            )
        return folder, names
    return where, ()


def _from_hub(part: str, name: str, streaming: bool) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(NAME, data_dir=part or None, split=name, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AssetError(
            f"cannot load {NAME}{f' ({part})' if part else ''}: {reason} -- it is neither to be "
            "reached nor in the cache of datasets. Ways out: connect once, later runs may set "
            "HF_DATASETS_OFFLINE=1; or copy its files (or a save_to_disk folder) here and write "
            "hh:FOLDER where data.source or data.prompt_source has hh"
        ) from error


def _from_disk(folder: str, name: str) -> Iterable[Row]:
    import datasets

    loaded: Any = datasets.load_from_disk(folder)
    if isinstance(loaded, datasets.DatasetDict):
        if name not in loaded:
            raise FileNotFoundError(
                f"source='hh:{folder}' is a saved data set with {', '.join(loaded)}, without {name}"
            )
        return loaded[name]
    if name != "train":
        raise FileNotFoundError(
            f"source='hh:{folder}' is one saved table, so it has no test rows: save a DatasetDict "
            "with train and test"
        )
    return loaded
