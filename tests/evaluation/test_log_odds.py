"""Log-odds of two answers: against whole prompts read one by one, and what must not matter."""

import functools

import numpy as np
import pytest

from rlhf_jax.data.templates import ChatTokenizer
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation import log_odds as module
from rlhf_jax.evaluation import text_batches
from rlhf_jax.evaluation.log_odds import first_tokens, log_odds
from rlhf_jax.models.transformer import Transformer
from tests import tiny
from tests.data.test_tokenizer import sentencepiece_like
from tests.references import decoder

PREFIX = 'Review: "fine"\nMood: good\n\nReview: "'
SUFFIX = '"\nMood:'
ANSWERS = (" good", " bad")
WORDS = ["a", "film", "of", "no", "great", "dull", "and", "é", "!", "good", "bad", "Review:"]


@functools.cache
def tokenizer():
    return train_bpe(["Review: Mood: good bad film"] * 4, 300)


@functools.cache
def model(**changes):
    config = tiny.model_config(vocab_size=len(tokenizer()), **changes)
    return tiny.language_model(config, seed=4)


def texts(count: int, *, longest: int = 12, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


def read(some, **changes):
    arguments = {"prefix": PREFIX, "suffix": SUFFIX, "answers": ANSWERS} | changes
    return log_odds(model(), tokenizer(), texts=some, **arguments)


def oracle(ids: list[int], answers=ANSWERS) -> float:
    """Log-odds after all of these tokens, in float64 and without a cache."""
    logits = decoder.logits(model(), np.array(ids))[-1]
    log_probs = logits - np.log(np.sum(np.exp(logits)))
    first, second = (tokenizer().encode(answer, add_special_tokens=False)[0] for answer in answers)
    return log_probs[first] - log_probs[second]


def whole(text: str, prefix: str = PREFIX, suffix: str = SUFFIX) -> list[int]:
    bos = tokenizer().bos_token_id
    before = ChatTokenizer(tokenizer()).encode(prefix, first=True)
    return [bos, *before, *ChatTokenizer(tokenizer()).encode(text + suffix, first=not prefix)]


@pytest.mark.parametrize("prefix", [PREFIX, 'Review: "', ""])
def test_equals_whole_prompts_read_one_by_one(prefix):
    some = ["", *texts(7)]
    wanted = [oracle(whole(text, prefix)) for text in some]
    assert np.std(wanted) > 0.1
    result = read(some, prefix=prefix)
    assert result.values.dtype == np.float64
    np.testing.assert_allclose(result.values, wanted, atol=1e-4)
    assert not result.cut.any()


def test_tokenizers_that_put_a_space_before_every_text_put_none_at_the_seams():
    spaced = sentencepiece_like("llama")
    lama = tiny.language_model(tiny.model_config(vocab_size=len(spaced)), seed=4)
    prefix, text, suffix, answers = "the film\n", "is a story", " about", (" the", " and")
    result = log_odds(lama, spaced, prefix, [text], suffix, answers).values[0]
    ids = spaced.encode(prefix + text + suffix, add_special_tokens=False)
    first, second = (spaced.convert_tokens_to_ids("▁" + word.strip()) for word in answers)
    logits = decoder.logits(lama, np.array([spaced.bos_token_id, *ids]))[-1]
    np.testing.assert_allclose(result, logits[first] - logits[second], atol=1e-4)


def test_answers_in_the_other_order_change_the_sign():
    some = texts(5)
    swapped = read(some, answers=ANSWERS[::-1]).values
    np.testing.assert_allclose(read(some).values, -swapped, atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 100, 5000])
def test_neighbours_padding_and_order_do_not_matter(batch_tokens):
    some = texts(30, longest=8)
    wanted = read(some).values
    np.testing.assert_allclose(read(some, batch_tokens=batch_tokens).values, wanted, atol=1e-5)
    order = np.random.default_rng(1).permutation(len(some))
    np.testing.assert_allclose(read([some[i] for i in order]).values, wanted[order], atol=1e-5)
    alone = [read([text]).values[0] for text in some[:3]]
    np.testing.assert_allclose(alone, wanted[:3], atol=1e-5)


def test_equal_texts_have_equal_numbers_and_are_read_once(monkeypatch):
    rows = []
    real = module._read
    monkeypatch.setattr(module, "_read", lambda *a: rows.append(int(a[3].any(1).sum())) or real(*a))
    values = read(["dull", "great", *["dull"] * 50]).values
    assert rows == [2]
    assert len(set(values[2:])) == 1 and values[2] == values[0] != values[1]


def test_the_prefix_is_run_once_and_programs_are_few(monkeypatch):
    """Traces are counted, as each is a compilation; calls of the prefix's program as well."""
    traces, calls = [], []
    after, real = Transformer.after, module._read_prefix
    monkeypatch.setattr(
        Transformer, "after", lambda self, p, t, s: traces.append(t.shape) or after(self, p, t, s)
    )
    monkeypatch.setattr(module, "_read_prefix", lambda *a: calls.append(a[1].shape) or real(*a))
    module._read.clear_cache()  # of this program alone: others count their own
    for seed in range(4):
        read(texts(40 - 7 * seed, seed=seed), batch_tokens=128)
    columns = {shape[1] for shape in traces}
    assert columns <= {16, 24, 32, 48, 64, 96}
    assert len(traces) == len(set(traces)) <= 2 * len(columns)
    assert calls == [(1, 32)] * 4
    # A prefix a little shorter shares the programs.
    count = len(traces)
    read(texts(40, seed=0), batch_tokens=128, prefix=PREFIX[1:])
    assert calls[-1] == (1, 32)
    assert len(traces) == count


def test_a_batch_is_full_or_a_quarter_and_holds_each_text_once():
    rng = np.random.default_rng(0)
    for count in (1, 5, 8, 9, 31, 33, 100):
        lengths = rng.integers(1, 70, count).tolist()
        seen = []
        for members, num_rows, columns in text_batches.plan(lengths, 512):
            assert num_rows in (512 // columns, 512 // columns // 4)
            assert 0 < len(members) <= num_rows and max(lengths[i] for i in members) <= columns
            seen += members.tolist()
        assert sorted(seen) == list(range(count))


def test_lengths_are_the_next_of_a_short_row():
    row = sorted({text_batches.columns_for(n) for n in range(1, 1025)})
    assert row == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(text_batches.columns_for(n) >= n for n in range(1, 1025))


def test_long_texts_lose_their_end_and_keep_the_suffix():
    long, limit = " ".join(texts(30)), 90
    result = read([long, "dull"], max_length=limit)
    assert result.cut.tolist() == [True, False]
    tail = ChatTokenizer(tokenizer()).encode(SUFFIX, first=False)
    ids = [*whole(long)[: limit - len(tail)], *tail]
    assert len(whole(long)) > limit == len(ids)
    np.testing.assert_allclose(result.values[0], oracle(ids), atol=1e-4)
    np.testing.assert_allclose(result.values[1], oracle(whole("dull")), atol=1e-4)


def test_the_context_of_the_model_is_a_limit_too():
    short = model(max_length=70)
    arguments = (tokenizer(), PREFIX, [" ".join(texts(9))], SUFFIX, ANSWERS)
    one, other = log_odds(short, *arguments), log_odds(model(), *arguments, max_length=70)
    assert one.cut.all() and other.cut.all()
    np.testing.assert_allclose(one.values, other.values, atol=1e-5)


def test_no_text_no_number_and_one_string_is_refused():
    result = read([])
    assert result.values.shape == result.cut.shape == (0,)
    with pytest.raises(ValueError, match="sequence of strings"):
        read("dull")


@pytest.mark.parametrize(
    "answers", [(" good", " good film"), (" goodness", " good"), (" good", "")]
)
def test_answers_that_begin_alike_are_refused(answers):
    message = r"after the template 'Review: \"{text}\"\\nMood:' must differ in their first tokens"
    with pytest.raises(ValueError, match=message) as raised:
        read(["dull"], answers=answers)
    assert "\n" not in str(raised.value)


def test_first_tokens_are_those_after_the_suffix():
    vocab = tokenizer().get_vocab()
    ids = first_tokens(tokenizer(), PREFIX, SUFFIX, ANSWERS)
    assert ids.tolist() == [vocab["Ġgood"], vocab["Ġbad"]]


def test_a_suffix_without_tokens_or_without_room_is_one_line():
    full = len(whole(""))
    assert read(["dull"], max_length=full + 1).cut.all()
    for changes in ({"suffix": ""}, {"max_length": full}):
        with pytest.raises(ValueError, match="tokens and must have from 1 to") as raised:
            read(["dull"], **changes)
        assert "\n" not in str(raised.value)
