"""Direct preference optimisation: no reward model and no sampling, the policy is its own reward.

  python -m experiments.dpo --config configs/dpo.py:quickstart

Training starts at the reference, the SFT policy, whose log-probabilities of every pair are computed
once and kept. Chosen and rejected go through the policy in one forward pass.

Pairs of reviews have an empty prompt: DPO learns which whole reviews are better than others. The
evaluation asks for something else, to go on from the opening words of a review that no stage has
seen, on the prompts of PPO-max and with its keys. DPO never sees the texts that it is judged by.

Writes `model/`, report.md with figures, metrics.jsonl, config.json, summary.json and the cached
`reference_*.npz` to the run folder. Deck: "DPO".
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import data, dpo_setup, harness, reporting, stages
from experiments.dpo_setup import DPOConfig, PairSet, log_probs_of_pairs, sequence_log_probs
from rlhf_jax import losses
from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation.comparison import win_tie_lose
from rlhf_jax.evaluation.panels import DPO_PANELS, PPO_PANELS
from rlhf_jax.methods.reductions import weighted_sum
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.runtime import distributed
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import create_state, make_train_step

_SAMPLED = {"judge/win_rate", "policy/kl_ref_sequence", "policy/perplexity", "response/distinct_2"}
PANELS = (*DPO_PANELS, *(panel for panel in PPO_PANELS if _SAMPLED & set(panel.metrics)))


def loss_fn(model: Transformer, batch: dict, *, config: DPOConfig) -> tuple[jax.Array, dict]:
    """L = -log σ(β log(π(y⁺)/π_ref(y⁺)) - β log(π(y⁻)/π_ref(y⁻))), or what `config` names.

    Args:
      model: The policy π.
      batch: Tokens, segments and loss mask `[B, 2, T]`, chosen first, `ref_log_probs [B, 2]`, and
        weights from `weigh`.
      config: The loss.
    """
    log_probs = sequence_log_probs(model, batch)
    metrics = pair_metrics(log_probs, batch["ref_log_probs"], batch["pair_weights"], config=config)
    if not config.sft_coef:
        return metrics["loss/dpo"], metrics
    return metrics["loss/dpo"] - config.sft_coef * metrics["dpo/chosen_log_prob"], metrics


def pair_metrics(
    log_probs: jax.Array, ref_log_probs: jax.Array, weights: jax.Array, *, config: DPOConfig
) -> dict[str, jax.Array]:
    """Weighted sums over pairs: the loss, whichever it is, and what the policy thinks of them.

    Args:
      log_probs: `[B, 2]`, of the policy, chosen first; the loss is differentiated in it.
      ref_log_probs: `[B, 2]`, of the reference.
      weights: `[B]`, of each pair.
      config: The loss.
    """
    four = (*log_probs.T, *ref_log_probs.T)
    rewards = losses.implicit_rewards(log_probs, ref_log_probs, beta=config.beta)
    chosen, rejected = rewards.T
    numbers = {
        "loss/dpo": config.loss(*four),
        "dpo/accuracy": losses.preference_accuracy(chosen, rejected),
        "dpo/margin": chosen - rejected,
        "dpo/chosen_log_prob": log_probs[:, 0],
        "dpo/rejected_log_prob": log_probs[:, 1],
        "dpo/chosen_reward": chosen,
        "dpo/rejected_reward": rejected,
        "dpo/gradient_coefficient": losses.dpo_gradient_coefficient(*four, beta=config.beta),
    }
    return {name: weighted_sum(number, weights) for name, number in numbers.items()}


_pair_metrics = jax.jit(pair_metrics, static_argnames="config")


def weigh(batch: dict) -> dict:
    """Adds each pair's weight in the mean over the whole batch."""
    valid = batch["valid"]
    return {**batch, "pair_weights": valid / jnp.maximum(valid.sum(), 1)}


def evaluate(
    model: Transformer, held_out: PairSet, ref_log_probs: np.ndarray, config: DPOConfig, sharding
) -> dict[str, jax.Array]:
    """`pair_metrics` of held-out pairs under names that begin with `eval/`."""
    count = len(held_out.pairs)
    log_probs = log_probs_of_pairs(model, held_out.batches, count, sharding)
    weights = np.full(count, 1 / count, np.float32)
    metrics = _pair_metrics(log_probs, ref_log_probs, weights, config=config)
    return {f"eval/{name}": value for name, value in metrics.items()}


def main(config: ConfigDict) -> None:
    """Trains, compares with SFT and PPO-max and reports; resumes where an earlier run stopped."""
    distributed.require_one("DPO")
    if stages.skip_if_finished(config, "DPO"):
        return
    dpo_config = DPOConfig(**config.dpo)
    train, inputs, sharding = config.train, config.inputs, stages.make_sharding(config)
    devices = sharding.mesh.size

    # 1. The SFT policy, as it is and to be trained; adapters leave one copy to be both.
    folder = stages.require(
        inputs.reference, stage="sft", variant=inputs.variant, build=inputs.build
    )
    tokenizer = stages.load_tokenizer(folder)
    policy = stages.make_tuning(config, stages.load_policy(folder, config, sharding))
    reference = policy.trunk or stages.load_policy(folder, config, sharding, frozen=True)

    # 2. Pairs that people have ranked; pairs and prompts to measure with.
    pairs = data.preference_pairs(config, tokenizer, "train", config.data.pairs)
    batches = data.pair_batches(pairs, tokenizer, train, config.seed, devices)
    validation = dpo_setup.held_out_pairs(
        config, tokenizer, "validation", config.data.validation_pairs, devices
    )
    test = dpo_setup.held_out_pairs(config, tokenizer, "test", config.data.eval_pairs, devices)
    scorer = dpo_setup.load_reward_model(config, sharding)
    respond = dpo_setup.make_respondents(config, tokenizer, reference, scorer, sharding)

    # 3. Optimizer and the compiled step.
    harness.positive("eval.every", config.eval.every)
    optimizer, schedule = make_optimizer(OptimizerConfig(**config.optimizer), train.steps)
    train_step = make_train_step(
        functools.partial(loss_fn, config=dpo_config),
        optimizer,
        sharding,
        microbatches=train.microbatches,
        prepare=weigh,
        trunk=policy.trunk,
    )
    state = create_state(policy.take(), optimizer, sharding)
    harness.banner(
        "DPO",
        {
            "policy": f"{stages.parameters_line(policy, state.model)}, from {folder}",
            "pairs": f"{len(pairs):,} ({len(validation.pairs):,} and {len(test.pairs):,} held out)",
            "pairs per update": f"{train.min_pairs} to {train.max_pairs}, "
            f"at most {train.max_tokens:,} tokens",
            "batches": batches.describe(),
            "updates": f"{train.steps:,}, {train.steps / batches.steps_per_epoch:.2f} epochs",
            "devices": f"{devices}, {sharding.mode}",
            "run folder": config.workdir,
        },
    )
    # The same key as in ppo_max, so that SFT gives the same responses there and here.
    _, eval_key = jax.random.split(jax.random.key(config.seed))
    sft_valid = respond["validation"](reference, eval_key, config.eval.prompts)

    show = ("loss/dpo", "dpo/accuracy", "judge/win_rate")
    with harness.Run(config, total=train.steps, desc="DPO", show=show) as run:
        # 4. log π_ref of both sides of every pair, once.
        cache = functools.partial(dpo_setup.reference_log_probs, reference, sharding=sharding)
        ref_train = cache(run.workdir / "reference_train.npz", pairs, batches.once())
        ref_valid = cache(run.workdir / "reference_validation.npz", *validation)

        # 5. Train.
        state = run.restore(state, batches)
        for step in run.steps():
            batch = next(batches)
            batch["ref_log_probs"] = ref_train[batch["index"]]
            state, metrics = train_step(state, sharding.put_batch(batch))
            metrics["optim/learning_rate"] = schedule(step)
            if (step + 1) % config.eval.every == 0 or step + 1 == train.steps:
                model = policy.sampling_model(state.model)
                metrics |= evaluate(model, validation, ref_valid, dpo_config, sharding)
                answers = respond["validation"](model, eval_key, config.eval.prompts)
                wins = win_tie_lose(answers.judged, sft_valid.judged)
                metrics |= {f"eval/{k}": v for k, v in answers.statistics.items()}
                metrics["judge/win_rate"] = wins.win_rate
            run.log(step, metrics)
            run.checkpoint(step, state, batches)

    # 6. Save, compare on prompts and pairs that no stage has seen, report.
    trained = stages.save_tuned(policy, state.model, run.workdir, tokenizer, base=folder)
    policies, notes = dpo_setup.policies_to_compare(config, reference, trained, sharding)
    answers = {
        name: respond["test"](model, eval_key, config.eval.final_prompts)
        for name, model in policies.items()
    }
    accuracy = dpo_setup.compare_on_pairs(policies, test, tokenizer, scorer, sharding)
    for name in set(answers) & set(accuracy):
        answers[name].statistics["pairs/accuracy"] = accuracy[name].value
    reporting.write(
        config,
        run,
        answers,
        plot=functools.partial(plots.plot_dpo, panels=PANELS),
        notes=(dpo_setup.tell_accuracy(accuracy, len(test.pairs)), *notes),
        summary={"pair_accuracy": accuracy, "held_out_pairs": len(test.pairs)},
    )


if __name__ == "__main__":
    harness.cli(main, default="configs/dpo.py:quickstart")
