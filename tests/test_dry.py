"""Programs are compared by what they compute, not by names or by what was traced before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import dry
from tests.test_knobs import Knobs

X = jnp.arange(3.0)
factor = 1.0


@jax.jit
def scaled(x):
    """Reads a global value, which jax does not look at again."""
    return x * factor


def program(function, *args):
    return dry.digest(dry.structure(jax.jit(function).trace(*args).jaxpr))


def halves(x):
    return jnp.where(x > 0, x, 0) + jnp.where(x > 1, x, 0)


def test_names_and_shared_parts_do_not_count():
    once = jax.jit(lambda x: x * 2)
    twice = [jax.jit(lambda x: x * 2), jax.jit(lambda x: x * 2)]

    def shares(x):
        return once(once(x))

    def does_not(x):
        return twice[1](twice[0](x))

    texts = [jax.jit(f).lower(X).as_text() for f in (shares, does_not)]
    assert texts[0].replace("shares", "") != texts[1].replace("does_not", "")
    assert program(shares, X) == program(does_not, X)
    assert program(halves, X) == program(lambda x: halves(x), X)


def test_what_is_computed_counts():
    table = np.arange(3.0)
    others = [
        lambda x: x * 2,
        lambda x: x * 3,
        lambda x: x + 2,
        lambda x: 2 - x,
        lambda x: x - 2,
        lambda x: x * table,
        lambda x: x * (table + 1),
        lambda x: (x * 2, x),
        lambda x: (x, x * 2),
        lambda x: x[::-1],
        jnp.cumsum,
        lambda x: jnp.cumsum(x, axis=0)[:2],
        jax.grad(lambda x: (x**3).sum()),
        jax.grad(lambda x: (x**4).sum()),
        jax.checkpoint(lambda x: x * 2),
        lambda x: jax.lax.cond(x[0] > 0, lambda y: y, lambda y: -y, x),
        lambda x: jax.lax.cond(x[0] > 0, lambda y: -y, lambda y: y, x),
        lambda x: jax.lax.scan(lambda c, y: (c + y, c), 0.0, x),
        lambda x: jax.lax.scan(lambda c, y: (c + y, c), 0.0, x, reverse=True),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c * 2, x),
        lambda x: jax.lax.fori_loop(0, 4, lambda i, c: c * 2, x),
    ]
    digests = [program(function, X) for function in others]
    assert len(set(digests)) == len(digests)
    assert digests == [program(function, X) for function in others]
    assert program(others[0], X) != program(others[0], X.astype(jnp.bfloat16))


@pytest.mark.parametrize("keyed", [True, False])
def test_a_value_that_is_read_from_elsewhere_is_seen_in_fresh_traces(tmp_path, monkeypatch, keyed):
    """A key that acts through a global value is read, though jax traces nothing anew for it."""

    def main(config):
        if keyed:
            monkeypatch.setattr(__import__(__name__, fromlist=["x"]), "factor", config.seed + 1.0)
        jax.jit(lambda x: scaled(x) + 1)(X)

    monkeypatch.setitem(dry.MAINS, "sft", main)
    knobs = Knobs("sft", tmp_path)
    assert bool(knobs.seen("seed", 7)) == keyed
