"""The shapes in which preference and instruction data come, brought to one.

Read: {"prompt", "chosen", "rejected"} with strings or message lists; transcripts ("\\n\\nHuman: ...
\\n\\nAssistant: ...", HH-RLHF); lists of turns (MOSS-RLHF); "conversations" with "from" and "value"
(ShareGPT); "instruction", "input", "output" (Alpaca). Made: the rows described in each function.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data.fields import require, require_sft
from rlhf_jax.data.types import DropCounts, Message, Row

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
    "Human": "user",
    "human": "user",
    "user": "user",
    "Assistant": "assistant",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
DIFFERENT = "chosen and rejected answer different prompts"


def parse_transcript(text: str) -> list[Message]:
    """Turns "\\n\\nHuman: a\\n\\nAssistant: b" into messages; turns of one speaker are joined.

    Raises:
        ValueError: the text does not begin with a turn.
    """
    first = _TURN.match("\n\n" + text.lstrip("\n"))
    if first is None:
        raise ValueError(f"a transcript must begin with '\\n\\nHuman:', not {text[:40]!r}")
    parts = _TURN.split("\n\n" + text.lstrip("\n"))[1:]
    messages: list[Message] = []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        role = _ROLES[name]
        if messages and messages[-1]["role"] == role:
            joined = f"{messages[-1]['content']}\n\n{content.strip()}".strip()
            messages[-1] = {"role": role, "content": joined}
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages


def convert_hh(row: Row, drops: DropCounts | None = None) -> Row | None:
    """Converts {"chosen", "rejected"} transcripts; the prompt ends at the last "\\n\\nAssistant:".

    Returns:
        {"prompt": messages, "chosen": str, "rejected": str} and what else the row has; None where
        the two transcripts differ before their last answer, or have nothing there (counted).

    Raises:
        ValueError: a missing field, or a text that is no transcript.
    """
    require(row, ("chosen", "rejected"), "an HH row")
    mark = "\n\nAssistant:"
    prompt, found, chosen = row["chosen"].rpartition(mark)
    if not found:
        raise ValueError(f"a transcript needs {mark!r}; found: {row['chosen'][:40]!r}")
    asked, _, rejected = row["rejected"].rpartition(mark)
    if asked != prompt or not prompt.strip():
        if drops is not None:
            drops.drop(DIFFERENT if asked != prompt else "no question")
        return None
    return {
        **row,
        "prompt": parse_transcript(prompt),
        "chosen": chosen.strip(),
        "rejected": rejected.strip(),
    }


def as_preference(row: Row, drops: DropCounts | None = None) -> Row | None:
    """Brings a row of any of the shapes to {"prompt": str or messages, "chosen", "rejected"}.

    Raises:
        ValueError: missing fields (named, with those found).
    """
    require(row, ("chosen", "rejected"), "a preference row")
    chosen, rejected = row["chosen"], row["rejected"]
    if "conversations" in row:
        return {
            "prompt": [_message(turn) for turn in row["conversations"]],
            "chosen": _message(chosen)["content"],
            "rejected": _message(rejected)["content"],
        }
    if not isinstance(chosen, str):
        return _from_lists(row, drops)
    if "prompt" not in row and _TURN.match("\n\n" + chosen.lstrip("\n")):
        return convert_hh(row, drops)
    require(row, ("prompt", "chosen", "rejected"), "a preference row")
    return row


def as_sft(row: Row, drops: DropCounts | None = None) -> Row | None:
    """Brings a row to {"messages"}, {"prompt", "response"} or {"text"}; of a pair the chosen."""
    if "chosen" in row:
        pair = as_preference(row, drops)
        if pair is None:
            return None
        if isinstance(pair["prompt"], str):
            return {"prompt": pair["prompt"], "response": pair["chosen"]}
        return {"messages": [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]}
    if "conversations" in row:
        return {"messages": [_message(turn) for turn in row["conversations"]]}
    if "instruction" in row:
        require(row, ("instruction", "output"), "an instruction row")
        answer = {"role": "assistant", "content": row["output"]}
        return {"messages": [_instruction(row), answer]}
    require_sft(row)
    return row


def as_prompt(row: Row, drops: DropCounts | None = None) -> Row | None:
    """Brings a row to {"prompt"}: what stands before the last answer of the assistant."""
    if "prompt" in row and "chosen" not in row:
        require(row, ("prompt",), "a prompt row")
        return {"prompt": row["prompt"]}
    if "chosen" in row:
        pair = as_preference(row, drops)
        return None if pair is None else {"prompt": pair["prompt"]}
    if "instruction" in row:
        return {"prompt": [_instruction(row)]}
    messages = (as_sft(row) or {}).get("messages")
    if messages is None:
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"a prompt row needs prompt, or messages; found: {found}")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return {"prompt": messages}


def _from_lists(row: Row, drops: DropCounts | None) -> Row | None:
    """Chosen and rejected are lists of turns: all but the last are the prompt."""
    sides = [_turns(row[name]) for name in ("chosen", "rejected")]
    prompts = [side[:-1] for side in sides]
    before = row.get("prompt")
    if not any(prompts) and before is not None:
        prompt = before if isinstance(before, str) else _turns(before)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompts = [prompt, prompt]
    if prompts[0] != prompts[1]:
        if drops is not None:
            drops.drop(DIFFERENT)
        return None
    if not sides[0] or not sides[1] or not prompts[0]:
        raise ValueError("lists in chosen and rejected need a prompt and an answer each")
    return {
        **row,
        "prompt": prompts[0],
        "chosen": sides[0][-1]["content"],
        "rejected": sides[1][-1]["content"],
    }


def _turns(turns: Sequence[Any]) -> list[Message]:
    """Reads messages, or strings said in turn by user and assistant."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": turn}
        if isinstance(turn, str)
        else _message(turn)
        for number, turn in enumerate(turns)
    ]


def _message(turn: Any) -> Message:
    """Reads {"role", "content"} or {"from", "value"}."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn must be a dict, not {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(
            f"a turn needs role (or from) among {sorted(_ROLES)} and content (or value); "
            f"found: {sorted(turn)} with role {role!r}"
        )
    return {"role": _ROLES[role], "content": content}


def _instruction(row: Row) -> Message:
    """Joins instruction and input into one question."""
    parts = [row["instruction"], row.get("input") or ""]
    return {"role": "user", "content": "\n".join(part for part in parts if part)}
