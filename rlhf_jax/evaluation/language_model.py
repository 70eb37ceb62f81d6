"""A language model as judge: which of two answers it expects after a question about a text."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.evaluation.log_odds import first_tokens, log_odds
from rlhf_jax.evaluation.statistics import repetition
from rlhf_jax.evaluation.text_batches import each_once
from rlhf_jax.models.files import hf_files, hf_weights
from rlhf_jax.runtime import digests

_log = logging.getLogger(__name__)

TEXT = "{text}"
# Words of a phrase whose second occurrence in a text costs.
PHRASE = 4


@dataclasses.dataclass(frozen=True)
class Question:
    """What a language model is asked about a text, and the two answers that are compared.

    Attributes:
      template: The prompt up to the answer; `{text}` stands once for the text.
      answers: The answer that counts as high and the one that counts as low, each as it would go on
        after the template (so with a leading space, for most tokenizers). They are compared by
        their first tokens.
      examples: Texts with their answers, shown before the question. None is allowed.
      separator: What stands between an example and the next text.
      about: What reports say is judged.
    """

    template: str
    answers: tuple[str, str]
    examples: tuple[tuple[str, str], ...] = ()
    separator: str = "\n\n"
    about: str = "the answer"

    def __post_init__(self):
        if self.template.count(TEXT) != 1 or self.template.endswith(TEXT):
            raise ValueError(
                f"template={self.template!r} must hold {TEXT} once, with something after it"
            )
        wrong = [answer for _, answer in self.examples if answer not in self.answers]
        if wrong:
            raise ValueError(f"the example's answer {wrong[0]!r} is none of {self.answers}")

    @property
    def prefix(self) -> str:
        """What stands before every text: the examples, and the template up to the text."""
        before, after = self.template.split(TEXT)
        shown = (f"{before}{t}{after}{answer}{self.separator}" for t, answer in self.examples)
        return "".join(shown) + before

    @property
    def suffix(self) -> str:
        """What stands between a text and its answer."""
        return self.template.split(TEXT)[1]


# The examples were written for this purpose; no data set holds them.
SENTIMENT = Question(
    template=f'Review: "{TEXT}"\nSentiment:',
    answers=(" positive", " negative"),
    examples=(
        ("A moving, funny film with wonderful acting.", " positive"),
        ("Dull and far too long; I wanted my money back.", " negative"),
    ),
    about="sentiment",
)


class LanguageModelJudge:
    """Log-odds of the first answer of a question against the second, by a language model.

    By default the sentiment of a text, after one positive and one negative labelled review:

        log p(" positive" | prompt) − log p(" negative" | prompt) − cost · repetition(text)

    where repetition is the share of the text's four-word phrases that it has used before. Without
    this term a fluent sentence of praise is liked the more the more often it is said. Numbers are
    rounded to four decimals: a text may be read in batches of different shapes, and the rounding
    errors of these must not decide between two equal texts.

    Args:
      folder: Of a language model with its tokenizer; or a name on the hub.
      question: What is asked.
      name: In reports; empty is the name of the folder.
      dtype: Of the weights in memory, "float32" or "bfloat16"; None is that of the file.
      repetition_cost: In nats, what a text pays that says nothing but what it said before; 0 leaves
        the log-odds as they are.
      max_length: See `log_odds`.
      batch_tokens: See `log_odds`.

    Raises:
      ValueError: No such model, the two answers begin with the same token, or a negative or
        infinite `repetition_cost`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        question: Question = SENTIMENT,
        name: str = "",
        dtype: str | None = None,
        repetition_cost: float = 6.0,
        max_length: int = 1024,
        batch_tokens: int = 1024,
    ):
        if not 0 <= repetition_cost < float("inf"):
            raise ValueError(f"repetition_cost={repetition_cost} must be a number of nats, >= 0")
        config = hf_weights.load_config(folder)
        self.tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
        hf_weights.check_vocabulary(self.tokenizer, config, str(folder))
        first_tokens(self.tokenizer, question.prefix, question.suffix, question.answers)
        self.model = hf_weights.load_model(folder, dtype=dtype)
        self.question, self.repetition_cost = question, repetition_cost
        self.name = name or short_name(folder)
        self.num_read = self.num_cut = 0
        self._folder, self._max_length, self._batch_tokens = folder, max_length, batch_tokens

    @property
    def scale(self) -> str:
        """What the number is, for the axis of a figure or the head of a column."""
        high, low = (answer.strip() for answer in self.question.answers)
        less = " less repetition" if self.repetition_cost else ""
        return f"{self.name}, log-odds of '{high}' against '{low}'{less}"

    def describe(self) -> str:
        """One line for reports: what it is, what it cannot see, what fools it."""
        count = len(self.question.examples)
        shown = f"after {count} labelled examples" if count else "without examples"
        high, low = (answer.strip() for answer in self.question.answers)
        return (
            f"{self.name} judges {self.question.about}: a language model's log-odds of '{high}' "
            f"against '{low}', {shown}{self._repetition()}. It reads whole sentences, yet text "
            "written to sway it fools it; it does not check truth or relevance."
        )

    def _repetition(self) -> str:
        cost = self.repetition_cost
        return f", less {cost:g} times the share of repeated phrases" if cost else ""

    def fingerprint(self) -> str:
        """Changes when a number might: digests the model's files, the question and settings."""
        settings = {
            "question": dataclasses.asdict(self.question),
            "dtype": self.model.config.dtype,
            "max_length": self._max_length,
            "repetition_cost": self.repetition_cost,
        }
        return f"{digest_of_folder(self._folder)} {settings}"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores N texts; warns of texts that were cut, and counts them in `num_cut`.

        Args:
          texts: N texts.

        Returns:
          float64 [N], in nats; 0 is undecided for a text without repetition.

        Raises:
          ValueError: `texts` is one string instead of a sequence of them.
        """
        different, index = each_once(texts)
        values, cut = (
            numbers[index]
            for numbers in log_odds(
                self.model,
                self.tokenizer,
                self.question.prefix,
                different,
                self.question.suffix,
                self.question.answers,
                max_length=self._max_length,
                batch_tokens=self._batch_tokens,
            )
        )
        self.num_read, self.num_cut = self.num_read + len(texts), self.num_cut + int(cut.sum())
        if cut.any():
            limit = min(self._max_length, self.model.config.max_length)
            _log.warning(
                "%s: %d of %d texts were cut, prompts have at most %d tokens",
                *(self.name, int(cut.sum()), len(texts), limit),
            )
        repeated = np.array([repetition([text], PHRASE) for text in texts])
        return np.round(values - self.repetition_cost * repeated, 4)


def short_name(folder: str | Path) -> str:
    """The last part of a path that tells models apart: smollm2 of `runs/.../smollm2/model`."""
    parts = [part for part in Path(folder).parts if part not in ("model", ".", "/")]
    return parts[-1] if parts else str(folder)


def digest_of_folder(folder: str | Path) -> str:
    """A digest of the files of a saved model, in the order of their names."""
    patterns = hf_files.CONFIG_PATTERNS + hf_files.WEIGHT_PATTERNS
    files = sorted(hf_files.find_folder(folder, patterns).iterdir())
    return digests.of_files([path for path in files if hf_files.OWN_FILES.fullmatch(path.name)])
