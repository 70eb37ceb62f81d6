"""Judges: scores of responses by something that no policy was trained against.

A reward model that is optimised stops being a measure (Gao et al. 2022, arXiv 2210.10760). A judge
stays out of training and shows when the reward keeps rising while the responses get worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rlhf_jax.runtime.errors import MissingPackageError


class Judge(Protocol):
    """Scores texts, higher is better.

    Attributes:
      name: Heads its column in a report.
      describe: What it is and what it does not see, for a report.
    """

    name: str
    describe: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores N texts.

        Args:
          texts: N texts.

        Returns:
          float64 [N].
        """
        ...


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
    describe = "a rule for sentiment, from -1 to 1; it does not see grammar, truth or relevance."

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise MissingPackageError(
                "VaderJudge needs vaderSentiment: pip install vaderSentiment"
            ) from error
        self._analyzer = SentimentIntensityAnalyzer()

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


JUDGES: dict[str, Callable[[], Judge]] = {"vader": VaderJudge}


def make_judges(names: Sequence[str]) -> dict[str, Judge]:
    """Judges by the names that a config gives them.

    Raises:
      ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in JUDGES]
    if unknown:
        raise ValueError(f"unknown judge {unknown[0]!r}; there are: {', '.join(JUDGES)}")
    return {name: JUDGES[name]() for name in names}


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
