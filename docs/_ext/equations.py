r"""Typesets the Unicode equations of docstrings: `Â_t = Σ_{l≥0} (γλ)^l δ_{t+l}` becomes LaTeX.

The docstrings are read in an editor first, so their equations are Unicode, indented by four. This
reads that notation and nothing more: letters with accents, scripts (`_t`, `^{k−1}`, `⁺`), calls,
brackets, sums, roots, fractions, and words as text. `a/b` divides the two neighbours, `a / b`
everything up to the next plus, minus, relation or comma.

>>> to_latex("Â_t = δ_t + γλ Â_{t+1}")
'\\hat{A}_{t}=\\delta_{t}+\\gamma \\lambda \\,\\hat{A}_{t+1}'
"""

import re
import unicodedata

from latex_items import EquationError, Item, divide, join

ACCENTS = {"\u0302": "hat", "\u0304": "bar", "\u0303": "tilde"}
SCRIPTS = {"²": "2", "³": "3", "¹": "1", "⁺": "+", "⁻": "-", "ᵀ": r"\top "}
ATOMS = {
    "·": r"\cdot ",
    "½": r"\tfrac{1}{2}",
    "…": r"\dots ",
    "∇": r"\nabla ",
    "∞": r"\infty ",
    "ℓ": r"\ell ",
}
SIGNS = {"+": "+", "−": "-", "-": "-", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm "}
RELATIONS = {
    "=": "=",
    "<": r"\lt ",
    ">": r"\gt ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "←": r"\leftarrow ",
    "~": r"\sim ",
    "∧": r"\land ",
    "‖": r"\,\|\,",
    ":": r"\colon ",
}
# Words that are mathematics; any other word of two letters or more is text.
FUNCTIONS = {"log", "exp", "max", "min"}
OPERATORS = {"clip", "KL", "Var", "mean", "std", "odds", "merge"}
PRODUCTS = {"Fx"}
BRACKETS = {"(": ")", "[": "]", "{": "}"}

_WORD = re.compile(r"[A-Za-z]+")
_IDENTIFIER = re.compile(r"[a-z]{2,}(_[a-z]{2,})+|[A-Za-z]\d+(?![\d.])")
_NUMBER = re.compile(r"\d+(\.\d+)?")
_TEXT = re.compile(r"`[^`]*`|\"[^\"]*\"")


def to_latex(line: str) -> str:
    """One line of an equation.

    Raises:
      EquationError: a character without a meaning here, or an open bracket.
    """
    reader = Reader("".join(_split_accents(char) for char in line.strip()))
    items = reader.sequence("")
    if reader.rest:
        raise EquationError(f"{reader.rest[:1]!r} closes nothing in {line!r}")
    return join(divide(items)).strip()


def block_to_latex(lines: list[str]) -> str:
    """An indented block: rows aligned at their first relation; a deeper row continues the last.

    Raises:
      EquationError: as `to_latex`.
    """
    rows = [line for line in lines if line.strip()]
    if len(rows) == 1:
        return to_latex(rows[0])
    indent = min(len(row) - len(row.lstrip()) for row in rows)
    aligned = []
    for row in rows:
        latex = to_latex(row)
        if row[indent:].startswith(" "):
            aligned.append(rf"& \qquad {latex}")
        else:
            aligned.append(re.sub(r"(=|\\leftarrow |\\sim |\\approx )", r"& \1", latex, count=1))
    return r"\begin{aligned}" + r" \\ ".join(aligned) + r"\end{aligned}"


class Reader:
    """Reads a line from left to right; `rest` is what is left of it."""

    def __init__(self, line: str):
        self.rest = line

    def take(self, length: int) -> str:
        """Removes and returns the next characters."""
        taken, self.rest = self.rest[:length], self.rest[length:]
        return taken

    def sequence(self, close: str) -> list[Item]:
        """Items up to the closing bracket, which is taken; up to the end if it is empty."""
        items: list[Item] = []
        spaced = False
        while self.rest:
            if close and self.rest[0] == close and not (close == "|" and _opens(items)):
                self.take(1)
                return items
            if self.rest[0] in ")]}":
                break
            item = self.item(items)
            if item:
                item.spaced = spaced
                items.append(item)
            spaced = item is None
        if close:
            raise EquationError(f"no {close!r} in the rest of the equation")
        return items

    def item(self, before: list[Item]) -> Item | None:
        """The next piece, or None for a space that means nothing."""
        spaces = len(self.rest) - len(self.rest.lstrip(" "))
        if spaces:
            after = self.rest[spaces:]
            self.take(spaces)
            if after.startswith("/ "):
                self.take(2)
                return Item("slash", " ")
            return Item("gap", r"\qquad ") if spaces > 1 else None
        char = self.rest[0]
        for kind, table in (("sign", SIGNS), ("relation", RELATIONS)):
            # A dot that stands for an argument is no product: π(· | s).
            if char in table and not (char == "·" and _opens(before)):
                self.take(1)
                return Item(kind, table[char])
        if char in ",;":
            self.take(1)
            return Item("comma", char)
        if char == "/":
            self.take(1)
            return Item("slash", "")
        if char == "|" and not _opens(before):
            self.take(1)
            return Item("relation", r"\mid ")
        return self.base()

    def base(self) -> Item:
        """An atom with its scripts and calls, a function, or text."""
        char = self.rest[0]
        if match := _TEXT.match(self.rest):
            return Item("text", self.take(match.end()))
        if char in "ΣΠ":
            self.take(1)
            return Item("function", self.scripts(r"\sum " if char == "Σ" else r"\prod "))
        if char == "√":
            self.take(1)
            under = self.base()
            return Item("atom", rf"\sqrt{{{under.inner or under.latex}}}")
        if char in BRACKETS or char == "|":
            group = self.group()
            latex = self.scripts(group.latex)
            return Item("atom", latex, group.inner if latex == group.latex else "")
        if match := _IDENTIFIER.match(self.rest):
            name = self.take(match.end()).replace("_", r"\_")
            return self.call(rf"\mathrm{{{name}}}")
        if (match := _WORD.match(self.rest)) and match.end() > 1 and match[0] not in PRODUCTS:
            return self.word(self.take(match.end()))
        return self.call(self.symbol())

    def word(self, word: str) -> Item:
        """A function, an operator, or text that may carry an index."""
        if word in FUNCTIONS:
            return Item("function", self.scripts(f"\\{word} "))
        if word in OPERATORS:
            return self.call(rf"\operatorname{{{word}}}")
        if self.rest[:1] in ("_", "("):
            return self.call(rf"\mathrm{{{word}}}")
        return Item("text", word)

    def symbol(self) -> str:
        """One letter, number or sign, with its accent."""
        if match := _NUMBER.match(self.rest):
            number = self.take(match.end())
            return r"\mathbf{1}" if number == "1" and self.rest[:1] == "[" else number
        char = self.take(1)
        latex = (
            _greek(char) or ATOMS.get(char) or (char if char.isascii() and char.isalpha() else "")
        )
        if not latex:
            raise EquationError(f"{char!r} has no meaning here")
        if self.rest[:1] in ACCENTS and self.rest:
            return rf"\{ACCENTS[self.take(1)]}{{{latex}}}"
        return latex + " " if latex.startswith("\\") and not latex.endswith(" ") else latex

    def call(self, latex: str) -> Item:
        """Scripts, and an argument list that follows directly."""
        latex = self.scripts(latex)
        if self.rest[:1] and self.rest[0] in "([":
            latex += self.scripts(self.group().latex)
        return Item("atom", latex)

    def scripts(self, latex: str) -> str:
        """Indices, powers and primes after a base."""
        lower, upper = "", ""
        while self.rest and (self.rest[0] in "_^′" or self.rest[0] in SCRIPTS):
            mark = self.take(1)
            if mark == "′":
                upper += r"\prime "
            elif mark in SCRIPTS:
                upper += SCRIPTS[mark]
            elif mark == "_":
                lower += self.script()
            else:
                upper += self.script()
        latex = latex.rstrip() if lower or upper else latex
        return latex + (f"_{{{lower}}}" if lower else "") + (f"^{{{upper}}}" if upper else "")

    def script(self) -> str:
        """What follows `_` or `^`: a group in braces, in parentheses, a word or a symbol."""
        if self.rest.startswith("{"):
            self.take(1)
            return join(divide(self.sequence("}"))).strip()
        if self.rest.startswith("("):
            return self.group().latex
        if (match := _WORD.match(self.rest)) and match.end() > 1:
            return rf"\mathrm{{{self.take(match.end())}}}"
        return self.symbol().strip()

    def group(self) -> Item:
        """A bracket and what it holds; brackets grow with fractions and sums."""
        opening = self.take(1)
        closing = BRACKETS.get(opening, "|")
        inner = join(divide(self.sequence(closing))).strip()
        left, right = (
            (r"\lvert ", r"\rvert ") if opening == "|" else (opening.replace("{", r"\{"), closing)
        )
        right = right.replace("}", r"\}")
        if re.search(r"\\(frac|sum|prod|sqrt)", inner):
            left, right = rf"\left{left}", rf"\right{right}"
        return Item("atom", f"{left}{inner}{right}", inner if opening == "(" else "")


def _opens(items: list[Item]) -> bool:
    """Whether an operand is still missing, so that `|` opens and `·` is one."""
    return not items or items[-1].kind not in ("atom", "text")


def _greek(char: str) -> str:
    """The command of a Greek letter, from its Unicode name; empty for another character."""
    words = unicodedata.name(char, "").split()
    if words[:1] != ["GREEK"]:
        return ""
    name = words[-1].replace("LAMDA", "LAMBDA")
    if words[1] == "CAPITAL":
        return "\\" + name.capitalize()
    return "\\" + ("var" if name in ("EPSILON", "PHI") else "") + name.lower()


def _split_accents(char: str) -> str:
    """A letter with an accent as two characters; ≠ stays one."""
    return unicodedata.normalize("NFD", char) if char.isalpha() else char
