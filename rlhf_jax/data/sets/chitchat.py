"""People chatting with people: text for fine-tuning from scratch.

The Chit Chat Challenge of the BYU Perception, Control and Cognition Laboratory (MIT licence; the
package chitchat-dataset): 7,168 conversations. Senders are not read beyond who speaks first.
"""

from __future__ import annotations

import json

from rlhf_jax.data.schemas import DropCounts, Message, Row
from rlhf_jax.data.sets import archives
from rlhf_jax.data.splits import check_split, clean_text, normalise, split_of


def chitchat_rows(split: str, *, max_turns: int = 8, drops: DropCounts | None = None) -> list[Row]:
    """Returns {"messages"} rows: consecutive windows of the conversations.

    Who speaks first is the user, who answers is the assistant. A conversation is in one split as a
    whole; a window that repeats an earlier one is dropped, so no text is in two splits.

    Args:
        split: "train", "validation", "test" or "all".
        max_turns: even; the most turns of a window (eight are about 200 tokens).
        drops: counts conversations that nobody answered (3,150), last turns that nobody answered,
            and repeated windows.

    Raises:
        ValueError: an unknown split, or max_turns that is odd or below 2.
        archives.AssetError: the archive cannot be fetched.
    """
    content = archives.read_member("chitchat-dataset", "chitchat_dataset/dataset.json")
    conversations = [one["messages"] for one in json.loads(content).values()]
    return window_rows(conversations, split, max_turns=max_turns, drops=drops)


def window_rows(
    conversations: list[list[list[dict[str, str]]]],
    split: str,
    *,
    max_turns: int,
    drops: DropCounts | None = None,
) -> list[Row]:
    """Cuts conversations (turns of messages with "text" and "sender") into rows."""
    check_split(split)
    if max_turns < 2 or max_turns % 2:
        raise ValueError(f"max_turns={max_turns} must be even and at least 2")
    drops = DropCounts() if drops is None else drops
    seen: set[str] = set()
    rows = []
    for turns in conversations:
        messages = _messages(turns)
        is_wanted = split in ("all", split_of("\n".join(m["content"] for m in messages)))
        if len(messages) < 2:
            drops.drop("nobody answered", int(is_wanted))
            continue
        for start in range(0, len(messages), max_turns):
            window = messages[start : start + max_turns]
            reason = _unfit(window, seen)
            if reason and is_wanted:
                drops.drop(reason)
            elif is_wanted:
                rows.append({"messages": window})
    return rows


def _unfit(window: list[Message], seen: set[str]) -> str:
    """Returns why a window is left out, or nothing; remembers it."""
    if len(window) < 2:
        return "last turn without an answer"
    key = normalise("\n".join(message["content"] for message in window))
    if key in seen:
        return "duplicate text"
    seen.add(key)
    return ""


def _messages(turns: list[list[dict[str, str]]]) -> list[Message]:
    """Joins the messages of a turn; turns without words vanish, their neighbours are joined."""
    messages: list[Message] = []
    first = turns[0][0]["sender"] if turns and turns[0] else None
    for turn in turns:
        content = clean_text(" ".join(message["text"] for message in turn))
        if not content:
            continue
        role = "user" if turn[0]["sender"] == first else "assistant"
        if messages and messages[-1]["role"] == role:
            joined = f"{messages[-1]['content']} {content}"
            messages[-1] = {"role": role, "content": joined}
        elif messages or role == "user":
            messages.append({"role": role, "content": content})
    return messages
