"""Constitutional AI: a model criticises its own responses by principles, and revises them.

A constitution is a TOML file (see `constitutions`): principles, each with a critique request, a
revision request and a question for comparisons; and examples, which keep the roles straight. What
is here makes prompts of them and reads what was drawn; drawing is the caller's.

Source: Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback" (arXiv 2212.08073),
sections 3 (critiques and revisions) and 4.1 (comparisons).
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.schemas import Message
from rlhf_jax.data.splits import normalise
from rlhf_jax.runtime.settings import check

CONSTITUTIONS = Path(__file__).parent / "constitutions"
PLAIN, CHAT = "plain", "chat"
_BETWEEN = "\n\n---\n\n"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")

Prompt = str | list[Message]
Draw = Callable[[list[Prompt]], list[str]]


@dataclasses.dataclass(frozen=True)
class Principle:
    """One rule of a constitution.

    Attributes:
      name: short, for tables.
      critique: asks what in a response goes against the rule.
      revision: asks for a response that follows it.
      comparison: asks which of two responses follows it better.
    """

    name: str
    critique: str
    revision: str
    comparison: str


@dataclasses.dataclass(frozen=True)
class Example:
    """A critique and a revision that the model is shown before its own."""

    prompt: str
    response: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


@dataclasses.dataclass(frozen=True)
class Constitution:
    """Principles and examples.

    Attributes:
      name: of its file.
      source: whose principles they are.
      form: "chat" asks in the chat template of the model, "plain" in plain text.
      principles: one or more.
      examples: in the order in which they are shown.
      task: what the human has asked for, where prompts are beginnings of the text itself; empty
        where prompts are what the human has asked.
    """

    name: str
    source: str
    form: str
    principles: tuple[Principle, ...]
    examples: tuple[Example, ...] = ()
    task: str = ""

    def __post_init__(self):
        check(self, form=(PLAIN, CHAT))
        if not self.principles:
            raise ValueError("principles are missing: write [[principles]] once for each")
        names = [one.name for one in self.principles]
        if len(set(names)) < len(names):
            raise ValueError(f"principles must have different names, got {', '.join(names)}")


def load_constitution(name: str) -> Constitution:
    """Reads a constitution.

    Args:
      name: one of those that come with the library, without its ending, or the path of a TOML file.

    Raises:
      ValueError: there is no such file, or a field that it needs is missing; names both.
    """
    path = Path(name) if name.endswith(".toml") else CONSTITUTIONS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in CONSTITUTIONS.glob("*.toml")))
        raise ValueError(
            f"no constitution {name!r}: give the path of a TOML file, or one of {known}"
        )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        principles = _several(Principle, content.pop("principles", []), "principles")
        examples = _several(Example, content.pop("examples", []), "examples")
        _check_fields(content, ("source", "form"), ("task",), "the constitution")
        return Constitution(path.stem, principles=principles, examples=examples, **content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"constitution {path}: {' '.join(str(error).split())}") from error


def _several(kind: Any, found: Any, what: str) -> tuple[Any, ...]:
    """Tables of a file as dataclasses."""
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{what} must be tables: write [[{what}]] once for each")
    needed = [field.name for field in dataclasses.fields(kind)]
    for number, one in enumerate(found, 1):
        _check_fields(one, needed, (), f"number {number} of {what}")
    return tuple(kind(**one) for one in found)


def _check_fields(
    content: Mapping[str, Any], needed: Sequence[str], allowed: Sequence[str], where: str
) -> None:
    """Refuses fields that are missing, empty, unknown or no text."""
    for key in needed:
        if not str(content.get(key, "")).strip():
            raise ValueError(f"{where} needs the field {key!r}, and it is missing or empty")
    for key, value in content.items():
        if key not in (*needed, *allowed):
            raise ValueError(f"{where} has an unknown field {key!r}: it takes {', '.join(needed)}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key}={value!r} must be text")


def critique_prompt(
    constitution: Constitution, request: str, response: str, principle: Principle
) -> Prompt:
    """Examples, the request with its response, and the critique request; open for the critique.

    Args:
      constitution: whose examples are shown, and in which form.
      request: what the human asked.
      response: what is criticised.
      principle: by which.
    """
    return _prompt(constitution, request, response, [(principle.critique, "")])


def revision_prompt(
    constitution: Constitution, request: str, response: str, principle: Principle, critique: str
) -> Prompt:
    """The same with the critique, and the revision request; open for the revision."""
    told = [(principle.critique, critique), (principle.revision, "")]
    return _prompt(constitution, request, response, told)


def _prompt(
    constitution: Constitution, request: str, response: str, told: list[tuple[str, str]]
) -> Prompt:
    talks = [(one.prompt, one.response, _pairs_of(one)) for one in constitution.examples]
    talks.append((request, response, told))
    if constitution.form == CHAT:
        return [message for talk in talks for message in _messages(*talk)]
    return _BETWEEN.join(_text(*talk) for talk in talks)


def _pairs_of(one: Example) -> list[tuple[str, str]]:
    return [(one.critique_request, one.critique), (one.revision_request, one.revision)]


def _messages(request: str, response: str, told: Sequence[tuple[str, str]]) -> list[Message]:
    """A talk as turns; an answer that is empty is the one that is asked for."""
    turns = [request, response, *(text for pair in told for text in pair)]
    said = [
        {"role": "assistant" if number % 2 else "user", "content": text}
        for number, text in enumerate(turns)
    ]
    return said[:-1] if not turns[-1] else said


def _text(request: str, response: str, told: Sequence[tuple[str, str]]) -> str:
    """A talk as text, open at its end where the last answer is empty."""
    parts = [f"Human: {request}", f"Assistant: {response}"]
    for (asked, answer), name in zip(told, ("Critique", "Revision"), strict=False):
        parts += [f"{name} Request: {asked}", f"{name}: {answer}".rstrip()]
    return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Revised:
    """A response before and after a round.

    Attributes:
      principle: name of the one that was drawn.
      before: the response that came in.
      critique: as the model wrote it, perhaps empty.
      revision: as the model wrote it, perhaps empty; empty without a critique.
      response: what goes on: the revision, or what came in where critique or revision is empty.
    """

    principle: str
    before: str
    critique: str
    revision: str
    response: str


def draw_principles(
    constitution: Constitution, count: int, rng: np.random.Generator
) -> list[Principle]:
    """One principle for each of `count` revisions, with replacement."""
    picked = rng.integers(len(constitution.principles), size=count)
    return [constitution.principles[int(i)] for i in picked]


def revise(
    draw: Draw,
    constitution: Constitution,
    requests: Sequence[str],
    responses: Sequence[str],
    principles: Sequence[Principle],
) -> list[Revised]:
    """One round: a critique of each response, and a revision by it.

    Where the critique is empty no revision is asked for; where either is empty the response stays.

    Args:
      draw: answers prompts, one answer each.
      constitution: examples and form.
      requests: N, what the human asked.
      responses: N, to be revised.
      principles: N, one for each.
    """
    both = list(zip(requests, responses, principles, strict=True))
    critiques = _drawn(draw, constitution, [critique_prompt(constitution, *one) for one in both])
    told = [number for number, text in enumerate(critiques) if text]
    asked = [revision_prompt(constitution, *both[n], critiques[n]) for n in told]
    revisions = [""] * len(both)
    for number, text in zip(told, _drawn(draw, constitution, asked), strict=True):
        revisions[number] = text
    return [
        Revised(principle.name, response, critique, revision, revision or response)
        for (_, response, principle), critique, revision in zip(
            both, critiques, revisions, strict=True
        )
    ]


def _drawn(draw: Draw, constitution: Constitution, prompts: list[Prompt]) -> list[str]:
    """Answers without spaces around them; of plain text, which nothing ends, one paragraph."""
    texts = [text.strip() for text in draw(prompts)] if prompts else []
    if constitution.form == PLAIN:
        texts = [text.partition("\n\n")[0].strip() for text in texts]
    return texts


def boilerplate(texts: Sequence[str]) -> tuple[float, str]:
    """The sentence that most texts hold, and the share of texts that hold it.

    Models that are trained on critiques come to end everything alike ("you are valid, valued, and
    cared for", Bai et al. 2022, section 4.3).

    Args:
      texts: N; none gives a share of 0.

    Returns:
      The share, and the sentence; of equally frequent ones the first.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        sentences = filter(None, map(str.strip, _SENTENCE_END.split(text)))
        counts.update(list(dict.fromkeys(sentences)))
    if not counts:
        return 0.0, ""
    sentence, count = counts.most_common(1)[0]
    return count / len(texts), sentence


def statistics(revised: Sequence[Revised]) -> dict[str, float]:
    """Of a round: what came out empty, what did not change, and how the responses read."""
    texts = [one.response for one in revised]
    same = [normalise(one.response) == normalise(one.before) for one in revised]
    return response_statistics(texts) | {
        "revise/empty_critiques": float(sum(not one.critique for one in revised)),
        "revise/empty_revisions": float(
            sum(bool(one.critique) and not one.revision for one in revised)
        ),
        "revise/unchanged": float(np.mean(same)),
    }


def response_statistics(texts: Sequence[str]) -> dict[str, float]:
    """Of responses, revised or not."""
    return {
        "revise/words": float(np.mean([len(text.split()) for text in texts])),
        "revise/boilerplate": boilerplate(texts)[0],
    }
