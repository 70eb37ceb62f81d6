"""SFT, a reward model, PPO-max and DPO for two steps each, through `rlhf_jax` alone.

What a notebook elsewhere does after `pip install rlhf_jax`, without the experiments of a checkout.
Prints one line for each method; fails where a step changes nothing or a number is not finite.
"""

import functools
import json
import math
import tempfile
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.data import batches, templates, tokenizer
from rlhf_jax.methods import dpo, reward_model, sft
from rlhf_jax.methods.pairwise import PairTrainConfig
from rlhf_jax.methods.ppo_max import PPOMax, PPOMaxConfig, PPOTrainConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.lora import Tuning
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.rollout import SamplingConfig
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.tasks import TaskConfig, make_task
from rlhf_jax.training.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.training.run import Run
from rlhf_jax.training.step import create_state

STEPS = 2
SHARDING = Sharding(make_mesh(1))
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def write_pairs(path: Path) -> str:
    """A file of JSON lines: pairs of answers, the polite one first."""
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "warm", "cold", "small", "large", "old", "new", "bright"]
    with path.open("w") as file:
        for _ in range(200):
            said = " ".join(rng.choice(words, 5))
            row = {"prompt": f"say {said}", "chosen": f" {said} please", "rejected": f" {said} no"}
            file.write(json.dumps(row) + "\n")
    return f"jsonl:{path}"


def report(name: str, before, after, metrics: dict) -> None:
    """Fails unless the weights moved and every number is finite."""
    numbers = {key: float(value) for key, value in metrics.items()}
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    moved = jax.tree.map(lambda x, y: float(abs(np.asarray(x) - y).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 0, f"{name} moved nothing"
    print("trained", name, json.dumps(numbers))


def train(name: str, folder: Path, model, step, examples, *extra):
    """Two steps of a method in a run folder; returns the trained model."""
    start = jax.tree.map(np.asarray, model)
    optimizer, _ = make_optimizer(OPTIMIZER, STEPS)
    state, train_step = create_state(model, optimizer, SHARDING), step(optimizer, SHARDING)
    with Run(folder / name, total=STEPS, desc=name) as run:
        state = run.restore(state, examples)
        for number in run.steps():
            batch = next(examples)
            for add in extra:
                batch = add(batch)
            state, metrics = train_step(state, SHARDING.put_batch(batch))
            run.log(number, metrics)
            run.checkpoint(number, state, examples)
    report(name, start, state.model, metrics)
    return state.model


def main(folder: Path) -> None:
    """Each method after the other, each on what the one before left."""
    task = make_task(TaskConfig(write_pairs(folder / "pairs.jsonl")))
    words = tokenizer.train_bpe(task.texts(), 300)
    pad_id = words.pad_token_id
    sizes = ModelConfig(len(words), hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)

    # SFT from scratch.
    config = sft.SFTConfig(steps=STEPS, minibatch=4, row_length=32)
    documents = task.documents(words, "train", max_length=32)
    rows = batches.packed_batches(documents, rows=4, length=32, seed=0, pad_id=pad_id)
    policy = Transformer(sizes, jax.random.key(0))
    policy = train("sft", folder, policy, functools.partial(sft.make_step, config), rows)

    # A reward model from it.
    of_pairs = PairTrainConfig(steps=STEPS, max_tokens=1024, min_pairs=4, max_pairs=8)
    pairs = task.preferences(words, "train", max_length=32, count=100)
    settings = of_pairs.batching(devices=1) | {"pad_id": pad_id}
    loss = reward_model.RewardModelConfig(lm_coef=0.1)
    scorer = train(
        "reward_model",
        folder,
        ScalarModel(policy, jax.random.key(1)),
        functools.partial(reward_model.make_step, loss, of_pairs),
        batches.pair_batches(pairs, seed=0, **settings),
    )

    # PPO-max of the policy against it.
    method = PPOMax(
        PPOMaxConfig(
            train=PPOTrainConfig(iterations=STEPS, prompts_per_iteration=8, minibatch=4),
            sampling=SamplingConfig(max_new_tokens=6),
            optimizer=OPTIMIZER,
            critic_optimizer=OPTIMIZER,
        ),
        policy=Tuning(policy),
        reference=policy,
        reward_model=scorer,
        make_critic=lambda language: Tuning(ScalarModel(language)),
        eos_ids=tuple(templates.stop_tokens(words)),
        pad_id=pad_id,
        sharding=SHARDING,
    )
    asked = task.prompts(words, "train", max_length=16)
    prompts = batches.prompt_batches(asked, batch_size=8, buckets=(16,), seed=0, pad_id=pad_id)
    state, start = method.start(), jax.tree.map(np.asarray, policy)
    with Run(folder / "ppo_max", total=STEPS, desc="PPO-max") as run:
        state = run.restore(state, prompts)
        for iteration in run.steps():
            rollout = method.sample(state, next(prompts), iteration)
            experience, state = method.score(state, rollout)
            updates = []
            for minibatch in method.minibatches(experience, iteration):
                state, metrics = method.update(state, minibatch, iter(()), iteration)
                updates.append(metrics)
            metrics = method.metrics(experience, updates)
            run.log(iteration, metrics)
            run.checkpoint(iteration, state, prompts)
    report("ppo_max", start, method.policy(state), metrics)

    # DPO of the same policy on the same pairs.
    examples = batches.pair_batches(pairs, seed=0, **settings)
    cached = dpo.reference_log_probs(
        policy, folder / "reference.npz", pairs, examples.once(), sharding=SHARDING
    )
    train(
        "dpo",
        folder,
        policy,
        functools.partial(dpo.make_step, dpo.DPOConfig(), of_pairs),
        examples,
        lambda batch: batch | {"ref_log_probs": cached[batch["index"]]},
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
