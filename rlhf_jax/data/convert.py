"""Rows in any of the shapes that data come in, brought to rows of a kind.

Read: {"prompt", "chosen", "rejected"} with strings or message lists; transcripts ("\\n\\nHuman: ...
\\n\\nAssistant: ...", HH-RLHF); lists of turns (MOSS-RLHF); "conversations" with "from" and "value"
(ShareGPT); "instruction", "input", "output" (Alpaca); {"prompt", "completion"} (TRL), with a
"label" unpaired feedback (KTO). Made: the rows described in each function.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rlhf_jax.data.schemas import (
    DropCounts,
    Kind,
    Message,
    Row,
    check_characters,
    check_messages,
    one_line,
    require,
    require_sft,
)
from rlhf_jax.data.splits import split_of

_TURN = re.compile(r"\n\n(Human|Assistant):")
_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "Human"),
    "assistant": (
        *("assistant", "Assistant", "gpt", "chatgpt", "bing", "bard", "model"),
        "function_call",  # LLaMA-Factory: the call is what the assistant says.
    ),
    "tool": ("tool", "observation", "function_response"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
# What decides the shape of a row, first come first: a set of conversations often has the question
# in "prompt" as well, and instructions the rendered text in "text".
_SHAPES = ("chosen", "messages", "conversations", "instruction", "response", "completion", "text")
# Columns that templates or models of other tools are given, and ours are not.
_UNREAD = ("tools", "documents", "chat_template_kwargs", "images", "videos", "audios")
_NOTHING: tuple[Any, ...] = (None, "", "[]", "{}", [], {})
DIFFERENT = "chosen and rejected answer different prompts"


def rows_of_kind(
    rows: Iterable[Row],
    kind: Kind,
    split: str,
    drops: DropCounts,
    *,
    belongs: Callable[[Row], bool] | None = None,
) -> Iterator[Row]:
    """Brings rows to a kind; keeps those that belong to the split, and each prompt once.

    Args:
      rows: of any of the shapes above.
      kind: "sft", "preference" or "prompt": rows become those of `as_sft`, `as_preference` or
        `as_prompt`.
      split: "train", "validation", "test" or "all".
      drops: counts what is left out.
      belongs: whether a converted row is of the split; by default a hash of its text says so.

    Raises:
      ValueError: a row is of no such shape; names the row.
    """
    seen: set[bytes] = set()
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a row must be a dict of columns, not {type(row).__name__}")
            converted = _CONVERT[kind](row, drops)
            if converted is not None:
                check_characters(converted)
        except ValueError as error:
            raise ValueError(f"row {number}: {one_line(error)}") from error
        if converted is None:
            continue
        if not (belongs(converted) if belongs else _is_in_split(converted, kind, split, drops)):
            continue
        if kind == "prompt":
            key = row_key(converted)
            if key in seen:
                drops.drop("duplicate prompt")
                continue
            seen.add(key)
        yield converted


def every_row(row: Row) -> bool:
    """For rows that are all of the split."""
    return True


def row_key(row: Row) -> bytes:
    """Returns 16 bytes that equal rows share, whatever the order of their columns."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def first_text(row: Row) -> str:
    """Returns the text that decides the split: of a conversation, what was said first."""
    said = row.get("messages") or row.get("prompt")
    if said and not isinstance(said, str):
        return next((m["content"] for m in said if m["role"] != "system"), "")
    return said or row.get("text") or row.get("chosen") or row.get("response") or ""


def _is_in_split(row: Row, kind: Kind, split: str, drops: DropCounts) -> bool:
    """Whether the row belongs to the split; a pair without a prompt must do so with both texts."""
    if split == "all":
        return True
    found = {split_of(first_text(row))}
    if kind == "preference" and not row["prompt"]:
        found.add(split_of(row["rejected"]))
    if len(found) > 1:
        drops.drop("texts of two splits")
    return found == {split}


def is_transcript(text: Any) -> bool:
    """Whether a text begins with a turn."""
    return isinstance(text, str) and _TURN.match("\n\n" + text.lstrip()) is not None


def _turns_of(text: str) -> list[tuple[Message, str]]:
    """Returns the messages of a transcript, each with all the text from its content on.

    Turns of one speaker are joined. Only a paragraph that begins with the speaker is a turn:
    "Human:" within a line, or after a single line break, is text.

    Raises:
      ValueError: the text does not begin with a turn.
    """
    text = "\n\n" + text.strip()
    if not _TURN.match(text):
        raise ValueError(f"a transcript must begin with '\\n\\nHuman:', not {text[2:42]!r}")
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns: list[tuple[Message, str]] = []
    for mark, end in zip(marks, ends, strict=True):
        role, content = _ROLES[mark[1]], text[mark.end() : end].strip()
        if turns and turns[-1][0]["role"] == role:
            message, rest = turns[-1]
            joined = f"{message['content']}\n\n{content}".strip()
            turns[-1] = ({"role": role, "content": joined}, rest)
        else:
            turns.append(({"role": role, "content": content}, text[mark.end() :].strip()))
    return turns


def convert_hh(row: Row, drops: DropCounts | None = None) -> Row | None:
    """Converts {"chosen", "rejected"} transcripts to a prompt and two answers.

    The prompt is what both transcripts have in common, turn by turn, back to the last turn of the
    human; what follows in each is its answer. Where one answer holds further turns, it quotes a
    dialogue, and they are part of its text. Where both do, or where one transcript only goes on
    after the other's answer, they are different conversations: the row is left out and counted.

    Returns:
      {"prompt": messages, "chosen": str, "rejected": str} and what else the row has; None where
      there is no such prompt (counted).

    Raises:
      ValueError: a missing field, or a text that is no transcript.
    """
    require(row, ("chosen", "rejected"), "an HH row")
    sides = [_turns_of(row[name]) for name in ("chosen", "rejected")]
    pairs = zip(*sides, strict=False)
    shared = list(itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], pairs))
    while shared and shared[-1][0][0]["role"] != "user":
        shared.pop()
    rests = [side[len(shared) :] for side in sides]
    several = [len(rest) > 1 for rest in rests]
    goes_on = any(several) and rests[0][:1] and rests[1][:1] and rests[0][0][0] == rests[1][0][0]
    if not shared or all(several) or goes_on:
        if drops is not None:
            asked = all(any(turn["role"] == "user" for turn, _ in side) for side in sides)
            drops.drop(DIFFERENT if asked else "no question")
        return None
    chosen, rejected = (
        rest[0][1] if len(rest) > 1 else rest[0][0]["content"] if rest else "" for rest in rests
    )
    prompt = [pair[0][0] for pair in shared]
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def as_preference(row: Row, drops: DropCounts | None = None) -> Row | None:
    """Brings a row of any of the shapes to {"prompt": str or messages, "chosen", "rejected"}.

    Raises:
      ValueError: missing fields (named, with those found), or a column that changes the prompt
        and cannot be used.
    """
    return _with_columns(row, _preference(row, drops))


def as_sft(row: Row, drops: DropCounts | None = None) -> Row | None:
    """Brings a row to {"messages"}, {"prompt", "response"} or {"text"}; of a pair the chosen.

    Raises:
      ValueError: as for `as_preference`.
    """
    return _with_columns(row, _sft(row, drops))


def as_prompt(row: Row, drops: DropCounts | None = None) -> Row | None:
    """Brings a row to {"prompt"}: what comes before the last answer of the assistant.

    Raises:
      ValueError: as for `as_preference`.
    """
    return _with_columns(row, _prompt(row, drops))


def _with_columns(row: Row, made: Row | None) -> Row | None:
    """Puts the column "system" before what a row became; refuses what no template is given."""
    if made is None:
        return None
    for column in _UNREAD:
        if row.get(column) not in _NOTHING:
            raise ValueError(
                f"{column} changes what the assistant reads, and templates are not given it here: "
                "write it into the messages, or leave out the column"
            )
    system = row.get("system")
    if system in _NOTHING:
        return made
    field = "messages" if "messages" in made else "prompt"
    if not isinstance(system, str) or not isinstance(made.get(field), list):
        raise ValueError("system must be text beside messages: before a plain text it has no place")
    said = check_messages(made[field], field)
    if not said or said[0]["role"] != "system":
        return {**made, field: [{"role": "system", "content": system}, *said]}
    if said[0]["content"].strip() != system.strip():
        raise ValueError("system differs from the system message of the conversation: keep one")
    return made


def _preference(row: Row, drops: DropCounts | None) -> Row | None:
    if row.get("chosen") is None and row.get("completion") is not None:
        raise ValueError(
            "completion with prompt is no pair, and no method here learns from unpaired feedback: "
            "SFT takes the row, read_unpaired gives its label; a pair needs chosen and rejected"
        )
    require(row, ("chosen", "rejected"), "a preference row")
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("conversations") is not None:
        answers = {name: _answer(row[name], name) for name in ("chosen", "rejected")}
        beside: Row = {name: row[name] for name in ("margin", "p_chosen") if name in row}
        prompt = _open_prompt(row["conversations"], "conversations")
        if not prompt:
            raise ValueError("conversations is empty: chosen and rejected answer nothing")
        return {"prompt": prompt, **answers, **beside}
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return _from_lists(row, drops)
    if row.get("prompt") is None and is_transcript(chosen):
        return convert_hh(row, drops)
    require(row, ("prompt", "chosen", "rejected"), "a preference row")
    if not isinstance(row["prompt"], str):
        return {**row, "prompt": _open_prompt(row["prompt"])}
    return row


def _sft(row: Row, drops: DropCounts | None) -> Row | None:
    shape = _shape(row)
    if shape == "chosen":
        pair = _preference(row, drops)
        if pair is None:
            return None
        if isinstance(pair["prompt"], str):
            return {"prompt": pair["prompt"], "response": pair["chosen"]}
        return {"messages": [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]}
    if shape in ("messages", "conversations"):
        return {"messages": _conversation(row[shape], shape)}
    if shape == "instruction":
        require(row, ("instruction", "output"), "an instruction row")
        answer = {"role": "assistant", "content": _text(row["output"], "output")}
        return {"messages": [*_instruction(row), answer]}
    if shape == "completion":
        return _completion(row, drops)
    fields = ("prompt", "response") if shape == "response" else (shape,)
    kept = {field: row[field] for field in fields if field in row}
    require_sft(kept or row)
    if not isinstance(kept.get("prompt", ""), str):
        kept["prompt"] = _open_prompt(kept["prompt"])
    return kept


def _completion(row: Row, drops: DropCounts | None) -> Row | None:
    """A prompt and what was said to it, text or messages both; a label of False leaves it out."""
    prompt, completion, label = read_unpaired(row)
    if label is False:
        if drops is not None:
            drops.drop("label is false")
        return None
    if isinstance(prompt, str):
        return {"prompt": prompt, "response": completion}
    return {"messages": [*prompt, *completion]}


def read_unpaired(row: Row) -> tuple[str | list[Message], str | list[Message], bool | None]:
    """Reads a row of unpaired feedback: {"prompt", "completion", "label"} (KTO, TRL).

    Returns:
      The prompt and the completion, both text or both messages, and whether people wanted it; None
      where the row has no label. No method here learns from what was not wanted: SFT leaves it out.

    Raises:
      ValueError: a missing field, one of another type, or a label that is no bool.
    """
    require(row, ("prompt", "completion"), "a prompt-completion row")
    prompt, completion, label = row["prompt"], row["completion"], row.get("label")
    if label is not None and not isinstance(label, bool):
        raise ValueError(f"label={label!r:.40} must be true or false")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion, label
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("prompt and completion must both be text or both lists of messages")
    return _open_prompt(prompt), _conversation(completion, "completion"), label


def _prompt(row: Row, drops: DropCounts | None) -> Row | None:
    shape = _shape(row)
    if shape == "chosen":
        pair = _preference(row, drops)
        return None if pair is None else {"prompt": pair["prompt"]}
    if shape == "instruction":
        return {"prompt": _instruction(row)}
    if shape == "completion":
        return {"prompt": read_unpaired(row)[0]}
    if shape in ("messages", "conversations"):
        messages = _conversation(row[shape], shape)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return {"prompt": messages}
    if "prompt" not in row:
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"a prompt row needs prompt, or messages; found: {found}")
    require(row, ("prompt",), "a prompt row")
    kept = {field: row[field] for field in ("prompt", "opening") if row.get(field) is not None}
    if not isinstance(kept["prompt"], str):
        kept["prompt"] = _open_prompt(kept["prompt"])
    if "opening" in kept:
        _text(kept["opening"], "opening")
    return kept


def _shape(row: Row) -> str:
    """Returns the column that decides what a row is, whatever kind of row is made of it.

    Were it to depend on the kind, SFT could train on one column and PPO ask what is in another.
    """
    there = [column for column in _SHAPES if column in row]
    # Files of tables hold every column in every row, and null where a row has none.
    nothing = "prompt" if row.get("prompt") is not None or not there else there[0]
    return next((column for column in there if row[column] is not None), nothing)


def texts_of(row: Row) -> list[str]:
    """Returns the texts of a row of `as_sft`, without roles or templates."""
    said: Any = row["messages"] if "messages" in row else row.get("prompt", "")
    texts = [said] if isinstance(said, str) else [message["content"] for message in said]
    return [text for text in [*texts, row.get("response", ""), row.get("text", "")] if text]


def _from_lists(row: Row, drops: DropCounts | None) -> Row | None:
    """Chosen and rejected are lists of turns: all but the last are the prompt, or end it."""
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], list):
            kind = type(row[name]).__name__
            raise ValueError(
                f"chosen and rejected must both be text or both lists; {name} is {kind}"
            )
    sides = [_turns(row[name]) for name in ("chosen", "rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if side and side[-1]["role"] != "assistant":
            raise ValueError(f"{name} must end with the assistant, not with the {side[-1]['role']}")
    prompts = [side[:-1] for side in sides]
    if row.get("prompt") is not None:
        before = _asked(row["prompt"])
        prompts = [_after(before, prompt) for prompt in prompts]
    if prompts[0] != prompts[1]:
        if drops is not None:
            drops.drop(DIFFERENT)
        return None
    if not sides[0] or not sides[1] or not prompts[0]:
        raise ValueError("lists in chosen and rejected need a prompt and an answer each")
    if prompts[0][-1]["role"] == "assistant":
        _open_prompt(prompts[0])
    answers = {
        name: _plain(side[-1], name)["content"]
        for name, side in zip(("chosen", "rejected"), sides, strict=True)
    }
    return {**row, "prompt": prompts[0], **answers}


def _asked(prompt: Any) -> list[Message]:
    """Reads a prompt beside lists of turns; one that is a string is a question."""
    if not isinstance(prompt, str | list):
        raise ValueError(f"prompt must be text or a list of messages, not {type(prompt).__name__}")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt)


def _after(before: list[Message], turns: list[Message]) -> list[Message]:
    """Joins a prompt with the turns of a side: they go on from it, or say it again."""
    system = [turn for turn in before[:1] if turn["role"] == "system"]
    wanted = [_folded(turn) for turn in before[len(system) :]]
    found = [_folded(turn) for turn in turns]
    size = len(wanted)
    if any(found[n : n + size] == wanted for n in range(len(found) - size + 1)):
        held = turns[0]["role"] == "system" if turns else False
        return turns if held else system + turns
    return before + turns


def _folded(turn: Message) -> tuple[str, str]:
    """A turn to compare: white space makes no other one of it."""
    return turn["role"], " ".join(turn["content"].split())


def _turns(turns: Sequence[Any]) -> list[Message]:
    """Reads messages, or strings said in turn by user and assistant."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": turn}
        if isinstance(turn, str)
        else _message(turn)
        for number, turn in enumerate(turns)
    ]


def _conversation(turns: Any, where: str = "conversations") -> list[Message]:
    """Reads a list of turns; see `_message`."""
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{where}: messages must be a list of dicts, not {type(turns).__name__}")
    return [_message(turn, f"{where}: ") for turn in turns]


def _open_prompt(prompt: Any, where: str = "prompt") -> list[Message]:
    """Reads a prompt that is a list: somebody else than the assistant spoke last."""
    said = _conversation(prompt, where)
    if said and said[-1]["role"] == "assistant":
        raise ValueError(
            f"{where} ends with the assistant, so that a second answer would follow: leave that "
            "turn out, or give words with which the answer begins as opening"
        )
    return said


def _answer(turn: Any, where: str) -> str:
    """Reads the answer beside a ShareGPT conversation: a turn of the assistant, or its text."""
    if isinstance(turn, list) and len(turn) == 1:
        turn = turn[0]
    if isinstance(turn, str):
        return turn
    message = _plain(_message(turn, f"{where}: "), where)
    if message["role"] != "assistant":
        raise ValueError(f"{where} must be said by the assistant, not by the {message['role']}")
    return message["content"]


def _plain(message: Message, where: str) -> Message:
    """Refuses an answer of a pair that is more than its text."""
    more = [name for name in message if name not in ("role", "content") and message[name]]
    if more:
        raise ValueError(f"{where}: {more[0]} of an answer is not used in pairs: write it as text")
    return message


def _message(turn: Any, where: str = "") -> Message:
    """Reads {"role", "content"} or {"from", "value"}; keeps what else templates may read."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where}a turn must be a dict, not {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    held = "content" in turn or "value" in turn
    if not isinstance(role, str) or role not in _ROLES or not held:
        raise ValueError(
            f"{where}a turn needs role (or from) among {sorted(_ROLES)} and content (or value); "
            f"found: {sorted(turn)} with role {role!r:.40}"
        )
    content = _said(turn.get("content", turn.get("value")), where)
    more = {
        name: value
        for name, value in turn.items()
        if name not in ("role", "from", "content", "value") and value is not None
    }
    return {"role": _ROLES[role], "content": content, **more}


def _said(content: Any, where: str) -> str:
    """Reads a content: text, a list of parts that are text, or null, which is nothing said."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return _text(content, f"{where}content")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}content has a part of type {kind!r:.40}: only text is read")
    return "".join(part["text"] for part in content)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, not {type(value).__name__}")
    return value


def _instruction(row: Row) -> list[Message]:
    """Joins instruction and input into one question; what was said before comes first."""
    parts = [_text(row[name] or "", name) for name in ("instruction", "input") if name in row]
    history = row.get("history") or []
    if not isinstance(history, list | tuple) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in history
    ):
        raise ValueError("history must be a list of pairs, a question and its answer each")
    before = _turns([text for turn in history for text in turn])
    return [*before, {"role": "user", "content": "\n".join(part for part in parts if part)}]


_CONVERT: dict[Kind, Callable[[Row, DropCounts | None], Row | None]] = {
    "sft": as_sft,
    "preference": as_preference,
    "prompt": as_prompt,
}
