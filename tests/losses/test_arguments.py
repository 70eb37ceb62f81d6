"""What every loss says to arguments that it does not take: which one, and what to pass instead."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from tests.losses.cases import CASES, IDS
from tests.losses.harness import as_jax, draw

# Values that decide the program, and with it what `jit` needs to know.
STATIC = {"axis", "estimator", "k", "method", "neutral", "normalize", "per_token", "shift_mean"}
# Keyword arguments that are arrays by their docstring.
ARRAYS = {"bootstrap", "other_where", "segments", "where"}
NAMES = sorted(set(losses.__all__) - {"RunningMoments"})


def hyper_parameters(name):
    """Keyword-only arguments that are single numbers, with the default of each."""
    parameters = inspect.signature(getattr(losses, name)).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in STATIC | ARRAYS
    }


def cases():
    return pytest.mark.parametrize("case", CASES, ids=IDS)


def equal(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def refusal(case, arrays, **settings):
    function = case.call or getattr(losses, case.name)
    with pytest.raises(AssertionError) as raised:
        function(**{**arrays, **case.settings, **settings})
    message = str(raised.value)
    assert "\n" not in message
    return message


@cases()
def test_what_is_refused_is_named(case):
    arrays = as_jax(draw(case, 0))
    for name, x in arrays.items():
        word = rf"\b{name}\b"
        for wrong in (x.tolist(), 1.0, None):
            if name == "margin" or (wrong is None and name in ARRAYS):
                continue  # a number will do, or nothing
            message = refusal(case, {**arrays, name: wrong})
            assert re.match(rf"{name} is (a float|a list|None), but must be an array", message)
        if jnp.issubdtype(x.dtype, jnp.floating):
            message = refusal(case, {**arrays, name: x.astype(jnp.int32)})
            assert re.match(rf"{name} is int32\[.*\], but must be float: .*astype", message)
        if x.dtype == bool:
            for dtype in (jnp.int32, jnp.float32):
                message = refusal(case, {**arrays, name: x.astype(dtype)})
                assert re.match(rf"{name} is .*\], but must be boolean: cast to bool", message)
        if len(arrays) > 1 and x.ndim:
            message = refusal(case, {**arrays, name: x[:-1]})
            assert re.search(word, message) and "shape" in message


@pytest.mark.slow
@cases()
def test_a_hyper_parameter_is_one_number(case):
    arrays = as_jax(draw(case, 1))
    shape = next(iter(arrays.values())).shape
    function = case.call or getattr(losses, case.name)
    plain = function(**arrays, **case.settings)
    for name, default in hyper_parameters(case.name).items():
        value = case.settings.get(name, default)
        if name in arrays or value is None or case.call:
            continue
        for several in ((1,), (2,), shape[:1], shape[-1:], shape):
            if not several or (name == "margin" and several == shape):
                continue
            message = refusal(case, arrays, **{name: jnp.full(several, value)})
            assert re.match(rf"{name} is \w+\[.*\], but must (be a single|have the shape)", message)
        assert name in refusal(case, arrays, **{name: [value]})
        for one in (jnp.float32(value), np.float32(value), np.full((), value, np.float32)):
            found = function(**arrays, **{**case.settings, name: one})
            jax.tree.map(equal, found, plain)

        def traced(value, name=name):
            return function(**arrays, **{**case.settings, name: value})

        jax.tree.map(equal, jax.jit(traced)(jnp.float32(value)), plain)


def test_a_discount_for_each_row_is_refused_even_where_it_would_fit():
    square = jnp.ones((3, 3))
    for call in (
        lambda d: losses.rewards_to_go(square, discount=d, where=square > 0),
        lambda d: losses.gae(square, square, discount=d, lambda_=1.0, where=square > 0),
        lambda d: losses.gae(square, square, discount=1.0, lambda_=d, where=square > 0),
    ):
        with pytest.raises(AssertionError, match=r"(discount|lambda_) is float32\[3\]"):
            call(jnp.array([0.0, 0.5, 1.0]))
        several = jax.vmap(call)(jnp.array([0.0, 0.5, 1.0]))
        assert several.shape == (3, 3, 3)


def test_one_pair_has_one_beta():
    pair = [jnp.zeros(1)] * 4
    for loss in (losses.dpo_loss, losses.ipo_loss, losses.dpo_hinge_loss):
        with pytest.raises(AssertionError, match=r"beta is float32\[2\]"):
            loss(*pair, beta=jnp.ones(2))


def test_hindsight_takes_one_rate_traced_or_not():
    real, key = jnp.ones((2, 3), bool), jax.random.key(0)
    with pytest.raises(AssertionError, match=r"max_rate is float32\[2\]"):
        losses.hindsight_visible(key, real, max_rate=jnp.ones(2))
    with pytest.raises(AssertionError, match=r"where is int32.*cast to bool"):
        losses.hindsight_visible(key, real.astype(jnp.int32), max_rate=0.5)
    hide = jax.jit(lambda rate: losses.hindsight_visible(key, real, max_rate=rate))
    np.testing.assert_array_equal(hide(0.0), real)


def test_moments_are_refused_by_name_too():
    zeros = losses.RunningMoments.zeros()
    with pytest.raises(AssertionError, match="values is a list"):
        losses.update_moments(zeros, [1.0])
    with pytest.raises(AssertionError, match=r"where is float32.*cast to bool"):
        losses.update_moments(zeros, jnp.ones(2), where=jnp.ones(2))
    several = losses.RunningMoments(*jnp.zeros((3, 2)))
    with pytest.raises(AssertionError, match=r"b.count is float32\[2\]"):
        losses.merge_moments(zeros, several)
    for scale in (losses.scale_rewards, lambda r, m: losses.normalize_rewards(r, m, clip=1.0)):
        with pytest.raises(AssertionError, match=r"moments.count is float32\[2\]"):
            scale(jnp.ones(2), several)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_is_static(name):
    parameters = inspect.signature(getattr(losses, name)).parameters
    text = inspect.getdoc(getattr(losses, name))
    for static in STATIC & set(parameters):
        argument = re.search(rf"\n  {static}: ((?:.*\n)(?:    .*\n)*)", text)
        assert argument and "static under `jit`" in " ".join(argument[1].split()), static


@pytest.mark.parametrize(
    ("static", "call"),
    [
        ("k", lambda k, x: losses.k_step_returns(x, x, discount=1.0, k=k, where=x < 1)),
        ("k", lambda k, x: losses.k_step_advantages(x, x, discount=1.0, k=k, where=x < 1)),
        ("normalize", lambda n, x: losses.sequence_log_prob(x, where=x < 1, normalize=n)),
        ("normalize", lambda n, x: losses.language_model_loss(x, where=x < 1, normalize=n)),
        ("shift_mean", lambda s, x: losses.masked_whiten(x, where=x < 1, shift_mean=s)),
        ("axis", lambda a, x: losses.masked_mean(x, where=x < 1, axis=a)),
    ],
)
def test_what_must_be_static_is_refused_when_traced(static, call):
    with pytest.raises(AssertionError, match=f"{static} is traced.*static_argnames='{static}'"):
        jax.jit(call)(1, jnp.zeros(3))
    assert jax.jit(call, static_argnums=0)(0 if static == "axis" else 1, jnp.zeros(3)).ndim < 2


@pytest.mark.parametrize("k", [2.0, "2", None, jnp.ones(2, jnp.int32)])
def test_k_is_an_integer(k):
    x = jnp.zeros(3)
    with pytest.raises(AssertionError, match=r"k is .*, but must be an integer"):
        losses.k_step_returns(x, x, discount=1.0, k=k, where=x < 1)
