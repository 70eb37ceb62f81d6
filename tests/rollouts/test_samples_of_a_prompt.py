"""Many samples of one prompt: those of the prompt repeated, and it is read once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.batches import each_repeated
from rlhf_jax.rollouts.rollout import SamplingConfig, generate, make_generate
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from tests import tiny

SAMPLES = 3


@functools.cache
def sampler(setting: str):
    """As `tiny.sampler`, with several samples of each prompt."""
    return tiny.jit(
        functools.partial(
            generate,
            config=tiny.SETTINGS[setting],
            eos_ids=tiny.EOS_IDS,
            pad_id=tiny.pad_of(setting),
            samples=SAMPLES,
        )
    )


def asked() -> dict[str, np.ndarray]:
    return dict(zip(("tokens", "mask"), tiny.prompts(), strict=True))


@pytest.mark.parametrize("setting", ["plain", "every filter"])
def test_samples_are_those_of_repeated_prompts(setting):
    key, model = jax.random.key(7), tiny.language_model()
    together = sampler(setting)(model, *asked().values(), key)
    repeated = each_repeated(asked(), SAMPLES)
    apart = tiny.sampler(setting)(model, *repeated.values(), key)
    assert np.array_equal(together.tokens, apart.tokens)
    assert np.array_equal(together.mask, apart.mask)
    assert np.array_equal(together.ended, apart.ended)
    tiny.close(together.log_probs, apart.log_probs)
    tiny.close(together.entropies, apart.entropies)
    # Samples of a prompt differ from each other.
    groups = np.asarray(together.responses).reshape(-1, SAMPLES, tiny.RESPONSE)
    assert (groups[:, 0] != groups[:, 1]).any(1).mean() > 0.5


def flops(prompts: int, samples: int) -> float:
    """Operations of a sampler of one token, which is drawn from what the prompt has left."""
    run = functools.partial(
        generate,
        config=SamplingConfig(1),
        eos_ids=(tiny.EOS,),
        pad_id=tiny.PAD,
        samples=samples,
    )
    arguments = (*tiny.left_padded([24] * prompts, 24), jax.random.key(0))
    return jax.jit(run).lower(tiny.language_model(), *arguments).cost_analysis()["flops"]


def test_a_prompt_is_read_once_for_all_its_samples():
    """Beyond two prompts that are read, six more rows cost their draws and nothing else."""
    draws = flops(8, 1) - flops(2, 1)  # six prompts read, and six tokens drawn
    assert flops(2, 4) - flops(2, 1) < draws / 4


def test_a_row_without_prompt_is_over_at_once():
    tokens, mask = (x.copy() for x in tiny.prompts())
    mask[5] = False
    drawn = sampler("plain")(tiny.language_model(), tokens, mask, jax.random.key(7))
    filler = np.repeat(np.arange(8) == 5, SAMPLES)
    assert not np.asarray(drawn.response_mask)[filler].any()
    assert np.asarray(drawn.ended)[filler].all()
    whole = sampler("plain")(tiny.language_model(), *tiny.prompts(), jax.random.key(7))
    assert np.array_equal(drawn.tokens[~filler], whole.tokens[~filler])


def test_samples_on_eight_devices_are_those_on_one():
    config, eos = tiny.SETTINGS["plain"], tiny.EOS_IDS
    drawn, programs = [], []
    for devices in (1, 8):
        sharding = Sharding(make_mesh(devices), "zero2")
        model = tiny.language_model()
        model = jax.device_put(model, sharding.frozen(model))
        run = make_generate(
            config, eos_ids=eos, pad_id=tiny.PAD, samples=SAMPLES, sharding=sharding
        )
        batch = sharding.put_batch(asked())
        arguments = (model, batch["tokens"], batch["mask"], jax.random.key(7))
        drawn.append(run(*arguments))
        programs.append(run.lower(*arguments).compile().as_text())
    one, eight = drawn
    assert eight.tokens.sharding.spec[0] == "data"
    assert np.array_equal(one.tokens, eight.tokens)
    tiny.close(one.log_probs, eight.log_probs)
    # Every device has the responses of its own rows, and nobody has keys of a prompt for each.
    rows, heads, size = 8 * SAMPLES, model.config.num_kv_heads, model.config.head_dim
    own, whole = tiny.RESPONSE, tiny.PROMPT + tiny.RESPONSE
    assert f"f32[{rows},{heads},{own},{size}]" in programs[0]
    assert f"f32[{rows},{heads},{own},{size}]" not in programs[1]
    assert f"f32[{rows // 8},{heads},{own},{size}]" in programs[1]
    assert not any(f"[{rows},{heads},{whole},{size}]" in program for program in programs)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        generate(
            tiny.language_model(),
            *map(jnp.asarray, tiny.prompts()),
            jax.random.key(0),
            config=SamplingConfig(1),
            eos_ids=(tiny.EOS,),
            pad_id=tiny.PAD,
            samples=0,
        )
