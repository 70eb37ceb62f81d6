"""Which of two answers a language model expects after a prompt, for many prompts alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.evaluation.text_batches import padded, plan
from rlhf_jax.models.cache import Prefix
from rlhf_jax.models.heads import hidden_at, last_real_index
from rlhf_jax.models.transformer import Transformer

# Prefixes are padded to a multiple of this, so that prompts that differ a little share a program.
_PREFIX_MULTIPLE = 32


class LogOdds(NamedTuple):
    """What `log_odds` reads off a model.

    Attributes:
      values: float64 [N].
      cut: bool [N], whether a text was too long and lost its end.
    """

    values: np.ndarray
    cut: np.ndarray


def log_odds(
    model: Transformer,
    tokenizer: Any,
    prefix: str,
    texts: Sequence[str],
    suffix: str,
    answers: tuple[str, str],
    *,
    max_length: int = 1024,
    batch_tokens: int = 1024,
) -> LogOdds:
    """Log-odds of the first of two answers against the second, after `prefix + text + suffix`.

        log p(a_1 | prefix, text, suffix) − log p(a_2 | prefix, text, suffix)

    where a_1 and a_2 are the first tokens of the answers. The keys and values of the prefix are
    computed once and shared by all texts, and equal texts are read once. Texts are sorted by length
    and padded to lengths of the row 16, 24, 32, 48, ..., in batches of at most two sizes a length:
    there are at most two programs for each of these lengths, whatever the texts. Up to rounding, a
    text's number does not depend on its neighbours.

    Prefix and text are tokenized one by one, text and suffix together. The tokenizer's BOS stands
    first where the model was trained to see one there.

    Args:
      model: A language model.
      tokenizer: The model's.
      prefix: What all prompts share: instructions, examples, the beginning of the question. May be
        empty.
      texts: N texts. Empty ones are allowed.
      suffix: What stands between a text and the answer; not empty.
      answers: Two answers as they would go on after the suffix.
      max_length: The longest prompt in tokens, unless the model's own context is shorter. Longer
        texts lose their end; the suffix stays.
      batch_tokens: About how many tokens are in a batch, padding included, the prefix not.

    Returns:
      A `LogOdds` of N numbers, positive where the first answer is expected.

    Raises:
      ValueError: The answers begin with the same token, the suffix has no token, or prefix and
        suffix leave no room for a text.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a sequence of strings, got one: wrap it in [...]")
    wanted = first_tokens(tokenizer, prefix, suffix, answers)
    pieces = ChatTokenizer(tokenizer)
    shared = [] if pieces.leading_bos is None else [pieces.leading_bos]
    shared += pieces.encode(prefix, first=True)
    tail = pieces.encode(suffix, first=False)
    room = min(max_length, model.config.max_length) - len(shared)
    if not 0 < len(tail) < room:
        raise ValueError(
            f"the suffix {suffix!r} has {len(tail)} tokens and must have from 1 to {room - 1}: "
            f"the prefix takes {len(shared)} of {min(max_length, model.config.max_length)}"
        )
    position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    rows = [pieces.encode(text + suffix, first=not prefix) for text in position]
    was_cut = np.array([len(row) > room for row in rows], bool)
    rows = [row if len(row) <= room else row[: room - len(tail)] + tail for row in rows]

    both = _log_probs(model, shared, rows, wanted, batch_tokens)
    index = np.array([position[text] for text in texts], np.int64)
    return LogOdds((both[:, 0] - both[:, 1])[index], was_cut[index])


def log_probs_after(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[int],
    *,
    batch_tokens: int = 1024,
) -> np.ndarray:
    """Log-probabilities of some tokens after each of many prompts that begin alike.

    The keys and values of the tokens that all prompts begin with are computed once; equal prompts
    are read once. For the shapes of batches see `log_odds`.

    Args:
      model: A language model.
      prompts: N prompts of token ids, BOS included where there is one; none is empty.
      wanted: K token ids.
      batch_tokens: About how many tokens are in a batch, padding included, the beginning not.

    Returns:
      float64 [N, K], log p(token | prompt), in nats.

    Raises:
      ValueError: A prompt is empty.
    """
    rows = [tuple(map(int, prompt)) for prompt in prompts]
    if () in rows:
        raise ValueError(f"prompt {rows.index(())} is empty: nothing comes after it")
    position = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    different = list(position)
    common = 0
    if different:
        # The least and the greatest of sorted rows differ first; each keeps a token of its own.
        low, high = min(different), max(different)
        alike = (a == b for a, b in zip(low, high, strict=False))
        common = sum(1 for _ in itertools.takewhile(bool, alike))
        common = min(common, min(map(len, different)) - 1)
    shared = list(different[0][:common]) if different else []
    own = [list(row[common:]) for row in different]
    values = _log_probs(model, shared, own, np.array(wanted, np.int32), batch_tokens)
    return values[np.array([position[row] for row in rows], np.int64)]


def _log_probs(
    model: Transformer,
    shared: list[int],
    rows: Sequence[Sequence[int]],
    wanted: np.ndarray,
    batch_tokens: int,
) -> np.ndarray:
    """log p(token | shared tokens, row), float64 [N, K]."""
    values = np.zeros((len(rows), len(wanted)), np.float64)
    if rows:
        cache = _read_prefix(model, *padded([shared], 1, _prefix_columns(len(shared))))
        for members, num_rows, columns in plan([len(row) for row in rows], batch_tokens):
            tokens, mask = padded([rows[i] for i in members], num_rows, columns)
            read = np.asarray(
                _read(model, cache, tokens, mask.astype(np.int32), wanted), np.float64
            )
            values[members] = (read[:, :-1] - read[:, -1:])[: len(members)]
    return values


def first_tokens(tokenizer: Any, prefix: str, suffix: str, answers: tuple[str, str]) -> np.ndarray:
    """Ids of the first tokens of two answers, int32 [2].

    Raises:
      ValueError: They are the same, or an answer is empty; names the template.
    """
    pieces = ChatTokenizer(tokenizer)
    ids = [pieces.encode(answer, first=False)[:1] for answer in answers]
    if [] in ids or ids[0] == ids[1]:
        template = prefix.rpartition("\n")[2] + "{text}" + suffix
        raise ValueError(
            f"the answers {answers[0]!r} and {answers[1]!r} after the template {template!r} must "
            "differ in their first tokens, which are what is compared: choose other words"
        )
    return np.array(ids, np.int32)[:, 0]


def _prefix_columns(length: int) -> int:
    return max(1, -(-length // _PREFIX_MULTIPLE)) * _PREFIX_MULTIPLE


@jax.jit
def _read_prefix(model: Transformer, tokens: jax.Array, mask: jax.Array) -> Prefix:
    return model.prefix(tokens, mask)


@jax.jit
def _read(
    model: Transformer, prefix: Prefix, tokens: jax.Array, segments: jax.Array, wanted: jax.Array
) -> jax.Array:
    """Logits of K tokens after the last token of each row, and their normaliser, `[B, K + 1]`."""
    hidden = model.after(prefix, tokens, segments)
    logits = model.logits(hidden_at(hidden, last_real_index(segments > 0))).astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.concatenate([logits[:, wanted], normaliser], axis=-1)
