"""Sampling responses: one jitted loop, key/value cache in and out.

Which distribution is optimised? The policy of the ratio is the model at the sampling temperature
over the whole vocabulary, π(y|x) = softmax(logits / temperature). The loop records log π of each
token that it draws, the trainer computes the same function, and so the ratio of a fresh rollout
is 1 and its KL to an equal reference 0 for every temperature, top-k and top-p. Top-k, top-p and
the repetition penalty only restrict which tokens get drawn: with them the samples come from a
truncated policy while the full one is optimised, a bias that all trainers with top-p share. The
alternative, renormalising the ratio over the old nucleus, gives tokens outside it no gradient
and an infinite KL when the nucleus moves. `top_p=1, top_k=0` has no bias and is the default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.losses import entropy, select_log_probs
from rlhf_jax.models.layers import each_repeated
from rlhf_jax.models.transformer import KVCache, LayerWeights, Rope, Transformer
from rlhf_jax.rollouts import sampling
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Attributes:
      max_new_tokens: length G of the response window; a response that has no EOS by then is cut.
      temperature: divides the logits, in sampling and in the optimised policy; 0 is greedy (then
        log-probabilities are those of temperature 1).
      top_p: nucleus mass; 1 is off.
      top_k: number of candidates; 0 is off.
      repetition_penalty: divides the logits of tokens already in the response; 1 is off.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        check(
            self,
            max_new_tokens="[1, inf)",
            temperature="[0, 100]",  # above, nothing is left of the policy
            top_p="(0, 1]",
            top_k="[0, inf)",
            repetition_penalty="(0, 100]",
        )

    @property
    def policy_temperature(self) -> float:
        """Temperature of the distribution that is optimised."""
        return self.temperature or 1.0


@flax.struct.dataclass
class Rollout:
    """Prompts with sampled responses. P prompt columns (left padded), then G response columns.

    Attributes:
      tokens: `[B, P + G]` int32, padding after EOS.
      mask: `[B, P + G]` bool, True on real tokens; EOS is real.
      log_probs: `[B, G]` float32, log π of each response token at the sampling temperature.
      entropies: `[B, G]` float32, entropy of the policy at each response position, in nats.
      ended: `[B]` bool, whether the response contains EOS; True on rows without a prompt.
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    entropies: jax.Array
    ended: jax.Array

    @property
    def prompt_length(self) -> int:
        """P, the first response column."""
        return self.tokens.shape[-1] - self.log_probs.shape[-1]

    @property
    def response_mask(self) -> jax.Array:
        """`[B, G]` bool, True on real response tokens, EOS included."""
        return self.mask[..., self.prompt_length :]

    @property
    def responses(self) -> jax.Array:
        """`[B, G]` int32."""
        return self.tokens[..., self.prompt_length :]

    @property
    def segments(self) -> jax.Array:
        """`[B, P + G]` int32, the mask as segment ids."""
        return self.mask.astype(jnp.int32)


def make_generate(
    config: SamplingConfig,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    samples: int = 1,
    sharding: Sharding | None = None,
) -> Callable[..., Rollout]:
    """`generate` jitted with its settings bound: one program for each shape of prompts."""
    bound = functools.partial(
        generate, config=config, eos_ids=eos_ids, pad_id=pad_id, samples=samples
    )
    return jax.jit(bound if sharding is None else sharding.bind(bound))


class _Carry(NamedTuple):
    step: jax.Array  # scalar: response tokens drawn so far
    hidden: jax.Array  # [B, D]: state that predicts the next token
    cache: KVCache
    # For the next token. Made at the end of a step and carried: inside the next step XLA would
    # fuse the sines into the rotation of each head of each layer, and recompute them for each.
    rope: Rope
    ended: jax.Array  # [B]
    tokens: jax.Array  # [B, G]
    mask: jax.Array  # [B, G]
    log_probs: jax.Array  # [B, G]
    entropies: jax.Array  # [B, G]
    seen: jax.Array | None  # [B, V], only with a repetition penalty


def generate(
    model: Transformer,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    *,
    config: SamplingConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    samples: int = 1,
) -> Rollout:
    """Samples responses to prompts; stops when every sequence has ended.

    Jit it once with its settings bound: it compiles one program per shape of `prompts`, and the
    cache is as long as this shape needs.

    Several samples of a prompt are those of a batch in which it stands as many times, from the
    same key and up to rounding; but the model reads the prompt once, and holds its keys and values
    once. A row without any prompt token fills up a batch: nothing is drawn for it, and it counts as
    ended.

    Args:
      model: the policy.
      prompts: `[B, P]` int32, left padded.
      prompt_mask: `[B, P]` bool.
      key: random key, consumed.
      config: sampling settings.
      eos_ids: tokens that end a response. They are part of it: stopping is an action to be learned.
      pad_id: token written after the end.
      samples: responses to each prompt, S.

    Returns:
      The rollout of B · S rows, those of a prompt adjacent, with log-probabilities from the same
      pass that drew the tokens.

    Raises:
      ValueError: fewer than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    prompt_length, length = prompts.shape[1], config.max_new_tokens
    hidden, cache = model.prefill(prompts, prompt_mask, cache_length=prompt_length + length)
    first_slot = prompt_length
    if samples > 1:
        cache, first_slot = cache.branched(samples, at=prompt_length), 0
        hidden, prompts, prompt_mask = (
            each_repeated(x, samples) for x in (hidden, prompts, prompt_mask)
        )
    batch = prompts.shape[0]
    real_prompt_tokens = prompt_mask.sum(axis=-1)
    penalized = config.repetition_penalty != 1.0
    rows = jnp.arange(batch)

    def draw(carry: _Carry) -> _Carry:
        logits = model.logits(carry.hidden)
        candidates = logits
        if carry.seen is not None:
            candidates = sampling.penalize_repetition(logits, carry.seen, config.repetition_penalty)
        token = sampling.sample(
            jax.random.fold_in(key, carry.step),
            candidates,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        token = jnp.where(carry.ended, pad_id, token)
        log_prob = select_log_probs(logits, token, temperature=config.policy_temperature)
        t, alive = carry.step, ~carry.ended
        return carry._replace(
            tokens=carry.tokens.at[:, t].set(token),
            mask=carry.mask.at[:, t].set(alive),
            log_probs=carry.log_probs.at[:, t].set(jnp.where(alive, log_prob, 0.0)),
            entropies=carry.entropies.at[:, t].set(
                jnp.where(alive, entropy(logits / config.policy_temperature), 0.0)
            ),
            ended=carry.ended | jnp.isin(token, jnp.asarray(eos_ids)) & alive,
            seen=None if carry.seen is None else carry.seen.at[rows, token].set(True),
        )

    def loop(carry: _Carry, layer_weights: tuple[LayerWeights, ...] = ()) -> _Carry:
        def advance(carry: _Carry) -> _Carry:
            carry = draw(carry)
            hidden, cache = model.decode_step(
                carry.tokens[:, carry.step],
                carry.rope,
                first_slot + carry.step,
                carry.cache,
                layer_weights,
            )
            step = carry.step + 1
            rope = model.rope(real_prompt_tokens + step)
            return carry._replace(step=step, hidden=hidden, cache=cache, rope=rope)

        # The last token is drawn outside of the loop: nothing follows it, so it is not fed back.
        return jax.lax.while_loop(lambda c: (c.step < length - 1) & ~c.ended.all(), advance, carry)

    zeros = jnp.zeros((batch, length), jnp.float32)
    start = _Carry(
        step=jnp.zeros((), jnp.int32),
        hidden=hidden,
        cache=cache,
        rope=model.rope(real_prompt_tokens),
        ended=real_prompt_tokens == 0,
        tokens=jnp.full((batch, length), pad_id, jnp.int32),
        mask=jnp.zeros((batch, length), bool),
        log_probs=zeros,
        entropies=zeros,
        seen=jnp.zeros((batch, model.config.vocab_size), bool) if penalized else None,
    )
    # On CPU XLA copies a slice of stacked weights, at every token if it is taken inside the loop.
    # Outside it costs the memory of the decoder's layers once more, so only CPUs do so.
    carry = jax.lax.platform_dependent(
        start, cpu=lambda carry: loop(carry, model.layers.each()), default=loop
    )
    carry = draw(carry)
    return Rollout(
        tokens=jnp.concatenate([prompts, carry.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, carry.mask], axis=1),
        log_probs=carry.log_probs,
        entropies=carry.entropies,
        ended=carry.ended,
    )
