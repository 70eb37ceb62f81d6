"""Tokenizers from GGUF metadata: byte-level BPE with its pre-tokenizer, and SentencePiece BPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# `tokenizer.ggml.pre` -> how text is cut before the merges, as a regular expression.
LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_CUT = LLAMA3_CUT.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2")


def tokenizer_from_metadata(metadata: Mapping[str, Any], where: str) -> Any:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: key -> value.
      where: the file, for messages.

    Returns:
      A `transformers.PreTrainedTokenizerFast` with the file's special tokens and chat template; a
      pad token that is the end of sequence, or none, is replaced by an unused token.

    Raises:
      ValueError: the metadata hold no tokenizer, or one of a kind that is not supported.
    """
    from transformers import PreTrainedTokenizerFast

    from rlhf_jax.data.tokenizer import ensure_pad

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, tokens = get("model"), get("tokens")
    if not tokens:
        raise ValueError(f"{where} holds no tokenizer (tokenizer.ggml.tokens)")
    if kind == "gpt2":
        backend = _byte_level(get, where)
    elif kind == "llama":
        backend = _sentence_piece(get, where)
    else:
        raise ValueError(f"{where}: tokenizer {kind!r} is not supported; use gpt2 or llama")
    _add_special(backend, tokens, get("token_type", [NORMAL] * len(tokens)))
    ids = {name: get(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    named = {name: None if i is None else tokens[i] for name, i in ids.items()}
    if get("add_bos_token", kind == "llama") and named["bos"] is not None:
        _put_first(backend, named["bos"], ids["bos"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named["bos"],
        eos_token=named["eos"],
        unk_token=named["unknown"],
        pad_token=named["padding"],
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    ensure_pad(tokenizer, vocab_size=len(tokens))
    return tokenizer


def _byte_level(get: Any, where: str) -> Any:
    """Byte-level BPE, as GPT-2, SmolLM, Llama 3 and Qwen use it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre, merges = get("pre"), get("merges")
    if pre not in PRE_TOKENIZERS or not merges:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(
            f"{where}: pre-tokenizer {pre!r} is not supported; supported are {known}, with merges"
        )
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(get("tokens"))},
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    cuts: list[Any] = []
    if pre == "smollm":
        cuts = [pre_tokenizers.Digits(individual_digits=True)]
    elif pre != "gpt-2":
        cut = LLAMA3_CUT if pre == "llama-bpe" else QWEN2_CUT
        cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated", invert=False)]
    # GPT-2's own cut is built into ByteLevel; it holds for SmolLM too, after the digits.
    own_cut = pre in ("smollm", "gpt-2")
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_cut))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(get: Any, where: str) -> Any:
    """SentencePiece BPE with byte fallback, as Llama 1, Llama 2 and Mistral use it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = get("tokens"), get("scores")
    if not scores:
        raise ValueError(f"{where}: a tokenizer of kind llama needs tokenizer.ggml.scores")
    unknown = get("unknown_token_id", 0)
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges_of_scores(tokens, scores, get("token_type", [NORMAL] * len(tokens))),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] if get("add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def merges_of_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply.

    SentencePiece joins the neighbours whose union has the best score; a list of merges that is
    sorted by the score of the union does the same.
    """
    ids = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[i], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(backend: Any, tokens: list[str], types: list[int]) -> None:
    """Marks the control tokens, which are cut out of a text before anything else."""
    from tokenizers import AddedToken

    for token, kind in zip(tokens, types, strict=True):
        added = AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        if kind in (CONTROL, UNKNOWN):
            backend.add_special_tokens([added])
        elif kind == USER_DEFINED:
            backend.add_tokens([added])


def _put_first(backend: Any, bos: str, bos_id: int) -> None:
    """Puts BOS in front of every text that is encoded with special tokens."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, bos_id)],
    )
