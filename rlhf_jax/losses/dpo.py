"""Direct preference optimisation and its variants, on log-probabilities of whole responses.

Inputs are sums over response tokens (`sequence_log_prob`). The slides call the reference π_{θ_old}:
it is the frozen SFT policy, not the old policy of PPO.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import _checks as check
from rlhf_jax.losses._numbers import log_loss, select, subtractable
from rlhf_jax.losses.reward import preference_accuracy

Scalar = float | jax.Array


def dpo_loss(
    chosen_log_probs: jax.Array,
    rejected_log_probs: jax.Array,
    ref_chosen_log_probs: jax.Array,
    ref_rejected_log_probs: jax.Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """Preference loss whose reward is the policy itself.

        u = β log(π_θ(y⁺|x)/π_ref(y⁺|x)) − β log(π_θ(y⁻|x)/π_ref(y⁻|x))
        L = −(1 − ε) log σ(u) − ε log σ(−u)

    At the reference u = 0 and L = log 2. With ε = 0 the gradient is
    −β σ(−u) (∇log π_θ(y⁺|x) − ∇log π_θ(y⁻|x)).

    A log-ratio past 8.5e37, infinity included (a response that is impossible to one of the two
    policies), counts as 8.5e37 and has no gradient; of one that is impossible to both nothing is
    known, NaN. So in all of this file.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq 7; slide "DPO", whose π_{θ_old} is the
    frozen SFT policy π_ref. Label smoothing: Mitchell 2023, conservative DPO.

    Args:
      chosen_log_probs: log π_θ(y⁺|x), [...] float, differentiated.
      rejected_log_probs: log π_θ(y⁻|x), same shape, differentiated.
      ref_chosen_log_probs: log π_ref(y⁺|x), same shape, constant.
      ref_rejected_log_probs: log π_ref(y⁻|x), same shape, constant.
      beta: β, strength of the pull to the reference.
      label_smoothing: ε, the share of labels that are thought to be flipped, below ½.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.
      ValueError: label_smoothing is outside [0, ½).

    >>> at_reference = jnp.array([-5.0]), jnp.array([-7.0]), jnp.array([-5.0]), jnp.array([-7.0])
    >>> print(dpo_loss(*at_reference, beta=0.1).round(3))
    [0.693]
    """
    check.scalars(beta=beta, label_smoothing=label_smoothing)
    check.require(label_smoothing >= 0, f"label_smoothing={label_smoothing} must not be negative")
    check.require(label_smoothing < 0.5, f"label_smoothing={label_smoothing} must be below 0.5")
    u = beta * _log_ratio_margin(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    return log_loss(-u, label_smoothing)


def ipo_loss(
    chosen_log_probs: jax.Array,
    rejected_log_probs: jax.Array,
    ref_chosen_log_probs: jax.Array,
    ref_rejected_log_probs: jax.Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """Regression of the log-ratio margin to a fixed target: it does not run away on sure pairs.

        h = log(π_θ(y⁺|x)/π_ref(y⁺|x)) − log(π_θ(y⁻|x)/π_ref(y⁻|x))
        L = (h − 1/(2β))²

    From |h| = 1.8e19 on the square is inf in float32.

    Source: Azar et al. 2023 (arXiv 2310.12036), eq 17, whose τ is β here. Some implementations
    average over tokens first: `sequence_log_prob(..., normalize=True)`.

    Args:
      chosen_log_probs: log π_θ(y⁺|x), [...] float, differentiated.
      rejected_log_probs: log π_θ(y⁻|x), same shape, differentiated.
      ref_chosen_log_probs: log π_ref(y⁺|x), same shape, constant.
      ref_rejected_log_probs: log π_ref(y⁻|x), same shape, constant.
      beta: β, positive.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.
      ValueError: beta is not positive.

    >>> at_reference = jnp.array([-5.0]), jnp.array([-7.0]), jnp.array([-5.0]), jnp.array([-7.0])
    >>> print(ipo_loss(*at_reference, beta=0.5))
    [1.]
    """
    check.scalars(beta=beta)
    check.require(beta > 0, f"beta={beta} must be positive")
    margin = _log_ratio_margin(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    return jnp.square(margin - 1 / (2 * beta))


def dpo_hinge_loss(
    chosen_log_probs: jax.Array,
    rejected_log_probs: jax.Array,
    ref_chosen_log_probs: jax.Array,
    ref_rejected_log_probs: jax.Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """Hinge on the same margin: pairs that are right by 1 are left alone.

        L = max(0, 1 − u),  u as in `dpo_loss`

    Source: Liu et al. 2023 (RSO, arXiv 2309.06657), "hinge-norm": SLiC-HF with a
    reference.

    Args:
      chosen_log_probs: log π_θ(y⁺|x), [...] float, differentiated.
      rejected_log_probs: log π_θ(y⁻|x), same shape, differentiated.
      ref_chosen_log_probs: log π_ref(y⁺|x), same shape, constant.
      ref_rejected_log_probs: log π_ref(y⁻|x), same shape, constant.
      beta: β.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> at_reference = jnp.array([-5.0]), jnp.array([-7.0]), jnp.array([-5.0]), jnp.array([-7.0])
    >>> print(dpo_hinge_loss(*at_reference, beta=0.1))
    [1.]
    """
    check.scalars(beta=beta)
    margin = _log_ratio_margin(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    return jax.nn.relu(1 - beta * margin)


def simpo_loss(
    chosen_log_probs: jax.Array,
    rejected_log_probs: jax.Array,
    *,
    beta: Scalar,
    margin: Scalar,
) -> jax.Array:
    """Preference loss on means over tokens, with a margin and without a reference.

        u = β/|y⁺| log π_θ(y⁺|x) − β/|y⁻| log π_θ(y⁻|x) − γ
        L = −log σ(u)

    Source: Meng et al. 2024 (SimPO, arXiv 2405.14734), eq 6; there β is 2 to 10 and γ/β 0.3 to 0.6.

    Args:
      chosen_log_probs: log π_θ(y⁺|x) / |y⁺|, [...] float, means over tokens, differentiated.
      rejected_log_probs: log π_θ(y⁻|x) / |y⁻|, same shape, differentiated.
      beta: β.
      margin: γ, by which the chosen response is to win.

    Returns:
      [...], unreduced.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(simpo_loss(jnp.array([-2.0]), jnp.array([-2.5]), beta=2.0, margin=1.0).round(3))
    [0.693]
    """
    check.same_shape(
        check.floats(chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs)
    )
    check.scalars(beta=beta, margin=margin)
    u = beta * (subtractable(chosen_log_probs) - subtractable(rejected_log_probs)) - margin
    return jax.nn.softplus(-u)


def kto_loss(
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> jax.Array:
    """Each response by itself: what people want is to be above a reference point, the rest below.

        r = log(π_θ(y|x)/π_ref(y|x))
        L = λ_D σ(−β(r − z))  if y is desirable,   λ_U σ(β(r − z))  otherwise

    z is KL(π_θ ‖ π_ref), not differentiated. The paper estimates it from responses to other prompts
    of the batch, and takes 0 where the estimate is negative: the caller does.

    Source: Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), eq 8; its constant λ_y is left in:
    λ_y − v = λ_y (1 − σ(·)).

    Args:
      log_probs: log π_θ(y|x), [...] float, sums over tokens, differentiated.
      ref_log_probs: log π_ref(y|x), same shape, constant.
      desirable: True where people want the response, same shape, bool.
      kl: z, same shape, constant.
      beta: β.
      desirable_weight: λ_D.
      undesirable_weight: λ_U.

    Returns:
      [...], unreduced, between 0 and λ.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> at_reference = jnp.array([-5.0]), jnp.array([-5.0]), jnp.array([True]), jnp.zeros(1)
    >>> print(kto_loss(*at_reference, beta=0.1))
    [0.5]
    """
    check.same_shape(
        check.floats(log_probs=log_probs, ref_log_probs=ref_log_probs, kl=kl),
        check.masks(desirable=desirable),
    )
    check.scalars(
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    ref_log_probs, kl = jax.lax.stop_gradient((ref_log_probs, kl))
    above = beta * (subtractable(log_probs - ref_log_probs) - subtractable(kl))
    return jnp.where(
        desirable,
        desirable_weight * jax.nn.sigmoid(-above),
        undesirable_weight * jax.nn.sigmoid(above),
    )


def implicit_rewards(log_probs: jax.Array, ref_log_probs: jax.Array, *, beta: Scalar) -> jax.Array:
    """The reward that a policy stands for, up to a term of the prompt alone.

        r̂(x, y) = β log(π_θ(y|x) / π_ref(y|x))

    Source: Rafailov et al. 2023 (arXiv 2305.18290), §4 after eq 7; a slide once prints y⁻ on the
    right for any y.

    Args:
      log_probs: log π_θ(y|x), [...] float.
      ref_log_probs: log π_ref(y|x), same shape.
      beta: β.

    Returns:
      [...], unreduced, constant: a diagnostic.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> print(implicit_rewards(jnp.array([-3.0]), jnp.array([-5.0]), beta=0.5))
    [1.]
    """
    check.same_shape(check.floats(log_probs=log_probs, ref_log_probs=ref_log_probs))
    check.scalars(beta=beta)
    return jax.lax.stop_gradient(subtractable(beta * (log_probs - ref_log_probs)))


def dpo_gradient_coefficient(
    chosen_log_probs: jax.Array,
    rejected_log_probs: jax.Array,
    ref_chosen_log_probs: jax.Array,
    ref_rejected_log_probs: jax.Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """How hard DPO pulls on a pair: near 1 where it is ranked wrongly, near 0 where rightly.

        c = σ(r̂(x, y⁻) − r̂(x, y⁺)) = σ(−u),   ∇L = −β c (∇log π_θ(y⁺|x) − ∇log π_θ(y⁻|x))

    Source: Rafailov et al. 2023 (arXiv 2305.18290), §4 "What does the DPO update do?". The slide's
    text has the two rewards the other way round, and a step of its derivation prints ∇σ(u)/σ(u)
    where σ′(u)/σ(u) = σ(−u) belongs; its last formula is right.

    Args:
      chosen_log_probs: log π_θ(y⁺|x), [...] float.
      rejected_log_probs: log π_θ(y⁻|x), same shape.
      ref_chosen_log_probs: log π_ref(y⁺|x), same shape.
      ref_rejected_log_probs: log π_ref(y⁻|x), same shape.
      beta: β.

    Returns:
      [...] between 0 and 1, unreduced, constant: a diagnostic.

    Raises:
      AssertionError: shapes differ, or a type is not float.

    >>> at_reference = jnp.array([-5.0]), jnp.array([-7.0]), jnp.array([-5.0]), jnp.array([-7.0])
    >>> print(dpo_gradient_coefficient(*at_reference, beta=0.1))
    [0.5]
    """
    check.scalars(beta=beta)
    margin = _log_ratio_margin(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    return jax.lax.stop_gradient(jax.nn.sigmoid(-beta * margin))


def dpo_diagnostics(
    chosen_log_probs: jax.Array,
    rejected_log_probs: jax.Array,
    ref_chosen_log_probs: jax.Array,
    ref_rejected_log_probs: jax.Array,
    *,
    beta: Scalar,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """What the policy thinks of each pair: implicit rewards, right or wrong, and the pull left.

        margin = r̂(x, y⁺) − r̂(x, y⁻),   accuracy = 1[margin > 0] + ½ 1[margin = 0]

    Nothing is reduced: weigh them as the loss is weighed, or take `masked_mean`. They are
    constant, the log-probabilities too: a loss takes those from its caller.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), §4.

    Args:
      chosen_log_probs: log π_θ(y⁺|x), [...] float.
      rejected_log_probs: log π_θ(y⁻|x), same shape.
      ref_chosen_log_probs: log π_ref(y⁺|x), same shape.
      ref_rejected_log_probs: log π_ref(y⁻|x), same shape.
      beta: β.
      where: True on the pairs that count, same shape, bool; None is all.

    Returns:
      [...] each, unreduced, constant: dpo/accuracy (ties count one half), dpo/margin,
      dpo/chosen_log_prob, dpo/rejected_log_prob, dpo/chosen_reward, dpo/rejected_reward,
      dpo/gradient_coefficient. 0 where masked.

    Raises:
      AssertionError: shapes differ, or a type is wrong.

    >>> log_probs = jnp.array([-5.0]), jnp.array([-7.0]), jnp.array([-6.0]), jnp.array([-6.0])
    >>> print(dpo_diagnostics(*log_probs, beta=0.1)["dpo/margin"])
    [0.2]
    """
    four = [chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs]
    _check_pair(*four)
    if where is not None:
        check.same_shape({"chosen_log_probs": chosen_log_probs}, check.masks(where=where))
        four = [select(where, x) for x in four]
    chosen = implicit_rewards(four[0], four[2], beta=beta)
    rejected = implicit_rewards(four[1], four[3], beta=beta)
    numbers = {
        "dpo/accuracy": preference_accuracy(chosen, rejected),
        "dpo/margin": chosen - rejected,
        "dpo/chosen_log_prob": jax.lax.stop_gradient(four[0]),
        "dpo/rejected_log_prob": jax.lax.stop_gradient(four[1]),
        "dpo/chosen_reward": chosen,
        "dpo/rejected_reward": rejected,
        "dpo/gradient_coefficient": dpo_gradient_coefficient(*four, beta=beta),
    }
    if where is None:
        return numbers
    return {name: select(where, number) for name, number in numbers.items()}


def _log_ratio_margin(
    chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array
) -> jax.Array:
    """h = log(π_θ(y⁺)/π_ref(y⁺)) − log(π_θ(y⁻)/π_ref(y⁻)); the reference is constant."""
    _check_pair(chosen, rejected, ref_chosen, ref_rejected)
    ref_chosen, ref_rejected = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    return subtractable(chosen - ref_chosen) - subtractable(rejected - ref_rejected)


def _check_pair(
    chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array
) -> None:
    check.same_shape(
        check.floats(
            chosen_log_probs=chosen,
            rejected_log_probs=rejected,
            ref_chosen_log_probs=ref_chosen,
            ref_rejected_log_probs=ref_rejected,
        )
    )
