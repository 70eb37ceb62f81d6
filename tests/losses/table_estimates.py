"""Cases: masking, log-probabilities, divergences, returns, advantages, rewards, baselines."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import losses
from tests.losses.harness import Case
from tests.references import returns, tokens

_REWARDS = {"rewards": "real:T", "where": "mask:T"}
_CRITIC = {"rewards": "real:T", "values": "real:T", "where": "mask:T"}
_CUT_OFF = {**_CRITIC, "bootstrap": "real:"}
_COVER = {"rewards": "where", "values": "where"}
_SHAPED = {
    "scores": "real:",
    "log_probs": "log_prob:T",
    "ref_log_probs": "log_prob:T",
    "where": "mask:T",
}
_SEEN = losses.RunningMoments(*(jnp.float32(v) for v in (10.0, 0.5, 40.0)))  # mean 0.5, std 2


def _tokens() -> list[Case]:
    x, x_cover = {"x": "real:T", "where": "mask:T"}, {"x": "where"}
    lp, lp_cover = {"log_probs": "log_prob:T", "where": "mask:T"}, {"log_probs": "where"}
    x_diff, lp_diff = ("x",), ("log_probs",)
    logits = {"logits": "real:TV", "tokens": "token:T"}
    targets = {"logits": "real:TV", "targets": "token:T"}
    both = {"logits_p": "real:V", "logits_q": "real:V"}
    two = {"log_probs": "log_prob:T", "ref_log_probs": "log_prob:T"}
    ratio = {"log_probs": "log_prob:T", "old_log_probs": "log_prob:T"}
    coef = {"coef": "positive:-", "kl": "positive:-"}
    t = tokens
    return [
        Case("masked_fill", x, t.masked_fill, {"fill": 2.0}, "element", x_diff, x_cover),
        Case("masked_sum", x, t.masked_sum, {}, "whole", x_diff, x_cover),
        Case("masked_mean", x, t.masked_mean, {}, "whole", x_diff, x_cover),
        Case("masked_mean", x, t.masked_mean, {}, "row", x_diff, x_cover, _over_last_axis),
        Case("masked_var", x, t.masked_var, {}, "whole", x_diff, x_cover),
        Case("masked_whiten", x, t.masked_whiten, {}, "whole", x_diff, x_cover),
        Case("masked_whiten", x, t.masked_whiten, {"shift_mean": False}, "whole", x_diff, x_cover),
        Case("last_token_mask", {"where": "mask:T"}, t.last_token_mask),
        Case(
            "select_log_probs",
            targets,
            t.select_log_probs,
            {"temperature": 0.7},
            "row",
            ("logits",),
        ),
        Case(
            "token_log_probs", logits, t.token_log_probs, {"temperature": 0.7}, "row", ("logits",)
        ),
        Case(
            "sequence_log_prob",
            lp,
            t.sequence_log_prob,
            {"normalize": False},
            "row",
            lp_diff,
            lp_cover,
        ),
        Case(
            "sequence_log_prob",
            lp,
            t.sequence_log_prob,
            {"normalize": True},
            "row",
            lp_diff,
            lp_cover,
        ),
        Case("entropy", {"logits": "real:V"}, t.entropy, {}, "row", ("logits",)),
        *(
            Case("kl_estimate", two, t.kl_estimate, {"estimator": k}, "element", lp_diff)
            for k in ("k1", "k2", "k3")
        ),
        Case("old_policy_kl", ratio, t.old_policy_kl, {}, "element", lp_diff),
        Case("kl_divergence", both, t.kl_divergence, {}, "row", ("logits_p", "logits_q")),
        Case(
            "adaptive_kl_coef",
            coef,
            t.adaptive_kl_coef,
            {"target": 1.2, "horizon": 9.0, "steps": 2},
            "whole",
        ),
        Case("adaptive_penalty_coef", coef, t.adaptive_penalty_coef, {"target": 0.5}, "whole"),
    ]


def _over_last_axis(x: jax.Array, where: jax.Array) -> jax.Array:
    return losses.masked_mean(x, where=where, axis=-1)


def _returns() -> list[Case]:
    r, g, r_cover = returns, {"discount": 0.9}, {"rewards": "where"}
    k2, k9, gl = {**g, "k": 2}, {**g, "k": 9}, {**g, "lambda_": 0.8}
    cut = {**_REWARDS, "bootstrap": "real:"}
    shaped_cover = {"log_probs": "where", "ref_log_probs": "where"}
    adv, adv_cover = {"advantages": "real:T", "where": "mask:T"}, {"advantages": "where"}
    scores = {"scores": "real:K"}
    return [
        Case("rewards_to_go", _REWARDS, r.rewards_to_go, g, masks=r_cover),
        Case("rewards_to_go", cut, r.rewards_to_go, g, masks=r_cover),
        Case("total_return", _REWARDS, r.total_return, g, masks=r_cover),
        Case("total_return", cut, r.total_return, g, masks=r_cover),
        Case("td_errors", _CRITIC, r.td_errors, g, masks=_COVER),
        Case("td_errors", _CUT_OFF, r.td_errors, g, masks=_COVER),
        Case("k_step_returns", _CRITIC, r.k_step_returns, k2, masks=_COVER),
        Case("k_step_returns", _CUT_OFF, r.k_step_returns, k9, masks=_COVER),
        Case("k_step_advantages", _CRITIC, r.k_step_advantages, k2, masks=_COVER),
        Case("k_step_advantages", _CUT_OFF, r.k_step_advantages, k9, masks=_COVER),
        Case("gae", _CRITIC, r.gae, gl, masks=_COVER),
        Case("gae", _CUT_OFF, r.gae, gl, masks=_COVER),
        Case(
            "kl_shaped_rewards", _SHAPED, r.kl_shaped_rewards, {"kl_coef": 0.3}, masks=shaped_cover
        ),
        Case(
            "sequence_kl_reward",
            _SHAPED,
            r.sequence_kl_reward,
            {"kl_coef": 0.3},
            masks=shaped_cover,
        ),
        Case("rolling_discounted_sum", _REWARDS, r.rolling_discounted_sum, g, masks=r_cover),
        Case(
            "scale_rewards",
            {"rewards": "real:T"},
            lambda rewards, moments: rewards / 2,
            {"moments": _SEEN},
            "element",
        ),
        Case(
            "normalize_rewards",
            {"rewards": "real:T"},
            lambda rewards, moments, clip: np.clip((rewards - 0.5) / 2, -clip, clip),
            {"moments": _SEEN, "clip": 0.4},
            "element",
        ),
        Case(
            "normalize_advantages",
            adv,
            r.normalize_advantages,
            {"clip": 0.8},
            "whole",
            (),
            adv_cover,
        ),
        Case("normalize_advantages", adv, r.normalize_advantages, {}, "whole", (), adv_cover),
        Case("batch_mean_baseline", scores, r.batch_mean_baseline, {}, "whole"),
        Case("leave_one_out_baseline", scores, r.leave_one_out_baseline),
        Case("group_mean_baseline", scores, r.group_mean_baseline),
        Case("group_advantages", scores, r.group_advantages, {"eps": 1e-4}),
    ]


CASES = [*_tokens(), *_returns()]
