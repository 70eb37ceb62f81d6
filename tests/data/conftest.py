"""A small tokenizer, chat templates in the style of several families, and an index on disk."""

import gzip
import io
import json
import tarfile

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.tokenizer import train_bpe

TEXTS = [
    "the film is a warm and funny story about two old friends who meet again",
    "the player broke after 12 days and the seller never wrote back",
    "what do you think of the sea and of the people who live there?",
    "I like the sea. It is wide, and the people are kind!",
] * 3

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what do you think?"},
    {"role": "assistant", "content": "I like the sea."},
    {"role": "user", "content": "and the people"},
    {"role": "assistant", "content": "they are kind!"},
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same without the switch: the assistant's header is written only with its words.
CHATML_NO_SWITCH = CHATML[: CHATML.index("{% if")]
# Contents trimmed, two line breaks after the header, BOS in front.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + "
    "m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
# Brackets around the questions and nothing before the answers; no system message.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[Q] ' + m['content'] + "
    "' [/Q]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# The system message is read only in the last turn, and only if that is the user's.
SYSTEM_LAST = (
    "{{ bos_token }}{% set ns = namespace(said='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.said = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}{{ '[Q] ' + (ns.said if loop.last else '') + m['content'] + "
    "'[/Q]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# What was thought is left out of every answer but the last.
THINKING = (
    "{% for m in messages %}{% set said = m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if loop.last else said) + '<|im_end|>\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Two tokens behind an answer, of which EOS, the second, ends every turn (Cohere2).
TWO_TOKENS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>' }}"
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
    "{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"
)
# EOS only behind the whole conversation (Phi-3).
EOS_AT_THE_END = (
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% else %}"
    "{{ eos_token }}{% endif %}"
)
# A block of thoughts, empty where there are none, in what follows the last question (Qwen3).
THOUGHTS_LAST = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '(' + "
    "(m['reasoning_content'] or '') + ')\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEVER_STOPS = (
    "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def plain():
    """A BPE with the plain template."""
    return train_bpe(TEXTS, 400)


@pytest.fixture
def with_template(plain):
    """Returns a copy of the tokenizer with a template and the tokens of its family."""

    def make(template: str) -> PreTrainedTokenizerFast:
        copy = PreTrainedTokenizerFast(
            tokenizer_object=type(plain.backend_tokenizer).from_str(
                plain.backend_tokenizer.to_str()
            ),
            pad_token="<pad>",
            bos_token="<bos>",
            eos_token="<eos>",
            chat_template=template,
        )
        named = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]
        copy.add_special_tokens({"extra_special_tokens": named})
        return copy

    return make


@pytest.fixture
def folding(plain):
    """A tokenizer that folds case: texts that differ only in it have the same tokens."""
    backend = type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=plain.chat_template,
    )


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """Points pip at a folder and at nothing else; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    return folder


def write_jsonl(path, rows):
    """Writes rows, gzipped if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def make_tar(files: dict[str, str]) -> bytes:
    """Returns a tar.gz of path -> content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(content.encode())
            tar.addfile(info, io.BytesIO(content.encode()))
    return buffer.getvalue()


def stretches(encoded, tokenizer, trained=True):
    """Decodes the stretches of a document that are trained."""
    found, current = [], []
    for token, flag in zip(*encoded, strict=True):
        if flag == trained:
            current.append(int(token))
        elif current:
            found.append(tokenizer.decode(current))
            current = []
    return [*found, tokenizer.decode(current)] if current else found


def sentencepiece_like(scheme="always"):
    """A tokenizer that puts a space before every text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    if scheme == "llama":
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        bpe.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]+"), "isolated")
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(
        [*TEXTS, "line\nbreak"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
