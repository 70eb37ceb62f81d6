import json

import pytest

from rlhf_jax.data import prepare
from rlhf_jax.data.convert import (
    as_preference,
    as_prompt,
    as_sft,
    convert_hh,
    read_unpaired,
    rows_of_kind,
)
from rlhf_jax.data.schemas import DropCounts

START = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: how are\n\nyou?"
HH = {"chosen": START + "\n\nAssistant: fine", "rejected": START + "\n\nAssistant: go away\n"}
PROMPT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "how are\n\nyou?"},
]


def test_turns_of_one_speaker_in_a_transcript_are_joined():
    talk = "\n\nHuman: a\n\nHuman: b\n\nAssistant: \n\nAssistant: c\n\nHuman: d"
    row = convert_hh({side: f"{talk}\n\nAssistant: {side}" for side in ("chosen", "rejected")})
    assert row["prompt"] == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]


def test_hh_prompt_ends_with_the_last_shared_question():
    assert convert_hh(HH) == {"prompt": PROMPT, "chosen": "fine", "rejected": "go away"}


QUOTED = "Sure:\n\nHuman: hi\n\nAssistant: hello"


@pytest.mark.parametrize(
    ("chosen", "rejected", "answers"),
    [
        # Only a paragraph that begins with the speaker is a turn.
        ("I said 'Human: hi'\nHuman: hi", "no", ("I said 'Human: hi'\nHuman: hi", "no")),
        # One answer quotes a dialogue, of whatever length: it is all text.
        (QUOTED, "No.", (QUOTED, "No.")),
        ("No.", QUOTED + QUOTED, ("No.", QUOTED + QUOTED)),
        # Paragraphs of one speaker are one answer.
        (
            "Sure:\n\nAssistant: hello",
            "Sure:\n\nAssistant: hey",
            ("Sure:\n\nhello", "Sure:\n\nhey"),
        ),
        # White space and an empty turn of the assistant make no difference.
        ("  fine \n\n", "\n\nAssistant: go away", ("fine", "go away")),
        ("fine", "", ("fine", "")),
    ],
)
def test_hh_prompt_is_found_in_oddly_formatted_text(chosen, rejected, answers):
    mark = "\n\nAssistant: "
    row = convert_hh({"chosen": START + mark + chosen, "rejected": START + mark + rejected})
    assert row == {"prompt": PROMPT, "chosen": answers[0], "rejected": answers[1]}


def test_hh_prompt_that_quotes_a_dialogue_is_the_same_for_both():
    quote = "\n\nHuman: continue this:\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?"
    row = convert_hh({side: f"{quote}\n\nAssistant: {side}" for side in ("chosen", "rejected")})
    assert [turn["content"] for turn in row["prompt"]] == ["continue this:\n\nhi", "hello", "and?"]
    assert (row["chosen"], row["rejected"]) == ("chosen", "rejected")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        # Two conversations that part at the first answer, one that goes on, and two without answer.
        ("yes\n\nHuman: a\n\nAssistant: b", "no\n\nHuman: c\n\nAssistant: d"),
        ("yes\n\nHuman: a\n\nAssistant: b", "yes"),
        ("yes\n\nHuman: a", "yes\n\nHuman: b"),
    ],
)
def test_hh_conversations_that_part_before_the_last_answer_are_dropped(chosen, rejected):
    drops = DropCounts()
    mark = START + "\n\nAssistant: "
    assert convert_hh({"chosen": mark + chosen, "rejected": mark + rejected}, drops) is None
    assert drops == {"chosen and rejected answer different prompts": 1}


def test_hh_transcripts_that_differ_earlier_are_dropped_and_counted():
    drops = DropCounts()
    other = {**HH, "rejected": HH["rejected"].replace("hello", "hey")}
    assert convert_hh(other, drops) is None
    assert drops == {"chosen and rejected answer different prompts": 1}
    alone = {"chosen": "\n\nAssistant: hi", "rejected": "\n\nAssistant: go"}
    assert convert_hh(alone, drops) is None
    assert drops["no question"] == 1


def test_hh_rows_that_are_none():
    with pytest.raises(ValueError, match=r"missing: \['rejected'\]; found: chosen"):
        convert_hh({"chosen": "a"})
    with pytest.raises(ValueError, match=r"a transcript must begin with .*, not 'plain'"):
        convert_hh({"chosen": "plain", "rejected": "plain"})


def answer(content):
    return [{"role": "assistant", "content": content}]


SHAPES = {
    "transcripts": HH,
    "messages": {"prompt": PROMPT, "chosen": "fine", "rejected": "go away"},
    "lists with the prompt inside": {
        "chosen": PROMPT + answer("fine"),
        "rejected": PROMPT + answer("go away"),
    },
    "lists with the prompt inside and beside": {
        "prompt": "how are you?",
        "chosen": PROMPT + answer("fine"),
        "rejected": PROMPT + answer("go away"),
    },
    "lists with the prompt beside": {
        "prompt": PROMPT,
        "chosen": answer("fine"),
        "rejected": answer("go away"),
    },
    "turns": {
        "chosen": ["hello", "hi", "how are\n\nyou?", "fine"],
        "rejected": ["hello", "hi", "how are\n\nyou?", "go away"],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "hello"},
            {"from": "gpt", "value": "hi"},
            {"from": "human", "value": "how are\n\nyou?"},
        ],
        "chosen": {"from": "gpt", "value": "fine"},
        "rejected": {"from": "gpt", "value": "go away"},
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_becomes_the_same_rows(shape):
    row = SHAPES[shape]
    pair = as_preference(row)
    assert {key: pair[key] for key in ("prompt", "chosen", "rejected")} == {
        "prompt": PROMPT,
        "chosen": "fine",
        "rejected": "go away",
    }
    assert as_prompt(row) == {"prompt": PROMPT}
    assert as_sft(row) == {"messages": PROMPT + answer("fine")}


def test_string_prompts_stay_strings_and_margins_stay():
    row = {"prompt": "a", "chosen": " b", "rejected": " c", "margin": 2.0}
    assert as_preference(row) == row
    assert as_sft(row) == {"prompt": "a", "response": " b"}
    assert as_prompt(row) == {"prompt": "a"}
    listed = {**SHAPES["lists with the prompt inside"], "margin": 2.0}
    assert as_preference(listed)["margin"] == 2.0


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "hi"},
        {"prompt": "hi", "response": "ho"},
        {"text": "hi"},
        {"instruction": "hi", "output": "ho"},
        {"conversations": [{"from": "human", "value": "hi"}]},
    ],
)
def test_messages_decide_for_every_kind_of_row(more):
    row = {**more, "messages": PROMPT + answer("fine")}
    assert as_sft(row) == {"messages": row["messages"]}
    assert as_prompt(row) == {"prompt": PROMPT}


def test_columns_that_are_null_decide_nothing():
    row = {"messages": None, "chosen": None, "prompt": "a", "response": "b"}
    assert as_sft(row) == {"prompt": "a", "response": "b"}
    assert as_prompt(row) == {"prompt": "a"}
    pair = {**PLAIN_PAIR, "conversations": None}
    assert as_preference(pair) == pair
    assert as_prompt({**row, "response": None, "text": None}) == {"prompt": "a"}


def test_response_decides_before_the_text_of_both():
    row = {"text": "### a\n### b", "prompt": "a", "response": "b"}
    assert as_sft(row) == {"prompt": "a", "response": "b"}
    assert as_prompt(row) == {"prompt": "a"}


def test_single_question_beside_lists():
    row = {"prompt": "how?", "chosen": answer("so"), "rejected": answer("no")}
    assert as_preference(row)["prompt"] == [{"role": "user", "content": "how?"}]


SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize("asked", [PROMPT[:1], [SYSTEM, *PROMPT[:1]], "hello"])
def test_lists_that_go_on_from_the_prompt_keep_it(asked):
    row = {"prompt": asked}
    row |= {side: PROMPT[1:] + answer(side) for side in ("chosen", "rejected")}
    before = PROMPT[:1] if isinstance(asked, str) else asked
    assert as_preference(row)["prompt"] == before + PROMPT[1:]
    assert as_prompt(row) == {"prompt": before + PROMPT[1:]}
    assert as_sft(row) == {"messages": before + PROMPT[1:] + answer("chosen")}


@pytest.mark.parametrize("asked", [PROMPT, PROMPT[:1], PROMPT[2:]])
def test_lists_that_repeat_the_prompt_keep_its_system_message(asked):
    row = {"prompt": [SYSTEM, *asked]}
    row |= {side: PROMPT + answer(side) for side in ("chosen", "rejected")}
    assert as_preference(row)["prompt"] == [SYSTEM, *PROMPT]
    inside = {side: [SYSTEM, *row[side]] for side in ("chosen", "rejected")}
    assert as_preference(row | inside)["prompt"] == [SYSTEM, *PROMPT]


CONVERT = {"preference": as_preference, "sft": as_sft, "prompt": as_prompt}
PLAIN_PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("kind", CONVERT)
@pytest.mark.parametrize("shape", SHAPES)
def test_column_system_comes_first_in_every_shape(shape, kind):
    plain, found = (
        CONVERT[kind]({**SHAPES[shape], **more}) for more in ({}, {"system": "be kind"})
    )
    field = "messages" if kind == "sft" else "prompt"
    assert found[field] == [SYSTEM, *plain[field]]
    again = {**SHAPES["messages"], "prompt": [SYSTEM, *PROMPT], "system": "be kind"}
    assert CONVERT[kind](again)[field][:2] == [SYSTEM, PROMPT[0]]


def test_column_system_of_conversations_and_instructions():
    asked = {"role": "user", "content": "add"}
    row = {"system": "be kind", "instruction": "add", "output": "3"}
    assert as_sft(row) == {"messages": [SYSTEM, asked, *answer("3")]}
    row = {"system": "be kind", "messages": PROMPT + answer("fine")}
    assert as_prompt(row) == {"prompt": [SYSTEM, *PROMPT]}


def test_history_comes_before_an_instruction():
    row = {"instruction": "how are\n\nyou?", "history": [["hello", "hi"]], "output": "fine"}
    assert as_prompt(row) == {"prompt": PROMPT}
    with pytest.raises(ValueError, match="history must be a list of pairs"):
        as_sft({**row, "history": ["hello"]})


@pytest.mark.parametrize("kind", CONVERT)
@pytest.mark.parametrize("row", [SHAPES["messages"], HH, SHAPES["sharegpt"], PLAIN_PAIR])
def test_columns_that_cannot_be_used_are_refused_by_name(row, kind):
    for column in ("tools", "documents"):
        with pytest.raises(ValueError, match=f"{column} changes what the assistant reads"):
            CONVERT[kind]({**row, column: [{"name": "weather"}]})
        assert CONVERT[kind]({**row, column: "[]"})


@pytest.mark.parametrize("kind", CONVERT)
def test_column_system_that_has_no_place_is_refused(kind):
    with pytest.raises(ValueError, match="system must be text beside messages"):
        CONVERT[kind]({**PLAIN_PAIR, "system": "be kind"})
    with pytest.raises(ValueError, match="system differs from the system message"):
        CONVERT[kind]({**SHAPES["messages"], "prompt": [SYSTEM, *PROMPT], "system": "be rude"})


def test_opening_of_a_prompt_stays():
    assert as_prompt({"prompt": PROMPT, "opening": "so"}) == {"prompt": PROMPT, "opening": "so"}


def test_lists_with_different_prompts_are_dropped_and_counted():
    drops = DropCounts()
    row = {"chosen": ["a", "b"], "rejected": ["c", "d"]}
    assert as_preference(row, drops) is None
    assert as_sft(row, drops) is None
    assert as_prompt(row, drops) is None
    assert drops.dropped == 3


def test_instructions():
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    question = {"role": "user", "content": "add\n1 2"}
    assert as_sft(row) == {"messages": [question, *answer("3")]}
    assert as_prompt(row) == {"prompt": [question]}
    assert as_prompt({**row, "input": ""})["prompt"][0]["content"] == "add"


def test_prompt_of_a_conversation_ends_with_a_question():
    assert as_prompt({"messages": PROMPT + answer("fine")}) == {"prompt": PROMPT}
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert as_prompt({"conversations": turns}) == {"prompt": [{"role": "user", "content": "a"}]}


def test_missing_fields_are_named_with_those_found():
    with pytest.raises(ValueError, match=r"missing: \['chosen', 'rejected'\]; found: prompt"):
        as_preference({"prompt": "a"})
    with pytest.raises(ValueError, match=r"missing: \['prompt'\]; found: chosen, rejected"):
        as_preference({"chosen": "a", "rejected": "b"})
    with pytest.raises(ValueError, match="a prompt row needs prompt, or messages; found: text"):
        as_prompt({"text": "a"})
    with pytest.raises(ValueError, match=r"found: \['speaker', 'value'\] with role None"):
        as_sft({"conversations": [{"speaker": "a", "value": "b"}]})
    with pytest.raises(ValueError, match="need a prompt and an answer each"):
        as_preference({"chosen": answer("a"), "rejected": answer("b")})


@pytest.mark.parametrize("kind", CONVERT)
@pytest.mark.parametrize("shape", ["strings", "messages", "sharegpt"])
def test_half_of_a_surrogate_pair_is_refused_with_its_row(plain, kind, shape):
    whole = json.dumps({"strings": PLAIN_PAIR, **SHAPES}[shape])
    row = json.loads(whole.replace("hello", "a \\ud83d").replace('"a"', '"a \\ud83d"'))
    match = r"row 1: '\w+' holds '\\ud83d', half of a surrogate pair"
    with pytest.raises(ValueError, match=match):
        list(rows_of_kind([PLAIN_PAIR, row], kind, "all", DropCounts()))
    made = CONVERT[kind](row)
    with pytest.raises(ValueError, match=match):
        prepare.encode_rows(kind, [CONVERT[kind](PLAIN_PAIR), made], plain, max_length=99)


@pytest.mark.parametrize("kind", CONVERT)
def test_sides_of_two_kinds_are_refused(kind):
    for sides in (("b", answer("c")), (answer("c"), "b")):
        row = {"prompt": "a"} | dict(zip(("chosen", "rejected"), sides, strict=True))
        with pytest.raises(ValueError, match="must both be text or both lists"):
            CONVERT[kind](row)


@pytest.mark.parametrize("kind", CONVERT)
def test_sides_that_end_with_the_user_are_refused(kind):
    row = {"chosen": PROMPT + answer("fine"), "rejected": PROMPT}
    with pytest.raises(ValueError, match="rejected must end with the assistant, not with the user"):
        CONVERT[kind](row)


@pytest.mark.parametrize("label", [True, None])
def test_prompt_and_completion(label):
    row = {"prompt": "a", "completion": " b", "label": label}
    assert as_sft(row) == {"prompt": "a", "response": " b"}
    assert as_prompt(row) == {"prompt": "a"}
    assert read_unpaired(row) == ("a", " b", label)
    listed = {"prompt": PROMPT, "completion": answer("fine"), "label": label}
    assert as_sft(listed) == {"messages": PROMPT + answer("fine")}
    assert as_prompt(listed) == {"prompt": PROMPT}


def test_feedback_without_a_pair():
    row = {"prompt": "a", "completion": " b", "label": False}
    drops = DropCounts()
    assert as_sft(row, drops) is None and drops == {"label is false": 1}
    assert as_prompt(row) == {"prompt": "a"}
    with pytest.raises(ValueError, match="no method here learns from unpaired feedback"):
        as_preference(row)
    with pytest.raises(ValueError, match="label=1 must be true or false"):
        as_sft({**row, "label": 1})
    with pytest.raises(ValueError, match="must both be text or both lists"):
        as_sft({**row, "completion": answer("b")})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *(("human", "user"), ("chatgpt", "assistant"), ("bing", "assistant")),
        *(("bard", "assistant"), ("function_call", "assistant"), ("observation", "tool")),
        *(("tool", "tool"), ("developer", "system")),
    ],
)
def test_other_names_of_roles(name, role):
    turns = [{"from": name, "value": "a"}]
    assert as_sft({"conversations": turns})["messages"] == [{"role": role, "content": "a"}]


def test_content_in_parts():
    parts = [{"type": "text", "text": "how are"}, {"type": "text", "text": "\n\nyou?"}]
    said = [*PROMPT[:2], {"role": "user", "content": parts}]
    assert as_prompt({"prompt": said}) == {"prompt": PROMPT}
    with pytest.raises(ValueError, match="a part of type 'image_url': only text is read"):
        as_prompt({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]})


@pytest.mark.parametrize("kind", CONVERT)
def test_prompts_that_end_with_the_assistant_are_refused(kind):
    row = {"prompt": PROMPT[:2], "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match="prompt ends with the assistant, so that a second"):
        CONVERT[kind](row)


def test_answers_of_sharegpt_pairs():
    row = {**SHAPES["sharegpt"], "margin": 2.0}
    assert as_preference(row)["margin"] == 2.0
    with pytest.raises(ValueError, match="chosen must be said by the assistant, not by the user"):
        as_preference({**row, "chosen": {"from": "human", "value": "fine"}})


@pytest.mark.parametrize("more", ["tool_calls", "reasoning_content"])
def test_answers_of_pairs_that_are_more_than_text_are_refused(more):
    row = {"prompt": PROMPT, "chosen": answer("fine"), "rejected": answer("go away")}
    row["chosen"][0][more] = ["x"]
    with pytest.raises(ValueError, match=f"chosen: {more} of an answer is not used in pairs"):
        as_preference(row)


def test_a_pair_without_prompt_that_is_kept_is_not_counted_as_dropped():
    drops = DropCounts()
    pairs = [{"prompt": "", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(50)]
    assert len(list(rows_of_kind(pairs, "preference", "all", drops))) == 50
    assert not drops
