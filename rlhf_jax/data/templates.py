"""Chat templates: which characters of a rendered conversation the assistant said.

Templates mark that seldom (`{% generation %}`), and without the marks transformers returns a mask
of zeros. Here it is found by rendering: the conversation up to a turn, left open for the assistant,
is a prefix of the whole; the turn starts where that prefix ends, and it ends with the stop token
that the template writes after the assistant's words: the first special token there, or EOS where
others lead to it at every turn (Cohere2: `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`). What a template
writes once, after the whole conversation, is left out: Phi-3 ends turns with `<|end|>`, which stops
the sampler, so that `<|endoftext|>` behind the last one is never sampled.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.schemas import MARK, Message, Row, check_characters, check_messages

_MANY = 16  # More answers than this are looked for at once.
_PROBE = "zq7w"  # A word that no template writes itself.
# The function by which templates ask for the date.
_NOW = "strftime_now"
_ASKS_DATE = re.compile(_NOW + r"\s*\(\s*(['\"])(.*?)\1\s*\)")
_log = logging.getLogger(__name__)


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids that end a response: the template's end-of-turn token, and EOS.

    Raises:
      ValueError: the template ends the assistant's turn with no token at all.
    """
    return ChatTokenizer(tokenizer).stop_tokens


def set_date(tokenizer: Any, date: str) -> None:
    """Sets the day that a template writes where it asks for today's; it is not saved with the rest.

    Args:
      tokenizer: a tokenizer of transformers, changed in place.
      date: as in 2026-01-31.

    Raises:
      ValueError: it is no date.
    """
    datetime.date.fromisoformat(date)
    tokenizer.date_of_template = date


def date_of(tokenizer: Any) -> str:
    """Returns the day that a template writes, as in 2026-01-31: that of `set_date`, or today's.

    Empty where the template asks for none.
    """
    if _NOW not in str(getattr(tokenizer, "chat_template", None)):
        return ""
    return getattr(tokenizer, "date_of_template", "") or datetime.date.today().isoformat()


class Piece(NamedTuple):
    """A stretch of the rendered text; pieces are tokenized one by one."""

    text: str
    trained: bool


class _Profile(NamedTuple):
    """What a template does, found by rendering probes."""

    stop: str  # The token that ends the assistant's turn.
    closing: str  # The special tokens behind an answer, the stop token the last of them.
    opens: bool  # Whether it heeds `add_generation_prompt`.
    marks_turns: bool  # Whether it writes BOS at every turn.
    header: str  # What it writes between a question and its answer, if only with the answer.
    rewrites: bool  # Whether an answer reads otherwise once more is said.


class ChatTokenizer:
    """A tokenizer with its chat template, and what was found out about the two.

    Whoever encodes rows makes one and passes it on. Nothing is written to the tokenizer; its
    template and special tokens must not change while this is used.

    Args:
      tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._rendered: dict[Any, str] | None = None
        self._ids: dict[tuple[str, bool], list[int]] = {}
        self._said_formatted = self._said_rewritten = False

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a response; see `templates.stop_tokens`."""
        stop = self.tokenizer.convert_tokens_to_ids(self._profile.stop)
        return tuple(dict.fromkeys([stop, self.tokenizer.eos_token_id]))

    @property
    def eos_token_id(self) -> int:
        """The id of EOS."""
        return self.tokenizer.eos_token_id

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids."""
        return self.tokenizer.decode(ids)

    @property
    def leading_bos(self) -> int | None:
        """The id that starts a text without a template, or None.

        None also where the template writes BOS at every turn: there it marks turns, as
        ``<|im_start|>`` does in SmolLM2-Instruct, and before plain text it would announce a role.
        """
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        marks_turns = has_template and self._profile.marks_turns
        return None if marks_turns else self.tokenizer.bos_token_id

    def pieces(self, messages: Sequence[Message], *, opened: bool) -> list[Piece]:
        """Splits the rendered conversation into what the assistant reads and what it says.

        Args:
          messages: the conversation.
          opened: the messages are a prompt; the template is left open for the assistant. Otherwise
            the text ends with the last turn of the assistant.

        Returns:
          Pieces in order, none empty; a trained piece is one turn, its stop token included.

        Raises:
          ValueError: the template refuses the messages, is not stable under prefixes, or ends a
            turn without its stop token.
        """
        stop = self._profile.stop
        messages = self._as_text(messages)
        whole = self.open_text(messages) if opened else self._render(messages)
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        # What the assistant says before anybody has spoken answers nothing: it is only read.
        answers = [number for number in answers if number]
        starts = self._starts(messages, answers, whole)
        if len(answers) > 1 and not opened:
            self._say_rewritten()
        pieces: list[Piece] = []
        done = 0
        for turn, (number, start) in enumerate(zip(answers, starts, strict=True)):
            if start is None:
                if opened:  # Nothing of a prompt is trained: it may stay in one piece.
                    return [*pieces, Piece(whole[done:], False)]
                raise ValueError(
                    f"the chat template renders what comes before message {number} differently "
                    "once it follows: give the tokenizer a template whose prefixes are stable"
                )
            later = starts[turn + 1] if turn + 1 < len(starts) else None
            end = _turn_end(whole, start, len(whole) if later is None else later, stop)
            pieces += [Piece(whole[done:start], False), Piece(whole[start:end], True)]
            done = end
        if opened:
            pieces.append(Piece(whole[done:], False))
        return [piece for piece in pieces if piece.text]

    def _say_rewritten(self) -> None:
        """Once, where conversations of several answers are trained on."""
        if self._profile.rewrites and not self._said_rewritten:
            self._said_rewritten = True
            _log.warning(
                "the chat template writes the last answer of a conversation otherwise than those "
                "before it: these are trained as it shows them then, and not as they are sampled"
            )

    def _starts(
        self, messages: Sequence[Message], answers: Sequence[int], whole: str
    ) -> list[int | None]:
        """Where each answer starts; None where what comes before it is rendered otherwise."""

        def start(number: int) -> int | None:
            before = self.open_text(messages[:number])
            return len(before) if whole.startswith(before) else None

        if len(answers) > _MANY:
            found = self._starts_at_once(messages, answers, whole)
            ends = [*range(_MANY // 4), *range(-(_MANY // 4), 0)]
            if found is not None and all(found[n] == start(answers[n]) for n in ends):
                return [*found]
        return [start(number) for number in answers]

    def _starts_at_once(
        self, messages: Sequence[Message], answers: Sequence[int], whole: str
    ) -> list[int] | None:
        """The same with two renderings, not one for each answer: time grows with the length only.

        All answers are replaced by a word; what is read between two of them stands in the
        conversation as well, behind the stop token of the first. None where it does not.
        """
        stop, probe = self._profile.stop, _PROBE * 4
        if any(probe in str(message) for message in messages):
            return None
        asked = {*answers}
        replaced = [
            {"role": "assistant", "content": probe} if number in asked else message
            for number, message in enumerate(messages)
        ]
        between = self._render(replaced).split(probe)
        if len(between) != len(answers) + 1:
            return None
        opening = ""
        if self._profile.opens:
            alone, opened = (
                self._render(messages[:1], add_generation_prompt=more) for more in (False, True)
            )
            # Alone it may end with EOS, where the template writes that behind a conversation.
            same = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(alone, opened, strict=False)
            )
            opening = opened[sum(1 for _ in same) :]
        found, position = [], 0
        for number, read in enumerate(between[:-1]):
            if number:
                position = whole.find(stop, position) + len(stop)
                head, stopped, read = read.partition(stop)
                if not stopped or (head + stopped).lstrip() != self._profile.closing:
                    return None
            read = read[: read.rfind(opening) + len(opening)] if opening else read.rstrip(" ")
            if not whole.startswith(read, position):
                return None
            position += len(read)
            found.append(position)
        return found

    def open_text(self, messages: Sequence[Message]) -> str:
        """Renders a prompt up to where the assistant's words begin.

        A template without `add_generation_prompt` writes its header, if any, only together with the
        words: what comes before them is the header, except for spaces, which start the response (as
        tokenizers glue a space to the word that follows it).
        """
        messages = self._as_text(messages)
        if self._profile.opens:
            return self._render(messages, add_generation_prompt=True)
        alone, answered = self._render(messages).rstrip(" "), self._before_answer(messages)
        if answered.startswith(alone) or alone.startswith(answered):
            return answered
        # Some templates put the system message into the last turn if it is the user's. With an
        # answer behind it the turn would lose what the policy is to read.
        return alone + self._profile.header

    def _before_answer(self, messages: Sequence[Message]) -> str:
        """Renders an answer behind the messages; returns what stands before it."""
        probe = self._render([*messages, {"role": "assistant", "content": _PROBE}])
        return probe[: probe.rindex(_PROBE)].rstrip(" ")

    def is_formatted(self, text: str) -> bool:
        """Whether a text is formatted already: it begins with a control token.

        Its control tokens are control tokens then; those of any other text are text.
        """
        found = self._control is not None and self._control.match(text.lstrip()) is not None
        if found and not self._said_formatted:
            self._said_formatted = True
            _log.warning(
                "texts begin with a control token: they are taken as formatted already, and BOS "
                "and stop tokens that they hold are not added"
            )
        return found

    def ends_turn(self, text: str) -> bool:
        """Whether a formatted text ends with a stop token."""
        stops = [self.tokenizer.eos_token]
        if getattr(self.tokenizer, "chat_template", None):
            stops.append(self._profile.stop)
        return text.endswith(tuple(stops))

    def as_text(self, text: str) -> str:
        """Marks the names of control tokens in a text, so that `encode` takes them as text."""
        if self._control is None:
            return text
        return self._control.sub(lambda found: found[0][:1] + MARK + found[0][1:], text)

    def _as_text(self, value: Any) -> Any:
        """The same of whatever a message holds, except its role."""
        if isinstance(value, str):
            return self.as_text(value)
        if isinstance(value, dict):
            return {k: v if k == "role" else self._as_text(v) for k, v in value.items()}
        return [self._as_text(one) for one in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Returns the ids of a piece of a longer text, without special tokens around it.

        Pieces that are encoded one by one must not gain a space at each seam. Tokenizers of the
        SentencePiece kind put one before every text; for those a later piece is encoded after a
        line break, whose ids are then taken off.

        Args:
          text: the piece.
          first: whether nothing but BOS comes before it.
        """
        known = self._ids.get((text, first))
        if known is not None:
            return known
        if first or not text or not self._adds_space:
            return self._encode_alone(text)
        head, ids = self._encode_alone("\n"), self._encode_alone("\n" + text)
        return ids[len(head) :] if ids[: len(head)] == head else self._encode_alone(text)

    @contextlib.contextmanager
    def ahead(self, rows: Iterable[Row]) -> Iterator[None]:
        """Encodes the pieces of many rows at once, on all cores; inside, `encode` looks them up.

        Inside, a conversation is also rendered once: two answers to one prompt share its prefixes.

        Args:
          rows: of any kind; those that are wrong are passed over.
        """
        self._rendered = {}
        try:
            self._ids = self._encoded([piece for row in rows for piece in self._pieces_of(row)])
            yield
        finally:
            self._rendered, self._ids = None, {}

    def _pieces_of(self, row: Row) -> list[tuple[str, bool]]:
        """What `encode` will be asked for, whatever the row is; [] if the row is wrong.

        What is missing here is encoded when its turn comes.
        """
        prompt = row.get("messages", row.get("prompt", ()))
        try:
            if isinstance(prompt, str):
                return []
            check_characters(row)
            said = check_messages(prompt, "prompt")
            sides = [row[side] for side in ("chosen", "rejected", "response") if side in row]
            talks = [[*said, {"role": "assistant", "content": side}] for side in sides] or [said]
            opened = "messages" not in row and not sides
            return [
                (piece.text, number == 0)
                for talk in talks
                for number, piece in enumerate(self.pieces(talk, opened=opened))
            ]
        except (ValueError, AttributeError, TypeError):
            return []  # The encoder says what is wrong, and in which row.

    def _encoded(self, pieces: list[tuple[str, bool]]) -> dict[tuple[str, bool], list[int]]:
        """Ids of pieces with their `first`; of slow tokenizers nothing is encoded ahead."""
        backend, found = self._backend, {}
        if backend is None:
            return {}
        wanted = [piece for piece in dict.fromkeys(pieces) if piece[0] and MARK not in piece[0]]
        seam = "\n" if self._adds_space else ""
        head = self._encode_alone(seam)
        texts = [text if first else seam + text for text, first in wanted]
        batch = backend.encode_batch_fast(texts, add_special_tokens=False)
        for (text, first), one in zip(wanted, batch, strict=True):
            ids, start = one.ids, 0 if first else len(head)
            if first or ids[:start] == head:
                found[text, first] = ids[start:]
        return found

    def _encode_alone(self, text: str) -> list[int]:
        """Encodes without special tokens: where it is safe, past transformers, twice as fast."""
        if not text:
            return []
        if MARK in text:
            return self._encode_literal(text)
        backend = self._backend
        if backend is None:
            return self.tokenizer.encode(text, add_special_tokens=False)
        return backend.encode(text, add_special_tokens=False).ids

    def _encode_literal(self, text: str) -> list[int]:
        """Encodes stretches between control tokens; names that are marked become text."""
        ids: list[int] = []
        marked = self._control.split(text) if self._control is not None else [text]
        for stretch in marked:
            if MARK not in stretch:
                ids += self._encode_alone(stretch)
            elif (plain := stretch.replace(MARK, "")) and self._literal is not None:
                ids += self._literal.encode(plain, add_special_tokens=False).ids
            else:
                ids += self.tokenizer.encode(
                    plain, add_special_tokens=False, split_special_tokens=True
                )
        return ids

    @functools.cached_property
    def _control(self) -> re.Pattern[str] | None:
        """Names of the control tokens; what stays in the text when it is split there."""
        known = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token) for token in known if token.special}
        names |= set(self.tokenizer.all_special_tokens)
        longest = sorted((name for name in names if name), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest)) + ")") if longest else None

    @functools.cached_property
    def _literal(self) -> Any:
        """A copy of the fast tokenizer to which control tokens are text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        copy = type(backend).from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        return copy

    @property
    def _backend(self) -> Any:
        """The fast tokenizer, None where it would cut or pad."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return None if backend is None or backend.truncation or backend.padding else backend

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether 'a' alone differs from 'a' after a line break."""
        alone, after = self._encode_alone("a"), self._encode_alone("\na")
        return after[-len(alone) :] != alone

    @functools.cached_property
    def _dated(self) -> dict[str, str]:
        """The template with its date written out, if it asks for one: one day for all rows."""
        date = date_of(self.tokenizer)
        if not date:
            return {}
        day = datetime.datetime.fromisoformat(date)
        template = _ASKS_DATE.sub(
            lambda found: json.dumps(day.strftime(found[2])), self.tokenizer.get_chat_template()
        )
        if re.search(rf"{_NOW}\s*\(", template):
            raise ValueError(
                f"the chat template calls {_NOW} with a format that is no string, so that its date "
                "cannot be fixed for a run: write the format into the call"
            )
        return {"chat_template": template}

    @functools.cached_property
    def _profile(self) -> _Profile:
        """Renders the probes."""
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: call ensure_template(tokenizer)")
        question = [{"role": "user", "content": "a"}]
        answer = {"role": "assistant", "content": _PROBE}
        answered = self._render([*question, answer])
        opened = self._render(question, add_generation_prompt=True)
        alone = self._render(question)
        names = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len)
        pattern = "|".join(re.escape(name) for name in reversed(names))
        behind = answered[answered.rindex(_PROBE) + len(_PROBE) :]
        found = re.match(rf"\s*((?:{pattern})+)", behind)
        if found is None:
            raise ValueError(
                "the chat template ends the assistant's turn with no special token, so that the "
                "stop token would be outside the loss mask: write {{ eos_token }} after it"
            )
        bos = tokenizer.bos_token
        marks_turns = bos is not None and answered.count(bos) > 1
        before, shared = self._before_answer(question), len(alone.rstrip(" "))
        header = before[shared:] if before[:shared] == alone[:shared] else ""
        twice = self._render([*question, answer, *question, answer])
        stop, closing = _stop_of(re.findall(pattern, found.group(1)), tokenizer.eos_token, twice)
        rewrites = not twice.startswith(answered[: answered.rindex(_PROBE)])
        return _Profile(stop, closing, opened != alone, marks_turns, header, rewrites)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Applies the template; a template that refuses gives a ValueError of one line."""
        from jinja2 import TemplateError

        kept = self._rendered
        if kept is not None and any(len(message) > 2 for message in messages):
            kept = None  # More than role and content may be rendered.
        key = (tuple((m["role"], m["content"]) for m in messages), add_generation_prompt)
        if kept is not None and key in kept:
            return kept[key]
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._dated,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template refuses the roles [{roles}]: {error}") from error
        if kept is not None:
            kept[key] = text
        return text


def _stop_of(tokens: Sequence[str], eos: str, twice: str) -> tuple[str, str]:
    """The token that ends a turn, of the special tokens behind an answer; and all up to it.

    EOS, if it is among them at every turn: what stands before it is said as well. `twice` is a
    conversation of two turns.
    """
    closing = "".join(tokens[: tokens.index(eos) + 1]) if eos in tokens else ""
    every_turn = closing and twice.count(closing) == 2
    return (eos, closing) if every_turn else (tokens[0], tokens[0])


def _turn_end(whole: str, start: int, limit: int, stop: str) -> int:
    """Returns the position after the first stop token of the turn that starts at `start`.

    Names of control tokens within the words are text and do not count: behind content, reasoning
    and calls the template's own is the first. `limit` is where the next answer starts.
    """
    position = whole.find(stop, start, limit)
    if position < 0:
        raise ValueError(
            f"the chat template ends an assistant's turn without its stop token {stop!r}, so that "
            "stopping would not be trained: write it after every turn of the assistant"
        )
    return position + len(stop)
