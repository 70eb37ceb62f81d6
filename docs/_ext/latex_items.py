"""Pieces of an equation, and how they are put together as LaTeX: products, fractions, text."""

import dataclasses
import itertools


class EquationError(ValueError):
    """The equation holds something that this notation does not have."""


@dataclasses.dataclass
class Item:
    """A piece of an equation.

    Attributes:
      kind: "atom", "function" (binds what follows), "sign", "relation", "comma", "text", "gap" or
        "slash" (`latex` is then " " for a loose one).
      latex: what it becomes.
      inner: for a bracketed atom, what is between the brackets.
      spaced: whether a space precedes it.
    """

    kind: str
    latex: str
    inner: str = ""
    spaced: bool = False


def divide(items: list[Item]) -> list[Item]:
    """Turns slashes into fractions: the tight ones first, they bind closer."""
    for loose in (False, True):
        while (at := _first_slash(items, loose)) is not None:
            start, stop = _reach(items, at, -1, loose), _reach(items, at, +1, loose)
            top, bottom = items[start:at], items[at + 1 : stop]
            if not top or not bottom:
                raise EquationError("a slash needs something on both sides")
            fraction = rf"\frac{{{_bare(top)}}}{{{_bare(bottom)}}}"
            items = [*items[:start], Item("atom", fraction), *items[stop:]]
    return items


def _first_slash(items: list[Item], loose: bool) -> int | None:
    found = (i for i, x in enumerate(items) if x.kind == "slash" and (x.latex == " ") == loose)
    return next(found, None)


def _reach(items: list[Item], at: int, way: int, loose: bool) -> int:
    """How far a fraction at `at` reaches: one atom, or up to the next weaker sign."""
    end = at + way
    if loose:
        while 0 <= end < len(items) and items[end].kind in ("atom", "function"):
            end += way
        return end + 1 if way < 0 else end
    if way > 0:
        # `log x` and the like are one operand.
        while end < len(items) and items[end].kind == "function":
            end += 1
        return end + 1
    return end


def _bare(items: list[Item]) -> str:
    """LaTeX without brackets around the whole."""
    return items[0].inner if len(items) == 1 and items[0].inner else join(items).strip()


def join(items: list[Item]) -> str:
    """LaTeX of a sequence: neighbouring words make one text, spaced factors stay a little apart."""
    parts: list[str] = []
    before = ""
    for kind, group in itertools.groupby(items, key=lambda item: item.kind):
        pieces = list(group)
        if kind == "text":
            space = before in ("atom", "function", "comma")
            parts.append((r"\ " if space else "") + _text([piece.latex for piece in pieces]))
        elif kind == "atom":
            space = before == "text"
            glue = (r"\," if n and piece.spaced else "" for n, piece in enumerate(pieces))
            factors = (g + piece.latex for g, piece in zip(glue, pieces, strict=True))
            parts.append((r"\ " if space else "") + "".join(factors))
        else:
            parts.append(" ".join(piece.latex for piece in pieces))
        before = kind
    return "".join(parts)


def _text(words: list[str]) -> str:
    """Words as text, names in backticks as code."""
    runs = []
    for is_code, group in itertools.groupby(words, key=lambda word: word.startswith("`")):
        command = "texttt" if is_code else "text"
        runs.append(rf"\{command}{{{' '.join(word.strip('`') for word in group)}}}")
    return r"\ ".join(runs)
