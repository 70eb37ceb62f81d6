"""A reward model as judge: what it was trained on decides whether it is an independent one.

Gao et al. 2022 (arXiv 2210.10760) measure how far a policy has over-optimised its reward model by a
second one that no policy is trained against, the gold reward model. Trained on other people's
ratings than the first, it does not share the errors that come from these.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.data.encode import encode_response
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.evaluation.language_model import digest_of_folder, short_name
from rlhf_jax.evaluation.text_batches import each_once, padded, plan
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.heads import ScalarModel

_log = logging.getLogger(__name__)


class RewardModelJudge:
    """The score r(x, y) of a reward model, for prompt and response as one text.

    A text is encoded as the reviews that a reward model of this project is trained on: after BOS
    and before EOS; or, with an instruction, as the assistant's turn of a chat. Each is read as if
    it had ended by itself: whether a response was cut at its last token is not in its text. Equal
    texts are read once. Numbers are rounded to four decimals: a text may be read in batches of
    different shapes, and the rounding errors of these must not decide between two equal texts.

    Source: Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760,
    section 2 (the gold reward model).

    Args:
      folder: Of a reward model with its tokenizer; or a name on the hub.
      name: In reports; empty is the name of the folder.
      instruction: The system's message, for a reward model that was trained on a chat; empty is
        plain text.
      dtype: Of the weights in memory, "float32" or "bfloat16"; None is that of the file.
      max_length: The longest text in tokens, unless the model's own context is shorter. Longer
        texts lose their end; the token that ends them stays.
      batch_tokens: About how many tokens are in a batch, padding included.

    Raises:
      ValueError: No such model, one without a scalar head, or `max_length` is below 2.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str = "",
        instruction: str = "",
        dtype: str | None = None,
        max_length: int = 1024,
        batch_tokens: int = 4096,
    ):
        if max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2")
        self.model = hf_weights.load_scalar_model(folder, dtype=dtype)
        config = self.model.trunk.config
        self.tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
        hf_weights.check_vocabulary(self.tokenizer, config, str(folder))
        self.name = name or short_name(folder)
        self.num_read = self.num_cut = 0
        self._folder, self._instruction, self._batch_tokens = folder, instruction, batch_tokens
        self._max_length = min(max_length, config.max_length)

    @property
    def scale(self) -> str:
        """What the number is, for the axis of a figure or the head of a column."""
        return f"reward by {self.name}"

    def describe(self) -> str:
        """One line for reports: what it is, and what it cannot see."""
        return (
            f"{self.name} judges by a reward model, which has learned from pairs of rated texts "
            "what people prefer. It does not check truth or relevance, has never read what an "
            "optimised policy writes, and overrates what every reward model of its kind does."
        )

    def fingerprint(self) -> str:
        """Changes when a number might: digests the model's files and the settings."""
        settings = {
            "instruction": self._instruction,
            "dtype": self.model.trunk.config.dtype,
            "max_length": self._max_length,
        }
        return f"{digest_of_folder(self._folder)} {settings}"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores N texts; warns of texts that were cut, and counts them in `num_cut`.

        Args:
          texts: N texts.

        Returns:
          float64 [N], in units of the reward model's standard deviation where it was normalised.

        Raises:
          ValueError: `texts` is one string instead of a sequence of them.
        """
        different, index = each_once(texts)
        rows, limit = self._encoded(different), self._max_length
        cut = np.array([len(row) > limit for row in rows], bool)[index]
        rows = [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in rows]
        values = np.zeros(len(rows), np.float64)
        for members, num_rows, columns in plan([len(row) for row in rows], self._batch_tokens):
            tokens, mask = padded([rows[i] for i in members], num_rows, columns)
            scores = _score(self.model, tokens, mask.astype(np.int32))
            values[members] = np.asarray(scores, np.float64)[: len(members)]
        self.num_read, self.num_cut = self.num_read + len(texts), self.num_cut + int(cut.sum())
        if cut.any():
            _log.warning(
                "%s: %d of %d texts were cut, a text has at most %d tokens",
                *(self.name, int(cut.sum()), len(texts), limit),
            )
        return np.round(values, 4)[index]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole texts, as the model was trained on them."""
        pieces = ChatTokenizer(self.tokenizer)
        prompt = [{"role": "system", "content": self._instruction}] if self._instruction else ""

        def encoded(text: str) -> np.ndarray:
            found = encode_response(prompt, text if text.strip() else ".", pieces, sys.maxsize)
            assert found is not None  # there is a response, and no bound
            if text.strip():
                return found.tokens
            # Nothing was said: what comes before an answer, and what ends it.
            return np.append(found.tokens[~found.loss_mask], found.tokens[-1])

        return [encoded(text).tolist() for text in texts]


@jax.jit
def _score(model: ScalarModel, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """`[B]`, read at the last token of each row; that of a row of padding means nothing."""
    return model.scores(tokens, segments)
