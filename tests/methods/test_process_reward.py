"""Reward models of steps and outcomes: targets, scores, and that they can be learned."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.schemas import DropCounts
from rlhf_jax.data.solutions import Solution
from rlhf_jax.data.step_labels import UNRATED, SolutionBatches, encode_solutions
from rlhf_jax.methods.process_reward import (
    ProcessRewardConfig,
    SolutionTrainConfig,
    StepScorer,
    likelihood_loss,
    loss_fn,
    make_step,
    prepare,
    score_steps,
)
from rlhf_jax.methods.search import Partial, Step
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import create_state
from tests import scripted, tiny

TOKENIZER = scripted.tokenizer()
PAD = TOKENIZER.pad_token_id
MODEL = tiny.model_config(vocab_size=300)
SHARDING = Sharding(make_mesh(1), "zero2")
PRM, ORM = ProcessRewardConfig(), ProcessRewardConfig(supervision="outcome")
LIKELY = ProcessRewardConfig(supervision="likelihood")
IDS = PRM.token_ids(TOKENIZER)
SOLUTIONS = [
    Solution("12 + 3 - 4 =", ("= 15 - 4\n", "= 12\n", "#### 12"), (1, -1, None), False),
    Solution("3 - 4 =", ("= -1\n", "#### -1"), (0, 1), True),
    Solution("4 + 4 =", ("= 9\n", "####"), (-1, None), None),
]
ENCODED = encode_solutions(SOLUTIONS, TOKENIZER, max_length=64, drops=DropCounts())


def batch_of(encoded=ENCODED, rows=2, length=64):
    (batch,) = SolutionBatches(encoded, batch_size=rows, length=length, seed=0, pad_id=PAD).once()
    return {name: jnp.asarray(value) for name, value in batch.items()}


def logits_of(model, tokens) -> np.ndarray:
    """All logits of one solution, [T, V], float64."""
    tokens = jnp.asarray(tokens)[None]
    hidden = model(tokens, jnp.ones_like(tokens))
    return np.asarray(model.logits(hidden)[0], np.float64)


@functools.cache
def model():
    return tiny.language_model(MODEL)


def loss(config, batch):
    return loss_fn(model(), prepare(batch, config=config), config=config, token_ids=IDS)


def test_the_loss_of_a_prm_is_the_mean_over_labelled_steps():
    terms = []
    for one in ENCODED:
        three = logits_of(model(), one.tokens)[:, list(IDS)]
        log_p = three - np.log(np.exp(three).sum(-1, keepdims=True))
        terms += [
            -log_p[end, label]
            for end, label in zip(one.ends, one.labels, strict=True)
            if label != UNRATED
        ]
    assert len(terms) == 5
    found, metrics = loss(PRM, batch_of())
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(metrics["loss/step_labels"]) == float(found)


def log_likelihoods(one) -> list[float]:
    """log π of each step of a solution."""
    values = logits_of(model(), one.tokens)
    log_p = values - np.log(np.exp(values).sum(-1, keepdims=True))
    said = [log_p[t - 1, one.tokens[t]] for t in range(1, len(one.tokens))]
    edges = [int(np.argmax(one.response)), *(int(end) + 1 for end in one.ends)]
    return [sum(said[a - 1 : b - 1]) for a, b in itertools.pairwise(edges)]


def test_a_step_is_as_likely_to_be_right_as_to_be_written():
    for one, found in zip(ENCODED, scores(LIKELY), strict=True):
        np.testing.assert_allclose(found, np.exp(log_likelihoods(one)), rtol=1e-4)


def test_the_loss_of_likelihoods_is_that_of_their_labels():
    terms = []
    for one in ENCODED:
        for log_pi, label in zip(log_likelihoods(one), one.labels, strict=True):
            if label != UNRATED:
                terms.append(-log_pi if label >= 1 else -np.log1p(-np.exp(log_pi)))
    assert len(terms) == 5
    found, metrics = loss(LIKELY, batch_of())
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-4)
    # A model that was never trained writes no step more often than not.
    assert float(metrics["steps/accuracy"]) == pytest.approx(2 / 5)


def test_a_wrong_step_that_is_certain_has_a_finite_loss_and_gradient():
    log_pi = jnp.array([-1e-9, -1e-9, -50.0, 0.0])
    right = jnp.array([False, True, False, False])
    value, slope = jax.value_and_grad(lambda x: likelihood_loss(x, right).sum())(log_pi)
    assert np.isfinite(value) and np.isfinite(slope).all()
    np.testing.assert_allclose(likelihood_loss(log_pi, right)[1:3], [1e-6, 0], atol=1e-6)


def test_the_loss_of_an_orm_is_the_mean_over_tokens_of_solutions_whose_outcome_is_known():
    terms = []
    for one in ENCODED[:2]:  # of the third nobody knows the outcome
        values = logits_of(model(), one.tokens)
        z = values[:, IDS[2]] - values[:, IDS[0]]
        sign = 1 if one.right else -1
        terms += list(np.log1p(np.exp(-sign * z))[one.response])
    found, metrics = loss(ORM, batch_of())
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-5)
    assert 0 <= float(metrics["steps/accuracy"]) <= 1


def test_the_language_model_loss_reads_only_solutions_without_a_fault():
    config = ProcessRewardConfig(lm_coef=0.5)
    # The third step of the second solution is neutral, which is no fault.
    one = ENCODED[1]
    values = logits_of(model(), one.tokens)
    log_p = values - np.log(np.exp(values).sum(-1, keepdims=True))
    terms = [-log_p[t - 1, one.tokens[t]] for t in np.flatnonzero(one.response)]
    found, metrics = loss(config, batch_of())
    assert float(metrics["loss/lm"]) == pytest.approx(np.mean(terms), rel=1e-5)
    plain = float(loss(PRM, batch_of())[0])
    assert float(found) == pytest.approx(plain + 0.5 * np.mean(terms), rel=1e-5)


def test_padding_and_neighbours_change_nothing():
    alone = [float(loss(PRM, batch_of([one], rows=1, length=40))[0]) for one in ENCODED]
    counts = [(one.labels != UNRATED).sum() for one in ENCODED]
    together = float(loss(PRM, batch_of())[0])
    assert together == pytest.approx(np.average(alone, weights=counts), rel=1e-5)


def test_neutral_counts_either_way():
    strict = ProcessRewardConfig(neutral="negative")
    loose, hard = (scores(config) for config in (PRM, strict))
    assert all((a > b).all() for a, b in zip(loose, hard, strict=True))
    accuracy = [float(loss(config, batch_of())[1]["steps/accuracy"]) for config in (PRM, strict)]
    assert accuracy[0] != accuracy[1]


def scores(config=PRM, rows=2, encoded=ENCODED, **changes):
    pairs = [(one.tokens, one.ends, int(one.begins[0])) for one in encoded]
    return score_steps(
        model(), pairs, SHARDING, config=config, token_ids=IDS, pad_id=PAD, rows=rows
    )


@pytest.mark.parametrize("config", [PRM, ORM], ids=["prm", "orm"])
def test_scores_are_read_at_the_ends_of_steps(config):
    for one, found in zip(ENCODED, scores(config), strict=True):
        three = logits_of(model(), one.tokens)[one.ends][:, list(IDS)]
        p = np.exp(three) / np.exp(three).sum(-1, keepdims=True)
        right = p[:, 1] + p[:, 2]
        if config is ORM:
            right = p[:, 2] / (p[:, 0] + p[:, 2])
        np.testing.assert_allclose(found, right, rtol=1e-4)


def test_scores_do_not_depend_on_the_batch():
    for one, other in zip(scores(rows=1), scores(rows=8), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert scores(encoded=[]) == []


def partial(problem: int, *texts: str, ends: bool = True) -> Partial:
    steps = [Step(text, 1) for text in texts[:-1]] + [Step(texts[-1], 1, ends=ends)]
    return Partial(problem, tuple(steps))


def scorer(max_length=64, prompts=tuple(one.prompt for one in SOLUTIONS)) -> StepScorer:
    return StepScorer(
        model(), TOKENIZER, prompts, SHARDING, config=PRM, max_length=max_length, rows=2
    )


def test_the_scorer_of_a_search_reads_what_the_reward_model_was_trained_on():
    partials = [partial(0, *SOLUTIONS[0].steps), partial(2, *SOLUTIONS[2].steps, ends=False)]
    found = scorer()(partials)
    expected = scores()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[2], rtol=1e-5)


@pytest.mark.parametrize("more", [0, 1])
def test_steps_beyond_the_scorers_length_score_nothing(more):
    """The last one ends where the length allows no token, or later."""
    before, last_end = (int(ENCODED[0].ends[i]) for i in (1, -1))
    limit = last_end if more else before + 1
    ((*first, last),) = scorer(max_length=limit)([partial(0, *SOLUTIONS[0].steps)])
    np.testing.assert_allclose(first, scores()[0][: len(first)], rtol=1e-5)
    assert last == 0.0 and len(first) == len(SOLUTIONS[0].steps) - 1


def test_a_prompt_that_the_scorer_cannot_read_is_refused():
    with pytest.raises(ValueError, match="longer than max_length=3 of the scorer"):
        scorer(max_length=3)


def test_label_texts_must_be_three_tokens():
    with pytest.raises(ValueError, match="'wrong', which is 5 tokens"):
        ProcessRewardConfig(tokens=("wrong", "?", "+")).token_ids(TOKENIZER)
    with pytest.raises(ValueError, match="3 different texts"):
        ProcessRewardConfig(tokens=("-", "+"))
    with pytest.raises(ValueError, match="3 different texts"):
        ProcessRewardConfig(tokens=("-", "+", "+"))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_some_tokens_are_those_of_all(tied):
    one = tiny.language_model(tiny.model_config(vocab_size=300, tie_embeddings=tied))
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 16))
    some = one.logits_of(hidden, jnp.asarray(IDS))
    np.testing.assert_allclose(some, one.logits(hidden)[..., list(IDS)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [PRM, ORM, LIKELY], ids=["prm", "orm", "likelihood"])
def test_labels_can_be_learned_in_any_number_of_microbatches(config):
    optimizer, _ = make_optimizer(
        OptimizerConfig(learning_rate=2e-2, schedule="constant", warmup_fraction=0.0), 40
    )
    losses = {}
    for parts in (1, 2):
        train = SolutionTrainConfig(steps=40, minibatch=2, row_length=64, microbatches=parts)
        step = make_step(config, train, optimizer, SHARDING, token_ids=IDS)
        state, batch = create_state(model(), optimizer, SHARDING), batch_of()
        state, metrics = step(state, batch)
        losses[parts] = [float(metrics["loss/step_labels"])]
        if parts == 1:
            for _ in range(40):
                state, metrics = step(state, batch)
            losses[parts].append(float(metrics["loss/step_labels"]))
    assert losses[2][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[1][1] < 0.1 * losses[1][0]


def test_rows_must_be_divisible_by_microbatches():
    with pytest.raises(ValueError, match="must be divisible"):
        SolutionTrainConfig(steps=1, minibatch=3, row_length=8, microbatches=2)
