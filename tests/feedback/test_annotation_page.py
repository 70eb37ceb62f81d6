"""The page's files: keys and labels that the modes need, two languages, nothing from elsewhere."""

import json
import re
import shutil
import subprocess
from importlib import resources

import pytest

from rlhf_jax.feedback.server import FILES, page_file

HTML, CSS, SCRIPT = (page_file(name) for name in ("index.html", "page.css", "page.js"))
TEXTS = json.loads(page_file("texts.json"))


def named() -> set[str]:
    """Names of texts that page and script ask for; those made of parts are listed."""
    found = set(re.findall(r'data-(?:text|label)="(\w+)"', HTML))
    found |= set(re.findall(r'\bt\("(\w+)"', SCRIPT))
    found |= set(re.findall(r'"(key_\w+)"', SCRIPT))
    found |= {f"{kind}_{mode}" for kind in ("hint", "guide") for mode in MODES}
    found |= {f"error_{code}" for code in ("network", "origin", "token", "input", "disk", "behind")}
    found |= {f"role_{role}" for role in ("user", "assistant", "system", "tool")}
    found |= {f"reason_{reason}" for reason in re.findall(r'"(\w+)"', REASONS)}
    return found | {"right", "neutral", "wrong", "kept", "skipped"}


MODES = ("score", "pair", "ranking", "steps")
REASONS = re.search(r"const REASONS = \[(.*?)\]", SCRIPT)[1]


def test_both_languages_have_every_text_with_the_same_places():
    assert set(TEXTS) == {"en", "zh"}
    assert set(TEXTS["en"]) == set(TEXTS["zh"])
    for name, text in TEXTS["en"].items():
        other = TEXTS["zh"][name]
        assert text and other
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", other)), name
    same = {name for name, text in TEXTS["en"].items() if text == TEXTS["zh"][name]}
    assert not same
    assert all(
        re.search(r"[\u4e00-\u9fff]", TEXTS["zh"][n]) for n in TEXTS["zh"] if n != "other_language"
    )


def test_every_text_is_there_and_used():
    assert named() == set(TEXTS["en"])


def test_every_action_has_a_key_that_is_shown():
    shown = re.findall(r"<kbd>(.+?)</kbd>", HTML)
    assert {"Enter", "S", "Ctrl+Z", "G", "?", "L", "N", "Esc", "0"} <= set(shown)
    actions = SCRIPT.partition("const ACTIONS = {")[2].partition("\n};")[0]
    for key in ("Enter", "s", "u", "g", "l", "n", '"?"', "PageDown", "PageUp", '"]"', '"["'):
        assert re.search(rf"(^|[\s,]){re.escape(key)}:", actions), key
    keys = SCRIPT.partition("const MODE_KEYS = {")[2].partition("\n};")[0]
    assert {mode for mode in MODES if re.search(rf"\b{mode}\(key\)", keys)} == set(MODES)
    assert '"ArrowDown"' in keys and '"ArrowUp"' in keys
    listed = SCRIPT.partition("function buildKeys")[2].partition("\n}")[0]
    for key in ("1 2", "1–9", "1 2 3", "0", "↑ ↓", "PgUp PgDn", "[ ]", "Enter", "S", "Ctrl+Z", "G"):
        assert f'"{key}"' in listed, key
    # Every button says its key to a screen reader, or is made by `button`, which does.
    for tag in re.findall(r"<button [^>]*id=\"(?:submit|skip|undo|\w+-button)\"[^>]*>", HTML):
        assert "aria-keyshortcuts" in tag


def test_texts_of_models_are_never_markup():
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert way not in SCRIPT
    assert "textContent" in SCRIPT
    assert not re.search(r"\son\w+=|style=|<script>|javascript:", HTML)


def test_nothing_comes_from_elsewhere():
    for text in (HTML, CSS, SCRIPT):
        assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert set(re.findall(r'(?:src|href)="(.+?)"', HTML)) == {"icon.svg", "page.css", "page.js"}
    asked = re.findall(r'(?:call|fetch)\("(.+?)"', SCRIPT)
    known = {"api/about", "api/next", "api/answer", "api/undo", "texts.json"}
    assert set(asked) == known
    folder = resources.files("rlhf_jax.feedback") / "page"
    assert {file.name for file in folder.iterdir()} == {name for name, _ in FILES.values()}


def test_readers_of_every_kind():
    assert 'role="alert"' in HTML and 'role="status" aria-live="polite"' in HTML
    assert HTML.count("<h1") == 1 and "<main" in HTML and "<label" in HTML
    for dialog in re.findall(r"<dialog [^>]*>", HTML):
        assert "aria-labelledby" in dialog
    for part in ('role: "radiogroup"', '"aria-checked"', '"aria-pressed"', '"aria-current"'):
        assert part in SCRIPT, part
    assert SCRIPT.count('dir: "auto"') == 2  # responses and steps, prompts
    assert "prefers-color-scheme: dark" in CSS and "max-width: 44rem" in CSS
    assert 'name="viewport"' in HTML
    assert not re.search(r"(margin|padding|border|text-align|float)(-|: ?)(left|right)\b", CSS)


@pytest.mark.skipif(not shutil.which("node"), reason="no node: the script's syntax was not checked")
def test_the_script_is_javascript():
    path = resources.files("rlhf_jax.feedback") / "page" / "page.js"
    subprocess.run(["node", "--check", str(path)], check=True, timeout=60)
