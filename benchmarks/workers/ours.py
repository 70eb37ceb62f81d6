"""rlhf_jax at the shapes of a case: the compiled functions of the experiments, nothing else.

python benchmarks/workers/ours.py '{"case": "generate", ...}' --alone 5
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workers.turns import Turns, repeat
from configs import ppo_max as ppo_max_config
from experiments.command import open_config
from experiments.ppo_max import Settings
from rlhf_jax.methods import dpo, sft
from rlhf_jax.methods.ppo_max import PPOMax, PPOMaxConfig
from rlhf_jax.models.files import hf_weights
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.lora import Tuning
from rlhf_jax.rollouts.rollout import SamplingConfig, make_generate
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler
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
    sampler = make_generate(SamplingConfig(spec["new"]), eos_ids=NO_EOS, pad_id=0)
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
    step = make_train_step(sft.loss_fn, optimizer, sharding, prepare=sft.prepare)
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
    loss = functools.partial(dpo.loss_fn, config=dpo.DPOConfig("dpo", beta=0.1))
    step = make_train_step(loss, optimizer, sharding, prepare=dpo.prepare)
    state, score = create_state(model, optimizer, sharding), jax.jit(dpo.sequence_log_probs)
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


def ppo_config(spec: dict) -> PPOMaxConfig:
    """PPO-max without the ptx loss, which the peers do not have, at the sizes of the case."""
    config = ppo_max_config.get_config("quickstart")
    # More iterations than anybody measures, so that the learning rate stays what it is.
    config.train.update(
        iterations=1000, prompts_per_iteration=spec["batch"], minibatch=spec["batch"]
    )
    config.train.critic_pretrain_iterations = 0
    config.sampling.max_new_tokens = spec["new"]
    config.ppo.ptx_coef = 0.0
    return open_config("ppo_max", config, Settings).method()


def ppo_step(spec: dict):
    """One iteration: sample, score with three models, advantages, update policy and critic."""
    policy = hf_weights.load_model(spec["model"])
    vocab = policy.config.vocab_size
    reference = jax.tree.map(jnp.copy, policy)
    reward_model, critic = (ScalarModel(reference, jax.random.key(seed)) for seed in (1, 2))
    method = PPOMax(
        ppo_config(spec),
        policy=Tuning(policy),
        reference=reference,
        reward_model=reward_model,
        make_critic=lambda _: Tuning(critic),
        eos_ids=NO_EOS,
        pad_id=0,
        sharding=Sharding(make_mesh(1), "zero2"),
    )
    state, iterations = method.start(), iter(range(10**6))
    prompts = tokens_of(spec["batch"], spec["prompt"], vocab=vocab)
    asked = {"tokens": prompts, "mask": np.ones(prompts.shape, bool)}

    def work():
        nonlocal state
        number = next(iterations)
        rollout = method.sample(state, asked, number)
        experience, state = method.score(state, rollout)
        updates = []
        for minibatch in method.minibatches(experience, number):
            state, metrics = method.update(state, minibatch, iter(()), number)
            updates.append(metrics)
        jax.device_get(method.metrics(experience, updates))

    return work


CASES = {"generate": generation, "sft": supervised, "dpo": preferences, "ppo": ppo_step}


def main() -> None:
    """Takes turns with the peers."""
    turns = Turns("jax", "flax", "optax", "numpy")  # before jax starts: it pins the process
    reuse_freed_memory()  # as every experiment does
    jax.config.update("jax_platforms", "cpu")
    guard_cpu_compiler()
    work = CASES[turns.spec["case"]](turns.spec)
    turns.hello()
    repeat(turns, work)


if __name__ == "__main__":
    main()
