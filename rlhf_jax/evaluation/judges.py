"""Judges: scores of responses by something that no policy was trained against.

A reward model that is optimised stops being a measure (Gao et al. 2022, arXiv 2210.10760). A judge
stays out of training and shows when the reward keeps rising while the responses get worse. Each can
be fooled in its own way, so a report shows more than one, and says how often each agrees with
people (`rlhf_jax.evaluation.agreement`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from rlhf_jax.runtime.errors import MissingPackageError

VADER, LANGUAGE_MODEL = "vader", "language_model"
# Of sums, see `rlhf_jax.evaluation.verifier`.
VERIFIER = "verifier"
# A reward model of the user's choice, and the one that no policy is to be trained against.
REWARD_MODEL, GOLD = "reward_model", "gold"
# What `make_judge` takes, as it is listed to users: alone, and with the model that it needs.
_WITH_MODEL = {
    LANGUAGE_MODEL: f"{LANGUAGE_MODEL}:FOLDER_OR_HUB_NAME",
    REWARD_MODEL: f"{REWARD_MODEL}:FOLDER_OR_HUB_NAME",
    GOLD: f"{GOLD}:FOLDER_OR_HUB_NAME",
}
NAMES = (
    VADER,
    VERIFIER,
    LANGUAGE_MODEL,
    _WITH_MODEL[LANGUAGE_MODEL],
    _WITH_MODEL[REWARD_MODEL],
    GOLD,
    _WITH_MODEL[GOLD],
)


class Judge(Protocol):
    """Scores texts, higher is better.

    Attributes:
      name: Heads its column in a report.
      scale: What its number is: "VADER, -1 to 1".
    """

    name: str

    @property
    def scale(self) -> str:
        """What its number is: "VADER, -1 to 1"."""
        ...

    def describe(self) -> str:
        """One line for reports: what it is, and what it cannot see."""
        ...

    def fingerprint(self) -> str:
        """Everything that its numbers depend on, as text: versions, digests, settings."""
        ...

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores N texts.

        Args:
          texts: N texts.

        Returns:
          float64 [N].
        """
        ...


def make_judge(name: str, /, *, default_model: str = "", **settings: Any) -> Judge:
    """Makes a judge from its name, as a config or a command line gives it.

    Args:
      name: "vader" or "verifier"; "language_model" or "gold" for `default_model`; or
        "language_model:", "reward_model:" or "gold:" and a folder or a name on the Hugging Face
        hub. The last two are reward models alike: "gold" is one that no policy was trained against.
      default_model: Folder or hub name of the model where the name has none.
      **settings: Keywords of the judge's class.

    Raises:
      ValueError: An unknown name or setting, no model, or a model that is missing: one line.
      MissingPackageError: the package vaderSentiment is missing.
    """
    if name == VADER:
        _check_settings(name, VaderJudge, settings)
        return VaderJudge(**settings)
    if name == VERIFIER:
        from rlhf_jax.evaluation.verifier import VerifierJudge

        _check_settings(name, VerifierJudge, settings)
        return VerifierJudge()
    kind, _, model = name.partition(":")
    if kind not in _WITH_MODEL:
        raise ValueError(f"unknown judge {name!r}; choose one of {', '.join(NAMES)}")
    judge = _class_of(kind)
    _check_settings(name, judge, settings)
    if not (model or default_model):
        raise ValueError(f"judge {name!r} names no model: write {_WITH_MODEL[kind]}")
    try:
        return judge(model or default_model, **settings)
    except ValueError as error:
        raise ValueError(f"judge {name!r}: {error}") from error


def _class_of(kind: str) -> Any:
    """The class of judges that read with a model; the VADER rule needs no code of models."""
    if kind == LANGUAGE_MODEL:
        from rlhf_jax.evaluation.language_model import LanguageModelJudge

        return LanguageModelJudge
    from rlhf_jax.evaluation.reward_model import RewardModelJudge

    return RewardModelJudge


def _check_settings(name: str, judge: Any, settings: dict[str, Any]) -> None:
    """Raises ValueError for keywords that a class does not take."""
    known = [
        key
        for key, parameter in inspect.signature(judge).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for key in settings:
        if key not in known:
            raise ValueError(
                f"judge {name!r} has no setting {key!r}; it has {', '.join(known) or 'none'}"
            )


class VaderJudge:
    """Sentiment of a text by the VADER rule: the compound score in [-1, 1].

    A lexicon that people rated, and a handful of rules for negation, degree words, capitals and
    punctuation; trained on nothing. A text without a word of the lexicon, and the empty text, score
    0. Source: Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", ICWSM 2014.

    It judges sentiment and nothing else: grammar, truth and relevance do not move it.

    Raises:
      MissingPackageError: the package vaderSentiment is missing.
    """

    name = "VADER"
    scale = "VADER, -1 to 1"

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise MissingPackageError(
                "VaderJudge needs vaderSentiment: pip install vaderSentiment"
            ) from error
        self._analyzer = SentimentIntensityAnalyzer()

    def describe(self) -> str:
        """One line for reports: what it is, and what it cannot see."""
        return (
            "VADER judges sentiment by a rule that adds up rated words. It does not see grammar, "
            "truth or relevance, and a heap of praising words scores highest."
        )

    def fingerprint(self) -> str:
        """Its numbers depend on the lexicon and the rules of the package alone."""
        return f"vaderSentiment {metadata.version('vaderSentiment')}"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores N texts.

        Args:
          texts: N texts.

        Returns:
          float64 [N], in [-1, 1].

        Raises:
          ValueError: `texts` is one string instead of a sequence of them.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of strings, got one: wrap it in [...]")
        scores = [self._analyzer.polarity_scores(text)["compound"] for text in texts]
        return np.array(scores, dtype=np.float64)


def make_judges(
    names: Sequence[str], *, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Judge]:
    """Judges by the first word of their names, under which their numbers are logged.

    Args:
      names: as `make_judge` takes them.
      settings: name of a judge -> keywords of `make_judge`.

    Raises:
      ValueError: two judges of one kind; or see `make_judge`.
    """
    kinds = [name.partition(":")[0] for name in names]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"judges={tuple(names)} must be of different kinds")
    made = [make_judge(name, **(settings or {}).get(name, {})) for name in names]
    return dict(zip(kinds, made, strict=True))


def judge_pairs(judge: Judge, pairs: Sequence[Any], tokenizer: Any) -> tuple[np.ndarray, ...]:
    """A judge's scores `[N]` of the chosen, and of the rejected texts of encoded pairs."""
    return tuple(
        judge(
            tokenizer.batch_decode(
                [getattr(pair, side).tokens for pair in pairs], skip_special_tokens=True
            )
        )
        for side in ("chosen", "rejected")
    )
