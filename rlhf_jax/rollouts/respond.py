"""Policies answer a fixed list of prompts; what they wrote is measured and judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.comparison import WinRate, win_tie_lose
from rlhf_jax.evaluation.judges import Judge
from rlhf_jax.rollouts import experience
from rlhf_jax.rollouts.rollout import Rollout
from rlhf_jax.runtime import distributed
from rlhf_jax.runtime.host_memory import release_freed_memory
from rlhf_jax.runtime.sharding import Sharding


class Responses(NamedTuple):
    """What a policy wrote on N prompts.

    Attributes:
      prompts: N texts.
      responses: N texts, without the prompt.
      rewards: `[N]` scores of the reward model, all 0 where there is none.
      judged: name of a judge -> `[N]` scores of prompt and response together.
      statistics: means over all responses, by metric name.
    """

    prompts: list[str]
    responses: list[str]
    rewards: np.ndarray
    judged: dict[str, np.ndarray]
    statistics: dict[str, float]


def win_rates(one: Responses, other: Responses) -> dict[str, WinRate]:
    """How often `one` beats `other` on the same prompts, by judge; the first judge leads."""
    return {name: win_tie_lose(one.judged[name], other.judged[name]) for name in one.judged}


@flax.struct.dataclass
class NoRewardModel:
    """In place of a missing reward model: every response scores 0."""

    def scores(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """`[B]` zeros for sequences `[B, T]`."""
        del segments
        return jnp.zeros(tokens.shape[0], jnp.float32)


@functools.lru_cache(maxsize=16)  # Respondents of all splits share one compiled function.
def make_evaluate(sharding: Sharding, temperature: float) -> Callable[..., experience.Evaluation]:
    """`evaluate(rollout, reference, reward_model)` of answers, jitted; there is no critic."""
    evaluate = functools.partial(experience.evaluate, critic=None, temperature=temperature)
    return jax.jit(sharding.bind(evaluate))


class Respondent:
    """Lets policies answer a fixed list of prompts.

    Args:
      generate: from `rollout.make_generate`.
      batches: prompt batches `{"tokens", "mask"}`, all of one shape.
      tokenizer: turns tokens into text.
      judges: judges of texts by name; empty where none fits the task.
      reference: frozen model for the KL.
      reward_model: scores the responses; None where there is none.
      sharding: where batches go.
      temperature: that of the policy.
      show: takes from a prompt the part that is shown and judged.
    """

    def __init__(
        self,
        generate: Callable[..., Rollout],
        *,
        batches: Sequence[dict],
        tokenizer: Any,
        judges: Mapping[str, Judge],
        reference: Any,
        reward_model: Any,
        sharding: Sharding,
        temperature: float,
        show: Callable[[str], str] = lambda prompt: prompt,
    ):
        self._generate, self._batches, self._show = generate, batches, show
        self._tokenizer, self._judges = tokenizer, judges
        self._reference = reference
        self._scored = reward_model is not None
        self._reward_model = reward_model if self._scored else NoRewardModel()
        self._sharding = sharding
        self._evaluate = make_evaluate(sharding, temperature)

    def __call__(self, policy: Any, key: jax.Array, count: int) -> Responses:
        """Samples one response for each of the first `count` prompts.

        They are drawn in whole batches, of which the last may be cut.
        """
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
        return self._measure(_stack(rollouts, count), _stack(evaluations, count))

    def _measure(self, sampled: Rollout, evaluated: experience.Evaluation) -> Responses:
        split = sampled.prompt_length
        prompts = self._decode(sampled.tokens[:, :split], sampled.mask[:, :split])
        full = self._decode(sampled.tokens, sampled.mask)
        responses = [text[len(prompt) :] for text, prompt in zip(full, prompts, strict=True)]
        shown = [self._show(prompt) for prompt in prompts]
        read = [words + response for words, response in zip(shown, responses, strict=True)]
        judged = {name: judge(read) for name, judge in self._judges.items()}
        numbers = rollout_statistics(sampled, evaluated)
        numbers |= {f"judge/{name}": float(scores.mean()) for name, scores in judged.items()}
        if not self._scored:
            numbers.pop("reward/mean")
        return Responses(shown, responses, np.asarray(evaluated.scores), judged, numbers)

    def _decode(self, tokens: Any, mask: Any) -> list[str]:
        rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
        return self._tokenizer.batch_decode(rows, skip_special_tokens=True)


class AgainstBaseline:
    """Measures a policy against a baseline on prompts that it does not train on.

    Args:
      respond: answers these prompts.
      baseline: its model answers once, here.
      key: random key; every policy draws with the same.
      count: prompts.
    """

    def __init__(self, respond: Respondent, baseline: Any, key: jax.Array, count: int):
        self._respond, self._key, self._count = respond, key, count
        self._before = respond(baseline, key, count)

    def __call__(self, policy: Any) -> dict[str, float]:
        """Statistics under `eval/`, the judges' means, and win rates against the baseline."""
        answers = self._respond(policy, self._key, self._count)
        metrics = {f"eval/{name}": value for name, value in answers.statistics.items()}
        for name, wins in win_rates(answers, self._before).items():
            metrics[f"judge/{name}"] = answers.statistics[f"judge/{name}"]
            metrics[f"win_rate/{name}"] = wins.win_rate
        return metrics


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


def _stack(trees: Sequence[Any], count: int) -> Any:
    """The first rows of all batches."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *trees)
