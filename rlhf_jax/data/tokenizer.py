"""Tokenizers: a small BPE from scratch, and making other people's fit for training.

`transformers` is imported where it is used: reading rows does not need it.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# For tokenizers that have no chat template. Contents in their order; a line break ends what the
# assistant reads, EOS ends what it says. Roles are not marked beyond that.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)

# Tokens that families of models keep for padding or for nothing at all, best first.
_SPARE_TOKENS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<unk>",
    "<|reserved_special_token_0|>",
    "<|extra_0|>",
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """Trains a byte-level BPE on `texts`: no unknown token, digits one by one, deterministic.

    Ids 0, 1, 2 are pad, bos, eos; then the 256 bytes; then the merges. The chat template is
    PLAIN_TEMPLATE.

    Returns:
      A `transformers.PreTrainedTokenizerFast` with at most `vocab_size` entries.

    Raises:
      ValueError: vocab_size is too small for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {len(special) + len(alphabet)}: "
            f"{len(alphabet)} bytes and {len(special)} special tokens"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template=PLAIN_TEMPLATE,
    )


def load_tokenizer(path: str | Path, *, vocab_size: int | None = None) -> Any:
    """Loads the tokenizer of a folder (or a hub name) and makes it fit for training.

    Code that the folder holds is never run. What `ensure_pad` and `ensure_template` changed is
    logged as a warning.

    Args:
      path: a folder with the files of `save_pretrained`, or a name on the hub.
      vocab_size: rows of the model's embedding, see `ensure_pad`.

    Raises:
      ValueError: no tokenizer there, or it has no token that can end a response.
    """
    from transformers import AutoTokenizer

    try:
        # False is not the default: left out, transformers asks on standard input.
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load a tokenizer from {str(path)!r}: {reason}") from error
    before = (tokenizer.pad_token, tokenizer.chat_template)
    lines = (ensure_pad(tokenizer, vocab_size=vocab_size), ensure_template(tokenizer))
    after = (tokenizer.pad_token, tokenizer.chat_template)
    for line, changed in zip(lines, map(operator.ne, before, after), strict=True):
        _log.log(logging.WARNING if changed else logging.INFO, "tokenizer %s: %s", path, line)
    return tokenizer


def ensure_pad(tokenizer: Any, *, vocab_size: int | None = None) -> str:
    """Gives the tokenizer a pad token that is not its EOS, and returns in one line what was done.

    With pad = eos, every mask made by `tokens != pad` hides the real EOS. In order: the pad token
    it has; a token of its vocabulary made for padding or for nothing (unknown, reserved); another
    special token that the chat template does not use; a new token, if the embedding has a row
    for it.

    Args:
      tokenizer: changed in place.
      vocab_size: rows of the model's embedding; without it the tokenizer may not grow.

    Raises:
      ValueError: no EOS, or no candidate and no free row in the embedding.
    """
    eos = tokenizer.eos_token
    if eos is None:
        raise ValueError("the tokenizer has no eos token: set tokenizer.eos_token first")
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return f"pad is {tokenizer.pad_token!r} (id {tokenizer.pad_token_id})"
    before = "no pad token" if tokenizer.pad_token is None else f"pad was eos {eos!r}"
    vocab = tokenizer.get_vocab()
    limit = len(tokenizer) if vocab_size is None else vocab_size
    spare = _spare_token(tokenizer, vocab, limit)
    if spare is not None:
        tokenizer.pad_token = spare
        return f"{before}; pad is now the existing {spare!r} (id {tokenizer.pad_token_id})"
    if len(tokenizer) >= limit:
        raise ValueError(
            f"{before}, and a new one would be id {len(tokenizer)} of an embedding with {limit} "
            "rows: pass the model's vocab_size, or set tokenizer.pad_token to a token never used"
        )
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return f"{before}; pad is now the new '<|pad|>' (id {tokenizer.pad_token_id} of {limit})"


def ensure_template(tokenizer: Any) -> str:
    """Gives a tokenizer without a chat template the plain one; says in one line what was done."""
    if getattr(tokenizer, "chat_template", None):
        return "has a chat template"
    tokenizer.chat_template = PLAIN_TEMPLATE
    return "no chat template; now bos, the contents, a line break or (assistant) eos after each"


def _spare_token(tokenizer: Any, vocab: dict[str, int], limit: int) -> str | None:
    """Returns a token of the vocabulary that can serve as pad, or None."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    others = sorted(tokenizer.all_special_tokens, key=lambda token: vocab.get(token, limit))
    for token in (*_SPARE_TOKENS, *others):
        is_free = token not in taken and token not in template
        if is_free and vocab.get(token, limit) < limit:
            return token
    return None
