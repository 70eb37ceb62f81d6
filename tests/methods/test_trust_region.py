"""The trust-region step on problems whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import kl_divergence, select_log_probs, trpo_surrogate
from rlhf_jax.methods.trust_region import trust_region_step

FISHER = jnp.array([[4.0, 1.0], [1.0, 2.0]])
SLOPE = jnp.array([1.0, 3.0])


def linear(theta):
    return SLOPE @ theta


def quadratic(theta):
    return theta @ FISHER @ theta / 2


def test_natural_gradient_of_a_quadratic_bound():
    # F⁻¹g = (−1, 11)/7 for F = [[4, 1], [1, 2]], g = (1, 3); the step is √(2δ / gᵀF⁻¹g) of it.
    direction = np.array([-1.0, 11.0]) / 7
    length = np.sqrt(2 * 0.01 / (direction @ np.asarray(SLOPE)))
    theta, info = trust_region_step(jnp.zeros(2), linear, quadratic, max_kl=0.011, damping=0.0)
    np.testing.assert_allclose(theta, length * direction * np.sqrt(1.1), rtol=1e-4)
    np.testing.assert_allclose(info["optim/grad_norm"], np.sqrt(10), rtol=1e-6)
    assert info["optim/cg_residual"] < 1e-4


def test_damping_shortens_the_step():
    # x = (F + 5)⁻¹ g for F + 5 = [[9, 1], [1, 7]]: (4, 26)/62; the bound is taken with F + 5 too.
    direction = np.array([4.0, 26.0]) / 62
    length = np.sqrt(2 * 0.01 / (direction @ np.asarray(SLOPE)))
    damped, _ = trust_region_step(jnp.zeros(2), linear, quadratic, max_kl=0.01, damping=5.0)
    np.testing.assert_allclose(damped, length * direction, rtol=1e-4)
    assert quadratic(damped) < 0.9 * 0.01


def test_backtracks_until_the_bound_holds():
    def steep(theta):  # curvature at 0 sees only the square; the bound is the quartic's
        return quadratic(theta) + 1e4 * jnp.sum(theta**4)

    theta, info = trust_region_step(jnp.zeros(2), linear, steep, max_kl=0.01, damping=0.0)
    assert info["policy/accepted"] and 0 < info["policy/step_fraction"] < 1
    assert steep(theta) <= 0.01 and linear(theta) > 0
    np.testing.assert_allclose(info["policy/kl"], steep(theta), rtol=1e-6)


def test_backtracks_until_it_improves():
    def bumpy(theta):  # better at first, worse at the length that the bound would allow
        return linear(theta) - 400 * jnp.sum(theta**2)

    theta, info = trust_region_step(jnp.zeros(2), bumpy, quadratic, max_kl=0.01, damping=0.0)
    assert info["policy/accepted"] and info["policy/step_fraction"] < 1
    assert bumpy(theta) > 0
    np.testing.assert_allclose(info["policy/improvement"], bumpy(theta), rtol=1e-5)


@pytest.mark.parametrize("bad", ["never better", "not a number", "flat"])
def test_stays_where_it_is_when_no_step_helps(bad):
    def surrogate(theta):
        if bad == "flat":
            return jnp.sum(theta) * 0
        away = linear(theta) if bad == "never better" else jnp.log(linear(theta)) * 0
        return jnp.where(jnp.any(theta != 0), -jnp.abs(away) - 1, 0) + linear(theta) * 1e-9

    start = jnp.zeros(2)
    theta, info = trust_region_step(start, surrogate, quadratic, max_kl=0.01, backtracks=4)
    np.testing.assert_array_equal(theta, start)
    assert not info["policy/accepted"] and info["policy/step_fraction"] == 0
    assert info["policy/kl"] == 0


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_a_tree_moves_along_the_solution_for_all_its_entries(damping):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    matrix = root @ root.T + np.eye(5)
    slope = np.array([1.0, 2.0, 3.0, 1.0, -2.0])

    def flat(tree):
        return jnp.concatenate([tree["a"], tree["b"][0]])

    def kl(tree):
        return flat(tree) @ jnp.asarray(matrix, jnp.float32) @ flat(tree) / 2

    def gain(tree):
        return jnp.asarray(slope, jnp.float32) @ flat(tree)

    start = {"a": jnp.zeros(3), "b": jnp.zeros((1, 2))}
    moved, info = trust_region_step(start, gain, kl, max_kl=0.01, damping=damping)
    x = np.linalg.solve(matrix + damping * np.eye(5), slope)
    length = float(info["policy/step_fraction"]) * np.sqrt(2 * 0.01 / (slope @ x))
    np.testing.assert_allclose(flat(moved), length * x, rtol=1e-3)
    assert info["optim/cg_residual"] < 1e-4 * info["optim/grad_norm"]


def test_few_iterations_leave_a_residual():
    # One iteration: x = (gᵀg / gᵀFg) g = 10/28 (1, 3), Fx − g = (2.5, 2.5) − (1, 3).
    theta, info = trust_region_step(
        jnp.zeros(2), linear, quadratic, max_kl=0.01, damping=0.0, cg_iterations=1
    )
    np.testing.assert_allclose(info["optim/cg_residual"], np.sqrt(2.5), rtol=1e-5)
    np.testing.assert_allclose(theta[1] / theta[0], 3, rtol=1e-5)


def test_stays_where_it_is_when_the_bound_is_flat():
    def nowhere(theta):
        return 0 * jnp.sum(theta)

    start = jnp.ones(2)
    theta, info = trust_region_step(start, linear, nowhere, max_kl=0.01, damping=0.0)
    np.testing.assert_array_equal(theta, start)
    assert not info["policy/accepted"]


def test_parameters_in_half_precision_take_the_step_of_those_in_full():
    def half(function):
        return lambda theta: function(theta.astype(jnp.float32))

    start = jnp.zeros(2, jnp.bfloat16)
    halved, info = trust_region_step(start, half(linear), half(quadratic), max_kl=0.01)
    full, _ = trust_region_step(jnp.zeros(2), linear, quadratic, max_kl=0.01)
    assert halved.dtype == jnp.bfloat16 and info["optim/cg_residual"] < 0.02
    np.testing.assert_allclose(halved.astype(jnp.float32), full, rtol=0.01)


def test_a_policy_moves_to_the_rewarded_action_within_the_bound():
    states = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), jnp.float32)
    actions = jnp.array([0, 1, 2, 3] * 2)
    advantages = jnp.where(actions == 2, 1.0, -0.3)
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros((1, 4))}

    def logits(p):
        return states @ p["w"] + jnp.broadcast_to(p["b"], (8, 4))

    old_logits = logits(params)
    old = select_log_probs(old_logits, actions)

    def surrogate(p):
        return jnp.mean(trpo_surrogate(select_log_probs(logits(p), actions), old, advantages))

    def kl(p):
        return jnp.mean(kl_divergence(old_logits, logits(p)))

    @jax.jit
    def step(p):
        return trust_region_step(p, surrogate, kl, max_kl=0.01, damping=0.01)

    moved, info = step(params)
    assert info["policy/accepted"] and info["policy/improvement"] > 0
    assert 0.002 < kl(moved) <= 0.01  # it uses the room that it has
    before, after = jax.nn.softmax(old_logits), jax.nn.softmax(logits(moved))
    assert after[:, 2].mean() > before[:, 2].mean()
    assert jax.tree.structure(moved) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "setting", [{"damping": -1.0}, {"cg_iterations": 0}, {"backtracks": 0}, {"shrink": 1.0}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        trust_region_step(jnp.zeros(2), linear, quadratic, max_kl=0.01, **setting)
