"""A policy that is asked with words before the prompt: what it says is an answer to the prompt."""

import jax
import numpy as np

from rlhf_jax.rollouts.conditioned import Conditioned, with_conditions, with_prefix
from tests import tiny

PREFIX = (11, 12, 13)


def test_the_prefix_stands_first_or_behind_bos():
    tokens, mask = tiny.left_padded([3, 1, 4, 0], 4)
    tokens[1, -1] = 9
    longer, real = map(np.asarray, with_prefix(tokens, mask, PREFIX, bos=9))
    for row in range(4):
        prompt = tokens[row][mask[row]].tolist()
        place = int(prompt[:1] == [9])
        wanted = [*prompt[:place], *PREFIX, *prompt[place:]] if prompt else []
        assert longer[row][real[row]].tolist() == wanted
        # Padding is on the left alone.
        assert np.all(np.diff(real[row].astype(int)) >= 0)


def test_answers_are_those_to_the_longer_prompt_and_stand_behind_the_plain_one():
    tokens, mask = tiny.prompts()
    model, key = tiny.language_model(), jax.random.key(5)
    generate = tiny.sampler("plain")
    asked = with_conditions(generate)(Conditioned(model, PREFIX), tokens, mask, key)
    direct = generate(model, *with_prefix(tokens, mask, PREFIX), jax.random.key(5))
    np.testing.assert_array_equal(asked.responses, direct.responses)
    np.testing.assert_array_equal(asked.log_probs, direct.log_probs)
    np.testing.assert_array_equal(asked.response_mask, direct.response_mask)
    width = tokens.shape[1]
    assert asked.prompt_length == width
    np.testing.assert_array_equal(asked.tokens[:, :width], tokens)
    np.testing.assert_array_equal(asked.mask[:, :width], mask)
    plain = with_conditions(generate)(model, tokens, mask, jax.random.key(5))
    tiny.close(plain, tiny.rollout("plain"), 0)
    assert np.any(np.asarray(plain.log_probs) != np.asarray(asked.log_probs))
