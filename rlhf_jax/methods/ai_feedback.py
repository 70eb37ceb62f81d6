"""AI feedback: what a language model says of responses, as soft labels and as ratings.

Functions of a model and texts. A judge compares two responses, shown in both orders, rates one from
1 to 10, or says which of two answers it expects to a question about one. What it is asked is a
template in a TOML file (see `feedback_templates`), which names its source and is there to be
edited. What is wrong with the labels is returned beside them: position bias, how often the order
decides, entropy.

Sources: Bai et al. 2022, "Constitutional AI" (arXiv 2212.08073), section 4.1; Lee et al. 2023,
"RLAIF vs. RLHF" (arXiv 2309.00267), section 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.schemas import Message, check_messages
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.evaluation.log_odds import log_probs_after
from rlhf_jax.models.files import hf_weights
from rlhf_jax.rollouts.answers import sample_answers
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime.settings import check

TEMPLATES = Path(__file__).parent / "feedback_templates"
PLAIN, CHAT = "plain", "chat"
COMPARE, RATE, SCORE = "compare", "rate", "score"
# The fields of a template: those that it must hold, and those that it may.
_FIELDS = {
    COMPARE: (("first", "second"), ("prompt", "question")),
    RATE: (("response",), ("prompt",)),
    SCORE: (("response",), ("prompt",)),
}
_KNOWN = re.compile(r"\{(prompt|first|second|response|question)\}")
# How the turns of a conversation are shown, by role; the system's are shown as they stand.
_SPEAKERS = {"user": "Human: ", "assistant": "Assistant: ", "tool": "Tool: "}
# Of a rationale in plain text, which no stop token ends.
_PARAGRAPH = "\n\n"

Prompt = str | Sequence[Message]


@dataclasses.dataclass(frozen=True)
class Template:
    """What a judge is asked.

    Attributes:
      name: of its file.
      source: the paper it follows, or whose it is.
      kind: "compare", "rate", or "score", which is one response and two answers.
      form: "plain" is gone on with as it stands; "chat" is what a user says, in the chat template
        of the judge.
      prompt: the question, with fields: `{first}` and `{second}` to compare, else `{response}`;
        `{prompt}` for what was responded to and `{question}` for a principle, where they are asked.
      answers: what may follow, as it would go on after the opening.
      opening: words between the question and the answer; in a chat the judge has begun with them.
      system: the system's message of a chat.
      rationale: words that ask for reasons, in place of the opening; empty where none can be asked.
      verdict: words between the reasons and the answer.

    Raises:
      ValueError: a field is missing or is none of its kind, or there are not enough answers.
    """

    name: str
    source: str
    kind: str
    form: str
    prompt: str
    answers: tuple[str, ...]
    opening: str = ""
    system: str = ""
    rationale: str = ""
    verdict: str = ""

    def __post_init__(self):
        check(self, kind=_FIELDS, form=(PLAIN, CHAT))
        for key in ("source", "prompt"):
            if not getattr(self, key).strip():
                raise ValueError(f"{key} is empty")
        needed, allowed = _FIELDS[self.kind]
        found = set(_KNOWN.findall(self.prompt))
        for field in needed:
            if field not in found:
                raise ValueError(f"prompt must hold {{{field}}}, for kind={self.kind!r}")
        if extra := sorted(found - {*needed, *allowed}):
            raise ValueError(f"prompt holds {{{extra[0]}}}, which kind={self.kind!r} does not fill")
        if self.form == PLAIN and self.system:
            raise ValueError("system is for form='chat': write it into the prompt")
        if bool(self.rationale) != bool(self.verdict):
            raise ValueError("rationale and verdict go together: give both, or none")
        count, two = len(self.answers), self.kind != RATE
        if len(set(self.answers)) < count or (count != 2 if two else count < 2):
            how_many = "two" if two else "two or more"
            raise ValueError(f"answers={self.answers} must be {how_many} different ones")


def load_template(name: str) -> Template:
    """Reads a template.

    Args:
      name: one of those that come with the library, without its ending, or the path of a TOML file.

    Raises:
      ValueError: there is no such file, or it is no template; names the file.
    """
    path = Path(name) if name.endswith(".toml") else TEMPLATES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in TEMPLATES.glob("*.toml")))
        raise ValueError(f"no template {name!r}: give the path of a TOML file, or one of {known}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        fields = {field.name for field in dataclasses.fields(Template)} - {"name"}
        if unknown := sorted(content.keys() - fields):
            raise ValueError(f"unknown key {unknown[0]!r}; there are {', '.join(sorted(fields))}")
        required = ("source", "kind", "form", "prompt", "answers")
        if missing := [key for key in required if key not in content]:
            raise ValueError(f"key {missing[0]!r} is missing")
        answers = content.pop("answers")
        for key, value in (*content.items(), *(("answers", one) for one in answers)):
            if not isinstance(value, str):
                raise ValueError(f"{key}={value!r} must be text")
        return Template(name=path.stem, answers=tuple(answers), **content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"template {path}: {' '.join(str(error).split())}") from error


@dataclasses.dataclass(frozen=True)
class FeedbackModel:
    """A language model that judges.

    Attributes:
      model: its weights.
      tokenizer: its own.
      name: in reports.
      max_length: the longest prompt in tokens, unless the model's own context is shorter.
      batch_tokens: about how many tokens are read at a time, what all prompts share aside.
    """

    model: Any
    tokenizer: Any
    name: str = "judge"
    max_length: int = 2048
    batch_tokens: int = 2048

    @property
    def room(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return min(self.max_length, self.model.config.max_length)

    @functools.cached_property
    def chat(self) -> ChatTokenizer:
        """The tokenizer with its chat template."""
        return ChatTokenizer(self.tokenizer)


def load_feedback_model(folder: str, *, dtype: str | None = None, **settings: Any) -> FeedbackModel:
    """Loads a judge from the folder of a language model, or by its name on the hub.

    Args:
      folder: with its tokenizer.
      dtype: of the weights in memory; None is that of the file.
      **settings: of a `FeedbackModel`.

    Raises:
      ValueError: no such model.
    """
    config = hf_weights.load_config(folder)
    tokenizer = tokenizers.load_tokenizer(folder, vocab_size=config.vocab_size)
    hf_weights.check_vocabulary(tokenizer, config, str(folder))
    return FeedbackModel(hf_weights.load_model(folder, dtype=dtype), tokenizer, **settings)


def answer_log_probs(
    judge: FeedbackModel, prompts: Sequence[Sequence[int]], answers: Sequence[str]
) -> np.ndarray:
    """log p(answer | prompt) for answers of one or more tokens, float64 [N, K].

    An answer that begins another, as "1" begins "10" where digits are tokens, is one that does not
    go on as the other:

        p(1) = p("1") (1 − p("0" | "1"))

    Args:
      judge: reads the prompts.
      prompts: N prompts of token ids.
      answers: K different answers as they would go on after the prompts.

    Raises:
      ValueError: an answer has no token, or two have the same ones.
    """
    ids = [tuple(judge.chat.encode(answer, first=False)) for answer in answers]
    if () in ids or len(set(ids)) < len(ids):
        raise ValueError(f"the answers {tuple(answers)} must be different tokens, and none empty")
    reached: dict[tuple[int, ...], np.ndarray] = {(): np.zeros(len(prompts))}
    ended: dict[tuple[int, ...], np.ndarray] = {}
    beginnings = {one[:length] for one in ids for length in range(len(one))}
    for beginning in sorted(beginnings, key=len):
        at = len(beginning)
        following = sorted({one[at] for one in ids if len(one) > at and one[:at] == beginning})
        values = log_probs_after(
            judge.model,
            [[*prompt, *beginning] for prompt in prompts],
            following,
            batch_tokens=judge.batch_tokens,
        )
        for column, token in enumerate(following):
            reached[(*beginning, token)] = reached[beginning] + values[:, column]
        going_on = np.exp(values).sum(axis=1)
        ended[beginning] = np.log(np.maximum(1 - going_on, 1e-12))
    return np.stack([reached[one] + ended.get(one, 0.0) for one in ids], axis=1)


def log_odds(
    judge: FeedbackModel,
    prompts: Sequence[Sequence[int]],
    answers: tuple[str, str],
    *,
    template: str,
) -> np.ndarray:
    """Log-odds of the first of two answers against the second after each prompt, float64 [N].

        log p(a_1 | prompt) − log p(a_2 | prompt)

    by the first tokens of the answers; 0 is undecided. What all prompts begin with is computed
    once, and batches have few shapes, see `evaluation.log_odds`. Rounded to four decimals: a prompt
    may be read in batches of different shapes, whose rounding must decide nothing.

    Args:
      judge: reads the prompts.
      prompts: N prompts of token ids.
      answers: two answers as they would go on after the prompts.
      template: name of what is asked, for the error.

    Raises:
      ValueError: the answers begin with the same token, or one is empty; names the template.
    """
    first = [judge.chat.encode(answer, first=False)[:1] for answer in answers]
    if [] in first or first[0] == first[1]:
        raise ValueError(
            f"template {template}: the answers {answers[0]!r} and {answers[1]!r} begin with the "
            f"same token for the judge {judge.name}, and first tokens are what is compared: choose "
            "other words, or move what they share to the opening"
        )
    wanted = [token for ids in first for token in ids]
    values = log_probs_after(judge.model, prompts, wanted, batch_tokens=judge.batch_tokens)
    return np.round(values[:, 0] - values[:, 1], 4)


class Comparison(NamedTuple):
    """Two responses to one prompt.

    Attributes:
      prompt: text that they go on with, or messages that they answer; may be empty.
      first: a response.
      second: another.
    """

    prompt: Prompt
    first: str
    second: str


class Chain(NamedTuple):
    """How reasons are drawn before an answer: a chain of thought.

    Attributes:
      key: random key.
      max_new_tokens: of the reasons.
      temperature: of the sampling; 0 is greedy.
    """

    key: jax.Array
    max_new_tokens: int = 128
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Compared:
    """Soft labels of N comparisons, and what is wrong with them.

    Attributes:
      shown_first: `[N]`, p(first is better) where the first was shown first.
      shown_second: `[N]`, p(first is better) where it was shown second.
      p: `[N]`, the mean of both, clamped where that was asked.
      cut: `[N]` bool, whether a prompt lost its oldest turns (or a response its end) in an order.
      rationales: N pairs of reasons, one in each order; empty without a chain of thought.
    """

    shown_first: np.ndarray
    shown_second: np.ndarray
    p: np.ndarray
    cut: np.ndarray
    rationales: tuple[tuple[str, str], ...] = ()

    @property
    def flips(self) -> np.ndarray:
        """`[N]` bool, whether the judge prefers another response once they are swapped."""
        return (self.shown_first - 0.5) * (self.shown_second - 0.5) < 0

    @property
    def survives(self) -> np.ndarray:
        """`[N]`: 1 where the first is preferred in both orders, 0 where the second is, else 1/2."""
        lower = np.minimum(self.shown_first, self.shown_second)
        upper = np.maximum(self.shown_first, self.shown_second)
        return np.where(lower > 0.5, 1.0, np.where(upper < 0.5, 0.0, 0.5))

    def statistics(self) -> dict[str, float]:
        """Means over the comparisons; of no comparison there are none.

        Position bias is the mean probability of what is shown first, less one half: 1/2 for a judge
        that always takes it, 0 for one whom the order does not sway on the whole.
        """
        if not self.p.size:
            return {}
        of_first = np.concatenate([self.shown_first, 1 - self.shown_second])
        return {
            "feedback/position_bias": float(of_first.mean() - 0.5),
            "feedback/prefers_first": float(
                np.mean(np.where(of_first == 0.5, 0.5, of_first > 0.5))
            ),
            "feedback/flip_rate": float(self.flips.mean()),
            "feedback/entropy": float(_binary_entropy(self.p).mean()),
            "feedback/cut": float(self.cut.sum()),
        }


def compare(
    judge: FeedbackModel,
    comparisons: Sequence[Comparison],
    template: Template,
    *,
    questions: Sequence[str] | None = None,
    chain: Chain | None = None,
    clamp: tuple[float, float] = (0.0, 1.0),
) -> Compared:
    """Which of two responses is better: soft labels, from both orders.

        p = ½ [p(1 | y_1, y_2) + p(2 | y_2, y_1)]

    where p(1 | ...) is the softmax of the log-probabilities of the two answers. Each comparison is
    asked twice, the responses swapped, and the probabilities are averaged once they are mapped back
    (Lee et al. 2023, section 2.1). With a chain of thought the judge first gives reasons, which it
    then reads before it answers; such labels are near 0 or 1, and Bai et al. clamp them to
    [0.4, 0.6].

    Args:
      judge: is asked.
      comparisons: N pairs of responses.
      template: of kind "compare".
      questions: what goes into the field `{question}`, one for each comparison, as the principles
        of a constitution; the template has the field if and only if they are given.
      chain: asks for reasons first; None asks for the answer alone.
      clamp: bounds of p.

    Raises:
      ValueError: the template is of another kind, or has no words that ask for reasons; its answers
        begin with the same token; questions and field do not go together; no room for the template.
    """
    if template.kind != COMPARE:
        raise ValueError(f"template {template.name}: kind={template.kind!r} compares nothing")
    _check_clamp(clamp)
    asks = "{question}" in template.prompt
    if asks != (questions is not None):
        raise ValueError(
            f"template {template.name} {'needs' if asks else 'has no field {question} for'} "
            "questions, such as the principles of a constitution"
        )
    if questions is not None and len(questions) != len(comparisons):
        raise ValueError(f"{len(comparisons)} comparisons and {len(questions)} questions")
    asked: list[_Asked] = []
    for number, (prompt, first, second) in enumerate(comparisons):
        fixed = {} if questions is None else {"question": questions[number]}
        for sides in ((first, second), (second, first)):
            fields = dict(zip(("first", "second"), sides, strict=True))
            asked.append(_Asked(prompt, fields, fixed))
    rows, cut, reasons = _prompts(judge, asked, template, chain)
    values = log_odds(
        judge, rows, (template.answers[0], template.answers[1]), template=template.name
    )
    of_first = _sigmoid(values).reshape(-1, 2)
    one, other = of_first[:, 0], 1 - of_first[:, 1]
    p = np.clip(np.round((one + other) / 2, 6), *clamp)
    pairs = tuple(zip(reasons[::2], reasons[1::2], strict=True))
    in_either = np.array(cut.reshape(-1, 2).any(axis=1))
    return Compared(one, other, p, in_either, pairs)


@dataclasses.dataclass(frozen=True)
class Rated:
    """Ratings of N responses.

    Attributes:
      values: `[N]`, the expected rating.
      probabilities: `[N, K]`, of each answer, given that it is one of them.
      cut: `[N]` bool, whether a prompt lost its oldest turns, or the response its end.
      levels: `[K]`, the ratings that the answers stand for.
    """

    values: np.ndarray
    probabilities: np.ndarray
    cut: np.ndarray
    levels: np.ndarray

    @property
    def scaled(self) -> np.ndarray:
        """`[N]` in [-1, 1]: the reward of d-RLAIF, 2 (s - 1) / 9 - 1 for ratings from 1 to 10."""
        low, high = self.levels.min(), self.levels.max()
        return 2 * (self.values - low) / (high - low) - 1

    def statistics(self) -> dict[str, float]:
        """Means over the responses; of no response there are none."""
        if not self.values.size:
            return {}
        p = np.maximum(self.probabilities, 1e-300)
        return {
            "feedback/rating": float(self.values.mean()),
            "feedback/rating_std": float(self.values.std()),
            "feedback/entropy": float(-(self.probabilities * np.log(p)).sum(axis=1).mean()),
            "feedback/cut": float(self.cut.sum()),
        }


def rate(
    judge: FeedbackModel, prompts: Sequence[Prompt], responses: Sequence[str], template: Template
) -> Rated:
    """How good each response is, by the expected rating.

        s = Σ_i i p(i) / Σ_i p(i)

    Source: d-RLAIF, Lee et al. 2023 (arXiv 2309.00267), section 2.2.2.

    Args:
      judge: is asked.
      prompts: N prompts, see `Comparison`.
      responses: N responses.
      template: of kind "rate"; its answers are numbers.

    Raises:
      ValueError: the template is of another kind, an answer is no number, the numbers of prompts
        and responses differ, or there is no room for the template.
    """
    if template.kind != RATE:
        raise ValueError(f"template {template.name}: kind={template.kind!r} rates nothing")
    try:
        levels = np.array([float(answer) for answer in template.answers])
    except ValueError:
        raise ValueError(f"template {template.name}: answers must be numbers to rate by") from None
    rows, cut = _single(judge, prompts, responses, template)
    logs = answer_log_probs(judge, rows, template.answers)
    p = np.exp(logs - logs.max(axis=1, keepdims=True, initial=-np.inf))
    p = p / p.sum(axis=1, keepdims=True)
    return Rated(np.round(p @ levels, 4), p, cut, levels)


class Scored(NamedTuple):
    """Log-odds of N responses.

    Attributes:
      values: `[N]`, in nats; 0 is undecided.
      cut: `[N]` bool, whether a prompt lost its oldest turns, or the response its end.
    """

    values: np.ndarray
    cut: np.ndarray


def score(
    judge: FeedbackModel, prompts: Sequence[Prompt], responses: Sequence[str], template: Template
) -> Scored:
    """How much more the judge expects the first of two answers about each response.

        s = log p(a_1 | x, y) − log p(a_2 | x, y)

    A small model that cannot compare two texts may well say of one which of two words fits it.

    Args:
      judge: is asked.
      prompts: N prompts, see `Comparison`.
      responses: N responses.
      template: of kind "score"; its first answer is what is good.

    Raises:
      ValueError: the template is of another kind, its answers begin with the same token, the
        numbers of prompts and responses differ, or there is no room for the template.
    """
    if template.kind != SCORE:
        raise ValueError(f"template {template.name}: kind={template.kind!r} scores nothing")
    rows, cut = _single(judge, prompts, responses, template)
    answers = (template.answers[0], template.answers[1])
    return Scored(log_odds(judge, rows, answers, template=template.name), cut)


def label(
    judge: FeedbackModel,
    comparisons: Sequence[Comparison],
    template: Template,
    *,
    questions: Sequence[str] | None = None,
    chain: Chain | None = None,
    clamp: tuple[float, float] = (0.0, 1.0),
) -> Compared:
    """Soft labels of pairs, by whatever a template asks.

    One that compares is asked in both orders, see `compare`. Otherwise each response is read alone,
    so that no order plays a part: with scores p = σ(s_1 − s_2), as Bradley and Terry have it; with
    ratings the probability that one drawn for the first response is higher than one drawn for the
    second, equal ones counted one half:

        p = Σ_{i>j} p_1(i) p_2(j) + ½ Σ_i p_1(i) p_2(i)

    Args:
      judge: is asked.
      comparisons: N pairs of responses.
      template: of any kind.
      questions: see `compare`.
      chain: see `compare`.
      clamp: bounds of p.

    Raises:
      ValueError: as `compare`, `score` and `rate`; or principles or reasons are given to a template
        that compares nothing.
    """
    _check_clamp(clamp)
    if template.kind == COMPARE:
        return compare(judge, comparisons, template, questions=questions, chain=chain, clamp=clamp)
    if questions is not None or chain is not None:
        raise ValueError(
            f"template {template.name}: kind={template.kind!r} reads one response, without "
            "principles and reasons: use one of kind 'compare'"
        )
    prompts = [one.prompt for one in comparisons for _ in range(2)]
    responses = [side for one in comparisons for side in (one.first, one.second)]
    if template.kind == SCORE:
        scored = score(judge, prompts, responses, template)
        cut = scored.cut
        p = _sigmoid(scored.values[::2] - scored.values[1::2])
    else:
        rated = rate(judge, prompts, responses, template)
        cut, order = rated.cut, np.argsort(rated.levels)
        one, other = rated.probabilities[::2, order], rated.probabilities[1::2, order]
        below = np.cumsum(other, axis=1) - other
        p = (one * (below + other / 2)).sum(axis=1)
    p = np.round(p, 6)
    in_either = np.array(cut.reshape(-1, 2).any(axis=1))
    return Compared(p, p, np.clip(p, *clamp), in_either)


class _Asked(NamedTuple):
    """What fills a template: texts that may be cut, and those that may not."""

    prompt: Prompt
    sides: dict[str, str]
    fixed: dict[str, str]


def _prompts(
    judge: FeedbackModel, asked: Sequence[_Asked], template: Template, chain: Chain | None
) -> tuple[list[list[int]], np.ndarray, list[str]]:
    """Token ids up to the answer, whether a text was cut, and reasons where they are asked for."""
    if chain is None:
        fitted = [_fitted(judge, one, template, template.opening, 0) for one in asked]
        cut = np.array([was_cut for _, was_cut in fitted], bool)
        return [ids for ids, _ in fitted], cut, []
    if not template.rationale:
        raise ValueError(f"template {template.name} has no rationale, which asks for reasons")
    verdict = judge.chat.encode(template.verdict, first=False)
    spare = chain.max_new_tokens + len(verdict)
    fitted = [_fitted(judge, one, template, template.rationale, spare) for one in asked]
    drawn = sample_answers(
        judge.model,
        [np.array(ids, np.int32) for ids, _ in fitted],
        judge.tokenizer,
        samples=1,
        sampling=SamplingConfig(chain.max_new_tokens, temperature=chain.temperature),
        key=chain.key,
        rows=32,
    )
    reasons = [some[0].text for some in drawn]
    if template.form == PLAIN:
        reasons = [text.partition(_PARAGRAPH)[0] for text in reasons]
    reasons = [text.rstrip() for text in reasons]
    said = [
        judge.chat.encode(judge.chat.as_text(text), first=False)[: chain.max_new_tokens]
        for text in reasons
    ]
    rows = [[*ids, *words, *verdict] for (ids, _), words in zip(fitted, said, strict=True)]
    return rows, np.array([was_cut for _, was_cut in fitted], bool), reasons


def _single(
    judge: FeedbackModel, prompts: Sequence[Prompt], responses: Sequence[str], template: Template
) -> tuple[list[list[int]], np.ndarray]:
    """`_prompts` of a template that reads one response."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
    asked = [
        _Asked(prompt, {"response": response}, {})
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    rows, cut, _ = _prompts(judge, asked, template, None)
    return rows, cut


def _fitted(
    judge: FeedbackModel, asked: _Asked, template: Template, opening: str, spare: int
) -> tuple[list[int], bool]:
    """A prompt that leaves room for `spare` tokens and an answer, and whether a text was cut.

    The oldest turns of the prompt go first, then the beginning of the last one, then the ends of
    the responses, alike.
    """
    turns, sides, was_cut = _turns(asked.prompt), dict(asked.sides), False
    room = judge.room - spare - 1
    while True:
        fields = {"prompt": "".join(turns), **sides, **asked.fixed}
        ids = _encoded(judge, template, opening, fields)
        excess = len(ids) - room
        if excess <= 0:
            return ids, was_cut
        was_cut = True
        if len(turns) > 1:
            turns = turns[1:]
        elif turns:
            times = max(1, template.prompt.count("{prompt}"))
            shorter = _without_tokens(judge, turns[0], math.ceil(excess / times), start=True)
            turns = [shorter] if shorter else []
        elif any(sides.values()):
            share = math.ceil(excess / sum(map(bool, sides.values())))
            sides = {
                name: _without_tokens(judge, text, share, start=False)
                for name, text in sides.items()
            }
        else:
            raise ValueError(
                f"template {template.name} takes {len(ids)} tokens without any text, and the judge "
                f"{judge.name} reads {judge.room}, {spare + 1} of which are for its answer"
            )


def _without_tokens(judge: FeedbackModel, text: str, count: int, *, start: bool) -> str:
    """A text without some tokens at its start or its end; always shorter, perhaps empty."""
    ids = judge.chat.encode(judge.chat.as_text(text), first=False)
    kept = ids[count:] if start else ids[: max(0, len(ids) - count)]
    shorter = judge.chat.decode(kept).strip("\ufffd") if kept else ""
    if len(shorter) < len(text):
        return shorter
    return text[1:] if start else text[:-1]


def _encoded(
    judge: FeedbackModel, template: Template, opening: str, fields: dict[str, str]
) -> list[int]:
    """Token ids of a filled template, the names of control tokens in the texts taken as text."""
    chat = judge.chat
    texts = {name: chat.as_text(text) for name, text in fields.items()}
    filled = _KNOWN.sub(_filler(texts), template.prompt)
    if template.form == CHAT:
        system = [{"role": "system", "content": template.system}] if template.system else []
        said = [*system, {"role": "user", "content": filled}]
        return chat.encode(chat.open_text(said) + opening, first=True)
    bos = [] if chat.leading_bos is None else [chat.leading_bos]
    return [*bos, *chat.encode(filled + opening, first=True)]


def _filler(texts: dict[str, str]) -> Callable[[re.Match[str]], str]:
    return lambda found: texts[found[1]]


def _turns(prompt: Prompt) -> list[str]:
    """The turns of a prompt, oldest first, as they are shown; an empty prompt has none."""
    if isinstance(prompt, str):
        return [prompt] if prompt else []
    said = check_messages(prompt, "prompt")
    shown = [_SPEAKERS.get(message["role"], "") + message["content"] for message in said]
    return [text + (_PARAGRAPH if i + 1 < len(shown) else "") for i, text in enumerate(shown)]


def _check_clamp(clamp: tuple[float, float]) -> None:
    """Refuses bounds that one half is not within."""
    low, high = clamp
    if not 0 <= low <= 0.5 <= high <= 1:
        raise ValueError(f"clamp={clamp} must be two numbers around 0.5, within [0, 1]")


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


def _binary_entropy(p: np.ndarray) -> np.ndarray:
    """−p log p − (1 − p) log(1 − p), in nats; 0 at 0 and 1."""
    q = np.clip(p, 1e-12, 1 - 1e-12)
    return -(q * np.log(q) + (1 - q) * np.log1p(-q))
