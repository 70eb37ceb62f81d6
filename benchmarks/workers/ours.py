"""rlhf_jax at the shapes of a case: the compiled functions of the experiments, nothing else.

python benchmarks/workers/ours.py '{"case": "generate", ...}' --alone 5
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workers.turns import Turns, repeat
from configs import ppo_max as ppo_max_config
from experiments import dpo, dpo_setup, ppo_max, ppo_setup, sft
from experiments.responses import jit_generate
from rlhf_jax import losses
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rollouts.experience import AdvantageConfig, take
from rlhf_jax.rollouts.rollout import SamplingConfig, generate
from rlhf_jax.runtime.host_memory import reuse_freed_memory
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import create_state, make_train_step

NO_EOS = (-1,)  # no token ends a response: every library makes the same number of tokens


def tokens_of(*shape: int, vocab: int) -> np.ndarray:
    """Random tokens without the special ones."""
    return np.random.default_rng(0).integers(4, vocab, shape, np.int32)


def generation(spec: dict):
    """Samples `new` tokens after prompts of `prompt`, with their log-probabilities."""
    model = hf_weights.load_model(spec["model"])
    sampler = jax.jit(
        functools.partial(generate, config=SamplingConfig(spec["new"]), eos_ids=NO_EOS, pad_id=0)
    )
    prompts = tokens_of(spec["batch"], spec["prompt"], vocab=model.config.vocab_size)
    mask = np.ones(prompts.shape, bool)
    seeds = iter(range(10**6))

    def work():
        rollout = sampler(model, prompts, mask, jax.random.key(next(seeds)))
        assert np.asarray(rollout.mask).all(), "a response ended early"

    return work


def supervised(spec: dict):
    """One update on `batch` rows of `length` tokens: forward, backward, clipping, AdamW."""
    model, sharding = hf_weights.load_model(spec["model"]), Sharding(make_mesh(1), "zero2")
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1e-5), 1000)
    step = make_train_step(sft.loss_fn, optimizer, sharding, prepare=sft.weigh)
    state = create_state(model, optimizer, sharding)
    tokens = tokens_of(spec["batch"], spec["length"], vocab=model.config.vocab_size)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens)}
    batch["loss_mask"] = np.ones(tokens.shape, bool)

    def work():
        nonlocal state
        state, metrics = step(state, sharding.put_batch(batch))
        float(metrics["loss/lm"])

    return work


def preferences(spec: dict):
    """One DPO update on `batch` pairs, the reference's pass over both sides included."""
    model, sharding = hf_weights.load_model(spec["model"]), Sharding(make_mesh(1), "zero2")
    reference = jax.tree.map(jnp.copy, model)
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1e-6), 1000)
    loss = functools.partial(dpo.loss_fn, config=dpo_setup.DPOConfig("dpo", beta=0.1))
    step = make_train_step(loss, optimizer, sharding, prepare=dpo.weigh)
    state, score = create_state(model, optimizer, sharding), jax.jit(dpo_setup.sequence_log_probs)
    length = spec["prompt"] + spec["new"]
    tokens = tokens_of(spec["batch"], 2, length, vocab=model.config.vocab_size)
    mask = np.broadcast_to(np.arange(length) >= spec["prompt"], tokens.shape)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens), "loss_mask": mask}
    valid = np.ones(spec["batch"], bool)

    def work():
        nonlocal state
        placed = sharding.put_batch(batch)
        extra = {"ref_log_probs": score(reference, placed), "valid": valid}
        state, metrics = step(state, placed | extra)
        float(metrics["loss/dpo"])

    return work


def ppo_config(spec: dict):
    """PPO-max without the ptx loss, which the peers do not have, at the sizes of the case."""
    config = ppo_max_config.get_config("quickstart")
    config.train.update(
        prompts_per_iteration=spec["batch"], minibatch=spec["batch"], microbatch=spec["batch"]
    )
    config.train.critic_pretrain_iterations = 0
    config.sampling.max_new_tokens = spec["new"]
    config.ppo.ptx_coef = 0.0
    return config


def ppo_step(spec: dict):
    """One iteration: sample, score with three models, advantages, update policy and critic."""
    config, sharding = ppo_config(spec), Sharding(make_mesh(1), "zero2")
    policy = hf_weights.load_model(spec["model"])
    vocab = policy.config.vocab_size
    reference = jax.tree.map(jnp.copy, policy)
    reward_model, critic = (ScalarModel(reference, jax.random.key(seed)) for seed in (1, 2))
    sampler = jit_generate(config, NO_EOS, 0, sharding)
    score = ppo_setup.make_score(config, AdvantageConfig(**config.advantage), sharding)
    optimizers, _ = ppo_setup.make_optimizers(config, 1000)
    policy_step, critic_step = ppo_setup.make_updates(config, sharding, optimizers)
    state = ppo_max.PPOState(
        policy=create_state(policy, optimizers[0], sharding),
        critic=create_state(critic, optimizers[1], sharding),
        moments=losses.RunningMoments.zeros(),
        kl_coef=jnp.float32(config.kl.coef),
        penalty_coef=jnp.float32(config.penalty.coef),
    )
    prompts = tokens_of(spec["batch"], spec["prompt"], vocab=vocab)
    batch = {"tokens": prompts, "mask": np.ones(prompts.shape, bool)}
    steps = (policy_step, critic_step, jax.jit(take))
    iterations = iter(range(10**6))

    def work():
        nonlocal state
        number, placed = next(iterations), sharding.put_batch(batch)
        rollout = sampler(
            state.policy.model, placed["tokens"], placed["mask"], jax.random.key(number)
        )
        experience, moments = score(
            rollout, reference, reward_model, state.critic.model, state.moments, state.kl_coef
        )
        state, metrics = ppo_max.update(
            state.replace(moments=moments), experience, config, number, steps, None, sharding
        )
        jax.device_get(metrics | ppo_max.experience_metrics(experience))

    return work


CASES = {"generate": generation, "sft": supervised, "dpo": preferences, "ppo": ppo_step}


def main() -> None:
    """Takes turns with the peers."""
    turns = Turns("jax", "flax", "optax", "numpy")  # before jax starts: it pins the process
    reuse_freed_memory()  # as every experiment does
    jax.config.update("jax_platforms", "cpu")
    work = CASES[turns.spec["case"]](turns.spec)
    turns.hello()
    repeat(turns, work)


if __name__ == "__main__":
    main()
