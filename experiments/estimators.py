"""Every Φ_t of the slide "Policy Gradient Methods" on one policy: expected gradient and variance.

  python -m experiments.estimators runs/ppo_max/quickstart

The policy is that of a finished run of `experiments.ppo_max`, and does not move; several runs are
several seeds. A critic is trained for it, alone, on responses of its own; then every Φ_t weighs the
same responses to other prompts, several to each, with the reward of the run (its moments as they
are once the critic is trained). What was measured of a run is kept in its folder as
`estimators.npz` and not measured again. Writes `estimators.json`, `estimators.md` and
`estimators.png`, with verdicts on the claims of `experiments/estimator_claims.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from experiments import command, estimator_claims, folders, ppo_max, stages
from experiments.estimator_claims import CLAIMS, CURVE, REFERENCE, UNIT, Measured, estimators
from rlhf_jax import losses
from rlhf_jax.data.batches import prompt_batches
from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.evaluation.gradients import (
    CountSketch,
    GradientMoments,
    compare_gradients,
    percentile_interval,
    sketched_gradients,
)
from rlhf_jax.evaluation.panels import COLORS, new_figure
from rlhf_jax.evaluation.plots import save_figure
from rlhf_jax.methods.ppo_max import PPOMax, PPOMaxConfig, PPOState
from rlhf_jax.models.lora import Tuning
from rlhf_jax.rollouts.experience import (
    AdvantageConfig,
    Evaluation,
    RewardConfig,
    advantages,
    shape_rewards,
)
from rlhf_jax.rollouts.rollout import Rollout, SamplingConfig
from rlhf_jax.runtime.compiler_guard import guard_cpu_compiler
from rlhf_jax.runtime.files import put, write_whole
from rlhf_jax.runtime.run_info import run_info, to_json
from rlhf_jax.training.record import read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT = "estimators.npz"
# One number a response: these are multiples of Σ_t ∇ log π, which is computed once for all.
SEQUENCE = ("total_return", "rloo", "batch_mean", "grpo")
# Of the tables: quantity -> heading.
COLUMNS = {
    "variance": f"variance / {UNIT}'s",
    "bias": "squared bias",
    "off_direction": "of it off direction",
    "scale": "scale",
    "cosine": "cosine",
    "noise": "noise / signal",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured of a run.

    Attributes:
      prompts: to which the policy responds.
      samples: responses to each; rloo and grpo compare them.
      critic_iterations: buffers of the run's size on which the critic is trained before.
      sketch: numbers that are kept of a gradient.
      seed: of the responses and the sketch, and so that they are not those of the run.
    """

    prompts: int = 512
    samples: int = 4
    critic_iterations: int = 60
    sketch: int = 8192
    seed: int = 1


def check_sampling(sampling: SamplingConfig) -> None:
    """Checks that responses are drawn from the distribution that is differentiated.

    Raises:
      ValueError: some tokens cannot be drawn, or one alone can.
    """
    for name, off in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0)):
        if getattr(sampling, name) != off:
            raise ValueError(
                f"the run samples with {name}={getattr(sampling, name)}, and every Φ_t is biased "
                f"there: give a run with sampling.{name}={off}"
            )
    if not sampling.temperature:
        raise ValueError("the run samples greedily (sampling.temperature=0): there is no gradient")


def method_config(settings: ppo_max.Settings, options: Options) -> PPOMaxConfig:
    """The run's settings, for a critic that trains alone and responses that nobody has seen.

    Raises:
      ValueError: the run has no critic, or its buffer is no multiple of the samples.
    """
    check_sampling(settings.sampling)
    rows, train = settings.train.rollout_batch, settings.train
    if train.critic_init == "none":
        raise ValueError(
            "the run has no critic (train.critic_init='none'), and gae, td, k_step and "
            "reward_to_go_baseline need one: give a run that has"
        )
    if rows % options.samples or options.prompts % (rows // options.samples):
        raise ValueError(
            f"--prompts {options.prompts} x --samples {options.samples} must fill buffers of "
            f"{rows} responses"
        )
    train = dataclasses.replace(
        train,
        iterations=options.critic_iterations + 1,
        critic_pretrain_iterations=options.critic_iterations,
        prompts_per_iteration=rows,
        samples_per_prompt=1,
    )
    advantage = dataclasses.replace(settings.advantage, method="gae")
    return dataclasses.replace(
        settings.method(),
        train=train,
        advantage=advantage,
        seed=settings.seed + 1000 * options.seed,
    )


def fixed_rewards(
    rollout: Rollout,
    evaluation: Evaluation,
    moments: losses.RunningMoments,
    *,
    config: RewardConfig,
    kl_coef: jax.Array | float,
) -> jax.Array:
    """r_t `[B, G]` as in training, but by moments that these responses do not move.

    Rewards that depend on the other responses of the batch would be no reward function.
    """
    scores = evaluation.scores
    if config.transform == "normalize":
        scores = losses.normalize_rewards(scores, moments, clip=config.clip or jnp.inf)
    elif config.transform != "none":
        scores = losses.scale_rewards(scores, moments)
    rewards, _ = shape_rewards(
        rollout,
        Evaluation(evaluation.ref_log_probs, scores, evaluation.values),
        moments,
        config=dataclasses.replace(config, transform="none"),
        discount=1.0,  # of a transform that is done
        kl_coef=kl_coef,
    )
    return rewards


def gradients_of_prompts(
    policy: Any,
    rollout: Rollout,
    rewards: jax.Array,
    values: jax.Array,
    sketch: CountSketch,
    *,
    choices: Mapping[str, AdvantageConfig],
    samples: int,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of a buffer for every Φ_t, by prompt.

    Args:
      policy: whose gradients.
      rollout: B responses, `samples` adjacent ones to each prompt.
      rewards: r_t, `[B, G]`.
      values: V(s_t), `[B, G]`.
      sketch: of gradients of the policy.
      choices: A of them, by name.
      samples: responses to a prompt.
      temperature: the sampler's.

    Returns:
      `[B / samples, A, m]`, the mean of the sketches of a prompt's responses; `[B / samples, A]`,
      the mean of |g|²; and the largest difference of log π between sampler and trainer.
    """
    where = rollout.response_mask
    phi = {
        name: advantages(rewards, values, where, config=config, samples_per_prompt=samples)[0]
        for name, config in choices.items()
    }
    by_token = [name for name in choices if name not in SEQUENCE]
    weights = [jnp.where(where, 1.0, 0.0), *(phi[name] for name in by_token)]
    sketches, squares, log_probs = sketched_gradients(
        policy,
        rollout.tokens,
        rollout.segments,
        jnp.stack(weights, axis=1),
        start=rollout.prompt_length,
        sketch=sketch,
        temperature=temperature,
    )
    found = []
    for name in choices:
        row = 1 + by_token.index(name) if name in by_token else 0
        # A response has at least one token, and Φ of a sequence is the same on all of them.
        factor = jnp.ones(len(rewards)) if row else phi[name][:, 0]
        found.append((factor[:, None] * sketches[:, row], jnp.square(factor) * squares[:, row]))
    means, lengths = (jnp.stack(part, axis=1) for part in zip(*found, strict=True))
    error = jnp.max(jnp.abs(log_probs - rollout.log_probs), where=where, initial=0.0)
    return (
        means.reshape(-1, samples, *means.shape[1:]).mean(axis=1),
        lengths.reshape(-1, samples, lengths.shape[1]).mean(axis=1),
        error,
    )


def load(
    folder: Path, options: Options
) -> tuple[ppo_max.Settings, PPOMax, PPOState, Iterator[dict[str, np.ndarray]]]:
    """The policy of a run with everything that rewards it, and prompts.

    Raises:
      ValueError: the folder holds no finished run of PPO, or too few prompts are there.
    """
    settings = ppo_max.finished(folder)
    config = method_config(settings, options)
    inputs, sharding, task = settings.inputs, settings.sharding.make(), settings.task()
    model = str(folder / "model")
    tokenizer = stages.load_tokenizer(
        inputs.reference, inputs.reward_model, model, date=folders.date(str(folder))
    )
    policy = Tuning(stages.load_policy(model, settings.model, sharding))
    reference = stages.load_policy(inputs.reference, settings.model, sharding, frozen=True)
    reward_model = stages.load_scalar(inputs.reward_model, settings.model, sharding, frozen=True)
    method = PPOMax(
        config,
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
    rows = config.train.rollout_batch
    every = task.prompts(tokenizer, "train", max_length=settings.data.longest_prompt).loaded()
    wanted = options.critic_iterations * rows + options.prompts
    if len(every) < wanted:
        raise ValueError(
            f"{wanted} prompts are needed, each once, and there are {len(every)}: lower "
            "--critic_iterations or --prompts"
        )
    prompts = prompt_batches(
        every,
        batch_size=rows,
        buckets=(settings.data.longest_prompt,),
        seed=config.seed,
        pad_id=tokenizer.pad_token_id,
    )
    return settings, method, method.start(), prompts


def train_critic(
    method: PPOMax, state: PPOState, prompts: Iterator[dict[str, np.ndarray]]
) -> PPOState:
    """The critic alone, as PPO-max trains it before the policy."""
    for iteration in range(method.config.train.critic_pretrain_iterations):
        rollout = method.sample(state, next(prompts), iteration)
        experience, state = method.score(state, rollout)
        for minibatch in method.minibatches(experience, iteration):
            state, _ = method.update(state, minibatch, iter(()), iteration)
    return state


def measure(folder: Path, options: Options) -> None:
    """Measures the estimators on the policy of a run, and keeps what comes out in its folder."""
    begun, info = time.monotonic(), run_info(dataclasses.asdict(options))
    # 1. The run, and a critic that is trained on responses of its policy.
    settings, method, state, prompts = load(folder, options)
    state = train_critic(method, state, prompts)
    policy, alone = method.policy(state), options.critic_iterations
    print(f"{folder}: critic trained, {time.monotonic() - begun:.0f} s", flush=True)

    # 2. The functions of a buffer.
    choices = estimators(settings.advantage.discount)
    key = jax.random.key(method.config.seed)
    count = stages.count_parameters(policy)
    sketch = CountSketch.draw(key, count, options.sketch)

    @jax.jit
    def gradients(policy, rollout, evaluation, moments, kl_coef, sketch):
        rewards = fixed_rewards(
            rollout, evaluation, moments, config=settings.reward, kl_coef=kl_coef
        )
        return rewards, gradients_of_prompts(
            policy,
            rollout,
            rewards,
            evaluation.values,
            sketch,
            choices=choices,
            samples=options.samples,
            temperature=settings.sampling.policy_temperature,
        )

    # 3. Responses to other prompts, a buffer at a time.
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    seen: list[dict[str, np.ndarray]] = []
    errors = []
    for index, batch in enumerate(buffers(prompts, options, method.config.train.rollout_batch)):
        rollout = method.sample(state, batch, alone + index, samples=options.samples)
        evaluation = method.score(state, rollout)[0].evaluation
        rewards, (means, squares, error) = gradients(
            policy, rollout, evaluation, state.moments, state.kl_coef, sketch
        )
        parts.append((np.asarray(means), np.asarray(squares)))
        errors.append(float(error))
        seen.append(
            {
                "rewards": np.asarray(rewards),
                "values": np.asarray(evaluation.values),
                "where": np.asarray(rollout.response_mask),
                "log_ratio": np.asarray(rollout.log_probs - evaluation.ref_log_probs),
            }
        )
        if index % 8 == 7:
            print(f"{folder}: {index + 1} buffers, {time.monotonic() - begun:.0f} s", flush=True)

    # 4. What is kept.
    means, squares = (np.concatenate(part) for part in zip(*parts, strict=True))
    moments = GradientMoments.of(tuple(choices), REFERENCE, means, squares)
    info |= {
        "measured": about(seen, settings.advantage.discount)
        | {"parameters": count, "sampler_error": max(errors)},
        "minutes": (time.monotonic() - begun) / 60,
    }
    keep(folder / KEPT, moments, info)


def buffers(
    prompts: Iterator[dict[str, np.ndarray]], options: Options, rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """Prompts of `rows` responses at a time."""
    each = rows // options.samples
    left = options.prompts
    while left:
        batch = next(prompts)
        for start in range(0, min(rows, left), each):
            yield {name: array[start : start + each] for name, array in batch.items()}
        left -= min(rows, left)


def about(seen: Sequence[Mapping[str, np.ndarray]], discount: float) -> dict[str, float]:
    """What the responses are like, and how good the critic is on them."""
    all_of = {name: np.concatenate([one[name] for one in seen]) for name in seen[0]}
    where = all_of["where"]
    to_go = losses.rewards_to_go(
        jnp.asarray(all_of["rewards"]), discount=discount, where=jnp.asarray(where)
    )
    explained = losses.explained_variance(
        jnp.asarray(all_of["values"]), to_go, where=jnp.asarray(where)
    )
    return {
        "responses": len(where),
        "tokens": float(where.sum(1).mean()),
        "return": float(np.where(where, all_of["rewards"], 0).sum(1).mean()),
        "kl": float(np.where(where, all_of["log_ratio"], 0).sum(1).mean()),
        "explained_variance": float(explained),
    }


def keep(path: Path, moments: GradientMoments, info: Mapping[str, Any]) -> None:
    """Writes the moments and where they are from, whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("wb") as file:
        np.savez(
            file,
            squares=moments.squares,
            products=moments.products.astype(np.float32),
            crosses=moments.crosses.astype(np.float32),
            names=np.array(moments.names),
            info=np.array(json.dumps(to_json(info))),
        )
    put(scratch, path)


def kept(path: Path) -> tuple[GradientMoments, dict[str, Any]]:
    """What `keep` wrote."""
    with np.load(path) as arrays:
        info = json.loads(str(arrays["info"]))
        return GradientMoments(
            tuple(str(name) for name in arrays["names"]),
            REFERENCE,
            arrays["squares"],
            arrays["products"].astype(np.float64),
            arrays["crosses"].astype(np.float64),
        ), info


def collect(paths: Sequence[Path]) -> dict[str, Any]:
    """Every number of the report, for its JSON."""
    runs: dict[str, Any] = {}
    seeds: dict[str, Measured] = {}
    for folder in paths:
        moments, info = kept(folder / KEPT)
        config = read_config(folder / "config.json")
        name = str(config["config"]["seed"])
        name = name if name not in runs else str(folder)
        numbers = compare_gradients(moments, unit=UNIT)
        seeds[name] = Measured(moments.names, numbers)
        runs[name] = {
            "folder": str(folder),
            "policy": {"command": config["command"], "commit": config["git"]["commit"]},
            "command": info["command"],
            "commit": info["git"],
            "hardware": info["processor"],
            "minutes": round(info["minutes"], 1),
            "options": info["config"],
            "measured": info["measured"],
            "estimators": {
                one: {
                    quantity: percentile_interval(seeds[name].of(quantity, one))
                    for quantity in numbers
                }
                for one in estimators(1.0)
            },
        }
    return to_json(
        {
            "reference": REFERENCE,
            "unit": UNIT,
            "runs": runs,
            "claims": [estimator_claims.judge(claim, seeds) for claim in CLAIMS],
        }
    )


def _shown(interval: Sequence[Any]) -> str:
    """`1.2 [1.0, 1.4]`; the JSON names what is not finite."""
    if any(isinstance(end, str) for end in interval):
        return "not told from 0"
    value, low, high = (0.0 if abs(end) < 5e-7 else end for end in interval)
    if low == value == high:
        return _digits(value)
    return f"{_digits(value)} [{_digits(low)}, {_digits(high)}]"


def _digits(value: float) -> str:
    """Three digits that count, and never a power of ten for a large number."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _break_even(numbers: Mapping[str, Any]) -> str:
    """The batch from which on the reference is better; of what is biased and scatters less."""
    low = numbers["bias"][1]
    biased = not isinstance(low, str) and low > 1e-6
    return _shown(numbers["break_even"]) if biased else "–"


def report(content: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    parts = [
        "# Estimators of the policy gradient\n\n"
        "Thresholds stand in `experiments/estimator_claims.py` and were committed before the "
        f"measurement. Biases are against {REFERENCE}, over the square of its expected gradient; "
        "95% intervals by a bootstrap over prompts. [The figures](../figures.md#estimators-of-the-"
        "policy-gradient) have what the columns mean."
    ]
    for name, run in content["runs"].items():
        about_it, options = run["measured"], run["options"]
        rows = [
            (one, *(_shown(numbers[quantity]) for quantity in COLUMNS), _break_even(numbers))
            for one, numbers in run["estimators"].items()
        ]
        parts.append(
            f"Seed {name}: {about_it['responses']} responses to {options['prompts']} prompts, KL "
            f"{about_it['kl']:.1f} nats, {about_it['tokens']:.0f} tokens; the critic explains "
            f"{about_it['explained_variance']:.0%} of the variance of the returns "
            f"({run['hardware']}, {run['minutes']:.0f} minutes, commit "
            f"{str(run['commit']['commit'])[:9]}).\n\n"
            + tabulate(
                rows,
                ("Φ_t", *COLUMNS.values(), "break-even batch"),
                tablefmt="github",
                disable_numparse=True,
            )
        )
    rows = [
        (
            claim["sentence"],
            f"{claim['metric']}: {claim['threshold']}",
            "; ".join(_shown(value) for value in claim["values"].values()),
            f"**{claim['verdict']}**",
        )
        for claim in content["claims"]
    ]
    headers = ("claim", "metric and threshold", "seeds [95%]", "verdict")
    parts.append(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def draw(content: Mapping[str, Any], path: Path) -> Path:
    """Variance and squared bias by estimator, and both along λ; a colour for each seed."""
    figure = new_figure(1, 3, width=15.0, height=4.8)
    by_variance, by_bias, along = figure.axes
    runs = content["runs"]
    names = list(next(iter(runs.values()))["estimators"])
    for i, (seed, run) in enumerate(runs.items()):
        shift = 0.22 * (i - (len(runs) - 1) / 2)
        color, label = COLORS[i % len(COLORS)], f"seed {seed}"
        found = run["estimators"]
        _points(by_variance, found, "variance", names, shift, color, label)
        _points(by_bias, found, "bias", names, shift, color, label)
        curve = [found[name] for name in CURVE.values()]
        for quantity, style, word in (
            ("bias", "-", "squared bias"),
            ("variance", "--", "variance"),
        ):
            values = np.array([_finite(one[quantity]) for one in curve])
            along.plot(list(CURVE), values[:, 0], style, color=color, label=f"{word}, {label}")
            along.fill_between(list(CURVE), values[:, 1], values[:, 2], color=color, alpha=0.12)
    for axes, heading in (
        (by_variance, f"Variance, over that of {UNIT}"),
        (by_bias, "Squared bias, over the squared gradient"),
    ):
        axes.set_title(heading, fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.legend(fontsize=8)
    by_variance.set_xscale("log")
    by_variance.axvline(1.0, color="grey", linewidth=0.8)
    by_bias.set_xscale("symlog", linthresh=0.1)
    by_bias.axvline(0.0, color="grey", linewidth=0.8)
    by_bias.axvline(0.1, color="grey", linewidth=0.8, linestyle=":")
    along.set_title("GAE: squared bias and variance", fontsize=10)
    along.set_xlabel("λ")
    along.legend(fontsize=8)
    return save_figure(figure, path)


def _finite(interval: Sequence[Any]) -> list[float]:
    return [np.nan if isinstance(end, str) else end for end in interval]


def _points(
    axes: Axes,
    found: Mapping[str, Any],
    quantity: str,
    names: Sequence[str],
    shift: float,
    color: str,
    label: str,
) -> None:
    values = np.array([_finite(found[name][quantity]) for name in names])
    ends = np.abs(values[:, 1:] - values[:, :1]).T
    places = np.arange(len(names)) + shift
    axes.errorbar(values[:, 0], places, xerr=ends, fmt="o", markersize=4, color=color, label=label)


def main(options: argparse.Namespace) -> None:
    """Measures what has not been measured, tries the claims, reports."""
    guard_cpu_compiler()
    command.enable_compilation_cache()
    wanted = Options(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Options)})
    paths = [Path(run) for run in options.runs]
    for folder in paths:
        if not (folder / KEPT).exists():
            measure(folder, wanted)
        now, before = dataclasses.asdict(wanted), kept(folder / KEPT)[1]["config"]
        if now != before:
            raise ValueError(
                f"{folder / KEPT} was measured with {before}: remove it, or give these"
            )
    content = collect(paths)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "estimators.json", json.dumps(content, indent=1) + "\n")
    write_whole(out / "estimators.md", report(content))
    print(report(content))
    print(draw(content, out / "estimators.png"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of finished runs of experiments.ppo_max")
    helps = {
        "prompts": "to which the policy responds",
        "samples": "responses to each prompt",
        "critic_iterations": "buffers on which the critic is trained before",
        "sketch": "numbers that are kept of a gradient",
        "seed": "of responses and sketch",
    }
    for field in dataclasses.fields(Options):
        parser.add_argument(
            f"--{field.name}", type=int, default=field.default, help=helps[field.name]
        )
    parser.add_argument("--out", default="runs/estimators", help="folder of the report")
    options = parser.parse_args(arguments)
    for field in dataclasses.fields(Options):
        if getattr(options, field.name) < (2 if field.name in ("prompts", "samples") else 1):
            parser.error(f"--{field.name} {getattr(options, field.name)} is too small")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit(130)
    except command.USER_ERRORS as error:
        sys.exit(f"error: {command.told(error)}")
