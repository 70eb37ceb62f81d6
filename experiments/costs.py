"""Does DPO take less memory and time than PPO? Both from one SFT policy, each in its own process.

  python -m experiments.costs --scale quickstart

Each reads equally many responses: DPO those of its pairs, the reference's pass over them included;
PPO-max those that it samples, scores and learns from, with its ptx loss. In turns, several times.
What is compiled and loaded is not counted: seconds and the peak of resident memory are of the same
work done once more. Needs the SFT and reward models of the scale. Writes `costs.json` and prints
the verdicts on the slide "DPO".
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tabulate import tabulate

from configs import common
from configs import dpo as dpo_configs
from configs import ppo_max as ppo_configs
from experiments import claims, command, dpo, ppo_max, stages
from rlhf_jax.data.batches import PairBatches, prompt_batches
from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.methods import dpo as dpo_method
from rlhf_jax.methods.ppo_max import PPOMax
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler
from rlhf_jax.runtime.files import write_whole
from rlhf_jax.runtime.host_memory import release_freed_memory, reuse_freed_memory
from rlhf_jax.runtime.run_info import run_info, to_json
from rlhf_jax.training.optimizers import make_optimizer
from rlhf_jax.training.step import create_state

METHODS = ("dpo", "ppo_max")
# The slide "DPO": less memory, less time. DPO's over PPO's; fixed before the measurement.
AT_MOST = 0.9
CLAIMS = {
    "seconds_per_response": "seconds for each response read",
    "peak_gib": "peak of resident memory, GiB, with the interpreter and its libraries",
    "held_mib": "weights and optimizer states that are held, MiB",
}


class Work(NamedTuple):
    """A method, ready to run.

    Attributes:
      step: one update of DPO, or one iteration of PPO; returns the responses that it read, and
        their real tokens.
      held: the trees of arrays that stay from one step to the next.
    """

    step: Callable[[], tuple[int, int]]
    held: Callable[[], Any]


def dpo_work(argument: str) -> Work:
    """DPO on pairs, from the SFT policy."""
    settings = command.open_config("dpo", dpo_configs.get_config(argument), dpo.Settings)
    sharding, task, folder = settings.sharding.make(), settings.task(), settings.inputs.model
    tokenizer = stages.load_tokenizer(folder)
    policy = stages.make_tuning(settings, stages.load_policy(folder, settings.model, sharding))
    reference = policy.trunk or stages.load_policy(folder, settings.model, sharding, frozen=True)
    data, train = settings.data, settings.train
    pairs = task.preferences(tokenizer, "train", max_length=data.max_length, count=data.pairs)
    batches = PairBatches(
        pairs.loaded(),
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id,
        num_buckets=3,
        **train.batching(sharding.mesh.size),
    )
    optimizer, _ = make_optimizer(settings.optimizer, train.steps)
    update = dpo_method.make_step(settings.dpo, train, optimizer, sharding, trunk=policy.trunk)
    state = create_state(policy.take(), optimizer, sharding)

    def step() -> tuple[int, int]:
        nonlocal state
        batch = next(batches)
        numbered = batch | {"index": np.arange(len(batch["valid"]))}
        batch["ref_log_probs"] = np.nan_to_num(
            dpo_method.log_probs_of_pairs(reference, [numbered], len(batch["valid"]), sharding)
        )
        state, metrics = update(state, sharding.put_batch(batch))
        float(metrics["loss/dpo"])
        return 2 * int(batch["valid"].sum()), int((batch["segments"] > 0).sum())

    return Work(step, lambda: (state, reference))


def ppo_work(argument: str) -> Work:
    """PPO-max on prompts, from the SFT policy, once its critic is trained."""
    config = ppo_configs.get_config(argument)
    settings = command.open_config("ppo_max", config, ppo_max.Settings)
    sharding, task, inputs = settings.sharding.make(), settings.task(), settings.inputs
    tokenizer = stages.load_tokenizer(inputs.reference, inputs.model, inputs.reward_model)
    policy, reference = ppo_max.load_policies(settings, sharding)
    reward_model = ppo_max.load_reward_model(settings, policy, sharding)
    prompts = prompt_batches(
        task.prompts(tokenizer, "train", max_length=settings.data.longest_prompt),
        batch_size=settings.train.prompts_per_iteration,
        buckets=settings.data.prompt_buckets,
        seed=settings.seed,
        pad_id=tokenizer.pad_token_id,
    )
    ptx = [*ppo_max.load_ptx(settings, task, tokenizer), iter(())][0]
    method = PPOMax(
        settings.method(),
        policy=policy,
        reference=reference,
        reward_model=reward_model,
        make_critic=lambda language: ppo_max.load_critic(
            settings, language, reward_model, sharding
        ),
        eos_ids=tuple(stop_tokens(tokenizer)),
        pad_id=tokenizer.pad_token_id,
        sharding=sharding,
    )
    state = method.start()
    iteration = settings.train.critic_pretrain_iterations

    def step() -> tuple[int, int]:
        nonlocal state, iteration
        rollout = method.sample(state, next(prompts), iteration)
        experience, state = method.score(state, rollout)
        for minibatch in method.minibatches(experience, iteration):
            state, metrics = method.update(state, minibatch, ptx, iteration)
        float(metrics["loss/policy"])
        iteration += 1
        return len(rollout.tokens), int(np.asarray(rollout.mask).sum())

    return Work(step, lambda: (state, reference, reward_model))


def reset_peak() -> None:
    """Forgets the peak of this process's resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """The peak of resident memory since `reset_peak`, GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise OSError("/proc/self/status has no VmHWM: costs are measured on Linux")


def run_once(work: Work, responses: int) -> dict[str, float]:
    """Reads so many responses at least, and measures it."""
    release_freed_memory(0.0)
    reset_peak()
    begun, read, tokens = time.perf_counter(), 0, 0
    while read < responses:
        some, long = work.step()
        read, tokens = read + some, tokens + long
    seconds = time.perf_counter() - begun
    held = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(work.held())}
    return {
        "responses": read,
        "tokens_per_response": tokens / read,
        "seconds_per_response": seconds / read,
        "seconds_per_token": seconds / tokens,
        "peak_gib": peak_gib(),
        "held_mib": sum(held.values()) / 2**20,
    }


def worker(method: str, argument: str, responses: int) -> None:
    """One method in this process: once to compile, once more to be measured; prints JSON."""
    reuse_freed_memory()
    guard_cpu_compiler()
    command.enable_compilation_cache()
    work = {"dpo": dpo_work, "ppo_max": ppo_work}[method](argument)
    run_once(work, responses)
    print(json.dumps(run_once(work, responses)))


def verdict(ratios: Sequence[float]) -> str:
    """Of a ratio in every round: all within the bound, none, or something between."""
    kept = [ratio <= AT_MOST for ratio in ratios]
    if len(kept) > 1 and all(kept):
        return claims.REPRODUCED
    return claims.UNDECIDED if any(kept) or not kept else claims.NOT_REPRODUCED


def judged(rounds: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """The claims, from what each method took in each round."""
    found = []
    for quantity, metric in CLAIMS.items():
        ratios = [one["dpo"][quantity] / one["ppo_max"][quantity] for one in rounds]
        found.append(
            {
                "metric": f"{metric}: DPO's over PPO-max's",
                "threshold": f"at most {AT_MOST:g}",
                "ratios": ratios,
                "verdict": verdict(ratios),
            }
        )
    return found


def report(rounds: Sequence[dict[str, dict[str, float]]]) -> str:
    """Means over the rounds with the lowest and the highest, as Markdown."""
    rows = []
    for quantity in rounds[0]["dpo"]:
        row = [quantity.replace("_", " ")]
        for method in METHODS:
            values = [one[method][quantity] for one in rounds]
            mean = math.fsum(values) / len(values)
            row.append(f"{mean:.4g} [{min(values):.4g}, {max(values):.4g}]")
        rows.append(row)
    table = tabulate(rows, ("", "DPO", "PPO-max"), tablefmt="github", disable_numparse=True)
    lines = [
        f"- {claim['metric']}, {claim['threshold']}: "
        f"{', '.join(f'{ratio:.2f}' for ratio in claim['ratios'])}: **{claim['verdict']}**"
        for claim in judged(rounds)
    ]
    return table + "\n\n" + "\n".join(lines) + "\n"


def main(options: argparse.Namespace) -> None:
    """Runs the workers in turns and tries the claims."""
    argument = f"{options.scale},seed={options.seed}"
    if options.worker:
        worker(options.worker, argument, options.responses)
        return
    settings = common.resolve(ppo_configs.get_config(argument))
    for folder in (settings.inputs.reference, settings.inputs.reward_model):
        stages.require(folder)
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        rounds.append({})
        for method in METHODS:
            arguments = ["--scale", options.scale, "--seed", str(options.seed)]
            arguments += ["--responses", str(options.responses), "--worker", method]
            line = [sys.executable, "-m", "experiments.costs", *arguments]
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
            rounds[-1][method] = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"round {number + 1}, {method}: {rounds[-1][method]}", flush=True)
    content = run_info(vars(options)) | {"rounds": rounds, "claims": judged(rounds)}
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(to_json(content), indent=1) + "\n")
    print(f"\n{report(rounds)}\n{out}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scale", default="quickstart", choices=("tiny", "quickstart", "smollm2"))
    parser.add_argument("--seed", type=int, default=0, help="of the stages before, and of both")
    parser.add_argument("--responses", type=int, default=1024, help="that each method reads")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both methods")
    parser.add_argument("--out", default="runs/costs/costs.json", help="JSON file")
    parser.add_argument("--worker", default="", choices=("", *METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.responses < 1 or options.rounds < 1:
        parser.error("--responses and --rounds must be at least 1")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: a worker ended with status {error.returncode}; its message is above")
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
