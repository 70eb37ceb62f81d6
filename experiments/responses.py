"""Sampling from a policy on held-out prompts, and what is measured there: shared by PPO and DPO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.judges import Judge
from rlhf_jax.rollouts import experience, rollout
from rlhf_jax.rollouts.rollout import Rollout, SamplingConfig
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.host_memory import release_freed_memory
from rlhf_jax.runtime.sharding import Sharding


class Responses(NamedTuple):
    """What a policy wrote on N prompts.

    Attributes:
      prompts: N texts.
      responses: N texts, without the prompt.
      judged: `[N]` scores of the judge for prompt and response together.
      statistics: Means over all responses, by metric name.
    """

    prompts: list[str]
    responses: list[str]
    judged: np.ndarray
    statistics: dict[str, float]


def make_generate(
    tokenizer: Any, config: ConfigDict, sharding: Sharding | None = None
) -> Callable[..., Rollout]:
    """`rollout.generate` jitted for a tokenizer and `config.sampling`: one program per shape."""
    return jit_generate(config, tuple(stop_tokens(tokenizer)), tokenizer.pad_token_id, sharding)


def jit_generate(
    config: ConfigDict, eos_ids: tuple[int, ...], pad_id: int, sharding: Sharding | None
) -> Callable[..., Rollout]:
    """The same from the ids of the tokens that end and pad a response."""
    sampling = SamplingConfig(**config.sampling)
    generate = functools.partial(rollout.generate, config=sampling, eos_ids=eos_ids, pad_id=pad_id)
    return jax.jit(generate if sharding is None else sharding.bind(generate))


@flax.struct.dataclass
class NoRewardModel:
    """Stands where there is no reward model: every response scores 0."""

    def scores(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """`[B]` zeros for sequences `[B, T]`."""
        del segments
        return jnp.zeros(tokens.shape[0], jnp.float32)


class Respondent:
    """Lets policies answer a fixed list of prompts.

    Args:
      generate: From `make_generate`.
      batches: Prompt batches `{"tokens", "mask"}`, all of one shape.
      tokenizer: Turns tokens into text.
      judge: Scores texts.
      reference: Frozen model for the KL.
      reward_model: None where there is none.
      sharding: Where batches go.
      temperature: Of the policy.
      show: What of a prompt is shown and judged, for prompts that hold more than their text.
    """

    def __init__(
        self,
        generate: Callable[..., Rollout],
        *,
        batches: Sequence[dict],
        tokenizer: Any,
        judge: Judge,
        reference: Any,
        reward_model: Any,
        sharding: Sharding,
        temperature: float,
        show: Callable[[str], str] = lambda prompt: prompt,
    ):
        self._generate, self._batches, self._show = generate, batches, show
        self._tokenizer, self._judge = tokenizer, judge
        self._reference = reference
        self._scored = reward_model is not None
        self._reward_model = reward_model if self._scored else NoRewardModel()
        self._sharding = sharding
        evaluate = functools.partial(experience.evaluate, critic=None, temperature=temperature)
        self._evaluate = jax.jit(sharding.bind(evaluate))

    def __call__(self, policy: Any, key: jax.Array, count: int) -> Responses:
        """Samples one response for each of the first `count` prompts (whole batches)."""
        rollouts, evaluations = [], []
        size = self._batches[0]["tokens"].shape[0]
        for index, batch in enumerate(self._batches[: -(-count // size)]):
            placed = self._sharding.put_whole(batch)
            sampled = self._generate(
                policy, placed["tokens"], placed["mask"], jax.random.fold_in(key, index)
            )
            evaluated = self._evaluate(sampled, self._reference, self._reward_model)
            evaluations.append(distributed.fetch(evaluated))
            rollouts.append(distributed.fetch(sampled))
            release_freed_memory()
        return self._measure(_stack(rollouts), _stack(evaluations))

    def _measure(self, sampled: Rollout, evaluated: experience.Evaluation) -> Responses:
        split = sampled.prompt_length
        prompts = self._decode(sampled.tokens[:, :split], sampled.mask[:, :split])
        full = self._decode(sampled.tokens, sampled.mask)
        responses = [text[len(prompt) :] for text, prompt in zip(full, prompts, strict=True)]
        shown = [self._show(prompt) for prompt in prompts]
        read = [words + response for words, response in zip(shown, responses, strict=True)]
        judged = self._judge(read)
        statistics = rollout_statistics(sampled, evaluated) | {"judge/mean": float(judged.mean())}
        if not self._scored:
            statistics.pop("reward/mean")
        return Responses(shown, responses, judged, statistics)

    def _decode(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
        return self._tokenizer.batch_decode(rows, skip_special_tokens=True)


def rollout_statistics(sampled: Rollout, evaluated: experience.Evaluation) -> dict[str, float]:
    """Reward, KL to the reference, perplexity, entropy, length and variety of sampled responses."""
    where = np.asarray(sampled.response_mask)
    log_probs = np.asarray(sampled.log_probs)
    ref_log_probs = np.asarray(evaluated.ref_log_probs)
    return {
        "reward/mean": float(np.mean(evaluated.scores)),
        "policy/perplexity": statistics.response_perplexity(log_probs, where=where),
        "policy/perplexity_moss": statistics.moss_perplexity(log_probs, where=where),
        "policy/perplexity_reference": statistics.response_perplexity(ref_log_probs, where=where),
        "policy/entropy": float(np.asarray(sampled.entropies)[where].mean()),
        **statistics.kl_statistics(log_probs, ref_log_probs, where=where),
        **statistics.response_statistics(
            sampled.responses, where=where, ended=np.asarray(sampled.ended)
        ),
    }


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)
