"""PPO-max and every ablation of the deck: Algorithm 1 on language.

  python -m experiments.ppo_max --config configs/ppo_max.py:quickstart

Ablations are variants of the config (see configs/ppo_max.py). Writes `model/`, report.md with
figures, metrics.jsonl, config.json and summary.json to the run folder.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import data, harness, ppo_setup, reporting, stages
from experiments.ppo_setup import rollout_batch
from experiments.responses import Respondent, make_generate, rollout_statistics
from rlhf_jax import losses
from rlhf_jax.evaluation.comparison import win_tie_lose
from rlhf_jax.evaluation.judges import VaderJudge
from rlhf_jax.methods import ppo
from rlhf_jax.rollouts.experience import AdvantageConfig, take
from rlhf_jax.runtime import distributed
from rlhf_jax.training.step import TrainState

experience_metrics = jax.jit(ppo.experience_metrics)
# Of the first minibatch, before any update: 0, 1 and 1 where sampler and trainer agree.
FIRST = {
    "policy/approx_kl": "policy/approx_kl_first",
    "policy/ratio_max": "policy/ratio_max_first",
    "policy/ratio_min": "policy/ratio_min_first",
}


@flax.struct.dataclass
class PPOState:
    """Everything that a run changes, and so everything that a resumed run needs.

    Attributes:
      policy: π_θ and its optimizer.
      critic: V_φ and its optimizer; None for a Φ_t without critic.
      moments: Running moments of the reward.
      kl_coef: η of the token-level KL penalty.
      penalty_coef: β of PPO-penalty.
    """

    policy: TrainState
    critic: TrainState | None
    moments: losses.RunningMoments
    kl_coef: jax.Array
    penalty_coef: jax.Array


def adapt(state: PPOState, config: ConfigDict, statistics: dict, approx_kl: Any) -> PPOState:
    """Adaptive coefficients, where a target is set."""
    if config.kl.target:
        coef = losses.adaptive_kl_coef(
            state.kl_coef,
            jnp.float32(statistics["policy/kl_ref_sequence"]),
            target=config.kl.target,
            horizon=config.kl.horizon,
            steps=rollout_batch(config),
        )
        state = state.replace(kl_coef=coef)
    if config.penalty.target and approx_kl is not None:  # None while the critic trains alone
        coef = losses.adaptive_penalty_coef(
            state.penalty_coef, approx_kl, target=config.penalty.target
        )
        state = state.replace(penalty_coef=coef)
    return state


def minibatches(config: ConfigDict, iteration: int):
    """Row indices of each minibatch of an iteration: every epoch visits every row once."""
    rng = np.random.default_rng((config.seed, iteration))
    for _ in range(config.train.epochs):
        order = rng.permutation(rollout_batch(config))
        yield from order.reshape(-1, config.train.minibatch)


def update(state, experience, config, iteration, steps, ptx_batches, sharding):
    """Lines 5 and 6 of Algorithm 1: minibatch steps of critic and policy.

    Returns:
      The new state, and metrics of the last minibatch plus those of the first that `FIRST` names.
    """
    policy_step, critic_step, take_rows = steps
    # Rows past the end would not fail: the last one would be taken again and again.
    chex.assert_axis_dimension(experience.rewards, 0, rollout_batch(config))
    metrics: dict[str, Any] = {}
    pretraining = iteration < config.train.critic_pretrain_iterations
    for number, rows in enumerate(minibatches(config, iteration)):
        minibatch = take_rows(experience, rows)
        if state.critic is not None:
            critic, critic_metrics = critic_step(state.critic, (minibatch, None))
            state = state.replace(critic=critic)
            metrics |= {
                name.replace("optim/", "critic/"): value for name, value in critic_metrics.items()
            }
        if pretraining:
            continue
        ptx = sharding.put_batch(next(ptx_batches)) if config.ppo.ptx_coef else None
        policy, policy_metrics = policy_step(state.policy, (minibatch, ptx), state.penalty_coef)
        state = state.replace(policy=policy)
        metrics |= policy_metrics
        if number == 0:
            metrics |= {FIRST[n]: policy_metrics[n] for n in FIRST if n in policy_metrics}
    return state, metrics


def main(config: ConfigDict) -> None:
    """Trains, compares with SFT and reports; resumes where an earlier run stopped."""
    if stages.skip_if_finished(config, "PPO"):
        return
    train, inputs, sharding = config.train, config.inputs, stages.make_sharding(config)
    advantage = AdvantageConfig(samples_per_prompt=train.samples_per_prompt, **config.advantage)
    ppo_setup.check(config, advantage, sharding.data)

    # 1. What the stages before left: policy and reference from SFT, and the reward model.
    ppo_setup.require_inputs(config)
    tokenizer = stages.load_tokenizer(inputs.reference, inputs.policy, inputs.reward_model)
    policy, reference = ppo_setup.load_policies(config, sharding)
    reward_model = ppo_setup.load_reward_model(config, policy, sharding)

    # 2. Prompts to train on, SFT text for the ptx loss, and prompts that no stage has seen.
    prompts = data.prompt_batches(config, tokenizer, "train").share(sharding.local_rows)
    ptx_batches = data.ptx_batches(config, tokenizer).share(sharding.local_rows)
    judge, generate = VaderJudge(), make_generate(tokenizer, config, sharding)
    respond = {
        split: Respondent(
            generate,
            batches=data.fixed_prompts(config, tokenizer, split, rollout_batch(config)),
            tokenizer=tokenizer,
            judge=judge,
            reference=reference,
            reward_model=reward_model,
            sharding=sharding,
            temperature=config.sampling.temperature or 1.0,
            show=data.shown_prompt(config, tokenizer),
        )
        for split in ("validation", "test")
    }

    # 3. Compiled functions and the state.
    per_iteration = train.epochs * rollout_batch(config) // train.minibatch
    score = ppo_setup.make_score(config, advantage, sharding)
    take_rows = jax.jit(take, out_shardings=sharding.batch)
    optimizers, schedule = ppo_setup.make_optimizers(config, train.iterations * per_iteration)
    policy_state, critic, critic_state = ppo_setup.create_states(
        config, sharding, policy, reward_model, optimizers
    )
    policy_step, critic_step = ppo_setup.make_updates(
        config, sharding, optimizers, policy.trunk, critic and critic.trunk
    )
    state = PPOState(
        policy=policy_state,
        critic=critic_state,
        moments=sharding.put_everywhere(losses.RunningMoments.zeros()),
        kl_coef=sharding.put_everywhere(jnp.float32(config.kl.coef)),
        penalty_coef=sharding.put_everywhere(jnp.float32(config.penalty.coef)),
    )
    frozen = {"reference": reference, "reward model": reward_model}
    harness.banner(
        "PPO",
        ppo_setup.derived_numbers(
            config, stages.parameters_line(policy, state.policy.model), sharding, prompts
        )
        | stages.memory_lines(
            sharding,
            {"policy": state.policy, "critic": state.critic},
            frozen,
            accumulated=train.microbatch < train.minibatch,
        ),
    )
    sample_key, eval_key = jax.random.split(jax.random.key(config.seed))
    sft_valid = respond["validation"](reference, eval_key, config.eval.prompts)

    # 4. Algorithm 1.
    show = ("reward/mean", "judge/win_rate", "policy/kl_ref_sequence")
    with harness.Run(config, total=train.iterations, desc="PPO", show=show) as run:
        state = run.restore(state, prompts, ptx_batches)
        for iteration in run.steps():
            asked = data.each_repeated(next(prompts), train.samples_per_prompt)
            batch = sharding.put_batch(asked)
            rollout = generate(
                policy.sampling_model(state.policy.model),
                batch["tokens"],
                batch["mask"],
                jax.random.fold_in(sample_key, iteration),
            )
            critic_model = None if critic is None else critic.model(state.critic.model)
            experience, moments = score(
                rollout, reference, reward_model, critic_model, state.moments, state.kl_coef
            )
            state = state.replace(moments=moments)
            fetched = distributed.fetch((rollout, experience.evaluation))
            statistics = rollout_statistics(*fetched)
            state, metrics = update(
                state,
                experience,
                config,
                iteration,
                (policy_step, critic_step, take_rows),
                ptx_batches,
                sharding,
            )
            state = adapt(state, config, statistics, metrics.get("policy/approx_kl"))
            metrics |= statistics | experience_metrics(experience)
            metrics["optim/learning_rate"] = schedule(state.policy.step)
            metrics["policy/kl_coef"] = state.kl_coef
            if (iteration + 1) % config.eval.every == 0:
                answers = respond["validation"](
                    policy.sampling_model(state.policy.model), eval_key, config.eval.prompts
                )
                wins = win_tie_lose(answers.judged, sft_valid.judged)
                metrics |= {f"eval/{k}": v for k, v in answers.statistics.items()}
                metrics["judge/win_rate"] = wins.win_rate
                metrics["judge/mean"] = answers.statistics["judge/mean"]
            run.log(iteration, metrics)
            run.checkpoint(iteration, state, prompts, ptx_batches)

    # 5. Save, compare with SFT on prompts that no stage has seen, report.
    trained = state.policy.model
    model = stages.save_tuned(policy, trained, run.workdir, tokenizer, base=inputs.policy)
    answers = {
        "SFT": respond["test"](reference, eval_key, config.eval.final_prompts),
        config.label: respond["test"](model, eval_key, config.eval.final_prompts),
    }
    reporting.write(config, run, answers, notes=reporting.figure_4(config, run.workdir, answers))


if __name__ == "__main__":
    harness.cli(main, default="configs/ppo_max.py:quickstart")
