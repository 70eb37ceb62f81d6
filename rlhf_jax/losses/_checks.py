"""Checks of hyper-parameters that are known when Python runs, traced values pass unseen."""

from typing import Any

import jax


def require(condition: Any, message: str) -> None:
    """Raises ValueError(message) if the condition is known to be false.

    Args:
      condition: a Python bool, a concrete scalar array, or a tracer (which is let through).
      message: one line: the rule, the value, the fix.

    Raises:
      ValueError: the condition is concrete and false.
    """
    if not isinstance(condition, jax.core.Tracer) and not condition:
        raise ValueError(message)
