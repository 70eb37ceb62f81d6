"""What is compared: models, shapes, and the ratio aimed at. Data only."""

import dataclasses

# Sizes as `rlhf_jax.models.config.ModelConfig` has them. `small` has 4.46 million parameters;
# `smollm2` is the architecture of SmolLM2-135M. Both get random weights: these do not change speed.
MODELS = {
    "small": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 1024,
    },
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "intermediate_size": 1536,
        "rope_theta": 100_000.0,
        "max_length": 8192,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 32,
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
      name: its name in the results.
      title: its title in the table.
      spec: what every worker does: the case, the model's name, batch, lengths.
      peers: environments of the peers and the ratio of times (theirs to ours) asked for; None is
        no ratio to reach.
      tokens: what one run makes or trains on, for tokens per second.
    """

    name: str
    title: str
    spec: dict
    peers: dict[str, float | None]
    tokens: int


def _generate(model: str, batch: int, prompt: int, new: int, peers: dict) -> Case:
    spec = {"case": "generate", "model": model, "batch": batch, "prompt": prompt, "new": new}
    title = f"generate, batch {batch}, {prompt} + {new} tokens"
    return Case(f"{model}-generate-{batch}", title, spec, peers, batch * new)


def _sft(model: str, batch: int, length: int, peers: dict) -> Case:
    spec = {"case": "sft", "model": model, "batch": batch, "length": length}
    return Case(f"{model}-sft", f"SFT step, {batch} x {length}", spec, peers, batch * length)


def _dpo(model: str, batch: int, prompt: int, new: int, peers: dict) -> Case:
    spec = {"case": "dpo", "model": model, "batch": batch, "prompt": prompt, "new": new}
    title = f"DPO step, {batch} pairs, {prompt} + {new}"
    return Case(f"{model}-dpo", title, spec, peers, 2 * batch * (prompt + new))


def _ppo(model: str, batch: int, prompt: int, new: int, peers: dict) -> Case:
    spec = {"case": "ppo", "model": model, "batch": batch, "prompt": prompt, "new": new}
    title = f"PPO step, batch {batch}, {prompt} + {new}"
    return Case(f"{model}-ppo", title, spec, peers, batch * new)


CASES = (
    _generate("small", 8, 32, 128, {"torch": 4.0, "tunix": 2.0}),
    _generate("small", 128, 32, 128, {"torch": None, "tunix": None}),
    _ppo("small", 8, 32, 64, {"torch": 1.5}),
    _sft("small", 8, 128, {"torch": 1.0}),
    _dpo("small", 8, 32, 60, {"torch": 1.0}),
    _generate("smollm2", 32, 32, 64, {"torch": 1.5}),
    _sft("smollm2", 4, 128, {"torch": 1.0}),
    _ppo("smollm2", 8, 32, 32, {"torch": 1.5}),
)
# How cost grows: one size changes, the other stays at 8 rows or 160 tokens (128 for SFT).
GROWTH_BATCHES = (8, 32, 128)
GROWTH_LENGTHS = (64, 256, 1024)


def growth() -> list[tuple[str, int, Case]]:
    """What grows ("batch" or "length"), its value, and the case."""
    peers: dict[str, float | None] = {"torch": None}
    return [
        *(("batch", n, _generate("small", n, 32, 128, peers)) for n in GROWTH_BATCHES),
        *(("length", n, _generate("small", 8, 32, n - 32, peers)) for n in GROWTH_LENGTHS),
        *(("batch", n, _sft("small", n, 128, peers)) for n in GROWTH_BATCHES),
        *(("length", n, _sft("small", 8, n, peers)) for n in GROWTH_LENGTHS),
    ]


TINY = (
    _generate("tiny", 2, 4, 3, {}),
    _ppo("tiny", 2, 4, 3, {}),
    _sft("tiny", 2, 8, {}),
    _dpo("tiny", 2, 4, 3, {}),
)
