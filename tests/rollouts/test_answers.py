"""Answers of many prompts: each prompt gets its own, read once, whatever it is batched with."""

import functools
import itertools

import jax
import numpy as np
import pytest

from rlhf_jax.rollouts.answers import Answer, buckets_to, sample_answers
from rlhf_jax.rollouts.rollout import SamplingConfig, make_generate
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from tests import scripted, tiny
from tests.programs import compiled_programs

TOKENIZER = scripted.tokenizer()
SAMPLING = SamplingConfig(6)


@functools.cache
def model(seed: int = 0):
    return tiny.language_model(tiny.model_config(vocab_size=300), seed=seed)


def prompts_of(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.integers(3, 300, n).astype(np.int32) for n in lengths]


PROMPTS = prompts_of(3, 20, 7, 16, 1, 5, 30)


def ask(prompts=PROMPTS, policy=None, **settings) -> list[list[Answer]]:
    settings = {"samples": 2, "sampling": SAMPLING, "key": jax.random.key(4), "rows": 4} | settings
    return sample_answers(policy or model(), prompts, TOKENIZER, **settings)


def tokens_of(found: list[list[Answer]]) -> list[list[tuple[int, ...]]]:
    return [[answer.tokens for answer in of_prompt] for of_prompt in found]


@functools.cache
def answers() -> list[list[Answer]]:
    return ask()


def test_every_prompt_has_its_answers_with_the_numbers_of_the_training_pass():
    assert [len(of_prompt) for of_prompt in answers()] == [2] * len(PROMPTS)
    for prompt, of_prompt in zip(PROMPTS, answers(), strict=True):
        for answer in of_prompt:
            whole = np.concatenate([prompt, answer.tokens])[None].astype(np.int32)
            # One width, one program; padding on the right changes nothing.
            whole = np.pad(whole, ((0, 0), (0, 40 - whole.shape[1])))
            log_probs, entropies = tiny.teacher_forced(
                model(), whole, (np.arange(40)[None] < len(prompt) + len(answer.tokens)).astype(int)
            )
            said = slice(len(prompt) - 1, len(prompt) + len(answer.tokens) - 1)
            assert answer.log_prob == pytest.approx(float(log_probs[0, said].sum()), abs=1e-4)
            assert answer.entropy == pytest.approx(float(entropies[0, said].mean()), abs=1e-5)
            assert answer.text == TOKENIZER.decode(answer.tokens, skip_special_tokens=True)
            assert answer.ended == (TOKENIZER.eos_token_id in answer.tokens)


def test_draws_do_not_depend_on_the_prompts_that_follow():
    assert tokens_of(ask(PROMPTS[:4])) == tokens_of(answers())[:4]
    assert tokens_of(ask(PROMPTS[:1])) == tokens_of(answers())[:1]
    # Every prompt and every sample has draws of its own, also equal prompts of several batches.
    same = ask([PROMPTS[0]] * 5)
    assert len({tokens for of_prompt in tokens_of(same) for tokens in of_prompt}) == 10
    assert tokens_of(ask(key=jax.random.key(5))) != tokens_of(answers())


def test_a_shape_is_compiled_once_for_every_policy_and_number_of_prompts():
    ask()
    with compiled_programs() as programs:
        ask(policy=model(1), key=jax.random.key(9))
        ask(PROMPTS + PROMPTS)
    assert not programs["generate"]


def test_a_prebuilt_function_is_used_and_must_fit():
    make = functools.partial(make_generate, eos_ids=(2,), pad_id=0)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return run(*arguments)

    run = make(SAMPLING, samples=2)
    assert ask(generate=counted) == answers()
    shapes = [tokens.shape for _, tokens, _, _ in calls]
    assert shapes == [(2, 16), (2, 16), (2, 16), (2, 32)]  # prompts, not rows
    with pytest.raises(ValueError, match="generate drew 2 rows of 6 tokens in place of 4 of 6"):
        ask(PROMPTS[:2], generate=make(SAMPLING), prompt_buckets=(32,))


def test_an_answer_is_what_was_said_up_to_eos():
    encode = functools.partial(TOKENIZER.encode, add_special_tokens=False)
    lines = [encode("1 + 2 =") + encode("= 3\n#### 3"), encode("4 - 1 =") + encode(" 3")]
    asked = [np.array(encode(text), np.int32) for text in ("1 + 2 =", "4 - 1 =")]
    policy = scripted.scripted(lines)
    found = ask(asked, policy, samples=3, rows=8)
    long, short = lines[0][len(asked[0]) :], lines[1][len(asked[1]) :]
    assert len(long) > 6 > len(short)  # one is cut, one ends
    for of_prompt, ids, ended in zip(found, (long[:6], [*short, 2]), (False, True), strict=True):
        assert len(of_prompt) == 3
        for answer in of_prompt:
            assert answer.tokens == tuple(ids)
            assert answer.ended is ended
            assert answer.text == TOKENIZER.decode(ids, skip_special_tokens=True)
            assert answer.log_prob == pytest.approx(0, abs=1e-5)
    # One prefill for a prompt, and none for filler.
    assert sorted(policy.record.rows) == sorted(ids.tolist() for ids in asked)


@pytest.mark.slow
def test_devices_share_the_rows():
    sharding = Sharding(make_mesh(8), "zero2")
    spread = jax.device_put(model(), sharding.frozen(model()))
    settings = {"prompts": PROMPTS[:3], "rows": 16, "prompt_buckets": (32,)}
    one, eight = ask(**settings), ask(policy=spread, sharding=sharding, **settings)
    assert tokens_of(eight) == tokens_of(one)
    pairs = zip(itertools.chain(*one), itertools.chain(*eight), strict=True)
    for a, b in pairs:
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)


def test_wrong_requests_are_one_line():
    with pytest.raises(ValueError, match="samples=5 must be from 1 to rows=4"):
        ask(samples=5)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        ask([PROMPTS[0], PROMPTS[0][:0]])
    with pytest.raises(ValueError, match="30 tokens exceeds the largest bucket 24"):
        ask(prompt_buckets=(8, 24))
    assert ask([]) == []
    assert buckets_to(64) == (16, 32, 64)
