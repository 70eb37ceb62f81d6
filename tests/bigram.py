"""A language model and a critic that are one table each, and a minibatch of experience for them.

They have the methods that the losses call and nothing else, so a loss of PPO compiles in a moment
and can be written again in a few lines of NumPy.
"""

import types

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.rollouts.experience import Evaluation, Experience
from rlhf_jax.rollouts.rollout import Rollout

VOCAB, PROMPT, RESPONSE = 6, 3, 5
LENGTHS = [5, 1, 3, 2, 5, 4, 2, 3]  # of the responses


@flax.struct.dataclass
class Bigram:
    """Logits of the next token: the row `table[token]` of `[V, V]`."""

    table: jax.Array
    config = types.SimpleNamespace(vocab_size=VOCAB)

    def __call__(self, tokens, segments):
        del segments
        return jax.nn.one_hot(tokens, VOCAB, dtype=self.table.dtype)

    def together(self, *batches):
        return tuple(self(*batch) for batch in batches)

    def logits(self, hidden):
        return (hidden @ self.table).astype(jnp.float32)


@flax.struct.dataclass
class UnigramCritic:
    """Value of the state after a token: `weights[token]`, `[V]`."""

    weights: jax.Array

    def trunk(self, tokens, segments):
        del segments
        return jax.nn.one_hot(tokens, VOCAB)

    def read(self, hidden):
        return hidden @ self.weights


def policy(seed: int = 0) -> Bigram:
    return Bigram(
        jnp.asarray(np.random.default_rng(seed).normal(0, 1, (VOCAB, VOCAB)), jnp.float32)
    )


def critic(seed: int = 0) -> UnigramCritic:
    return UnigramCritic(jnp.asarray(np.random.default_rng(seed).normal(0, 1, VOCAB), jnp.float32))


def table_log_probs(table: np.ndarray, temperature: float) -> np.ndarray:
    """log π(next | token) `[V, V]` in float64."""
    logits = np.asarray(table, np.float64) / temperature
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def where(lengths=LENGTHS) -> np.ndarray:
    return np.arange(RESPONSE)[None] < np.array(lengths)[:, None]


def experience(rows: int = 8, *, fill: float = 0.0, temperature: float = 1.0) -> Experience:
    """Ragged rows, sampled long ago by another policy; `fill` is on padding."""
    rng = np.random.default_rng(5)
    lengths = (LENGTHS * -(-rows // 8))[:rows]
    real = where(lengths)
    tokens = rng.integers(0, VOCAB, (rows, PROMPT + RESPONSE)).astype(np.int32)
    before, after = tokens[:, PROMPT - 1 : -1], tokens[:, PROMPT:]
    old = table_log_probs(policy().table, temperature)[before, after]
    old = old + rng.normal(0, 0.3, old.shape)
    prompt = np.ones((rows, PROMPT), bool)
    prompt[1::2, 0] = False

    def field(scale: float, shift=0.0):
        x = rng.normal(0, scale, real.shape) + shift
        return jnp.asarray(np.where(real, x, fill), jnp.float32)

    return Experience(
        rollout=Rollout(
            tokens=jnp.asarray(tokens),
            mask=jnp.asarray(np.concatenate([prompt, real], axis=1)),
            log_probs=field(0.0, old),
            entropies=field(0.1, 1.0),
            ended=jnp.asarray(np.array(lengths) < RESPONSE),
        ),
        evaluation=Evaluation(
            ref_log_probs=field(0.2, old), scores=jnp.ones(rows), values=field(1.0)
        ),
        rewards=field(1.0),
        advantages=field(1.0),
        returns=field(1.0),
    )


def language_batch(rows: int = 4) -> dict[str, jax.Array]:
    """An LM batch with untrained tokens and padding."""
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, VOCAB, (rows, 7)).astype(np.int32)
    lengths = np.array([7, 4, 6, 5] * -(-rows // 4))[:rows]
    real = np.arange(7)[None] < lengths[:, None]
    trained = real & (np.arange(7)[None] >= 2)
    batch = {"tokens": tokens, "segments": real.astype(np.int32), "loss_mask": trained}
    return jax.tree.map(jnp.asarray, batch)


def mean(values: dict[tuple[int, int], float], reduction: str) -> float:
    """Reduces numbers at (row, t)."""
    rows = sorted({row for row, _ in values})
    per_row = [[v for (r, _), v in values.items() if r == row] for row in rows]
    if reduction == "token_mean":
        return sum(values.values()) / len(values)
    if reduction == "sequence_mean":
        return sum(sum(row) / len(row) for row in per_row) / len(rows)
    return sum(sum(row) for row in per_row) / len(rows)


def directional(function, at: np.ndarray, direction: np.ndarray) -> float:
    """Central difference."""
    step = 1e-6
    return (function(at + step * direction) - function(at - step * direction)) / (2 * step)


def constants_gradient(loss, experience):
    """Gradient of `loss(experience)` by every floating-point array of the experience."""
    leaves, tree = jax.tree.flatten(experience)
    floating = [i for i, leaf in enumerate(leaves) if leaf.dtype == jnp.float32]

    def of_floats(floats):
        filled = list(leaves)
        for i, x in zip(floating, floats, strict=True):
            filled[i] = x
        return loss(jax.tree.unflatten(tree, filled))

    return jax.grad(of_floats)([leaves[i] for i in floating])
