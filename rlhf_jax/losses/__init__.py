"""The loss library: arrays in, arrays out. Needs jax and chex only.

Shapes are [..., T] for tokens, [...] for sequences; nothing is reduced; `where` is a boolean mask;
what a paper calls constant carries no gradient.
"""

from rlhf_jax.losses.advantages import (
    gae,
    k_step_advantages,
    k_step_returns,
    rewards_to_go,
    td_errors,
    total_return,
)
from rlhf_jax.losses.baselines import (
    batch_mean_baseline,
    group_advantages,
    group_mean_baseline,
    leave_one_out_baseline,
)
from rlhf_jax.losses.dpo import (
    dpo_diagnostics,
    dpo_gradient_coefficient,
    dpo_hinge_loss,
    dpo_loss,
    implicit_rewards,
    ipo_loss,
)
from rlhf_jax.losses.kl import (
    adaptive_kl_coef,
    adaptive_penalty_coef,
    kl_divergence,
    kl_estimate,
    old_policy_kl,
)
from rlhf_jax.losses.log_probs import (
    entropy,
    select_log_probs,
    sequence_log_prob,
    token_log_probs,
)
from rlhf_jax.losses.masking import (
    last_token_mask,
    masked_fill,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
)
from rlhf_jax.losses.moments import (
    RunningMoments,
    merge_moments,
    merge_moments_across,
    update_moments,
)
from rlhf_jax.losses.policy import (
    entropy_bonus,
    importance_weights,
    policy_gradient_loss,
    ppo_clip_loss,
    ppo_diagnostics,
    ppo_penalty_loss,
    trpo_surrogate,
)
from rlhf_jax.losses.process import (
    aggregate_step_scores,
    outcome_loss,
    step_label_loss,
    step_scores,
    until_first_error,
)
from rlhf_jax.losses.quality import (
    figa_weights,
    hindsight_loss_mask,
    hindsight_visible,
    quality_weights,
    quark_loss,
)
from rlhf_jax.losses.reward import (
    bradley_terry_loss,
    language_model_loss,
    pairwise_ranking_loss,
    plackett_luce_loss,
    pointwise_loss,
    preference_accuracy,
    soft_preference_loss,
)
from rlhf_jax.losses.rewards import (
    kl_shaped_rewards,
    normalize_advantages,
    normalize_rewards,
    rolling_discounted_sum,
    scale_rewards,
    sequence_kl_reward,
)
from rlhf_jax.losses.supervised import (
    log1m_exp,
    orpo_loss,
    pro_loss,
    rrhf_loss,
    slic_loss,
    unlikelihood_loss,
)
from rlhf_jax.losses.value import (
    clipped_value_loss,
    explained_variance,
    value_diagnostics,
    value_loss,
)

__all__ = [
    "RunningMoments",
    "adaptive_kl_coef",
    "adaptive_penalty_coef",
    "aggregate_step_scores",
    "batch_mean_baseline",
    "bradley_terry_loss",
    "clipped_value_loss",
    "dpo_diagnostics",
    "dpo_gradient_coefficient",
    "dpo_hinge_loss",
    "dpo_loss",
    "entropy",
    "entropy_bonus",
    "explained_variance",
    "figa_weights",
    "gae",
    "group_advantages",
    "group_mean_baseline",
    "hindsight_loss_mask",
    "hindsight_visible",
    "implicit_rewards",
    "importance_weights",
    "ipo_loss",
    "k_step_advantages",
    "k_step_returns",
    "kl_divergence",
    "kl_estimate",
    "kl_shaped_rewards",
    "language_model_loss",
    "last_token_mask",
    "leave_one_out_baseline",
    "log1m_exp",
    "masked_fill",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "merge_moments",
    "merge_moments_across",
    "normalize_advantages",
    "normalize_rewards",
    "old_policy_kl",
    "orpo_loss",
    "outcome_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "pointwise_loss",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "ppo_diagnostics",
    "ppo_penalty_loss",
    "preference_accuracy",
    "pro_loss",
    "quality_weights",
    "quark_loss",
    "rewards_to_go",
    "rolling_discounted_sum",
    "rrhf_loss",
    "scale_rewards",
    "select_log_probs",
    "sequence_kl_reward",
    "sequence_log_prob",
    "slic_loss",
    "soft_preference_loss",
    "step_label_loss",
    "step_scores",
    "td_errors",
    "token_log_probs",
    "total_return",
    "trpo_surrogate",
    "unlikelihood_loss",
    "until_first_error",
    "update_moments",
    "value_diagnostics",
    "value_loss",
]
