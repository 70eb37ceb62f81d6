"""The compiled sampler: how many steps it runs, and no copy of the cache."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.rollout import SamplingConfig, generate
from tests import tiny

ROWS, WIDTH, LENGTH = 3, 4, 9
CONFIG = tiny.model_config(tie_embeddings=False, num_layers=1)


def model(eos_logit: float) -> Transformer:
    """Every token looks alike, and only the one that ends a response has a logit."""
    head = np.zeros((CONFIG.hidden_size, tiny.VOCAB), np.float32)
    head[:, tiny.EOS] = eos_logit / CONFIG.hidden_size
    blank = jax.tree.map(jnp.zeros_like, tiny.language_model(CONFIG))
    ones = jax.tree.map(jnp.ones_like, (blank.embedding, blank.final_norm))
    blank.embedding, blank.final_norm = ones
    blank.lm_head = jax.tree.map(lambda _: jnp.asarray(head), blank.lm_head)
    return blank


@pytest.fixture(scope="module")
def program():
    """The compiled sampler, and the list that grows with each token fed to the model."""
    fed = []
    decode = Transformer.decode_step

    def counted(self, *args):
        jax.debug.callback(lambda: fed.append(1))
        return decode(self, *args)

    run = functools.partial(
        generate, config=SamplingConfig(LENGTH), eos_ids=(tiny.EOS,), pad_id=tiny.PAD
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "decode_step", counted)
        prompts = tiny.left_padded([4, 2, 3], WIDTH)
        compiled = jax.jit(run).lower(model(0.0), *prompts, jax.random.key(0)).compile()
    return compiled, fed


def count_steps(program, eos_logit: float, seed: int = 0) -> tuple[int, int]:
    """Tokens fed to the model, and the length of the longest response."""
    compiled, fed = program
    fed.clear()
    prompts = map(jnp.asarray, tiny.left_padded([4, 2, 3], WIDTH))
    rollout = compiled(model(eos_logit), *prompts, jax.random.key(seed))
    jax.effects_barrier()
    return len(fed), int(np.asarray(rollout.response_mask).sum(1).max())


def test_the_loop_stops_when_every_response_has_ended(program):
    assert count_steps(program, 50.0) == (1, 1)


def test_the_loop_feeds_no_token_that_nothing_follows(program):
    assert count_steps(program, -50.0) == (LENGTH - 1, LENGTH)


def test_the_loop_waits_for_the_last_response(program):
    """At a logit of 3 a third of the tokens ends a response."""
    runs = [count_steps(program, 3.0, seed) for seed in range(6)]
    assert all(steps == min(longest, LENGTH - 1) for steps, longest in runs)
    assert any(1 < longest < LENGTH for _, longest in runs)


def loop_bodies(hlo: str, holding: str = "") -> list[str]:
    """The computations that while loops run whose bodies hold a text, with all that they call."""
    computations = {
        match.group(1): match.group(0)
        for match in re.finditer(r"^%?([\w.\-]+) [^\n]*\{\n.*?^\}", hlo, re.MULTILINE | re.DOTALL)
    }
    names = set(re.findall(r"body=%?([\w.\-]+)", hlo))
    names = {name for name in names if holding in computations[name]}
    while True:
        called = {
            name
            for body in names
            for name in re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", computations[body])
        }
        if called <= names:
            return [computations[name] for name in names]
        names |= called


def test_the_cache_is_updated_in_place(program):
    """In the optimised program the loop writes slices of the cache, and copies none of it."""
    hlo = program[0].as_text()
    shape = f"f32[{ROWS},{CONFIG.num_kv_heads},{WIDTH + LENGTH},{CONFIG.head_dim}]"
    made = [
        line.split(f"= {shape}", 1)[1]
        for body in loop_bodies(hlo)
        for line in body.splitlines()
        if f"= {shape}" in line
    ]
    operations = {re.match(r"\S* ([\w\-]+)\(", rest).group(1) for rest in made}
    updates = sum("dynamic-update-slice" in rest for rest in made)
    assert updates >= 2 * CONFIG.num_layers
    assert operations <= {"parameter", "get-tuple-element", "fusion", "dynamic-update-slice"}
    # A fusion of the cache's shape must itself be an update.
    fusions = [rest for rest in made if " fusion(" in rest]
    assert all("calls=" in rest for rest in fusions)
    assert len(fusions) <= updates


@pytest.fixture(scope="module")
def two_layers() -> str:
    """What the loop over tokens runs in a sampler for two layers, as text."""
    model, (prompts, mask) = tiny.language_model(), tiny.prompts()
    rows, width = prompts.shape
    cache = f"[{rows},{model.config.num_kv_heads},{width + LENGTH},{model.config.head_dim}]"
    run = functools.partial(
        generate, config=SamplingConfig(LENGTH), eos_ids=(tiny.EOS,), pad_id=tiny.PAD
    )
    lowered = jax.jit(run).lower(model, prompts, mask, jax.random.key(0))
    return "\n".join(loop_bodies(lowered.compile().as_text(), holding=cache))


def test_layers_are_taken_apart_outside_of_the_loop(two_layers):
    """A slice of stacked weights is a copy on CPU: all weights once more at every token."""
    config = tiny.model_config()
    gate = f"{config.hidden_size},{config.intermediate_size}]"
    assert f"f32[{gate}" in two_layers
    assert f"f32[{config.num_layers},{gate}" not in two_layers


def test_rotary_tables_are_made_once_a_step(two_layers):
    """Not once for each head of queries and keys in each layer."""
    assert two_layers.count(" cosine(") == 1
