"""Cases: policy, value, reward model, DPO, supervised alignment, process supervision."""

from tests.losses.harness import Case
from tests.references import alignment, objectives, preferences


def _sums(names: str) -> dict[str, str]:
    return {name: "log_prob:" for name in names.split()}


_RATIO = {"log_probs": "log_prob:T", "old_log_probs": "log_prob:T", "advantages": "real:T"}
_PAIR = _sums("chosen_log_probs rejected_log_probs ref_chosen_log_probs ref_rejected_log_probs")
_BOTH = ("chosen_log_probs", "rejected_log_probs")
_RANKED = {"log_probs": "log_prob:KT", "where": "mask:KT"}


def _objectives() -> list[Case]:
    o, lp = objectives, ("log_probs",)
    weighted = {"log_probs": "log_prob:T", "weights": "real:T"}
    behaviour = {"log_probs": "log_prob:T", "behaviour_log_probs": "log_prob:T"}
    diag = {"log_probs": "log_prob:T", "old_log_probs": "log_prob:T", "where": "mask:T"}
    diag_cover = {"log_probs": "where", "old_log_probs": "where"}
    value = {"values": "real:T", "returns": "real:T"}
    clipped = {"values": "real:T", "old_values": "real:T", "returns": "real:T"}
    value_cover = {"values": "where", "returns": "where"}
    with_kl = {**_RATIO, "kl": "positive:T"}
    bonus = {"weight": 0.3, "max_entropy": 1.5}
    return [
        Case("policy_gradient_loss", weighted, o.policy_gradient_loss, {}, "element", lp),
        Case("importance_weights", behaviour, o.importance_weights, {}, "element", lp),
        Case("ppo_clip_loss", _RATIO, o.ppo_clip_loss, {"clip_eps": 0.2}, "element", lp),
        Case("ppo_clip_loss", _RATIO, o.ppo_clip_loss, {"clip_eps": (0.1, 0.6)}, "element", lp),
        Case(
            "ppo_penalty_loss",
            with_kl,
            o.ppo_penalty_loss,
            {"kl_coef": 0.3},
            "element",
            ("log_probs", "kl"),
        ),
        Case("trpo_surrogate", _RATIO, o.trpo_surrogate, {}, "element", lp),
        Case(
            "entropy_bonus",
            {"entropies": "positive:T"},
            o.entropy_bonus,
            bonus,
            "element",
            ("entropies",),
        ),
        Case(
            "ppo_diagnostics", diag, o.ppo_diagnostics, {"clip_eps": 0.2}, "element", (), diag_cover
        ),
        Case(
            "ppo_diagnostics",
            diag,
            o.ppo_diagnostics,
            {"clip_eps": (0.1, 0.6)},
            "element",
            (),
            diag_cover,
        ),
        Case(
            "value_diagnostics",
            {"values": "real:T", "old_values": "real:T", "where": "mask:T"},
            o.value_diagnostics,
            {"clip_eps": 0.8},
            "element",
            (),
            {"values": "where", "old_values": "where"},
        ),
        Case("value_loss", value, o.value_loss, {}, "element", ("values",)),
        Case(
            "clipped_value_loss",
            clipped,
            o.clipped_value_loss,
            {"clip_eps": 0.2},
            "element",
            ("values",),
        ),
        Case(
            "explained_variance",
            {**value, "where": "mask:T"},
            o.explained_variance,
            {},
            "whole",
            (),
            value_cover,
        ),
    ]


def _preferences() -> list[Case]:
    p, beta = preferences, {"beta": 0.4}
    chosen = ("chosen_rewards", "rejected_rewards")
    rewards = dict.fromkeys(chosen, "real:")
    margin = {**rewards, "margin": "positive:"}
    soft = {"rewards_a": "real:", "rewards_b": "real:", "prob_a": "prob:"}
    ranking = {"rewards": "real:K", "where": "mask:K"}
    ranks, r_cover = {**ranking, "ranks": "rank:K"}, {"rewards": "where", "ranks": "where"}
    lm = {"log_probs": "log_prob:T", "where": "mask:T"}
    diag = {name: "log_prob:K" for name in _PAIR} | {"where": "mask:K"}
    return [
        Case(
            "pointwise_loss",
            {"rewards": "real:", "ratings": "real:"},
            p.pointwise_loss,
            {},
            "element",
            ("rewards",),
        ),
        Case(
            "bradley_terry_loss", rewards, p.bradley_terry_loss, {"margin": 0.5}, "element", chosen
        ),
        Case("bradley_terry_loss", margin, p.bradley_terry_loss, {}, "element", chosen),
        Case(
            "pairwise_ranking_loss",
            ranks,
            p.pairwise_ranking_loss,
            {},
            "row",
            ("rewards",),
            r_cover,
        ),
        Case(
            "plackett_luce_loss",
            ranking,
            p.plackett_luce_loss,
            {},
            "row",
            ("rewards",),
            {"rewards": "where"},
        ),
        Case(
            "soft_preference_loss",
            soft,
            p.soft_preference_loss,
            {},
            "element",
            ("rewards_a", "rewards_b"),
        ),
        Case("preference_accuracy", rewards, p.preference_accuracy, {}, "element"),
        Case(
            "language_model_loss",
            lm,
            p.language_model_loss,
            {"normalize": True},
            "row",
            ("log_probs",),
            {"log_probs": "where"},
        ),
        *(
            Case(
                "language_model_loss",
                lm,
                p.language_model_terms,
                {"normalize": normalize, "per_token": True},
                "row",
                ("log_probs",),
                {"log_probs": "where"},
            )
            for normalize in (False, True)
        ),
        Case("dpo_loss", _PAIR, p.dpo_loss, {**beta, "label_smoothing": 0.1}, "element", _BOTH),
        Case("ipo_loss", _PAIR, p.ipo_loss, beta, "element", _BOTH),
        Case("dpo_hinge_loss", _PAIR, p.dpo_hinge_loss, beta, "element", _BOTH),
        Case(
            "simpo_loss",
            _sums("chosen_log_probs rejected_log_probs"),
            p.simpo_loss,
            {"beta": 2.0, "margin": 0.7},
            "element",
            _BOTH,
        ),
        Case(
            "kto_loss",
            {**_sums("log_probs ref_log_probs"), "desirable": "flag:", "kl": "positive:"},
            p.kto_loss,
            {**beta, "desirable_weight": 1.3, "undesirable_weight": 0.6},
            "element",
            ("log_probs",),
        ),
        Case(
            "implicit_rewards",
            _sums("log_probs ref_log_probs"),
            p.implicit_rewards,
            beta,
            "element",
        ),
        Case("dpo_gradient_coefficient", _PAIR, p.dpo_gradient_coefficient, beta, "element"),
        Case(
            "dpo_diagnostics",
            diag,
            p.dpo_diagnostics,
            beta,
            "element",
            (),
            dict.fromkeys(_PAIR, "where"),
        ),
    ]


def _alignment() -> list[Case]:
    a, lp = alignment, ("log_probs",)
    scored, ranked = {**_RANKED, "scores": "real:K"}, {**_RANKED, "rewards": "falling:K"}
    quark = {"log_probs": "log_prob:T", "kl": "positive:T", "entropies": "positive:T"}
    slic = _sums("chosen_log_probs rejected_log_probs target_log_probs")
    edits = {
        "tokens": "rank:T",
        "other_tokens": "rank:K",
        "where": "mask:T",
        "other_where": "mask:K",
    }
    steps = {"logits": "real:TC", "labels": "label:T", "where": "mask:T"}
    outcome = {"logits": "real:T", "correct": "prob:", "where": "mask:T"}
    probs, labels = {"probs": "prob:T", "where": "mask:T"}, {"labels": "label:T", "where": "mask:T"}
    hindsight = {"is_output": "flag:T", "where": "mask:T"}
    weights = {"rank_weight": 0.7, "length_power": 0.5}
    return [
        Case("rrhf_loss", scored, a.rrhf_loss, weights, "row", lp, {"log_probs": "where"}),
        Case(
            "slic_loss",
            slic,
            a.slic_loss,
            {"margin": 1.0, "target_weight": 0.3},
            "element",
            tuple(slic),
        ),
        Case(
            "pro_loss", ranked, a.pro_loss, {"sft_weight": 0.2}, "row", lp, {"log_probs": "where"}
        ),
        Case("orpo_loss", _sums(" ".join(_BOTH)), a.orpo_loss, {"weight": 0.3}, "element", _BOTH),
        Case(
            "unlikelihood_loss", {"log_probs": "log_prob:T"}, a.unlikelihood_loss, {}, "element", lp
        ),
        Case("log1m_exp", {"x": "log_prob:T"}, a.log1m_exp, {}, "element", ("x",)),
        Case(
            "quark_loss",
            quark,
            a.quark_loss,
            {"kl_coef": 0.05, "entropy_coef": 0.06},
            "element",
            tuple(quark),
        ),
        Case("quality_weights", {"rewards": "real:"}, a.quality_weights, {"beta": 0.8}, "element"),
        Case(
            "figa_weights",
            edits,
            a.figa_weights,
            {"weight": 0.5},
            masks={"tokens": "where", "other_tokens": "other_where"},
        ),
        Case("hindsight_loss_mask", hindsight, a.hindsight_loss_mask),
        Case(
            "step_label_loss",
            steps,
            a.step_label_loss,
            {},
            "row",
            ("logits",),
            {"logits": "where", "labels": "where"},
        ),
        Case("outcome_loss", outcome, a.outcome_loss, {}, "row", ("logits",), {"logits": "where"}),
        Case("until_first_error", labels, a.until_first_error, masks={"labels": "where"}),
        *(
            Case(
                "step_scores",
                {"logits": "real:TC"},
                a.step_scores,
                {"neutral": n},
                "row",
                ("logits",),
            )
            for n in ("positive", "negative")
        ),
        *(
            Case(
                "aggregate_step_scores",
                probs,
                a.aggregate_step_scores,
                {"method": m},
                "row",
                ("probs",),
                {"probs": "where"},
            )
            for m in ("product", "min")
        ),
    ]


CASES = [*_objectives(), *_preferences(), *_alignment()]
