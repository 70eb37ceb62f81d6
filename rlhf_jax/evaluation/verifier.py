"""A verifier as judge: is the answer of a sum right?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.sets import arithmetic
from rlhf_jax.runtime import digests


class VerifierJudge:
    """Scores solutions of sums: 1 where the final answer is right, else 0.

    A text is the problem and its solution, `4 - 1 =` and what follows the first equals sign; a text
    whose problem cannot be read scores 0.
    """

    name = "verifier"
    scale = "right answers, 0 or 1"

    def describe(self) -> str:
        """One line for reports: what it is, and what it cannot see."""
        return (
            "The verifier works a sum out and compares the final answer: it is exact, and does not "
            "see whether the steps are right."
        )

    def fingerprint(self) -> str:
        """Digests the code of the verifier."""
        return digests.of_files([arithmetic.__file__])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores N texts.

        Args:
          texts: N problems with their solutions.

        Returns:
          float64 [N], 0 or 1.

        Raises:
          ValueError: `texts` is one string instead of a sequence of them.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of strings, not one string")
        return np.array([float(self._right(text)) for text in texts])

    def _right(self, text: str) -> bool:
        expression, equals, solution = text.strip().partition(" =")
        problem = arithmetic.sum_problem(expression) if equals else None
        return problem is not None and arithmetic.verify(problem, solution).right
