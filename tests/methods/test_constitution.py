"""Constitutional AI: who says what, what is kept, and which files are refused."""

import numpy as np
import pytest

from rlhf_jax.methods import constitution
from rlhf_jax.methods.constitution import (
    CONSTITUTIONS,
    Constitution,
    Example,
    Principle,
    Revised,
    boilerplate,
    critique_prompt,
    draw_principles,
    load_constitution,
    revise,
    revision_prompt,
    statistics,
)

KIND = Principle("kind", "CR kind?", "RR kind!", "which is kind?")
TRUE = Principle("true", "CR true?", "RR true!", "which is true?")
EXAMPLE = Example("p0", "r0", "cr0", "c0", "rr0", "v0")


def made(form: str = "chat") -> Constitution:
    return Constitution("test", "test", form, (KIND, TRUE), (EXAMPLE,))


def test_examples_and_requests_keep_the_roles_straight_in_a_chat():
    messages = revision_prompt(made(), "p", "r", KIND, "c")
    assert [m["content"] for m in messages] == [
        *("p0", "r0", "cr0", "c0", "rr0", "v0"),
        *("p", "r", "CR kind?", "c", "RR kind!"),
    ]
    assert [m["role"] for m in messages] == [*["user", "assistant"] * 5, "user"]
    assert critique_prompt(made(), "p", "r", KIND) == messages[:-2]


def test_plain_text_is_open_where_the_model_is_to_speak():
    text = critique_prompt(made("plain"), "p", "r", TRUE)
    shown, _, own = text.partition("\n\n---\n\n")
    assert shown.endswith("Revision Request: rr0\n\nRevision: v0")
    assert own == "Human: p\n\nAssistant: r\n\nCritique Request: CR true?\n\nCritique:"
    text = revision_prompt(made("plain"), "p", "r", TRUE, "c")
    assert text.endswith("Critique: c\n\nRevision Request: RR true!\n\nRevision:")


def test_what_is_empty_is_counted_and_the_input_kept():
    asked = []
    answers = iter([["bad. ", " ", "worse"], [" better ", ""]])

    def draw(prompts):
        asked.append(prompts)
        return next(answers)

    found = revise(draw, made(), ["p1", "p2", "p3"], ["a", "b", "c"], [KIND, TRUE, KIND])
    assert [one.response for one in found] == ["better", "b", "c"]
    # No revision is asked for without a critique.
    assert [prompts[-3]["content"] for prompts in asked[1]] == ["CR kind?", "CR kind?"]
    assert [prompts[-2]["content"] for prompts in asked[1]] == ["bad.", "worse"]
    told = statistics(found)
    assert told["revise/empty_critiques"] == 1 and told["revise/empty_revisions"] == 1
    assert told["revise/unchanged"] == pytest.approx(2 / 3)
    assert revise(draw, made(), [], [], []) == []


def test_of_plain_text_the_first_paragraph_is_taken():
    answers = iter([["bad.\n\nHuman: and"], ["good.\n\nMore"]])
    (one,) = revise(lambda prompts: next(answers), made("plain"), ["p"], ["a"], [KIND])
    assert (one.critique, one.revision) == ("bad.", "good.")


def test_a_revision_that_differs_in_capitals_alone_is_unchanged():
    same = Revised("kind", "It is good.", "c", "it is GOOD", "it is GOOD")
    other = Revised("kind", "It is good.", "c", "It is bad.", "It is bad.")
    assert statistics([same, other])["revise/unchanged"] == 0.5


def test_boilerplate_is_the_sentence_that_most_responses_hold():
    texts = ["You are valued. Yes. Yes. Yes.", "No!\nYou are valued.", "You are valued? Yes."]
    assert boilerplate(texts) == (2 / 3, "You are valued.")
    assert boilerplate(["", ""]) == boilerplate([]) == (0.0, "")


def test_principles_are_drawn_anew_for_each_response():
    drawn = draw_principles(made(), 400, np.random.default_rng(0))
    share = sum(one is KIND for one in drawn) / 400
    assert 0.4 < share < 0.6
    again = draw_principles(made(), 400, np.random.default_rng(1))
    assert drawn != again


@pytest.mark.parametrize("name", sorted(path.stem for path in CONSTITUTIONS.glob("*.toml")))
def test_the_constitutions_that_come_with_the_library_are_whole(name):
    one = load_constitution(name)
    assert len(one.principles) >= 3 and one.examples and one.form == "chat"
    assert all(p.comparison.endswith("?") for p in one.principles)


WHOLE = """
source = "test"
form = "plain"
[[principles]]
name = "kind"
critique = "c"
revision = "r"
comparison = "which?"
"""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('comparison = "which?"', "", r"number 1 of principles needs the field 'comparison'"),
        ('critique = "c"', 'critique = " "', "needs the field 'critique', and it is missing or"),
        ('source = "test"', "", "the constitution needs the field 'source'"),
        ('form = "plain"', 'form = "talk"', "form='talk' is unknown"),
        ("[[principles]]", "[principles]", "principles must be tables"),
        ('revision = "r"', "revision = 3", "revision=3 must be text"),
        ('revision = "r"', 'revision = "r"\nwhy = "x"', "has an unknown field 'why'"),
        ('source = "test"', "source =", "Invalid value"),
    ],
)
def test_a_constitution_that_lacks_something_is_one_line_with_its_file(
    tmp_path, before, after, message
):
    path = tmp_path / "mine.toml"
    path.write_text(WHOLE)
    assert load_constitution(str(path)).principles[0].name == "kind"
    path.write_text(WHOLE.replace(before, after))
    with pytest.raises(ValueError, match=message) as told:
        load_constitution(str(path))
    assert "\n" not in str(told.value) and "mine.toml" in str(told.value)


def test_names_that_are_not_there_or_twice_are_refused():
    with pytest.raises(ValueError, match=r"no constitution 'nothing': .* harmless, reviews"):
        load_constitution("nothing")
    with pytest.raises(ValueError, match="principles must have different names, got kind, kind"):
        Constitution("x", "x", "plain", (KIND, KIND))
    with pytest.raises(ValueError, match="principles are missing"):
        Constitution("x", "x", "plain", ())
    assert constitution.PLAIN == "plain"
