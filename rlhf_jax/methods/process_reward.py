"""Reward models of steps (PRM) and of outcomes (ORM): a language model whose token is a class.

After the last token of a step the model is asked for one of three label tokens: wrong, neutral,
right (Lightman et al. 2023, section 2.6). An outcome model is asked the same at every token of a
solution, with the outcome as its target and two of the tokens (Cobbe et al. 2021, section 4.2). A
likelihood model is asked nothing: a step is as likely to be right as it is to be written,

    P(right) = π(step | prompt, steps before)

so that what the policy knows when it writes serves to judge as well. Right steps are made more
likely and first errors less, −log π and −log(1 − π), which is the language-model loss and the
unlikelihood of whole steps. It needs steps that can be written in few ways; an implicit reward by
the ratio to a reference (Yuan et al. 2024, arXiv 2412.01981) does not, and needs a second model.
So each is an ordinary language model on file, with no head of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.data.step_labels import (
    NUM_CLASSES,
    UNRATED,
    encode_steps,
    encode_whole_prompt,
)
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.losses import language_model_loss, outcome_loss, step_label_loss, step_scores
from rlhf_jax.losses.process import NEGATIVE, POSITIVE
from rlhf_jax.methods.reductions import reduction_weights, weighted_sum
from rlhf_jax.methods.search import Partial
from rlhf_jax.models.heads import log_probs_of, next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.rescore import read_in_batches
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.step import make_train_step

PROCESS, OUTCOME, LIKELIHOOD = "process", "outcome", "likelihood"
SUPERVISIONS = (PROCESS, OUTCOME, LIKELIHOOD)
# −log(1 − π) of a step that is certain has no bound.
_MOST_CERTAIN = 1e-6
NEUTRALS = ("positive", "negative")


@dataclasses.dataclass(frozen=True)
class ProcessRewardConfig:
    """What a reward model of solutions learns.

    Attributes:
      supervision: "process", a class of each step; "outcome", one for all tokens of a solution; or
        "likelihood", the probability of each step, for which no label token is read.
      neutral: whether a neutral step counts as right, "positive", or not, "negative", in a score.
      every_token: whether a PRM is asked for the label of a step at all of its tokens, as an ORM is
        for the outcome, or only at the last one (Lightman et al. 2023). It is scored at the last
        one either way; the others are many times as many labels.
      lm_coef: weight of the language-model loss on solutions that are right in every step; 0 is
        off. Who is to see an error has to know what is right (Cobbe et al. 2021, section 4.2, train
        both at once).
      tokens: texts of the label tokens: wrong, neutral, right; one token each.
    """

    supervision: str = PROCESS
    neutral: str = "positive"
    every_token: bool = False
    lm_coef: float = 0.0
    tokens: tuple[str, ...] = ("-", "?", "+")

    def __post_init__(self):
        check(self, supervision=SUPERVISIONS, neutral=NEUTRALS, lm_coef="[0, 1e6]")
        if len(self.tokens) != NUM_CLASSES or len(set(self.tokens)) != NUM_CLASSES:
            raise ValueError(
                f"loss.tokens={self.tokens} must be {NUM_CLASSES} different texts: wrong, neutral, "
                "right"
            )

    def token_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """The ids of the label tokens.

        Raises:
          ValueError: a text is not one token, or two are the same token.
        """
        chat = ChatTokenizer(tokenizer)
        ids = [chat.encode(text, first=False) for text in self.tokens]
        for text, found in zip(self.tokens, ids, strict=True):
            if len(found) != 1:
                raise ValueError(
                    f"loss.tokens has {text!r}, which is {len(found)} tokens of this tokenizer: "
                    "choose texts of one token each"
                )
        if len({found[0] for found in ids}) != NUM_CLASSES:
            raise ValueError(f"loss.tokens={self.tokens} are not {NUM_CLASSES} different tokens")
        return tuple(found[0] for found in ids)


@dataclasses.dataclass(frozen=True)
class SolutionTrainConfig:
    """Batches of a run, all global.

    Attributes:
      steps: updates.
      minibatch: rows of an update, into which solutions are packed.
      row_length: tokens of a row.
      microbatches: parts of a minibatch whose gradients are computed one after the other.
    """

    steps: int
    minibatch: int
    row_length: int
    microbatches: int = 1

    def __post_init__(self):
        check(
            self,
            steps="[1, inf)",
            minibatch="[1, inf)",
            row_length="[1, inf)",
            microbatches="[1, inf)",
        )
        if self.minibatch % self.microbatches:
            raise ValueError(
                f"train.minibatch={self.minibatch} must be divisible by "
                f"train.microbatches={self.microbatches}"
            )


def class_logits(model: Transformer, hidden: jax.Array, token_ids: Sequence[int]) -> jax.Array:
    """Logits `[..., 3]` of the label tokens, from hidden states `[..., D]`."""
    return model.logits_of(hidden, jnp.asarray(token_ids))


def step_log_probs(log_probs: jax.Array, begins: jax.Array, ends: jax.Array) -> jax.Array:
    """log π of whole steps, in nats.

    Args:
      log_probs: `[B, T]`, at each token that of the token given those before it.
      begins: `[B, S]` int32, the first token of each step.
      ends: `[B, S]` int32, the last one; below `begins` for a step without tokens, whose sum is 0.

    Returns:
      `[B, S]`, at most 0 up to rounding.
    """
    sums = jnp.pad(jnp.cumsum(log_probs.astype(jnp.float32), axis=-1), ((0, 0), (1, 0)))
    return jnp.take_along_axis(sums, ends + 1, -1) - jnp.take_along_axis(sums, begins, -1)


def likelihood_loss(log_likelihood: jax.Array, right: jax.Array) -> jax.Array:
    """−log P of a label where P(right) = π.

        −log π            of a right step
        −log(1 − π)       of a wrong one

    Args:
      log_likelihood: log π of steps, any shape.
      right: bool, same shape.
    """
    log_pi = jnp.minimum(log_likelihood, -_MOST_CERTAIN)
    return jnp.where(right, -log_pi, -jnp.log(-jnp.expm1(log_pi)))


def outcome_logit(logits: jax.Array) -> jax.Array:
    """z `[...]` of p(right) = σ(z), from logits `[..., 3]`: right against wrong."""
    return logits[..., POSITIVE] - logits[..., NEGATIVE]


def prepare(batch: dict[str, jax.Array], *, config: ProcessRewardConfig) -> dict[str, jax.Array]:
    """Adds what is trained `[B, T]`, and its weights in the mean over the whole batch.

    Steps behind the first wrong one have no label, see `data.step_labels`. Of an outcome model
    every token of a solution counts.
    """
    if config.supervision != OUTCOME:
        trained = batch["labels"] != UNRATED
    else:
        trained = batch["loss_mask"] & ~jnp.isnan(batch["right"])
    return batch | {
        "trained": trained,
        "weights": reduction_weights("token_mean", trained),
        "lm_weights": reduction_weights("token_mean", batch["traced"][:, 1:]),
    }


def loss_fn(
    model: Transformer,
    batch: dict[str, jax.Array],
    *,
    config: ProcessRewardConfig,
    token_ids: tuple[int, ...],
) -> tuple[jax.Array, dict]:
    """Mean over labelled steps of −log P(label), or over tokens of the outcome loss.

    Args:
      model: the language model.
      batch: of `SolutionBatches`, with what `prepare` adds.
      config: which of them.
      token_ids: of the labels, three; none where the likelihood of steps is all.
    """
    hidden = model(batch["tokens"], batch["segments"])
    trained, weights = batch["trained"], batch["weights"]
    said: jax.Array | None = None
    if config.supervision == LIKELIHOOD or config.lm_coef:
        said, _ = log_probs_of(model, hidden[:, :-1], batch["tokens"][:, 1:])
    # Right or not, with neutral steps on the side that scores put them.
    bar = POSITIVE if config.neutral == "negative" else POSITIVE - 1
    if config.supervision == LIKELIHOOD:
        assert said is not None
        places = jnp.broadcast_to(jnp.arange(trained.shape[1]), trained.shape)
        log_pi = step_log_probs(jnp.pad(said, ((0, 0), (1, 0))), batch["begins"], places)
        right = batch["labels"] >= bar
        losses = likelihood_loss(jnp.where(trained, log_pi, -1.0), right)
        correct = (log_pi > math.log(0.5)) == right
    elif config.supervision == PROCESS:
        logits = class_logits(model, hidden, token_ids)
        losses = step_label_loss(logits, batch["labels"], where=trained)
        correct = (step_scores(logits, neutral=config.neutral) > 0.5) == (batch["labels"] >= bar)
    else:
        z = outcome_logit(class_logits(model, hidden, token_ids))
        right = jnp.where(trained, batch["right"], 0.0)
        # One token each: packed rows hold several solutions, each with an outcome of its own.
        losses = outcome_loss(z[..., None], right, where=trained[..., None])[..., 0]
        correct = (z > 0) == (right > 0.5)
    loss = weighted_sum(losses, weights)
    accuracy = weighted_sum(jnp.where(trained, correct, False).astype(jnp.float32), weights)
    metrics = {"loss/step_labels": loss, "steps/accuracy": accuracy}
    if not config.lm_coef:
        return loss, metrics
    assert said is not None
    nll = language_model_loss(said, where=batch["traced"][:, 1:], per_token=True)
    metrics["loss/lm"] = weighted_sum(nll, batch["lm_weights"])
    return loss + config.lm_coef * metrics["loss/lm"], metrics


def make_step(
    config: ProcessRewardConfig,
    train: SolutionTrainConfig,
    optimizer: optax.GradientTransformation,
    sharding: Sharding,
    *,
    token_ids: tuple[int, ...],
    trunk: Any = None,
) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)`, see `training.step.make_train_step`."""
    return make_train_step(
        functools.partial(loss_fn, config=config, token_ids=token_ids),
        optimizer,
        sharding,
        microbatches=train.microbatches,
        prepare=functools.partial(prepare, config=config),
        trunk=trunk,
    )


@functools.partial(jax.jit, static_argnames=("config", "token_ids"))
def probabilities(
    model: Transformer,
    tokens: jax.Array,
    segments: jax.Array,
    *,
    config: ProcessRewardConfig,
    token_ids: tuple[int, ...],
) -> jax.Array:
    """P(right) `[B, T]` float32 read at every token; of a PRM it means something at step ends.

    Of a likelihood model log π of each token, whose sums are those of steps.
    """
    if config.supervision == LIKELIHOOD:
        log_probs, _ = next_token_log_probs(model, tokens, segments)
        return jnp.pad(log_probs, ((0, 0), (1, 0)))
    logits = class_logits(model, model(tokens, segments), token_ids)
    if config.supervision == OUTCOME:
        return jax.nn.sigmoid(outcome_logit(logits))
    return step_scores(logits, neutral=config.neutral)


def score_steps(
    model: Transformer,
    encoded: Sequence[tuple[np.ndarray, np.ndarray, int]],
    sharding: Sharding,
    *,
    config: ProcessRewardConfig,
    token_ids: tuple[int, ...],
    pad_id: int,
    rows: int = 128,
) -> list[np.ndarray]:
    """P(right) of each step, of any number of solutions in batches of few shapes.

    Args:
      model: PRM or ORM.
      encoded: tokens [T] and step ends [S] of each, from `data.step_labels.encode_steps`, and where
        its first step begins.
      sharding: where batches go.
      config: what the model learned.
      token_ids: of the labels.
      pad_id: written into padding.
      rows: of a batch.

    Returns:
      float32 [S] for each.
    """
    read = functools.partial(probabilities, model, config=config, token_ids=token_ids)
    texts = [tokens for tokens, _, _ in encoded]
    values = read_in_batches(read, texts, pad_id=pad_id, rows=rows, sharding=sharding)
    if config.supervision != LIKELIHOOD:
        return [of[ends] for of, (_, ends, _) in zip(values, encoded, strict=True)]
    found = []
    for of, (_, ends, begin) in zip(values, encoded, strict=True):
        edges = np.concatenate([[begin], ends + 1])
        sums = np.concatenate([[0.0], np.cumsum(of, dtype=np.float64)])[edges]
        found.append(np.exp(np.minimum(np.diff(sums), 0.0)).astype(np.float32))
    return found


class StepScorer:
    """The `Score` of a search: P(right) of each step, by a PRM or an ORM.

    It reads texts: steps are encoded by the scorer's own tokenizer, so that policy and scorer need
    not share one.

    Args:
      model: PRM or ORM.
      tokenizer: the scorer's, of transformers.
      prompts: what the partial solutions answer: texts or messages, by the number of the problem.
      sharding: where batches go.
      config: what the model learned.
      max_length: the most tokens; of a longer solution the steps that do not fit score 0.
      rows: of a batch.

    Raises:
      ValueError: a prompt is longer than `max_length`, or a label text is not one token.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Any,
        prompts: Sequence[Any],
        sharding: Sharding,
        *,
        config: ProcessRewardConfig,
        max_length: int,
        rows: int = 128,
    ):
        chat = ChatTokenizer(tokenizer)
        found = []
        for prompt in prompts:
            encoded = encode_whole_prompt(prompt, chat, max_length)
            if encoded is None:
                raise ValueError(f"a prompt is longer than max_length={max_length} of the scorer")
            found.append(encoded)
        self._model, self._tokenizer, self._prompts = model, chat, found
        self._sharding, self._config = sharding, config
        self._max_length, self._rows = max_length, rows
        self._token_ids = () if config.supervision == LIKELIHOOD else config.token_ids(tokenizer)
        self._pad_id = tokenizer.pad_token_id

    def __call__(self, partials: Sequence[Partial]) -> list[list[float]]:
        """Scores every step of each partial solution."""
        encoded = []
        for one in partials:
            texts = [step.text for step in one.steps]
            tokens, ends = encode_steps(
                self._prompts[one.problem], texts, self._tokenizer, ended=one.ended
            )
            fits = ends < self._max_length
            begin = len(self._prompts[one.problem])
            encoded.append((tokens[: self._max_length], ends[fits], begin))
        scores = score_steps(
            self._model,
            encoded,
            self._sharding,
            config=self._config,
            token_ids=self._token_ids,
            pad_id=self._pad_id,
            rows=self._rows,
        )
        return [
            [*map(float, score), *[0.0] * (len(one.steps) - len(score))]
            for one, score in zip(partials, scores, strict=True)
        ]
