"""Ten thousand rows of any content: each is used, refused by its number, or dropped and counted."""

import json
import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlhf_jax.data import prepare
from rlhf_jax.data.convert import rows_of_kind
from rlhf_jax.data.schemas import DropCounts

KINDS = ("sft", "preference", "prompt")
GOOD = {"prompt": "the sea", "chosen": " is wide", "rejected": " is cold", "response": " is wide"}
EXAMPLES, ROWS, LENGTH = 50, 200, 400
COLUMNS = (
    *("prompt", "chosen", "rejected", "messages", "conversations", "instruction", "input"),
    *("output", "history", "response", "completion", "label", "text", "system", "opening"),
    *("margin", "tools", "question", "bad \ud83d", "line\nbreak"),
)
ROLES = (
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "developer",
    "bot",
    None,
    3,
    ["user"],
)
TEXTS = (
    *("", " ", "\n", "what do you think of the sea?", "\0", "\x1b[31m", "\u2028", "\r\n"),
    *("<eos>", "<bos>hi", "hi<pad><eos>", "\n\nHuman: a\n\nAssistant: b", "cut \ud83d", "\udc00"),
    *("\ufdd0", "\N{GRINNING FACE}", "e\u0301", "a " * 3000),
)
NUMBERS = (0, -1, 1.5, float("nan"), float("inf"), 1e300, 10**400, True, False)


def text(draw):
    return draw.choice(TEXTS) + draw.choice(("", "x", str(draw.randrange(10))))


def junk(draw, depth=2):
    """Any value that JSON can hold, and bytes, which tables can."""
    choice = draw.randrange(8 if depth else 4)
    if choice < 2:
        return text(draw)
    if choice < 4:
        return draw.choice((None, b"bytes", *NUMBERS))
    if choice < 6:
        return [junk(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice((*COLUMNS, "role", "content")): junk(draw, depth - 1) for _ in range(3)}


def turn(draw):
    role, content = draw.choice((("role", "content"), ("from", "value")))
    said = {role: draw.choice(ROLES[: draw.choice((2, 2, 2, len(ROLES)))]), content: text(draw)}
    if draw.random() < 0.2:
        said[draw.choice((role, content, "tool_calls", "name"))] = junk(draw)
    if draw.random() < 0.1:
        said[content] = [{"type": draw.choice(("text", "image", None)), "text": text(draw)}]
    if draw.random() < 0.05:
        del said[draw.choice((role, content))]
    return said


def turns(draw):
    if draw.random() < 0.5:
        talk = [
            {"role": ("user", "assistant")[n % 2], "content": text(draw)}
            for n in range(draw.randrange(5))
        ]
        return [*talk, *([turn(draw)] if draw.random() < 0.3 else [])]
    return [turn(draw) if draw.random() < 0.95 else junk(draw) for _ in range(draw.randrange(4))]


def row_of(draw):
    """A row near to one of the shapes, or far from all."""
    if draw.random() < 0.02:
        return junk(draw)
    shapes = (
        *(("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("messages",), ("text",)),
        *(("conversations",), ("conversations", "chosen", "rejected"), ("instruction", "output")),
        *(("prompt", "response"), ("prompt", "completion", "label"), ("prompt",)),
    )
    names = [*draw.choice(shapes), *draw.sample(COLUMNS, draw.choice((0, 0, 0, 1, 2)))]
    row = {}
    for name in names:
        value = draw.choice((text, text, text, turns, turns, turn, junk))(draw)
        if name in ("messages", "conversations", "history") and draw.random() < 0.8:
            value = turns(draw)
        if name in ("margin", "label"):
            value = draw.choice(NUMBERS)
        row[name] = value
    if draw.random() < 0.1:
        row.pop(draw.choice(names), None)
    return row


READ = {
    "sft": ("messages", "prompt", "response", "text"),
    "preference": ("prompt", "chosen"),
    "prompt": ("prompt", "opening"),
}


def texts_in(kind, made):
    """The texts of a converted row that a policy or reward model is to see."""
    for column in READ[kind]:
        value = made.get(column) or ""
        if isinstance(value, str):
            yield value
            continue
        answers = [n for n, said in enumerate(value) if said["role"] == "assistant"]
        # What follows the last answer of a document is left out, as documented.
        end = answers[-1] + 1 if column == "messages" else len(value)
        yield from (said["content"] for said in value[:end])


def attempt(run):
    """What is made, or None where the second row is refused by one line that names it."""
    try:
        return run()
    except ValueError as error:
        line = str(error)
        assert line.startswith("row 1: ") and line.isprintable(), ascii(line)
        assert not isinstance(error, UnicodeError) and len(line) < 2000, ascii(line)
        return None


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
@given(st.integers(0, 2**32 - 1))
def test_every_row_is_used_or_refused_by_number_or_dropped_and_counted(plain, number):
    draw = random.Random(number)
    for _ in range(ROWS):
        kind, row, drops = draw.choice(KINDS), row_of(draw), DropCounts()
        before = repr(row)
        made = attempt(lambda: list(rows_of_kind([GOOD, row], kind, "all", drops)))  # noqa: B023
        assert repr(row) == before
        if made is None:
            continue
        assert len(made) + drops.dropped == 2, ascii(row)
        count = DropCounts()
        found = attempt(
            lambda: prepare.encode_rows(kind, made, plain, max_length=LENGTH, drops=count)  # noqa: B023
        )
        if found is None:
            continue
        assert len(found) + count.dropped == len(made) and count["kept"] == len(found), ascii(row)
        if len(found) == 2 and not count["truncated"]:
            tokens = {
                "sft": lambda one: one.tokens,
                "preference": lambda one: one.chosen.tokens,
                "prompt": lambda one: one,
            }[kind](found[1])
            shown = plain.decode(tokens)
            for said in texts_in(kind, made[1]):
                assert said.strip() in shown, ascii((row, shown))


def test_a_thousand_turns_are_used_or_cut_and_counted(plain):
    talk = [{"role": ("user", "assistant")[n % 2], "content": f"{n} the sea"} for n in range(2000)]
    drops = DropCounts()
    (found,) = prepare.encode_rows("sft", [{"messages": talk}], plain, max_length=50, drops=drops)
    assert len(found.tokens) <= 50 and drops == {"kept": 1, "truncated": 1}
    assert plain.decode(found.tokens).endswith("1999 the sea<eos>")


def test_the_rows_hold_what_is_hard():
    """The generator makes of each shape rows that pass, and every kind of trouble."""
    draw = random.Random(0)
    whole = "\n".join(json.dumps(row_of(draw), default=str) for _ in range(3000))
    for hard in ("\\ud83d", "NaN", "Infinity", "1e+300", "<eos>", "\\u0000", "tool_calls"):
        assert hard in whole, hard
