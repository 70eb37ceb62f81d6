"""From a rollout to what the update needs: scores, shaped rewards, advantages.

prompts -> `rollout.generate` -> Rollout -> `evaluate` -> Evaluation -> `shape_rewards`,
`advantages` -> Experience -> minibatches -> train steps (`ppo`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax import losses
from rlhf_jax.models.heads import ScalarModel, next_token_log_probs
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.rollout import Rollout
from rlhf_jax.runtime.settings import check

ADVANTAGES = (
    "gae",
    "total_return",
    "reward_to_go",
    "reward_to_go_baseline",
    "td",
    "k_step",
    "batch_mean",
    "rloo",
    "grpo",
)
REWARD_TRANSFORMS = ("none", "scale", "scale_discounted", "normalize")
RETURNS = ("gae", "monte_carlo")
# Choices of Φ_t whose baseline is the critic; the others train no critic.
CRITIC_ADVANTAGES = ("gae", "reward_to_go_baseline", "td", "k_step")


@flax.struct.dataclass
class Evaluation:
    """What the frozen models and the critic say of a rollout with B rows and G response columns.

    Attributes:
      ref_log_probs: `[B, G]` float32, under the reference, at the policy's temperature.
      scores: `[B]` float32, the reward model's at the last real token.
      values: `[B, G]` float32, V(s_t) of the state before response token t; zeros without critic.
    """

    ref_log_probs: jax.Array
    scores: jax.Array
    values: jax.Array


class Experience(flax.struct.PyTreeNode):
    """A scored rollout: the content of the experience buffer.

    Attributes:
      rollout: the sampled tokens and their log-probabilities.
      evaluation: scores, values and reference log-probabilities.
      rewards: `[B, G]` float32, r_t after shaping.
      advantages: `[B, G]` float32, Φ_t of the policy gradient; 0 on padding.
      returns: `[B, G]` float32, the critic's targets; 0 on padding.
    """

    rollout: Rollout
    evaluation: Evaluation
    rewards: jax.Array
    advantages: jax.Array
    returns: jax.Array


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Shaping of rewards (slides "Reward Scaling", "Reward Normalization and Clipping").

    Attributes:
      transform: "none"; "scale" divides by the running std of scores; "scale_discounted" divides
        by the running std, over all real tokens, of the rolling discounted sum of rewards;
        "normalize" subtracts the running mean of scores and divides by their std.
      clip: δ, scores are clipped to ±clip after the transform; 0 is off.
      missing_eos_penalty: subtracted, after transform and clipping, from the score of a response
        that was cut at the length limit. A reward model reads its score at EOS and has never
        learned what an unfinished text is worth.
    """

    transform: str = "normalize"
    clip: float = 0.0
    missing_eos_penalty: float = 0.0

    def __post_init__(self):
        check(
            self,
            transform=REWARD_TRANSFORMS,
            clip="[0, inf)",
            missing_eos_penalty="[0, 1e6]",
        )


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """Which Φ_t weights the policy gradient (slides "Policy Gradient Methods", "GAE").

    Attributes:
      method: "gae"; "total_return" R(τ); "reward_to_go"; "reward_to_go_baseline" minus V(s_t);
        "td" δ_t; "k_step"; "batch_mean", "rloo", "grpo": the total return minus a baseline from
        other samples (all of the batch; the others of the prompt; mean and std of the prompt's).
      discount: γ.
      lambda_: λ of GAE.
      k: steps of "k_step".
      returns: the critic's target: "gae" is A + V_old, "monte_carlo" the discounted rewards-to-go.
    """

    method: str = "gae"
    discount: float = 1.0
    lambda_: float = 0.9
    k: int = 1
    returns: str = "gae"

    def __post_init__(self):
        check(
            self,
            method=ADVANTAGES,
            discount="[0, 1]",
            lambda_="[0, 1]",
            k="[1, inf)",
            returns=RETURNS,
        )

    @property
    def needs_critic(self) -> bool:
        """Whether Φ_t uses V(s_t)."""
        return self.method in CRITIC_ADVANTAGES

    def check_samples(self, samples_per_prompt: int) -> None:
        """Checks that a Φ which compares samples of one prompt gets several.

        Raises:
          ValueError: a prompt has one sample.
        """
        if self.method in ("rloo", "grpo") and samples_per_prompt < 2:
            raise ValueError(
                f"advantage.method={self.method!r} compares samples of one prompt; "
                f"samples_per_prompt={samples_per_prompt} must be at least 2"
            )


def evaluate(
    rollout: Rollout,
    reference: Transformer,
    reward_model: ScalarModel,
    critic: ScalarModel | None,
    *,
    temperature: float,
    microbatches: int = 1,
) -> Evaluation:
    """Runs the three models over a rollout; jit it with the keywords bound.

    Args:
      rollout: B rows.
      reference: frozen copy of the initial policy.
      reward_model: its score is read at the last real token.
      critic: None for a Φ_t without one.
      temperature: that of the policy.
      microbatches: parts in which the rows are processed, one after the other.
    """
    start = rollout.prompt_length

    def run(part: Rollout) -> Evaluation:
        log_probs, _ = next_token_log_probs(
            reference, part.tokens, part.segments, start=start, temperature=temperature
        )
        values = jnp.zeros_like(log_probs)
        if critic is not None:
            values = state_values(critic, part)
        return Evaluation(log_probs, reward_model.scores(part.tokens, part.segments), values)

    if microbatches == 1:
        return run(rollout)
    if rollout.tokens.shape[0] % microbatches:
        raise ValueError(
            f"a rollout of {rollout.tokens.shape[0]} must be divisible by "
            f"{microbatches} microbatches"
        )
    parts = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1),
        rollout,
    )
    stacked = jax.lax.map(run, parts)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), stacked)


def state_values(critic: ScalarModel, rollout: Rollout) -> jax.Array:
    """`[B, G]` V(s_t): read at the token before response token t, so that V does not see a_t."""
    start = rollout.prompt_length
    hidden = critic.trunk(rollout.tokens, rollout.segments)
    return critic.read(hidden[:, start - 1 : -1])


def shape_rewards(
    rollout: Rollout,
    evaluation: Evaluation,
    moments: losses.RunningMoments,
    *,
    config: RewardConfig,
    discount: float,
    kl_coef: jax.Array | float,
) -> tuple[jax.Array, losses.RunningMoments]:
    """r_t: the transformed score on the last real token, minus the KL penalty on every token.

    The moments are updated first, so that the first batch is normalised by itself.

    Returns:
      Rewards `[B, G]`, 0 on padding, and the new moments.
    """
    scores = evaluation.scores
    clip = config.clip or jnp.inf
    if config.transform == "scale_discounted":
        last = losses.last_token_mask(rollout.response_mask)
        at_end = jnp.where(last, scores[:, None], 0.0)
        sums = losses.rolling_discounted_sum(at_end, discount=discount, where=rollout.response_mask)
        # Over every real token: on the last one alone the sum is the score, and this is "scale".
        moments = losses.update_moments(moments, sums, where=rollout.response_mask)
    else:
        moments = losses.update_moments(moments, scores)
    if config.transform == "normalize":
        scores = losses.normalize_rewards(scores, moments, clip=clip)
    else:
        if config.transform != "none":
            scores = losses.scale_rewards(scores, moments)
        scores = jnp.clip(scores, -clip, clip)
    # After the transform: the penalty keeps its size whatever the scale of the reward model, and
    # neither moves the moments nor is clipped away.
    scores = scores - config.missing_eos_penalty * ~rollout.ended
    rewards = losses.kl_shaped_rewards(
        scores,
        rollout.log_probs,
        evaluation.ref_log_probs,
        kl_coef=kl_coef,
        where=rollout.response_mask,
    )
    return rewards, moments


def advantages(
    rewards: jax.Array,
    values: jax.Array,
    where: jax.Array,
    *,
    config: AdvantageConfig,
    samples_per_prompt: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Φ_t and the critic's targets.

    Args:
      rewards: `[B, G]`.
      values: `[B, G]`.
      where: `[B, G]` bool, real response tokens.
      config: choice of Φ.
      samples_per_prompt: adjacent rows that share a prompt ("rloo", "grpo").

    Returns:
      Advantages and returns, `[B, G]` each, 0 on padding.

    Raises:
      ValueError: a Φ compares samples of one prompt, and a prompt has one.
    """
    config.check_samples(samples_per_prompt)
    discount = config.discount
    to_go = losses.rewards_to_go(rewards, discount=discount, where=where)
    totals = to_go[:, 0]
    method = config.method
    if method == "gae":
        phi = losses.gae(rewards, values, discount=discount, lambda_=config.lambda_, where=where)
    elif method == "td":
        phi = losses.td_errors(rewards, values, discount=discount, where=where)
    elif method == "k_step":
        phi = losses.k_step_advantages(rewards, values, discount=discount, k=config.k, where=where)
    elif method == "reward_to_go":
        phi = to_go
    elif method == "reward_to_go_baseline":
        phi = to_go - values
    else:
        phi = _sequence_phi(totals, method, samples_per_prompt)[:, None] * jnp.ones_like(rewards)
    phi = jnp.where(where, phi, 0.0)
    returns = phi + values if method == "gae" and config.returns == "gae" else to_go
    return phi, jnp.where(where, returns, 0.0)


def _sequence_phi(totals: jax.Array, method: str, samples_per_prompt: int) -> jax.Array:
    """One weight per sequence `[B]`, from the total returns `[B]`."""
    if method == "total_return":
        return totals
    if method == "batch_mean":
        return totals - losses.batch_mean_baseline(totals)
    groups = totals.reshape(-1, samples_per_prompt)
    if method == "rloo":
        return (groups - losses.leave_one_out_baseline(groups)).reshape(-1)
    return losses.group_advantages(groups).reshape(-1)


def take(tree: Any, rows: jax.Array) -> Any:
    """The given rows of every array of an experience: a minibatch."""
    return jax.tree.map(lambda x: x[rows], tree)
