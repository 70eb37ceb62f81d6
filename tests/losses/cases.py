"""The table of every public loss; `test_every_loss.py` runs the generic checks over it."""

from tests.losses import table_estimates, table_losses

CASES = [*table_estimates.CASES, *table_losses.CASES]
IDS = [f"{i}-{case.name}" for i, case in enumerate(CASES)]
