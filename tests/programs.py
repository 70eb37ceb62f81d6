"""How many programs were compiled: asked of the compiler, not of a function's cache of fast calls.

`jit(f)._cache_size()` counts fast calls, and none is kept where key reuse is checked, so that it
depends on which tests ran before in the same process.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

from jax._src import monitoring
from jax._src.dispatch import BACKEND_COMPILE_EVENT


@contextlib.contextmanager
def compiled_programs() -> Iterator[Counter]:
    """Counts, by name ('generate' of `jit(generate)`), the programs compiled inside the block."""
    counts: Counter = Counter()

    def listen(event: str, duration: float, **details) -> None:
        if event == BACKEND_COMPILE_EVENT:
            counts[details["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        monitoring.unregister_event_duration_listener(listen)
