"""Loss masks of several styles of chat template."""

import datetime

import numpy as np
import pytest

from rlhf_jax.data import prepare
from rlhf_jax.data import templates as template_module
from rlhf_jax.data.convert import rows_of_kind
from rlhf_jax.data.encode import encode_messages, encode_prompt
from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.templates import ChatTokenizer as Chat
from rlhf_jax.data.templates import date_of, set_date, stop_tokens
from tests.data import conftest as templates
from tests.data.conftest import TALK, sentencepiece_like, stretches

ANSWERS = ["I like the sea.", "they are kind!"]


@pytest.fixture(params=["plain", "chatml", "no_switch", "headers", "brackets", "thinking"])
def family(request, plain, with_template):
    """(tokenizer, stop token, what the template writes before an answer, messages)."""
    if request.param == "plain":
        return plain, "<eos>", "", TALK
    style = {
        "chatml": (templates.CHATML, "<|im_end|>", "", TALK),
        "no_switch": (templates.CHATML_NO_SWITCH, "<|im_end|>", "", TALK),
        "headers": (templates.HEADERS, "<|eot|>", "", TALK),
        "brackets": (templates.BRACKETS, "<eos>", " ", TALK[1:]),
        "thinking": (templates.THINKING, "<|im_end|>", "", TALK),
    }[request.param]
    return with_template(style[0]), *style[1:]


def test_every_turn_of_the_assistant_is_trained_with_its_stop_token(family):
    tokenizer, stop, before, messages = family
    encoded = encode_messages(messages, Chat(tokenizer), 500)
    assert encoded.tokens.dtype == np.int32
    assert encoded.loss_mask.dtype == bool
    assert stretches(encoded, tokenizer) == [before + answer + stop for answer in ANSWERS]
    read = "".join(stretches(encoded, tokenizer, trained=False))
    assert "what do you think?" in read
    assert "and the people" in read


def test_document_is_the_rendered_template_up_to_the_last_stop_token(family):
    tokenizer, stop, _, messages = family
    encoded = encode_messages(messages, Chat(tokenizer), 500)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.tokens) == rendered[: rendered.rindex(stop) + len(stop)]


def test_prompt_is_a_prefix_of_the_whole_and_opens_the_turn(family):
    tokenizer, _, _, messages = family
    encoded = encode_messages(messages, Chat(tokenizer), 500)
    starts = np.flatnonzero(encoded.loss_mask & ~np.append(False, encoded.loss_mask[:-1]))
    for turn, start in zip((-3, -1), starts, strict=True):
        prompt = encode_prompt(messages[:turn], Chat(tokenizer), 500)
        assert prompt.tolist() == encoded.tokens[:start].tolist()


def test_stop_tokens_are_those_of_the_template_and_eos(family, with_template):
    tokenizer, stop, _, _ = family
    stops = stop_tokens(tokenizer)
    assert stops[0] == tokenizer.convert_tokens_to_ids(stop)
    assert tokenizer.eos_token_id in stops


def test_thoughts_that_a_template_drops_from_earlier_turns(with_template):
    tokenizer = with_template(templates.THINKING)
    messages = [dict(message) for message in TALK]
    messages[2]["content"] = "hm</think>I like the sea."
    messages[4]["content"] = "well</think>they are kind!"
    encoded = encode_messages(messages, Chat(tokenizer), 500)
    assert stretches(encoded, tokenizer) == [
        "I like the sea.<|im_end|>",
        "well</think>they are kind!<|im_end|>",
    ]


def test_template_that_never_stops_is_refused(with_template):
    tokenizer = with_template(templates.NEVER_STOPS)
    with pytest.raises(ValueError, match="stop token would be outside the loss mask"):
        encode_messages(TALK, Chat(tokenizer), 500)


def test_template_that_stops_only_at_the_end_is_refused(with_template):
    only_last = "{% if loop.last %}{{ eos_token }}{% endif %}"
    template = templates.BRACKETS.replace("+ eos_token }}", "}}" + only_last)
    tokenizer = with_template(template)
    assert stretches(encode_messages(TALK[1:3], Chat(tokenizer), 500), tokenizer) == [
        " I like the sea.<eos>"
    ]
    with pytest.raises(ValueError, match="without its stop token '<eos>'"):
        encode_messages(TALK[1:], Chat(tokenizer), 500)


def test_template_that_refuses_a_role_is_one_line(with_template):
    tokenizer = with_template(templates.BRACKETS)
    with pytest.raises(ValueError, match=r"refuses the roles \[system.*only user and assistant"):
        encode_messages(TALK, Chat(tokenizer), 500)


def test_system_message_that_only_an_unanswered_turn_holds_is_in_the_prompt(with_template):
    chat = Chat(with_template(templates.SYSTEM_LAST))
    prompt = encode_prompt(TALK[:2], chat, 500)
    assert chat.decode(prompt) == "<bos>[Q] be kind\n\nwhat do you think?[/Q]"
    later = chat.decode(encode_prompt(TALK[:4], chat, 500))
    assert later == (
        "<bos>[Q] what do you think?[/Q] I like the sea.<eos>[Q] be kind\n\nand the people[/Q]"
    )
    # Too long: the older turn goes, the system message stays.
    short = chat.decode(encode_prompt(TALK[:4], chat, len(chat.encode(later, first=True)) - 1))
    assert short == "<bos>[Q] be kind\n\nand the people[/Q]"


def test_system_message_that_an_answer_takes_away_is_refused_where_answers_are(with_template):
    tokenizer = with_template(templates.SYSTEM_LAST)
    pair = {"prompt": TALK[:2], "chosen": "yes", "rejected": "no"}
    for kind, row in (
        ("sft", {"messages": TALK[:3]}),
        ("sft", {"prompt": TALK[:2], "response": "yes"}),
        ("preference", pair),
    ):
        with pytest.raises(ValueError, match=r"row 0: .* before message 2 differently once"):
            prepare.encode_rows(kind, [row], tokenizer, max_length=500)
    # Without a system message nothing is lost.
    assert prepare.encode_rows("sft", [{"messages": TALK[1:3]}], tokenizer, max_length=500)


def test_changed_template_is_noticed(with_template):
    tokenizer = with_template(templates.CHATML)
    first = stop_tokens(tokenizer)
    tokenizer.chat_template = templates.HEADERS
    assert stop_tokens(tokenizer) != first


def test_kept_renderings_are_of_the_whole_message(with_template):
    name = "{{ '(' + m['name'] + ')' if m['name'] else '' }}"
    tokenizer = with_template(templates.CHATML.replace("{% endfor %}", name + "{% endfor %}"))
    talk = [{"role": "user", "content": "a"}]
    chat = Chat(tokenizer)
    with chat.ahead([]):
        texts = [chat.open_text([{**talk[0], **more}]) for more in ({}, {"name": "b"}, {})]
    assert texts[0] == texts[2]
    assert "(b)" in texts[1]
    assert "(b)" not in texts[0]


@pytest.mark.parametrize("scheme", ["always", "first", "llama"])
@pytest.mark.parametrize(("before", "piece"), [("the\n", "sea"), ("the sea", " and the people")])
def test_later_pieces_gain_no_space(scheme, before, piece):
    tokenizer = sentencepiece_like(scheme)
    whole = tokenizer.encode(before + piece, add_special_tokens=False)
    pieces = Chat(tokenizer).encode(before, first=True)
    pieces += Chat(tokenizer).encode(piece, first=False)
    assert pieces == whole


def test_pieces_would_gain_a_space_without_care():
    tokenizer = sentencepiece_like("llama")
    alone = tokenizer.encode(" and", add_special_tokens=False)
    assert "".join(tokenizer.convert_ids_to_tokens(alone)) == "▁▁and"
    careful = Chat(tokenizer).encode(" and", first=False)
    assert "".join(tokenizer.convert_ids_to_tokens(careful)) == "▁and"


def test_pieces_of_byte_level_tokenizers_are_plain_encodings(plain):
    for text in ("", " and", "\nand", "\n\n"):
        assert Chat(plain).encode(text, first=False) == plain.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("scheme", ["byte level", "always", "first", "llama"])
def test_pieces_encoded_at_once_are_those_encoded_one_by_one(plain, scheme, monkeypatch):
    tokenizer = plain if scheme == "byte level" else sentencepiece_like(scheme)
    texts = ["the sea", " and the people", "\nand", "I like 12", ""]
    pieces = [(text, first) for text in texts for first in (True, False)]
    alone = [Chat(tokenizer).encode(text, first=first) for text, first in pieces]
    chat = Chat(tokenizer)
    monkeypatch.setattr(chat, "_pieces_of", lambda row: pieces)
    with chat.ahead([{}, {}]):
        monkeypatch.setattr(chat, "_encode_alone", lambda text: [] if not text else None)
        assert [chat.encode(text, first=first) for text, first in pieces] == alone
    assert chat.encode("the sea", first=True) is None  # nothing is kept afterwards


def test_nothing_is_written_to_the_tokenizer(with_template):
    tokenizer = with_template(templates.CHATML)
    before = set(vars(tokenizer))
    rows = [{"messages": TALK}]
    assert prepare.encode_rows("sft", rows, tokenizer, max_length=200)
    assert stop_tokens(tokenizer)
    assert set(vars(tokenizer)) == before


def test_eos_behind_another_token_is_trained_at_every_turn(with_template):
    chat = Chat(with_template(templates.TWO_TOKENS))
    assert chat.stop_tokens == (chat.eos_token_id,)
    encoded = encode_messages(TALK, chat, 500)
    assert stretches(encoded, chat.tokenizer) == [f"{a}<|im_end|><eos>" for a in ANSWERS]
    whole = chat.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert chat.decode(encoded.tokens) == whole


def test_formatted_text_gains_eos_behind_another_token(with_template):
    chat = Chat(with_template(templates.TWO_TOKENS))
    row = {"prompt": "<|head|>user<|/head|>a<eos><|head|>assistant<|/head|>"}
    for response in ("b<|im_end|>", "b<|im_end|><eos>"):
        (encoded,) = prepare.encode_rows(
            "sft", [row | {"response": response}], chat.tokenizer, max_length=500
        )
        assert stretches(encoded, chat.tokenizer) == ["b<|im_end|><eos>"]


@pytest.mark.parametrize("between", ["\n", ""])
def test_eos_behind_the_whole_conversation_is_left_out(with_template, between):
    """The token that ends every turn is trained, and stops the sampler."""
    template = templates.EOS_AT_THE_END.replace("'<|eot|>\n'", f"'<|eot|>{between}'")
    tokenizer = with_template(template)
    names = tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer))
    assert names == ["<|eot|>", "<eos>"]
    encoded = encode_messages(TALK, Chat(tokenizer), 500)
    assert stretches(encoded, tokenizer) == [f"{answer}<|eot|>" for answer in ANSWERS]
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(encoded.tokens) + between + "<eos>" == whole


REWRITTEN = "writes the last answer of a conversation otherwise than those before it"


def test_earlier_answers_are_those_that_the_template_writes_later(with_template, caplog):
    """What is trained is the template's own rendering; that it is not as sampled is said once."""
    tokenizer = with_template(templates.THOUGHTS_LAST)
    chat = Chat(tokenizer)
    talk = [*TALK[1:4], TALK[4] | {"reasoning_content": "well"}]
    for messages, trained in (
        (talk[:2], ["()\nI like the sea.<|im_end|>"]),
        (talk, ["I like the sea.<|im_end|>", "(well)\nthey are kind!<|im_end|>"]),
        (talk * 2, ["I like the sea.<|im_end|>", "they are kind!<|im_end|>"] * 2),
    ):
        encoded = encode_messages(messages, chat, 500)
        if len(messages) == 8:
            trained[3] = "(well)\n" + trained[3]
        assert stretches(encoded, tokenizer) == trained
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(encoded.tokens) + "\n" == whole
        prompt = chat.decode(encode_prompt(messages[:-1], chat, 500))
        assert prompt == tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        assert caplog.text.count(REWRITTEN) == (len(messages) > 2)
    # A question without an answer is left out first: the answer before it is the last.
    encoded = encode_messages(talk[:3], chat, 500)
    assert stretches(encoded, tokenizer) == ["()\nI like the sea.<|im_end|>"]


def test_templates_that_write_all_answers_alike_say_nothing(family, caplog):
    tokenizer, _, _, messages = family
    encode_messages(messages, Chat(tokenizer), 500)
    assert REWRITTEN not in caplog.text


CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '(' + m['reasoning_content'] + ')' }}{% endif %}"
    "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}{{ '[' + call['name'] + ']' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("content", ["", "so", None])
def test_a_turn_ends_behind_its_tool_calls(with_template, content):
    tokenizer = with_template(CALLING)
    call = {"role": "assistant", "content": content, "tool_calls": [{"name": "weather"}]}
    talk = [TALK[1], call, {"role": "tool", "content": "18"}, TALK[4]]
    (row,) = rows_of_kind([{"messages": talk}], "sft", "all", DropCounts())
    (encoded,) = prepare.encode_rows("sft", [row], tokenizer, max_length=500)
    assert stretches(encoded, tokenizer) == [
        f"{content or ''}[weather]<|im_end|>",
        "they are kind!<|im_end|>",
    ]
    (row,) = rows_of_kind([{"messages": talk[:2]}], "sft", "all", DropCounts())
    (encoded,) = prepare.encode_rows("sft", [row], tokenizer, max_length=500)
    assert stretches(encoded, tokenizer) == [f"{content or ''}[weather]<|im_end|>"]


def test_an_answer_may_occur_in_its_reasoning(with_template):
    tokenizer = with_template(CALLING)
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2 gives 4"}
    encoded = encode_messages([TALK[1], answer], Chat(tokenizer), 500)
    assert stretches(encoded, tokenizer) == ["(2 and 2 gives 4)4<|im_end|>"]


def test_what_the_assistant_says_before_anybody_is_read_only(plain):
    encoded = encode_messages([TALK[2], *TALK[3:]], Chat(plain), 500)
    assert stretches(encoded, plain) == ["they are kind!<eos>"]
    drops = DropCounts()
    assert encode_messages([TALK[2]], Chat(plain), 500, drops) is None
    assert drops == {"no question": 1}


def many_turns(count):
    return [{"role": ("user", "assistant")[n % 2], "content": f"{n} the sea"} for n in range(count)]


@pytest.mark.parametrize(
    "style",
    [
        "plain",
        "CHATML",
        "CHATML_NO_SWITCH",
        "HEADERS",
        "BRACKETS",
        "TWO_TOKENS",
        "EOS_AT_THE_END",
        "THOUGHTS_LAST",
    ],
)
def test_many_turns_are_rendered_no_more_often_than_few(with_template, plain, style, monkeypatch):
    tokenizer = plain if style == "plain" else with_template(getattr(templates, style))
    rendered = []
    apply = type(tokenizer).apply_chat_template

    def counted(self, messages, **settings):
        rendered.append(len(messages))
        return apply(self, messages, **settings)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    often = []
    for turns in (100, 400):
        rendered.clear()
        pieces = Chat(tokenizer).pieces(many_turns(turns), opened=False)
        often.append(len(rendered))
        assert sum(piece.trained for piece in pieces) == turns // 2
    assert often[0] == often[1] < 40


@pytest.mark.parametrize(
    "style",
    [
        "plain",
        "CHATML",
        "CHATML_NO_SWITCH",
        "HEADERS",
        "BRACKETS",
        "TWO_TOKENS",
        "EOS_AT_THE_END",
        "THOUGHTS_LAST",
    ],
)
def test_turns_found_at_once_are_those_found_one_by_one(with_template, plain, style, monkeypatch):
    tokenizer = plain if style == "plain" else with_template(getattr(templates, style))
    talk = many_turns(60)
    talk[9]["content"] = "12 the sea\n\n"
    talk[21]["content"] = "hi<|im_end|>\n<|im_start|>assistant\n<eos>"
    talk[31]["content"] = ""
    at_once = Chat(tokenizer).pieces(talk, opened=False)
    monkeypatch.setattr(template_module, "_MANY", 1000)
    assert at_once == Chat(tokenizer).pieces(talk, opened=False)


def test_a_date_that_was_set_is_that_of_every_row(with_template):
    dated = (
        "{{ bos_token }}{%- if strftime_now is defined %}{{ strftime_now( '%d %b %Y') }} "
        '{{ strftime_now("%H:%M") }}{%- endif %}' + templates.CHATML
    )
    tokenizer = with_template(dated)
    assert date_of(tokenizer) == datetime.date.today().isoformat()
    of_today = prepare._key([], tokenizer)
    set_date(tokenizer, "2024-07-26")
    assert date_of(tokenizer) == "2024-07-26"
    for _ in range(2):  # a new one for each kind and split
        assert Chat(tokenizer).open_text(TALK[:1]).startswith("<bos>26 Jul 2024 00:00<|im")
    assert tokenizer.chat_template == dated
    assert prepare._key([], tokenizer) != of_today  # encoded rows of another day stay aside
    plain = with_template(templates.CHATML)
    set_date(plain, "2024-07-26")
    assert date_of(plain) == "" and Chat(plain).open_text(TALK[:1]).startswith("<|im")


def test_a_date_that_cannot_be_set_is_refused(with_template):
    with pytest.raises(ValueError, match="month"):
        set_date(with_template(templates.CHATML), "2024-13-01")
    computed = with_template("{% set f = '%d' %}{{ strftime_now(f) }}" + templates.CHATML)
    with pytest.raises(ValueError, match="calls strftime_now with a format that is no string"):
        Chat(computed).open_text(TALK[:1])
