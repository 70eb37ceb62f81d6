"""The directive `config NAME`: scales and variants of configs/NAME.py, read from the code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any
from unittest import mock

from docutils import nodes
from ml_collections import ConfigDict
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

# Made from the others.
DERIVED = ("workdir", "label", "scale")


def options(name: str) -> tuple[list[str], list[str]]:
    """Names of the scales and of the variants of a config, in the order of the file."""
    module = importlib.import_module(f"configs.{name}")
    with mock.patch("configs.common.build") as build:
        module.get_config()
    arguments = build.call_args.kwargs
    return list(arguments["scales"]), list(arguments["variants"])


def settings(name: str, argument: str) -> dict[str, Any]:
    """Every key of the config that an argument makes, flat: "ppo.clip_eps" -> 0.2."""
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    return {key: value for key, value in _flat(config).items() if key not in DERIVED}


def variant_rows(name: str) -> list[tuple[str, list[str]]]:
    """Variant -> what it sets that the `quickstart` scale does not."""
    base = settings(name, "quickstart")
    rows = []
    for variant in options(name)[1]:
        changed = settings(name, f"quickstart,{variant}")
        rows.append((variant, [f"{k}={v}" for k, v in changed.items() if base.get(k) != v]))
    return rows


def scale_rows(name: str) -> tuple[list[str], list[list[str]]]:
    """The scales, `quickstart` first, and for each key its values; empty where as in quickstart."""
    scales = sorted(options(name)[0], key=lambda scale: scale != "quickstart")
    columns = [settings(name, scale) for scale in scales]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = []
    for key in keys:
        first, *others = (_show(column, key) for column in columns)
        rows.append([key, first, *("" if other == first else other for other in others)])
    return scales, rows


def _show(column: Mapping[str, Any], key: str) -> str:
    if key not in column:
        return "–"
    value = column[key]
    return repr(value) if value == "" or isinstance(value, float) else str(value)


def _flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def make_table(head: list[str], rows: list[list[list[str]]], widths: list[int]) -> nodes.table:
    """A table whose cells are lists of code fragments."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=width) for width in widths]
    top = nodes.thead()
    top += _row([nodes.paragraph(text=text) for text in head])
    body = nodes.tbody()
    body += [_row([_code(cell) for cell in row]) for row in rows]
    group += [top, body]
    return nodes.table("", group)


def _row(cells: list[nodes.paragraph]) -> nodes.row:
    row = nodes.row()
    row += [nodes.entry("", cell) for cell in cells]
    return row


def _code(fragments: list[str]) -> nodes.paragraph:
    paragraph = nodes.paragraph()
    for number, fragment in enumerate(fragment for fragment in fragments if fragment):
        paragraph += [nodes.Text(" ")] if number else []
        paragraph += nodes.literal(text=fragment)
    return paragraph


class ConfigTables(SphinxDirective):
    """Renders the docstring of a config file, a table of its variants and one of its scales."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        module = importlib.import_module(f"configs.{name}")
        self.env.note_dependency(inspect.getfile(module))
        text = inspect.cleandoc(module.__doc__ or "")
        produced: list[nodes.Node] = [nodes.literal_block(text, text, language="text")]
        variants = [[[variant], changes or ["–"]] for variant, changes in variant_rows(name)]
        if variants:
            produced.append(nodes.rubric(text="What each variant sets that quickstart does not"))
            produced.append(make_table(["variant", "sets"], variants, [25, 75]))
        scales, rows = scale_rows(name)
        cells = [[[cell] for cell in row] for row in rows]
        produced.append(nodes.rubric(text="Every key by scale; empty where as in quickstart"))
        produced.append(make_table(["key", *scales], cells, [30] + [14] * len(scales)))
        return produced


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("config", ConfigTables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
