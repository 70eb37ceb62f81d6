"""Answers scored by a model that did not draw them."""

import jax
import numpy as np
import pytest

from rlhf_jax.rollouts.answers import sample_answers
from rlhf_jax.rollouts.rescore import answers_log_probs, answers_scores
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from tests import scripted, tiny

TOKENIZER = scripted.tokenizer()
CONFIG = tiny.model_config(vocab_size=300)
PROMPTS = [np.arange(3, 3 + n, dtype=np.int32) for n in (40, 4, 20, 9)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_under_the_model_that_drew_them_it_is_what_the_sampler_said(temperature):
    model = tiny.language_model(CONFIG)
    drawn = sample_answers(
        model,
        PROMPTS,
        TOKENIZER,
        samples=2,
        sampling=SamplingConfig(6, temperature=temperature),
        key=jax.random.key(1),
        rows=4,
    )
    arguments = {"pad_id": TOKENIZER.pad_token_id, "sharding": Sharding(make_mesh(1), "zero2")}
    found = answers_log_probs(model, PROMPTS, drawn, temperature=temperature, rows=4, **arguments)
    said = [[answer.log_prob for answer in some] for some in drawn]
    np.testing.assert_allclose(found, said, atol=1e-4)
    other = answers_log_probs(
        tiny.language_model(CONFIG, seed=5), PROMPTS, drawn, rows=4, **arguments
    )
    assert np.abs(np.array(other) - said).min() > 1e-2


def test_scores_are_those_of_the_reward_model_whatever_the_batch():
    scorer = tiny.scalar_model(CONFIG)
    drawn = sample_answers(
        tiny.language_model(CONFIG),
        PROMPTS,
        TOKENIZER,
        samples=2,
        sampling=SamplingConfig(6),
        key=jax.random.key(1),
        rows=4,
    )
    found = answers_scores(
        scorer,
        PROMPTS,
        drawn,
        pad_id=TOKENIZER.pad_token_id,
        rows=4,
        sharding=Sharding(make_mesh(1), "zero2"),
    )
    for prompt, answers, scores in zip(PROMPTS, drawn, found, strict=True):
        for answer, score in zip(answers, scores, strict=True):
            tokens = np.concatenate([prompt, answer.tokens])[None].astype(np.int32)
            alone = scorer.scores(tokens, np.ones_like(tokens))
            assert score == pytest.approx(float(alone[0]), abs=1e-4)
