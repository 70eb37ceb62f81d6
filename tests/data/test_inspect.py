import io

import numpy as np

from rlhf_jax.data.encode import encode_messages, encode_pair, encode_prompt, encode_text
from rlhf_jax.data.inspect import legend, lengths_line, render, use_color
from rlhf_jax.data.templates import ChatTokenizer as Chat

GREEN, GREY, INVERTED, END = "\033[32m", "\033[90m", "\033[1;7m", "\033[0m"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_only_on_a_terminal_without_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert use_color(Terminal())
    assert not use_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_color(Terminal())
    monkeypatch.setenv("NO_COLOR", "")
    assert use_color(Terminal())


def test_document_shows_its_mask(plain):
    encoded = encode_text("the sea", " is wide", Chat(plain), 50)
    assert render(encoded, plain, color=False) == "<bos>the sea[[ is wide<eos>]]"
    assert render(encoded, plain, color=True) == (
        f"{GREY}{INVERTED}<bos>{END}{GREY}the sea{END}"
        f"{GREEN} is wide{END}{GREEN}{INVERTED}<eos>{END}"
    )
    for color in (True, False):
        assert render(encoded, plain, color=color).startswith("\033") == color
        assert ("\033" in legend(color=color)) == color


def test_several_turns_show_each_stretch(plain):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    encoded = encode_messages(messages, Chat(plain), 50)
    assert render(encoded, plain, color=False) == "<bos>a\n[[b<eos>]]c\n[[d<eos>]]"


def test_pair_shows_both_sides_and_the_margin(plain):
    row = {"prompt": "a", "chosen": " b", "rejected": " c", "margin": 1.5}
    assert render(encode_pair(row, Chat(plain), 50), plain, color=False) == (
        "chosen (margin 1.5):\n<bos>a[[ b<eos>]]\nrejected:\n<bos>a[[ c<eos>]]"
    )


def test_prompt_shows_nothing_trained(plain):
    assert render(encode_prompt("a", Chat(plain), 9), plain, color=False) == "<bos>a"
    empty = np.zeros(0, dtype=np.int32)
    assert render(empty, plain, color=False) == ""


def test_lengths_on_one_line():
    line = lengths_line([*range(1, 101), 1000], bins=4)
    assert line == ("101 examples, tokens: min 1, median 51, p95 96, max 1000  █▁▁▁ (1 to 1000)")
    assert lengths_line([]) == "0 examples"
    assert "min 3, median 3, p95 3, max 3" in lengths_line([3, 3])
