"""Supervised alignment: what each method reads of candidates, and its loss on a whole model.

The losses have tests of their own. Here they are computed again in NumPy from log-probabilities
that are taken one sequence at a time: which tokens count, which response is which, what is a mean.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.data.candidates import Candidates, pad_candidates
from rlhf_jax.data.endless import Shape
from rlhf_jax.data.schemas import Encoded
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.methods import supervised
from rlhf_jax.methods.supervised import (
    FIGAConfig,
    PROConfig,
    QuarkConfig,
    RRHFConfig,
    SLiCConfig,
    SupervisedConfig,
    arrange,
    prefixed,
    quality_prefixes,
    quantile_classes,
)
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training.step import create_state
from tests import tiny

BOS = 2
PREFIXES = [(30, 31), (32, 33, 34)]
ONE_DEVICE = Sharding(make_mesh(1))


def document(prompt: int, response: int, seed: int) -> Encoded:
    """BOS, a prompt and a response."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([[BOS], rng.integers(3, 30, prompt + response)]).astype(np.int32)
    return Encoded(tokens, np.arange(len(tokens)) > prompt)


@functools.cache
def groups(count: int = 5, width: int = 3) -> tuple[Candidates, ...]:
    """Prompts with responses of 2 to 7 tokens; every second has one fewer."""
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        k = width - number % 2
        sides = [document(2, int(rng.integers(2, 8)), 10 * number + side) for side in range(k)]
        scores = np.sort(rng.normal(size=k))[::-1]
        found.append(Candidates(tuple(sides), tuple(map(float, scores))))
    return tuple(found)


def arranged(config: SupervisedConfig, seed: int = 0) -> list[Candidates]:
    return arrange(config, groups(), PREFIXES, bos=BOS, longest=40, seed=seed)


def batch_of(rows, length: int = 32, filler: int = 1) -> dict:
    sides = max(len(one.documents) for one in rows)
    batch = pad_candidates(rows, Shape(len(rows) + filler, length), sides)
    return supervised.prepare(jax.tree.map(jnp.asarray, batch))


def loss_of(config: SupervisedConfig, rows, **extra):
    loss = jax.jit(functools.partial(supervised.loss_fn, config=config, pad_id=tiny.PAD))
    reference = extra.pop("reference", None)
    batch = batch_of(rows) | extra
    value, metrics = loss(tiny.language_model(), batch, reference)
    return float(value), {name: float(number) for name, number in metrics.items()}


def table(tokens, model=None) -> np.ndarray:
    """Log-softmax `[T, V]` for one sequence, in float64."""
    model = tiny.language_model() if model is None else model
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden = tiny.forward(model, padded, np.ones_like(padded))
    logits = np.asarray(model.logits(hidden)[0, : len(tokens)], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_probs(one: Encoded, inputs=None) -> np.ndarray:
    """log π of the trained tokens of a document, perhaps read otherwise than they are predicted."""
    rows = table(one.tokens if inputs is None else inputs)
    places = np.flatnonzero(one.loss_mask)
    return rows[places - 1, one.tokens[places]]


def rrhf(config, one) -> float:
    each = [log_probs(d) for d in one.documents]
    p = [lp.sum() / len(lp) ** config.rrhf.length_power for lp in each]
    pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if one.scores[i] < one.scores[j]]
    ranking = sum(max(0.0, p[i] - p[j]) for i, j in pairs)
    return config.rrhf.rank_weight * ranking - each[0].sum()


def pro(config, one) -> float:
    each = [log_probs(d) for d in one.documents]
    s, r, total = [lp.mean() for lp in each], one.scores, 0.0
    for k in range(len(s) - 1):
        gaps = [r[k] - r[i] for i in range(k + 1, len(s))]
        heats = [s[k] * max(gaps)] + [s[k + 1 + i] * gap for i, gap in enumerate(gaps)]
        total -= heats[0] - np.log(np.exp(heats).sum())
    return total - config.pro.sft_weight * (len(s) - 1) ** 2 * each[0].sum()


def slic(config, one) -> float:
    chosen, rejected = (log_probs(d).sum() for d in one.documents)
    hinge = max(0.0, config.slic.margin - chosen + rejected)
    return hinge - config.slic.target_weight * chosen


def orpo(config, one) -> float:
    p = [np.exp(log_probs(d).mean()) for d in one.documents]
    odds = [x / (1 - x) for x in p]
    return -np.log(p[0]) + config.orpo.weight * np.log1p(odds[1] / odds[0])


def unlikelihood(config, one) -> float:
    chosen, rejected = (log_probs(d) for d in one.documents)
    return -chosen.mean() - config.unlikelihood.weight * np.log1p(-np.exp(rejected)).mean()


@pytest.mark.parametrize(
    ("config", "oracle"),
    [
        (SupervisedConfig("rrhf", rrhf=RRHFConfig(3.0, 0.5)), rrhf),
        (SupervisedConfig("pro", pro=PROConfig(0.2)), pro),
        (SupervisedConfig("slic", slic=SLiCConfig(2.0, 0.3)), slic),
        (SupervisedConfig("orpo"), orpo),
        (SupervisedConfig("unlikelihood"), unlikelihood),
    ],
    ids=lambda value: getattr(value, "method", ""),
)
def test_contrast_is_the_mean_over_prompts_of_the_paper_s_loss(config, oracle):
    rows = arranged(config)
    assert len(rows) == 5 and len(rows[0].documents) == (3 if oracle in (rrhf, pro) else 2)
    loss, metrics = loss_of(config, rows)
    np.testing.assert_allclose(loss, np.mean([oracle(config, one) for one in rows]), rtol=2e-5)
    np.testing.assert_allclose(loss, metrics["loss/sft"] + metrics["loss/aux"], rtol=1e-5)
    best = np.array([log_probs(one.documents[0]).mean() for one in rows])
    worst = np.array([log_probs(one.documents[-1]).mean() for one in rows])
    np.testing.assert_allclose(metrics["rank/best_log_prob"], best.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rank/worst_log_prob"], worst.mean(), rtol=1e-5)
    assert metrics["rank/accuracy"] == pytest.approx(np.mean(best > worst))


def test_figa_reads_what_differs_and_lowers_what_is_likely():
    """Better: 5 6 7 8, worse: 5 9 7: 6 becomes 9, and 8 goes."""
    head = [BOS, 3, 4]
    better, worse = (
        Encoded(np.array(head + said, np.int32), np.arange(3 + len(said)) >= 3)
        for said in ([5, 6, 7, 8], [5, 9, 7])
    )
    one = Candidates((better, worse), (1.0, 0.0))
    up, down = log_probs(better), log_probs(worse)
    config = SupervisedConfig("figa", figa=FIGAConfig(2.0, 0.5, 0.0, 1e4))
    loss, metrics = loss_of(config, [one])
    np.testing.assert_allclose(metrics["loss/sft"], -2.0 * (up[1] + up[3]) / 4, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/aux"], 0.5 * down[1] / 3, rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["loss/sft"] + metrics["loss/aux"], rtol=1e-6)
    # Out of the range of likelihoods nothing is lowered.
    near = float(-down[1])
    for low, high, counts in ((near + 0.1, near + 1, False), (near - 0.1, near + 0.1, True)):
        config = SupervisedConfig("figa", figa=FIGAConfig(2.0, 0.5, low, high))
        assert (loss_of(config, [one])[1]["loss/aux"] != 0) == counts


def test_c_rlft_weighs_the_classes_and_tells_them_apart():
    config = SupervisedConfig("c_rlft")
    rows = arranged(config)
    assert [one.scores for one in rows] == [(0.0,), (-1.0,)] * 5
    wanted = []
    for whole in groups():
        better = prefixed(whole.documents[0], PREFIXES[1], BOS)
        worse = prefixed(whole.documents[-1], PREFIXES[0], BOS)
        wanted += [-log_probs(better).sum(), -np.exp(-1 / 0.5) * log_probs(worse).sum()]
    np.testing.assert_allclose(loss_of(config, rows)[0], np.mean(wanted), rtol=1e-5)


def test_a_prefix_stands_behind_bos_and_is_not_trained():
    one = document(2, 3, 0)
    longer = prefixed(one, (30, 31), BOS)
    assert longer.tokens.tolist() == [BOS, 30, 31, *one.tokens[1:].tolist()]
    assert longer.loss_mask.sum() == one.loss_mask.sum() and not longer.loss_mask[:3].any()
    assert prefixed(one, (30,), None).tokens.tolist() == [30, *one.tokens.tolist()]


def test_a_chain_of_hindsight_trains_both_answers_and_no_feedback():
    config = SupervisedConfig("chain_of_hindsight")
    orders = set()
    for seed in range(8):
        for one, whole in zip(arranged(config, seed), groups(), strict=True):
            (chain,) = one.documents
            better = prefixed(whole.documents[0], PREFIXES[1], BOS)
            worse = prefixed(whole.documents[-1], PREFIXES[0], BOS)
            both = {
                first: np.concatenate([a.tokens, b.tokens[1:]]).tolist()
                for first, a, b in (("better", better, worse), ("worse", worse, better))
            }
            (first,) = [name for name, tokens in both.items() if tokens == chain.tokens.tolist()]
            orders.add(first)
            trained = chain.tokens[chain.loss_mask].tolist()
            answers = [d.tokens[d.loss_mask].tolist() for d in (better, worse)]
            one_after_other = answers if first == "better" else answers[::-1]
            assert trained == [*one_after_other[0], *one_after_other[1]]
    assert orders == {"better", "worse"}


def test_chains_are_a_mean_over_tokens_and_hidden_ones_are_read_as_padding():
    config = SupervisedConfig("chain_of_hindsight")
    rows = arranged(config)
    segments = batch_of(rows)["segments"]
    hidden = np.zeros(segments.shape, bool)
    hidden[1, 0, 4] = hidden[2, 0, 6] = True
    loss, _ = loss_of(config, rows, visible=jnp.asarray((np.asarray(segments) > 0) & ~hidden))
    each = []
    for number, one in enumerate(rows):
        (chain,) = one.documents
        inputs = np.where(hidden[number, 0, : len(chain.tokens)], tiny.PAD, chain.tokens)
        each.append(log_probs(chain, inputs))
    np.testing.assert_allclose(loss, -np.concatenate(each).mean(), rtol=1e-5)
    whole = -np.concatenate([log_probs(one.documents[0]) for one in rows]).mean()
    assert abs(loss - whole) > 1e-4


def test_a_few_tokens_are_hidden_and_never_the_first():
    config = SupervisedConfig("chain_of_hindsight")
    batch = {"segments": np.ones((64, 1, 200), np.int32)}
    visible = supervised.hide(config, batch, jax.random.key(0))["visible"]
    assert visible[:, :, 0].all() and 0.01 < 1 - visible.mean() < 0.04  # a mean rate of 2.5%
    assert supervised.hide(SupervisedConfig("rrhf"), batch, jax.random.key(1)) is batch


def test_quark_is_near_the_reference_that_reads_no_prefix():
    config = SupervisedConfig("quark", quark=QuarkConfig(0.7, 0.3))
    rows, reference = arranged(config), tiny.language_model(seed=1)
    assert len(rows) == 13  # every response by itself
    nll, kl, entropies = [], [], []
    for one in rows:
        told, plain = one.documents
        places, shift = np.flatnonzero(told.loss_mask), len(told.tokens) - len(plain.tokens)
        p = table(told.tokens)[places - 1]
        q = table(plain.tokens, reference)[places - 1 - shift]
        nll += (-p[np.arange(len(places)), told.tokens[places]]).tolist()
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        entropies += (-np.exp(p) * p).sum(-1).tolist()
    loss, metrics = loss_of(config, rows, reference=reference)
    np.testing.assert_allclose(metrics["quark/kl"], np.mean(kl), rtol=1e-4)
    np.testing.assert_allclose(metrics["quark/entropy"], np.mean(entropies), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/sft"], np.mean(nll), rtol=1e-5)
    wanted = np.mean(nll) + 0.7 * np.mean(kl) - 0.3 * np.mean(entropies)
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)


def test_quantiles_are_equally_large_and_the_best_words_stand_before_the_best():
    assert quantile_classes([0.1, 9, 3, 4, 5, 2], 3).tolist() == [0, 2, 1, 1, 2, 0]
    assert np.bincount(quantile_classes([*range(9), 9], 5)).tolist() == [2] * 5
    rows = arranged(SupervisedConfig("quark"))
    by_score = sorted(rows, key=lambda one: one.scores[0])
    said = [tuple(one.documents[0].tokens[1:3].tolist()) for one in by_score]
    # Of 13 the quantile of number i is the floor of 2 i / 13.
    assert said == [(30, 31)] * 7 + [(32, 33)] * 6


@pytest.mark.parametrize(
    ("scores", "count", "message"),
    [([1.0, 2.0], 3, "2 responses are fewer than the 3 quantiles"), ([1.0] * 4, 2, "all scores")],
)
def test_what_has_no_quantiles_is_refused(scores, count, message):
    with pytest.raises(ValueError, match=message):
        quantile_classes(scores, count)


@pytest.mark.parametrize("method", sorted(set(supervised.METHODS)))
def test_scores_that_are_all_equal_are_refused(method):
    flat = [Candidates(one.documents, (1.0,) * len(one.documents)) for one in groups()]
    with pytest.raises(ValueError, match="all scores are equal"):
        arrange(SupervisedConfig(method), flat, PREFIXES, bos=BOS, longest=40, seed=0)


def test_what_words_make_too_long_is_left_out():
    config = SupervisedConfig("c_rlft")
    lengths = [len(one.documents[0].tokens) for one in arranged(config)]
    cut = arrange(config, groups(), PREFIXES, bos=BOS, longest=max(lengths) - 1, seed=0)
    assert len(cut) == sum(n < max(lengths) for n in lengths)
    with pytest.raises(ValueError, match="longer than the 5 tokens that the model reads"):
        arrange(config, groups(), PREFIXES, bos=BOS, longest=5, seed=0)


def test_words_are_control_tokens_where_the_tokenizer_has_them():
    tokenizer = train_bpe(["a good film"] * 5, 300)
    good = tuple(tokenizer.encode("Good: ", add_special_tokens=False))
    assert quality_prefixes(["Bad: ", "Good: "], tokenizer)[1] == good
    for texts, message in (
        (["<|bad|>", "Good: "], r"'<\|bad\|>', and the tokenizer has no such control token"),
        (["Good: ", "Good: "], "must differ"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            quality_prefixes(texts, tokenizer)
        assert "\n" not in str(caught.value)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|bad|>"]})
    found = quality_prefixes(["<|bad|>", "Good: "], tokenizer)
    assert found == [(tokenizer.convert_tokens_to_ids("<|bad|>"),), good]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "quark", "texts": ("one",)}, "two or more texts"),
        ({"method": "c_rlft", "texts": ("a", "b", "c")}, "must be two texts"),
        ({"method": "nothing"}, "method='nothing' is unknown"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        SupervisedConfig(**changes)


@pytest.mark.slow
def test_microbatches_add_up():
    config = SupervisedConfig("rrhf", rrhf=RRHFConfig(3.0))
    batch = pad_candidates(arranged(config), Shape(8, 32), 3)
    moved = []
    for parts in (1, 4):
        train = supervised.CandidateTrainConfig(1, 999, 1, 99, microbatches=parts)
        step = supervised.make_step(config, train, optax.sgd(0.1), ONE_DEVICE, pad_id=tiny.PAD)
        state = create_state(tiny.language_model(), optax.sgd(0.1), ONE_DEVICE)
        state, metrics = step(state, ONE_DEVICE.put_batch(batch))
        moved.append((state.model, metrics))
    tiny.close(*moved, 2e-5)
    assert tiny.largest_difference(moved[0][0], tiny.language_model()) > 1e-3
