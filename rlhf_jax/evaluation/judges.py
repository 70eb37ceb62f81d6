"""Judges: scores of responses by something that no policy was trained against.

A reward model that is optimised stops being a measure (Gao et al. 2022, arXiv 2210.10760). A judge
stays out of training and shows when the reward keeps rising while the responses get worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Judge(Protocol):
    """Scores texts, higher is better; `name` heads its column in a report."""

    name: str

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
      ImportError: the package vaderSentiment is missing.
    """

    name = "VADER"

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ImportError(
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
