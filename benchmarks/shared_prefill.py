"""What many samples of one prompt cost when it is read once, and when it is read for each.

    python -m benchmarks.shared_prefill                     both sizes, some minutes on two cores
    python -m benchmarks.shared_prefill --cases quickstart  one

Prints medians of runs that take turns, and what the compiled programs allocate beside weights and
arguments. No token ends a response, so both sides draw the same number of tokens.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.cases import MODELS
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.rollout import SamplingConfig, generate
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler
from rlhf_jax.runtime.host_memory import reuse_freed_memory

QUICKSTART = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 344,
}
# Sizes, prompts, tokens of a prompt, new tokens.
CASES = {
    "quickstart": (QUICKSTART, 16, 24, 48),
    "smollm2": (MODELS["smollm2"], 4, 160, 96),
    "tiny": (MODELS["tiny"], 2, 8, 4),
}
SAMPLES = 16


def sides(name: str) -> dict[str, tuple[Callable[[], None], int]]:
    """By name, something to time and the bytes that its program allocates.

    "apart" reads every row's prompt, "together" each prompt once; "prefill" is what "apart" does
    before its first token, and "prefill once" the same for "together".
    """
    sizes, count, length, new = CASES[name]
    model = Transformer(ModelConfig(**sizes), jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(4, sizes["vocab_size"], (count, length)), jnp.int32)
    key = jax.random.key(1)
    sample = functools.partial(generate, config=SamplingConfig(new), eos_ids=(-1,), pad_id=0)

    def prefill(model, tokens, mask, key):
        del key
        return model.prefill(tokens, mask, cache_length=length + new)

    functions = {
        "apart": (sample, SAMPLES),
        "together": (functools.partial(sample, samples=SAMPLES), 1),
        "prefill": (prefill, SAMPLES),
        "prefill once": (prefill, 1),
    }
    made = {}
    for side, (function, times) in functions.items():
        tokens = jnp.repeat(prompts, times, axis=0)
        arguments = (model, tokens, jnp.ones(tokens.shape, bool), key)
        program = jax.jit(function).lower(*arguments).compile()
        memory = program.memory_analysis()
        allocated = memory.temp_size_in_bytes + memory.output_size_in_bytes
        run = functools.partial(lambda f, a: jax.block_until_ready(f(*a)), program, arguments)
        made[side] = (run, allocated)
    return made


class Cost(NamedTuple):
    """Of one side: medians of seconds and of processor seconds, and bytes.

    The clock of the processor goes on with what runs, whatever else the machine does.
    """

    seconds: float
    processor: float
    allocated: int


def measure(name: str, repeats: int) -> dict[str, Cost]:
    """The cost of each side; the first run of each is not counted."""
    made = sides(name)
    clocks = (time.perf_counter, time.process_time)
    spent: dict[str, list[list[float]]] = {side: [] for side in made}
    for turn in range(repeats + 1):
        for side, (run, _) in made.items():
            begun = [clock() for clock in clocks]
            run()
            if turn:
                now = [clock() for clock in clocks]
                spent[side].append([b - a for a, b in zip(begun, now, strict=True)])
    return {
        side: Cost(*map(statistics.median, zip(*spent[side], strict=True)), made[side][1])
        for side in made
    }


def main(argv: list[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="quickstart,smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    rows = []
    for name in args.cases.split(","):
        found = measure(name, args.repeats)
        apart, together = found["apart"], found["together"]
        once, each = found["prefill once"], found["prefill"]
        rows.append(
            {
                "case": name,
                "apart, s": f"{apart.seconds:.3f}",
                "together, s": f"{together.seconds:.3f}",
                "ratio": f"{together.seconds / apart.seconds:.0%}",
                "ratio of processor time": f"{together.processor / apart.processor:.0%}",
                "prefill of apart": f"{each.processor / apart.processor:.0%}",
                "prefill of together": f"{once.processor / together.processor:.0%}",
                "apart, MiB": f"{apart.allocated / 2**20:.0f}",
                "together, MiB": f"{together.allocated / 2**20:.0f}",
            }
        )
    print(tabulate(rows, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    reuse_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    guard_cpu_compiler()
    main()
