"""Supervised alignment: imitation of what is good, and a term that says what is better.

    L_total = L_SFT + L_aux

Quality prompts tell the model how good the response is that follows, and train on good and bad
ones; it is then asked for the best. Quality contrast trains on several responses to one prompt, of
which it is known which is better. Every objective reads candidates, see `data.candidates`:

  quark               prompt and response behind the words of the response's quantile of scores;
                      held near the reference (Lu et al. 2022)
  c_rlft              the better and the worse response, each behind the words of its class, with a
                      weight of its class (Wang et al. 2023, OpenChat)
  chain_of_hindsight  both in one sequence, each behind its words, in a random order (Liu et al.
                      2023)
  rrhf                K responses ranked by their likelihood, the best one imitated (Yuan et al.
                      2023)
  pro                 each response against all that are worse, the best one imitated (Song et al.
                      2023)
  slic                a hinge on the better and the worse one, the better one imitated (Zhao et al.
                      2023)
  orpo                their odds ratio, the better one imitated (Hong et al. 2024)
  unlikelihood        the worse one unlearned token by token, the better one imitated (Welleck et
                      al. 2019)
  figa                of both only the tokens in which they differ (Guo et al. 2023)
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import losses
from rlhf_jax.data.candidates import Candidates, extremes
from rlhf_jax.data.schemas import Encoded
from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.methods.pairwise import pair_weights
from rlhf_jax.methods.reductions import reduction_weights, weighted_sum
from rlhf_jax.models.heads import by_columns, fitting_columns, log_probs_of, next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime.settings import check
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.training.step import make_train_step

QUARK, C_RLFT, HINDSIGHT = "quark", "c_rlft", "chain_of_hindsight"
RRHF, SLIC, PRO, ORPO = "rrhf", "slic", "pro", "orpo"
UNLIKELIHOOD, FIGA = "unlikelihood", "figa"
PROMPTED = (QUARK, C_RLFT, HINDSIGHT)  # quality prompts
METHODS = (*PROMPTED, RRHF, SLIC, PRO, ORPO, UNLIKELIHOOD, FIGA)

_CONTROL = re.compile(r"<[^\s<>]+>|\[[A-Z_]+\]")  # how control tokens are called


@dataclasses.dataclass(frozen=True)
class QuarkConfig:
    """What Quark adds to imitation.

    Attributes:
      kl_coef: α, of the KL to the reference.
      entropy_coef: β, of the entropy.
    """

    kl_coef: float = 0.05
    entropy_coef: float = 0.06

    def __post_init__(self):
        check(self, kl_coef="[0, 1e6]", entropy_coef="[0, 1e6]")


@dataclasses.dataclass(frozen=True)
class CRLFTConfig:
    """The weights of the classes.

    Attributes:
      beta: β; the better class has reward 0 and weight 1, the worse one -1 and weight exp(-1/β).
    """

    beta: float = 0.5

    def __post_init__(self):
        check(self, beta="(0, 1e6]")


@dataclasses.dataclass(frozen=True)
class HindsightConfig:
    """What keeps an answer from being copied out of the one before.

    Attributes:
      max_rate: the largest share of a row's tokens that are hidden: read as padding, trained all
        the same. The paper hides them from attention.
    """

    max_rate: float = 0.05

    def __post_init__(self):
        check(self, max_rate="[0, 1]")


@dataclasses.dataclass(frozen=True)
class RRHFConfig:
    """The ranking.

    Attributes:
      rank_weight: w.
      length_power: a, the power of the length that divides a log-likelihood.
    """

    rank_weight: float = 1.0
    length_power: float = 1.0

    def __post_init__(self):
        check(self, rank_weight="[0, 1e6]", length_power="[0, 10]")


@dataclasses.dataclass(frozen=True)
class SLiCConfig:
    """The hinge, and what it is held to.

    Attributes:
      margin: δ, in nats of whole responses.
      target_weight: λ, of imitation.
    """

    margin: float = 1.0
    target_weight: float = 0.1

    def __post_init__(self):
        check(self, margin="[0, 1e6]", target_weight="[0, 1e6]")


@dataclasses.dataclass(frozen=True)
class PROConfig:
    """Imitation beside the ranking.

    Attributes:
      sft_weight: w, which (K-1)² multiplies.
    """

    sft_weight: float = 0.05

    def __post_init__(self):
        check(self, sft_weight="[0, 1e6]")


@dataclasses.dataclass(frozen=True)
class ORPOConfig:
    """The odds ratio.

    Attributes:
      weight: λ.
    """

    weight: float = 0.1

    def __post_init__(self):
        check(self, weight="[0, 1e6]")


@dataclasses.dataclass(frozen=True)
class UnlikelihoodConfig:
    """What is unlearned.

    Attributes:
      weight: of the worse response, as a mean over its tokens.
    """

    weight: float = 1.0

    def __post_init__(self):
        check(self, weight="[0, 1e6]")


@dataclasses.dataclass(frozen=True)
class FIGAConfig:
    """How much the tokens in which two responses differ weigh.

    Attributes:
      weight: of those of the better one.
      negative_weight: of those of the worse one, whose likelihood is lowered.
      nll_min: a token of the worse one counts from this negative log-likelihood on, nats.
      nll_max: and up to this one: what is unlikely already is left alone.
    """

    weight: float = 1.0
    negative_weight: float = 0.5
    nll_min: float = 0.6
    nll_max: float = 1.0

    def __post_init__(self):
        check(
            self,
            weight="[0, 1e6]",
            negative_weight="[0, 1e6]",
            nll_min="[0, 1e6]",
            nll_max="[0, inf)",
        )
        if self.nll_min > self.nll_max:
            raise ValueError(
                f"objective.figa.nll_min={self.nll_min} must be at most objective.figa.nll_max="
                f"{self.nll_max}"
            )


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """The objective. What the method of a name reads is the group of this name.

    Attributes:
      method: one of `METHODS`.
      texts: words before prompts, from those of the worst responses to those of the best; read by
        the quality prompts. Quark has as many quantiles.
    """

    method: str
    texts: tuple[str, ...] = ("Bad: ", "Good: ")
    quark: QuarkConfig = QuarkConfig()
    c_rlft: CRLFTConfig = CRLFTConfig()
    chain_of_hindsight: HindsightConfig = HindsightConfig()
    rrhf: RRHFConfig = RRHFConfig()
    slic: SLiCConfig = SLiCConfig()
    pro: PROConfig = PROConfig()
    orpo: ORPOConfig = ORPOConfig()
    unlikelihood: UnlikelihoodConfig = UnlikelihoodConfig()
    figa: FIGAConfig = FIGAConfig()

    def __post_init__(self):
        check(self, method=METHODS)
        if self.prompted and (len(self.texts) < 2 or not all(map(str.strip, self.texts))):
            raise ValueError(
                f"objective.texts={self.texts!r} must be two or more texts with words in them"
            )
        if self.method in (C_RLFT, HINDSIGHT) and len(self.texts) != 2:
            raise ValueError(
                f"objective.texts={self.texts!r} must be two texts, before worse and before better "
                f"responses: objective.method={self.method!r} has two classes"
            )

    @property
    def prompted(self) -> bool:
        """Whether the model is told how good a response is."""
        return self.method in PROMPTED


@dataclasses.dataclass(frozen=True)
class CandidateTrainConfig:
    """Token-balanced batches, all global: an update takes as many prompts as fit.

    Attributes:
      steps: updates.
      max_tokens: the most tokens of an update, padding included.
      min_sequences: the fewest sequences of an update; K of them are one prompt's.
      max_sequences: the most.
      microbatches: parts of an update whose gradients are computed one after the other.
    """

    steps: int
    max_tokens: int
    min_sequences: int
    max_sequences: int
    microbatches: int = 1

    def __post_init__(self):
        check(self, **{field.name: "[1, inf)" for field in dataclasses.fields(self)})
        if self.min_sequences > self.max_sequences:
            raise ValueError(
                f"train.min_sequences={self.min_sequences} must be at most train.max_sequences="
                f"{self.max_sequences}"
            )

    def batching(self, devices: int, candidates: int) -> dict[str, Any]:
        """The keywords of `data.candidates.CandidateBatches` for K candidates a prompt.

        Raises:
          ValueError: an update has no room for the candidates of one prompt.
        """
        if candidates > self.max_sequences:
            raise ValueError(
                f"train.max_sequences={self.max_sequences} must be at least {candidates}, the "
                "sequences of one prompt"
            )
        return {
            "max_tokens": self.max_tokens,
            "min_pairs": max(1, self.min_sequences // candidates),
            "max_pairs": self.max_sequences // candidates,
            "multiple_of": devices,
            "parts": self.microbatches,
        }


# From candidates to what an update reads; on the host.


def quality_prefixes(texts: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Tokens of the words that are said before a prompt.

    A text that is the name of a control token of the tokenizer is that token; any other is words.

    Args:
      texts: from the worst class to the best.
      tokenizer: with a chat template.

    Raises:
      ValueError: a text is called like a control token and the tokenizer has none of that name; or
        two texts have the same tokens.
    """
    chat, known = ChatTokenizer(tokenizer), tokenizer.get_vocab()
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    found: list[tuple[int, ...]] = []
    for text in texts:
        name = text.strip()
        if name in special:
            found.append((known[name],))
        elif _CONTROL.fullmatch(name):
            raise ValueError(
                f"objective.texts has {name!r}, and the tokenizer has no such control token: use "
                "words, such as 'Good: ', or add it to the model and its tokenizer before SFT"
            )
        else:
            found.append(tuple(chat.encode(chat.as_text(text), first=True)))
    if len(set(found)) < len(found):
        raise ValueError(f"objective.texts={tuple(texts)!r} must differ from each other")
    return found


def prefixed(document: Encoded, prefix: Sequence[int], bos: int | None) -> Encoded:
    """A document that begins with a prefix, behind BOS where it has one; the prefix is not trained.

    Args:
      document: prompt and response.
      prefix: tokens.
      bos: `ChatTokenizer.leading_bos`.
    """
    place = int(bos is not None and document.tokens[0] == bos)
    return Encoded(
        np.insert(document.tokens, place, np.asarray(prefix, np.int32)),
        np.insert(document.loss_mask, place, np.zeros(len(prefix), bool)),
    )


def quantile_classes(scores: Sequence[float], count: int) -> np.ndarray:
    """The quantile of each score, int `[N]`, 0 the lowest; quantiles are equally large.

    Equal scores at the edge of two quantiles go to either, by their order.

    Args:
      scores: N numbers.
      count: quantiles.

    Raises:
      ValueError: fewer scores than quantiles, or all are equal.
    """
    values = np.asarray(scores, np.float64)
    if len(values) < count:
        raise ValueError(
            f"{len(values)} responses are fewer than the {count} quantiles of objective.texts: "
            "read more candidates, or give fewer texts"
        )
    if values.min() == values.max():
        raise ValueError(_ALL_EQUAL)
    order = np.argsort(values, kind="stable")
    classes = np.empty(len(values), np.int64)
    classes[order] = np.arange(len(values)) * count // len(values)
    return classes


_ALL_EQUAL = (
    "all scores are equal, so that no response is better than another: give candidates that a "
    "reward model or people tell apart"
)


def arrange(
    config: SupervisedConfig,
    groups: Sequence[Candidates],
    prefixes: Sequence[Sequence[int]],
    *,
    bos: int | None,
    longest: int,
    seed: int,
) -> list[Candidates]:
    """What an objective reads of candidates, one group a row of a batch.

    RRHF and PRO read all candidates of a prompt, the other contrasts the best and the worst. Of the
    quality prompts each row is one sequence, for Quark with the same sequence without the prefix
    beside it, which the reference reads. The scores of C-RLFT are the rewards of the classes.

    Args:
      config: the objective.
      groups: candidates of each prompt, the best first.
      prefixes: from `quality_prefixes`; not read without quality prompts.
      bos: `ChatTokenizer.leading_bos`.
      longest: tokens that the model reads; what prefixes make longer is left out.
      seed: of the order in chains of hindsight.

    Raises:
      ValueError: nothing is left, fewer responses than quantiles, or equal scores only.
    """
    if config.method == QUARK:
        found = _quantiles(groups, prefixes, bos)
    elif config.method in (RRHF, PRO):
        found = [one for one in groups if one.scores[0] > one.scores[-1]]
    else:
        found = extremes(groups)
        if config.method == C_RLFT:
            found = [
                Candidates((prefixed(document, prefixes[c], bos),), (float(c - 1),))
                for pair in found
                for c, document in zip((1, 0), pair.documents, strict=True)
            ]
        if config.method == HINDSIGHT:
            rng = np.random.default_rng(seed)
            found = [_chain(pair, prefixes, bos, bool(rng.integers(2))) for pair in found]
    if not found:
        raise ValueError(_ALL_EQUAL)
    fit = [one for one in found if max(len(d.tokens) for d in one.documents) <= longest]
    if not fit:
        raise ValueError(
            f"with objective.texts before them all sequences are longer than the {longest} tokens "
            "that the model reads: lower data.max_length"
        )
    return fit


def _quantiles(
    groups: Sequence[Candidates], prefixes: Sequence[Sequence[int]], bos: int | None
) -> list[Candidates]:
    """Every response by itself, behind the words of its quantile, and without them."""
    pool = [pair for one in groups for pair in zip(one.documents, one.scores, strict=True)]
    classes = quantile_classes([score for _, score in pool], len(prefixes))
    return [
        Candidates((prefixed(document, prefixes[c], bos), document), (score, score))
        for (document, score), c in zip(pool, classes, strict=True)
    ]


def _chain(
    pair: Candidates, prefixes: Sequence[Sequence[int]], bos: int | None, better_first: bool
) -> Candidates:
    """Both responses in one sequence, each behind its words."""
    parts = [prefixed(d, prefixes[c], bos) for d, c in zip(pair.documents, (1, 0), strict=True)]
    first, second = parts if better_first else reversed(parts)
    begins = int(bos is not None and second.tokens[0] == bos)
    tokens = np.concatenate([first.tokens, second.tokens[begins:]])
    mask = np.concatenate([first.loss_mask, second.loss_mask[begins:]])
    return Candidates((Encoded(tokens, mask),), (0.0,))


def hide(config: SupervisedConfig, batch: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """Adds `visible [B, K, T]`, the tokens that a chain of hindsight reads; else nothing.

    Args:
      config: the objective.
      batch: of `CandidateBatches`.
      key: random key of the update, consumed.
    """
    if config.method != HINDSIGHT:
        return batch
    rate = config.chain_of_hindsight.max_rate
    visible = losses.hindsight_visible(key, jnp.asarray(batch["segments"] > 0), max_rate=rate)
    return batch | {"visible": np.asarray(visible)}


# The objective on a batch; on the device.


class Terms(NamedTuple):
    """Both parts of L_total, `[B]` each, weighted as the objective has them."""

    sft: jax.Array
    aux: jax.Array


class Read(NamedTuple):
    """What a contrast compares: responses to a prompt, the best first.

    Attributes:
      tokens: `[B, K, T]` int32.
      log_probs: `[B, K, T-1]`, of the tokens from the second on; differentiated.
      where: `[B, K, T-1]`, True on response tokens.
      scores: `[B, K]`.
    """

    tokens: jax.Array
    log_probs: jax.Array
    where: jax.Array
    scores: jax.Array

    def sums(self) -> jax.Array:
        """log π(y|x), `[B, K]`."""
        return losses.sequence_log_prob(self.log_probs, where=self.where)

    def means(self) -> jax.Array:
        """The same per token."""
        return losses.sequence_log_prob(self.log_probs, where=self.where, normalize=True)


def _rrhf(config: SupervisedConfig, read: Read) -> Terms:
    sft = -read.sums()[:, 0]
    total = losses.rrhf_loss(
        read.log_probs,
        read.scores,
        where=read.where,
        rank_weight=config.rrhf.rank_weight,
        length_power=config.rrhf.length_power,
    )
    return Terms(sft, total - sft)


def _pro(config: SupervisedConfig, read: Read) -> Terms:
    ranking, total = (
        losses.pro_loss(read.log_probs, read.scores, where=read.where, sft_weight=weight)
        for weight in (0.0, config.pro.sft_weight)
    )
    return Terms(total - ranking, ranking)


def _slic(config: SupervisedConfig, read: Read) -> Terms:
    chosen, rejected = read.sums().T
    total = losses.slic_loss(
        chosen,
        rejected,
        chosen,
        margin=config.slic.margin,
        target_weight=config.slic.target_weight,
    )
    sft = -config.slic.target_weight * chosen
    return Terms(sft, total - sft)


def _orpo(config: SupervisedConfig, read: Read) -> Terms:
    chosen, rejected = read.means().T
    total = losses.orpo_loss(chosen, rejected, weight=config.orpo.weight)
    return Terms(-chosen, total + chosen)


def _unlikelihood(config: SupervisedConfig, read: Read) -> Terms:
    per_token = losses.unlikelihood_loss(read.log_probs[:, 1])
    unlearned = losses.sequence_log_prob(per_token, where=read.where[:, 1], normalize=True)
    return Terms(-read.means()[:, 0], config.unlikelihood.weight * unlearned)


def _figa(config: SupervisedConfig, read: Read) -> Terms:
    # Of the whole rows: the first token of a row is never one of a response.
    response = jnp.pad(read.where, ((0, 0), (0, 0), (1, 0)))

    def term(side: int, weight: float) -> jax.Array:
        weights = losses.figa_weights(
            read.tokens[:, side],
            read.tokens[:, 1 - side],
            weight=weight,
            where=response[:, side],
            other_where=response[:, 1 - side],
        )[:, 1:]
        log_probs, where = read.log_probs[:, side], read.where[:, side]
        if weight < 0:
            nll = -jax.lax.stop_gradient(log_probs)
            likely = (nll >= config.figa.nll_min) & (nll <= config.figa.nll_max)
            weights = jnp.where(likely, weights, 0.0)
        per_token = losses.policy_gradient_loss(log_probs, weights)
        return losses.sequence_log_prob(per_token, where=where, normalize=True)

    return Terms(term(0, config.figa.weight), term(1, -config.figa.negative_weight))


_CONTRASTS: dict[str, Callable[[SupervisedConfig, Read], Terms]] = {
    RRHF: _rrhf,
    PRO: _pro,
    SLIC: _slic,
    ORPO: _orpo,
    UNLIKELIHOOD: _unlikelihood,
    FIGA: _figa,
}


def contrast_terms(config: SupervisedConfig, read: Read) -> Terms:
    """L_SFT and L_aux of each prompt, for an objective that compares responses.

    Args:
      config: the objective, whose method is none of `PROMPTED`.
      read: responses with their log-probabilities.
    """
    return _CONTRASTS[config.method](config, read)


def prepare(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds weights in the mean over the batch: of prompts, and of tokens of the first side."""
    trained = batch["loss_mask"][:, 0, 1:]
    return {
        **batch,
        "item_weights": pair_weights(batch["valid"]),
        "token_weights": reduction_weights("token_mean", trained),
    }


def loss_fn(
    model: Transformer,
    batch: dict[str, jax.Array],
    reference: Transformer | None = None,
    *,
    config: SupervisedConfig,
    pad_id: int,
) -> tuple[jax.Array, dict]:
    """L_SFT + L_aux of a batch.

    Quality contrast, SLiC and C-RLFT: the mean over prompts. Quark and chain of hindsight: the mean
    over all response tokens of the batch.

    Args:
      model: the policy π.
      batch: of `CandidateBatches`, with the weights of `prepare`; for chains of hindsight `visible`
        of `hide`.
      reference: π_ref; read by Quark.
      config: the objective.
      pad_id: what a hidden token is read as.
    """
    if config.method == QUARK:
        terms = _quark(model, batch, reference, config.quark)
    elif config.method == C_RLFT:
        log_probs, where = _first_side(model, batch, batch["tokens"][:, 0])
        total = losses.sequence_log_prob(log_probs, where=where)
        weights = losses.quality_weights(batch["scores"][:, 0], beta=config.c_rlft.beta)
        imitated = losses.policy_gradient_loss(total, weights)
        terms = {"loss/sft": weighted_sum(imitated, batch["item_weights"])}
    elif config.method == HINDSIGHT:
        tokens = batch["tokens"][:, 0]
        log_probs, _ = _first_side(model, batch, jnp.where(batch["visible"][:, 0], tokens, pad_id))
        where = losses.hindsight_loss_mask(
            batch["loss_mask"][:, 0], where=batch["segments"][:, 0] > 0
        )
        nll = losses.language_model_loss(log_probs, where=where, per_token=True)
        terms = {"loss/sft": weighted_sum(nll, batch["token_weights"])}
    else:
        read = read_candidates(model, batch)
        each = contrast_terms(config, read)
        terms = {
            "loss/sft": weighted_sum(each.sft, batch["item_weights"]),
            "loss/aux": weighted_sum(each.aux, batch["item_weights"]),
            **_ranking(read, batch["item_weights"]),
        }
    loss = terms["loss/sft"] + terms.get("loss/aux", 0.0)
    return loss, {"loss/supervised": loss, **terms}


def read_candidates(model: Transformer, batch: dict[str, jax.Array]) -> Read:
    """Log-probabilities of all responses of a batch, in one forward pass."""
    prompts, sides, width = batch["tokens"].shape
    tokens, segments = (batch[name].reshape(-1, width) for name in ("tokens", "segments"))
    log_probs, _ = next_token_log_probs(model, tokens, segments)
    return Read(
        batch["tokens"],
        log_probs.reshape(prompts, sides, width - 1),
        batch["loss_mask"][..., 1:],
        batch["scores"],
    )


def _first_side(
    model: Transformer, batch: dict[str, jax.Array], inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the first sequence of each row, read as `inputs`; and its mask."""
    tokens, segments = batch["tokens"][:, 0], batch["segments"][:, 0]
    log_probs, _ = log_probs_of(model, model(inputs, segments)[:, :-1], tokens[:, 1:])
    return log_probs, batch["loss_mask"][:, 0, 1:]


def _quark(
    model: Transformer,
    batch: dict[str, jax.Array],
    reference: Transformer | None,
    config: QuarkConfig,
) -> dict[str, jax.Array]:
    """The terms of Quark: the KL is over the whole vocabulary, the reference reads no prefix."""
    if reference is None:
        raise ValueError("Quark is held near a reference: give one")
    (tokens, plain), (segments, without) = (
        jnp.moveaxis(batch[name], 1, 0) for name in ("tokens", "segments")
    )
    hidden = model(tokens, segments)
    beside = jax.lax.stop_gradient(reference(plain, without))
    # A response stands further to the right by the length of the prefix.
    shift = (segments > 0).sum(1) - (without > 0).sum(1)
    column = jnp.maximum(jnp.arange(tokens.shape[1])[None] - shift[:, None], 0)
    beside = jnp.take_along_axis(beside, column[..., None], axis=1)

    def head(hidden, beside, targets):
        logits = model.logits(hidden)
        there = jax.lax.stop_gradient(reference.logits(beside))
        kl, entropies = losses.kl_divergence(logits, there), losses.entropy(logits)
        return losses.select_log_probs(logits, targets), kl, entropies

    chunk = max(1, fitting_columns(tokens.shape[0], model.config.vocab_size) // 2)
    each = by_columns(head, hidden[:, :-1], beside[:, :-1], tokens[:, 1:], chunk=chunk)
    total = losses.quark_loss(*each, kl_coef=config.kl_coef, entropy_coef=config.entropy_coef)
    log_probs, kl, entropies = (weighted_sum(x, batch["token_weights"]) for x in each)
    loss = weighted_sum(total, batch["token_weights"])
    return {
        "loss/sft": -log_probs,
        "loss/aux": loss + log_probs,
        "quark/kl": kl,
        "quark/entropy": entropies,
    }


def _ranking(read: Read, weights: jax.Array) -> dict[str, jax.Array]:
    """Whether the policy finds the best response likelier, per token, than the worst one."""
    means = jax.lax.stop_gradient(read.means())
    there = jnp.any(read.where, axis=-1)
    last = jnp.maximum(there.sum(-1, keepdims=True) - 1, 0)
    chosen, rejected = means[:, 0], jnp.take_along_axis(means, last, axis=1)[:, 0]
    accuracy = losses.preference_accuracy(chosen, rejected)
    return {
        "rank/accuracy": weighted_sum(accuracy, weights),
        "rank/best_log_prob": weighted_sum(chosen, weights),
        "rank/worst_log_prob": weighted_sum(rejected, weights),
    }


def make_step(
    config: SupervisedConfig,
    train: CandidateTrainConfig,
    optimizer: optax.GradientTransformation,
    sharding: Sharding,
    *,
    pad_id: int,
    trunk: Any = None,
) -> Callable[..., Any]:
    """`step(state, batch, *constants)`, see `training.step.make_train_step`.

    The constants are the reference for Quark, and none otherwise.
    """
    return make_train_step(
        functools.partial(loss_fn, config=config, pad_id=pad_id),
        optimizer,
        sharding,
        microbatches=train.microbatches,
        prepare=prepare,
        trunk=trunk,
    )
