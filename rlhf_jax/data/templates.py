"""Chat templates: which characters of a rendered conversation the assistant said.

Templates mark that seldom (`{% generation %}`), and without the marks transformers returns a mask
of zeros. Here it is found by rendering: the conversation up to a turn, left open for the assistant,
is a prefix of the whole; the turn starts where that prefix ends, and it ends with the stop token
that the template writes behind the assistant's words.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.schemas import Message, Row

_ROLES = ("system", "user", "assistant", "tool")
_PROBE = "zq7w"  # Words that no template writes itself.


class Piece(NamedTuple):
    """A stretch of the rendered text; pieces are tokenized one by one."""

    text: str
    trained: bool


class _Profile(NamedTuple):
    """What a template does, found by rendering probes once for each template and BOS."""

    key: tuple[str, str | None]
    stop: str
    opens: bool
    bos: int | None


def check_messages(messages: Any, where: str) -> list[Message]:
    """Returns the messages; raises ValueError naming what is missing and what was found."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(
            f"{where}: messages must be a list of dicts, not {type(messages).__name__}"
        )
    for number, message in enumerate(messages):
        found = sorted(message) if isinstance(message, dict) else type(message).__name__
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: message {number} needs role and content; found: {found}")
        if message["role"] not in _ROLES:
            raise ValueError(f"{where}: role {message['role']!r} must be one of {_ROLES}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ValueError(f"{where}: content of message {number} must be text, not {kind}")
    return list(messages)


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids that end a response: the template's end-of-turn token, and EOS.

    Raises:
        ValueError: the template ends the assistant's turn with no token at all.
    """
    stop = tokenizer.convert_tokens_to_ids(_profile(tokenizer).stop)
    return tuple(dict.fromkeys([stop, tokenizer.eos_token_id]))


def leading_bos(tokenizer: Any) -> int | None:
    """Returns the id that starts a text without a template, or None.

    None also where the template writes BOS at every turn: there it marks turns, as <|im_start|>
    does in SmolLM2-Instruct, and in front of plain text it would announce a role.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.bos_token_id
    return _profile(tokenizer).bos


def render_pieces(messages: Sequence[Message], tokenizer: Any, *, opened: bool) -> list[Piece]:
    """Splits the rendered conversation into what the assistant reads and what it says.

    Args:
        messages: the conversation.
        tokenizer: with a chat template.
        opened: the messages are a prompt; the template is left open for the assistant. Otherwise
            the text ends with the last turn of the assistant.

    Returns:
        Pieces in order, none empty; a trained piece is one turn, its stop token included.

    Raises:
        ValueError: the template refuses the messages, is not stable under prefixes, or ends a
            turn without its stop token.
    """
    profile = _profile(tokenizer)
    whole = open_text(messages, tokenizer) if opened else _render(messages, tokenizer)
    pieces = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = open_text(messages[:number], tokenizer)
        if not whole.startswith(before):
            raise ValueError(
                f"the chat template renders message {number} differently once more follow: "
                "give the tokenizer a template whose prefixes are stable"
            )
        end = _turn_end(whole, len(before), message["content"], profile.stop)
        pieces += [Piece(whole[done : len(before)], False), Piece(whole[len(before) : end], True)]
        done = end
    if opened:
        pieces.append(Piece(whole[done:], False))
    return [piece for piece in pieces if piece.text]


def pieces_of(row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
    """Returns what `encode_piece` will be asked for, whatever the row is; [] if the row is wrong.

    For encoding ahead: what is missing here is encoded when its turn comes.
    """
    prompt = row.get("messages", row.get("prompt", ()))
    try:
        if isinstance(prompt, str):
            return []
        said = check_messages(prompt, "prompt")
        sides = [row[side] for side in ("chosen", "rejected", "response") if side in row]
        talks = [[*said, {"role": "assistant", "content": side}] for side in sides] or [said]
        opened = "messages" not in row and not sides
        return [
            (piece.text, number == 0)
            for talk in talks
            for number, piece in enumerate(render_pieces(talk, tokenizer, opened=opened))
        ]
    except (ValueError, AttributeError, TypeError):
        return []  # The encoder says what is wrong, and in which row.


@contextlib.contextmanager
def renderings_kept(tokenizer: Any) -> Iterator[None]:
    """Inside, a conversation is rendered once: two answers to one prompt share its prefixes."""
    tokenizer._rlhf_jax_rendered = {}
    try:
        yield
    finally:
        tokenizer._rlhf_jax_rendered = None


def open_text(messages: Sequence[Message], tokenizer: Any) -> str:
    """Renders a prompt up to where the assistant's words begin.

    A template without `add_generation_prompt` writes its header, if any, only together with the
    words: what stands before them is the header, except for spaces, which start the response (as
    tokenizers glue a space to the word behind it).
    """
    if _profile(tokenizer).opens:
        return _render(messages, tokenizer, add_generation_prompt=True)
    probe = _render([*messages, {"role": "assistant", "content": _PROBE}], tokenizer)
    return probe[: probe.rindex(_PROBE)].rstrip(" ")


def _turn_end(whole: str, start: int, content: str, stop: str) -> int:
    """Returns the position behind the stop token of the turn that starts at `start`."""
    said = whole.find(content.strip(), start)
    # A template may rewrite the content (drop its reasoning): then the next stop token ends it.
    behind = said + len(content.strip()) if said >= 0 else start
    position = whole.find(stop, behind)
    gap = whole[behind:position] if position >= 0 else ""
    if position < 0 or (said >= 0 and gap.strip()):
        raise ValueError(
            f"the chat template ends an assistant's turn without its stop token {stop!r}, so that "
            "stopping would not be trained: write it behind every turn of the assistant"
        )
    return position + len(stop)


def _profile(tokenizer: Any) -> _Profile:
    """Renders the probes, or returns what was found before."""
    key = (str(getattr(tokenizer, "chat_template", None)), tokenizer.bos_token)
    known = getattr(tokenizer, "_rlhf_jax_profile", None)
    if known is not None and known.key == key:
        return known
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: call ensure_template(tokenizer)")
    question = [{"role": "user", "content": "a"}]
    answered = _render([*question, {"role": "assistant", "content": _PROBE}], tokenizer)
    opened = _render(question, tokenizer, add_generation_prompt=True)
    opens = opened != _render(question, tokenizer)
    names = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len)
    pattern = r"\s*(" + "|".join(re.escape(name) for name in reversed(names)) + ")"
    found = re.match(pattern, answered[answered.rindex(_PROBE) + len(_PROBE) :])
    if found is None:
        raise ValueError(
            "the chat template ends the assistant's turn with no special token, so that the stop "
            "token would be outside the loss mask: write {{ eos_token }} behind it"
        )
    marks_turns = tokenizer.bos_token is not None and answered.count(tokenizer.bos_token) > 1
    bos = None if marks_turns else tokenizer.bos_token_id
    profile = _Profile(key, found.group(1), opens, bos)
    tokenizer._rlhf_jax_profile = profile
    return profile


def _render(
    messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool = False
) -> str:
    """Applies the template; a template that refuses gives a ValueError of one line."""
    from jinja2 import TemplateError

    kept = getattr(tokenizer, "_rlhf_jax_rendered", None)
    if kept is not None and any(len(message) > 2 for message in messages):
        kept = None  # More than role and content may be rendered.
    key = (tuple((m["role"], m["content"]) for m in messages), add_generation_prompt)
    if kept is not None and key in kept:
        return kept[key]
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses the roles [{roles}]: {error}") from error
    if kept is not None:
        kept[key] = text
    return text
