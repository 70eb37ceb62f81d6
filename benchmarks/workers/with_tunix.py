"""Tunix at the shapes of a case: its sampler on its own Llama 3.

    VENV/bin/python benchmarks/workers/with_tunix.py '{"case": "generate", ...}' --alone 5

Weights are drawn here: the sizes are those of `config.json` in the model's folder.
"""

import json
import os
from pathlib import Path

from turns import Turns, repeat

os.environ["JAX_PLATFORMS"] = "cpu"
TURNS = Turns("google-tunix", "jax", "flax")

import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from tunix.generate.sampler import CacheConfig, Sampler  # noqa: E402
from tunix.models.llama3.model import Llama3, ModelConfig  # noqa: E402

SPEC = TURNS.spec


class Numbers:
    """A tokenizer whose text is numbers: prompts are tokens, and no text is made."""

    def encode(self, text: str) -> list[int]:
        """Tokens of `1 2 3`."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """Nothing that is measured needs text."""
        del ids
        return ""

    def bos_id(self) -> int:
        """None is added."""
        return 0

    def eos_id(self) -> int:
        """No token ends a response."""
        return -1

    def pad_id(self) -> int:
        """Also below all tokens of prompts."""
        return 0


def load() -> Llama3:
    """The sizes of the case with weights of its own."""
    raw = json.loads((Path(SPEC["model"]) / "config.json").read_text())
    config = ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["hidden_size"] // raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    return Llama3(config, rngs=nnx.Rngs(0))


def generation():
    """Samples from the whole vocabulary; the cache is as long as the case needs."""
    model = load()
    sizes = model.config
    length = SPEC["prompt"] + SPEC["new"]
    cache = CacheConfig(length, sizes.num_layers, sizes.num_kv_heads, sizes.head_dim)
    sampler = Sampler(model, Numbers(), cache)
    shape = (SPEC["batch"], SPEC["prompt"])
    tokens = np.random.default_rng(0).integers(4, sizes.vocab_size, shape)
    prompts = [" ".join(map(str, row)) for row in tokens]
    seeds = iter(range(10**6))

    def work():
        out = sampler(
            prompts,
            max_generation_steps=SPEC["new"],
            max_prompt_length=SPEC["prompt"],
            temperature=1.0,
            top_p=1.0,
            seed=next(seeds),
            return_logprobs=True,  # ours returns them too
        )
        assert all(len(row) == SPEC["new"] for row in out.tokens), "a response ended early"

    return work


def main() -> None:
    """Takes turns with the others."""
    work = {"generate": generation}[SPEC["case"]]()
    TURNS.hello()
    repeat(TURNS, work)


if __name__ == "__main__":
    main()
