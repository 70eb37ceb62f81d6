import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import tokenizer as module
from rlhf_jax.data.tokenizer import (
    PLAIN_TEMPLATE,
    ensure_pad,
    ensure_template,
    load_tokenizer,
    train_bpe,
)
from tests.data.conftest import CHATML, TEXTS, sentencepiece_like


def test_ids_and_size_of_a_trained_tokenizer(plain):
    assert (plain.pad_token_id, plain.bos_token_id, plain.eos_token_id) == (0, 1, 2)
    assert plain.unk_token is None
    assert len(plain) <= 400
    assert plain.chat_template == PLAIN_TEMPLATE


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(plain, text):
    assert plain.decode(plain.encode(text, add_special_tokens=False)) == text


def test_digits_are_split(plain):
    # "12" stands three times in the training text: without the split it is one token.
    parts = [plain.decode([i]) for i in plain.encode("12 days", add_special_tokens=False)]
    assert parts[:2] == ["1", "2"]


@pytest.mark.slow
def test_training_is_deterministic_across_processes():
    code = (
        "import hashlib; from rlhf_jax.data.tokenizer import train_bpe\n"
        "from tests.data.conftest import TEXTS\n"
        "text = train_bpe(TEXTS, 400).backend_tokenizer.to_str()\n"
        "print(hashlib.sha256(text.encode()).hexdigest())\n"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


def test_vocabulary_must_hold_the_bytes():
    with pytest.raises(ValueError, match="vocab_size=258 must be at least 259"):
        train_bpe(TEXTS, 258)


def test_saved_tokenizer_loads_the_same(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("the sea") == plain.encode("the sea")
    assert loaded.chat_template == PLAIN_TEMPLATE
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_folder_without_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_pad_of_its_own_is_kept(plain):
    assert ensure_pad(plain) == "pad is '<pad>' (id 0)"
    assert plain.pad_token_id == 0


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_pad_that_is_missing_or_eos_becomes_the_unknown_token(pad):
    tokenizer = sentencepiece_like()
    tokenizer.pad_token = pad
    size = len(tokenizer)
    line = ensure_pad(tokenizer)
    assert "pad is now the existing '<unk>' (id 0)" in line
    assert ("pad was eos" in line) == (pad is not None)
    assert tokenizer.pad_token_id == 0 != tokenizer.eos_token_id
    assert len(tokenizer) == size


def test_pad_is_no_token_of_the_chat_template(with_template):
    tokenizer = with_template(CHATML)
    tokenizer.pad_token = "<eos>"
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<free>"]})
    # <pad> is still in the vocabulary; hide it, so that a choice has to be made.
    vocab = tokenizer.get_vocab()
    spare = module._spare_token(tokenizer, {t: i for t, i in vocab.items() if t != "<pad>"}, 10**6)
    assert spare not in ("<|im_start|>", "<|im_end|>", "<eos>", "<bos>", None)


def without_spare():
    tokenizer = sentencepiece_like()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<unk>", eos_token="</s>"
    )


def test_new_pad_needs_a_row_of_the_embedding():
    tokenizer = without_spare()
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"new one would be id {size} of an embedding with {size}"):
        ensure_pad(tokenizer)
    with pytest.raises(ValueError, match="pass the model's vocab_size"):
        ensure_pad(tokenizer, vocab_size=size)
    assert len(tokenizer) == size
    line = ensure_pad(tokenizer, vocab_size=size + 1)
    assert f"the new '<|pad|>' (id {size} of {size + 1})" in line
    assert tokenizer.pad_token_id == size


def test_tokenizer_without_eos_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece_like().backend_tokenizer)
    with pytest.raises(ValueError, match="has no eos token"):
        ensure_pad(tokenizer)


def test_template_is_given_only_where_there_is_none(with_template):
    tokenizer = sentencepiece_like()
    assert "no chat template" in ensure_template(tokenizer)
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    other = with_template(CHATML)
    assert ensure_template(other) == "has a chat template"
    assert other.chat_template == CHATML


ASKED_PROGRAM = """
import sys
from rlhf_jax.data.tokenizer import load_tokenizer
try:
    load_tokenizer(sys.argv[1])
except ValueError as error:
    print("refused", error)
"""


def test_code_of_a_folder_never_runs_and_nobody_is_asked(tmp_path):
    code = "open(__file__ + '.ran', 'w')\nopen({!r}, 'w')\nclass Own: pass\n"
    (tmp_path / "own.py").write_text(code.format(str(tmp_path / "ran")))
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", **config}))
    done = subprocess.run(
        [sys.executable, "-c", ASKED_PROGRAM, str(tmp_path)],
        input="y\ny\ny\n",
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in done.stdout
    assert done.stdout.startswith("refused cannot load a tokenizer from"), done.stderr
