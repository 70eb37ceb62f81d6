"""Turns docstrings as they are written here into reStructuredText, before napoleon reads them.

- An indented block is an equation (`equations`), or stays unchanged where it is no mathematics.
- `Returns:` is prose, so that a colon in it does not begin a type.
- `name` in backticks links to whatever has this name; `[B, T]` in backticks is code.
- π_θ, y_{<t} and the like are typeset within a sentence.
- A bar means |x|, not a substitution.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from equations import EquationError, block_to_latex, to_latex
from sphinx.application import Sphinx
from sphinx.roles import XRefRole
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)

_SECTION = re.compile(r"(Args|Attributes|Fields|Raises|Returns|Yields)\b[^.]*:$")
_NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
# Code in backticks, or a letter with an index or a power (and then perhaps + or - of a pair); what
# a colon follows is the name of an argument.
_MARKED = re.compile(
    r"``[^`]+``|`(?P<code>[^`]+)`"
    r"|(?<![\w`\\.\"])(?P<symbol>[A-Za-zα-ωΑ-ΩÀ-ž][\u0302\u0303\u0304]?[⁺⁻]?"
    r"(?:[_^](?:\{[^{}]*\}|[A-Za-z0-9α-ω]+(?:\.\d+)?)){1,2}[⁺⁻]?)(?![\w_`\"]|: )"
)
# `length_power: a.` is a sentence, not the first item of a list.
_ENUMERATOR = re.compile(r"^(\s*(?:\w+: )?)([A-Za-z0-9]+\.(?:\s|$))")
_PROGRAM = re.compile(r"^\s*(>>> |python |pip |with |for |def |import |from )")
_TYPES = ("function", "class", "exception", "data", "module")


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrites the lines of a docstring in place; listens to `autodoc-process-docstring`."""
    del app, options
    if what in ("property", "attribute", "data"):
        lines.insert(0, "")  # or napoleon takes what precedes a colon for a type
    home = obj.__name__ if what == "module" else getattr(obj, "__module__", "") or ""
    if not home.startswith("rlhf_jax"):
        return  # inherited or imported: written in another notation
    lines[:] = [line for kind, block in blocks(lines) for line in (*rewrite(kind, block, name), "")]


def blocks(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Splits a docstring: "text", "section", "doctest", "indented" (after a blank line), "listing"
    (after a line that ends with a colon). Blank lines stay with what is before them."""
    block: list[str] = []
    kind, before = "text", ""
    for line in lines:
        new = _kind(line, before, kind)
        if (new != kind or (new == "section" and _SECTION.match(line))) and block:
            yield kind, block
            block = []
        kind, before = new, line.rstrip()
        block.append(line)
    if block:
        yield kind, block


def _kind(line: str, before: str, kind: str) -> str:
    """What a line is part of, given the line before and what that was part of."""
    if _SECTION.match(line):
        return "section"
    if line.startswith(">>>"):
        return "doctest"
    if kind == "text" and line.startswith("  "):
        return "indented" if not before else "listing" if before.endswith(":") else kind
    if (
        line.strip()
        and not line.startswith(" ")
        and (not before or kind in ("indented", "listing"))
    ):
        return "text"
    return kind


def rewrite(kind: str, block: list[str], name: str) -> list[str]:
    """One block as reStructuredText."""
    if kind == "doctest":
        return block
    if kind in ("indented", "listing"):
        return preformatted(kind, block, name)
    text = [_ENUMERATOR.sub(r"\1\\ \2", line.replace("|", r"\|")) for line in block]
    text = _MARKED.sub(_mark, "\n".join(text)).split("\n")
    if block[0] == "Returns:":
        body = [line.strip() for line in text[1:]]
        return [f":returns: {body[0]}", *(f"   {line}" if line else "" for line in body[1:])]
    return text


def preformatted(kind: str, block: list[str], name: str) -> list[str]:
    """An equation where it is one, else the block in a fixed-width font."""
    body = [line for line in block if line.strip()]
    is_equation = kind == "indented" and body[0].startswith("    ")
    directive, content = ".. code-block:: text", body
    if is_equation and not any(_PROGRAM.match(line) for line in body):
        try:
            directive, content = ".. math::", [block_to_latex(body)]
        except EquationError as error:
            logger.warning("%s: %s", name, error)
    return [directive, "", *(f"   {line}" for line in content)]


def _mark(match: re.Match[str]) -> str:
    if match["symbol"]:
        return rf"\ :math:`{to_latex(match['symbol'])}`\ "
    code = (match["code"] or "").replace(r"\|", "|")
    if not code:
        return match[0]
    return f"`{code}`" if _NAME.fullmatch(code) else f"``{code}``"


def constructor(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """The arguments of `__init__`, where a metaclass hides them behind *args and **kwargs."""
    del app, name, options
    if what != "class" or not (signature or "").startswith("(*args"):
        return None
    hidden = inspect.signature(obj.__init__)
    shown = hidden.replace(parameters=list(hidden.parameters.values())[1:])
    return stringify_signature(shown, unqualified_typehints=True), returns


def skip(
    app: Sphinx, what: str, name: str, obj: Any, is_skipped: bool, options: Any
) -> bool | None:
    """Leaves out what dataclasses and named tuples generate."""
    del app, what, is_skipped, options
    doc = getattr(obj, "__doc__", None) or ""
    generated = doc.startswith("Alias for field number") or name in ("replace", "count", "index")
    return True if generated else None


def resolve(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Links `gae` or `losses.gae` to the one object whose full name ends so, if there is one."""
    if node.get("reftype") != "name":
        return None
    target = node["reftarget"].removesuffix("()").removeprefix("losses.")
    objects = env.domains["py"].objects
    found = [
        (full, entry)
        for full, entry in objects.items()
        if f".{full}".endswith(f".{target}") and (entry.objtype in _TYPES or "." in target)
    ]
    found = [pair for pair in found if ".losses." in pair[0]] or found
    if len(found) != 1:
        return None
    full, entry = found[0]
    return make_refnode(
        app.builder, node["refdoc"], entry.docname, entry.node_id, content, title=full
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the functions above."""
    app.add_role("name", XRefRole())
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-skip-member", skip)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
