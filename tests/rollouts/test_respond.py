"""How many prompts are answered and measured."""

import jax
import pytest

from rlhf_jax.rollouts.respond import Respondent
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from tests import tiny


class Words:
    """A tokenizer whose every token is a word."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(f" {token}" for token in row) for row in rows]


@pytest.fixture(scope="module")
def respond():
    """Answers two batches of eight prompts, always the same."""
    tokens, mask = tiny.prompts()
    return Respondent(
        lambda policy, tokens, mask, key: tiny.rollout(),
        batches=[{"tokens": tokens, "mask": mask}] * 2,
        tokenizer=Words(),
        judges={},
        reference=tiny.language_model(seed=1),
        reward_model=None,
        sharding=Sharding(make_mesh(1)),
        temperature=1.0,
    )


@pytest.mark.parametrize(("asked", "answered"), [(1, 1), (8, 8), (11, 11), (16, 16), (50, 16)])
def test_as_many_prompts_are_measured_as_are_asked_for(respond, asked, answered):
    """Also where they do not fill a batch; no more than there are."""
    answers = respond(None, jax.random.key(0), asked)
    assert len(answers.prompts) == len(answers.responses) == answered
    lengths = [len(response.split()) for response in answers.responses]
    assert answers.statistics["response/length"] == pytest.approx(sum(lengths) / answered)
