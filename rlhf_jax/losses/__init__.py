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
from rlhf_jax.losses.kl import (
    adaptive_kl_coef,
    adaptive_penalty_coef,
    kl_divergence,
    kl_estimate,
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
from rlhf_jax.losses.moments import RunningMoments, merge_moments, update_moments
from rlhf_jax.losses.policy import (
    entropy_bonus,
    importance_weights,
    policy_gradient_loss,
    ppo_clip_loss,
    ppo_diagnostics,
    ppo_penalty_loss,
    trpo_surrogate,
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
from rlhf_jax.losses.value import clipped_value_loss, explained_variance, value_loss

__all__ = [
    "RunningMoments",
    "adaptive_kl_coef",
    "adaptive_penalty_coef",
    "batch_mean_baseline",
    "bradley_terry_loss",
    "clipped_value_loss",
    "entropy",
    "entropy_bonus",
    "explained_variance",
    "gae",
    "group_advantages",
    "group_mean_baseline",
    "importance_weights",
    "k_step_advantages",
    "k_step_returns",
    "kl_divergence",
    "kl_estimate",
    "kl_shaped_rewards",
    "language_model_loss",
    "last_token_mask",
    "leave_one_out_baseline",
    "masked_fill",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "merge_moments",
    "normalize_advantages",
    "normalize_rewards",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "pointwise_loss",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "ppo_diagnostics",
    "ppo_penalty_loss",
    "preference_accuracy",
    "rewards_to_go",
    "rolling_discounted_sum",
    "scale_rewards",
    "select_log_probs",
    "sequence_kl_reward",
    "sequence_log_prob",
    "soft_preference_loss",
    "td_errors",
    "token_log_probs",
    "total_return",
    "trpo_surrogate",
    "update_moments",
    "value_loss",
]
