"""PPO-max and every ablation of the paper: Algorithm 1 on language.

  python -m experiments.ppo_max --config configs/ppo_max.py:quickstart

Ablations are variants of the config (see configs/ppo_max.py). Writes `model/`, report.md with
figures, metrics.jsonl, config.json and summary.json to the run folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import common
from configs.ai_labels import policy_stage
from experiments import command, folders, judging, reporting, stages
from experiments.settings import (
    Answering,
    AnswersConfig,
    PromptData,
    check_label,
    judge_names,
    sampled_lengths,
)
from rlhf_jax.data.batches import fixed_prompts, packed_batches, prompt_batches
from rlhf_jax.data.templates import stop_tokens
from rlhf_jax.evaluation.collapse import OFF, CollapseConfig, CollapseMonitor
from rlhf_jax.methods.ppo import PPOConfig
from rlhf_jax.methods.ppo_max import (
    KLConfig,
    PenaltyConfig,
    PPOMax,
    PPOMaxConfig,
    PPOTrainConfig,
)
from rlhf_jax.methods.trpo import TRPOConfig
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.lora import Tuning
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollouts.experience import AdvantageConfig, RewardConfig
from rlhf_jax.rollouts.respond import AgainstBaseline, Respondent
from rlhf_jax.rollouts.rollout import SamplingConfig, make_generate
from rlhf_jax.runtime.settings import check, typed
from rlhf_jax.runtime.sharding import Sharding
from rlhf_jax.tasks import Task
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.record import read_config, read_summary
from rlhf_jax.training.rollback import retried, rollbacks
from rlhf_jax.training.run import OnStep


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Folders of the stages before, and whether to run these where a folder is missing."""

    model: str
    policy_variant: str
    reference: str
    reward_model: str
    reward_variant: str
    build: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(PromptData):
    """Prompts to answer, and rows of SFT text of `ptx_length` tokens for the ptx loss."""

    ptx_length: int

    def __post_init__(self):
        super().__post_init__()
        check(self, ptx_length="[1, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Answering):
    """Every key of configs/ppo_max.py."""

    label: str
    inputs: Inputs
    data: Prompts
    train: PPOTrainConfig
    sampling: SamplingConfig
    reward: RewardConfig
    kl: KLConfig
    advantage: AdvantageConfig
    ppo: PPOConfig
    penalty: PenaltyConfig
    trpo: TRPOConfig
    optimizer: OptimizerConfig
    critic_optimizer: OptimizerConfig
    eval: AnswersConfig
    collapse: CollapseConfig
    judges: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        check_label(self.label, ("SFT",))
        self.method()

    def method(self) -> PPOMaxConfig:
        """Everything that decides the numbers, except models and data."""
        names = [field.name for field in dataclasses.fields(PPOMaxConfig)]
        if self.lora.rank and self.ppo.objective == "trpo":
            raise ValueError("ppo.objective='trpo' steps in every weight: set lora.rank=0")
        return PPOMaxConfig(**{name: getattr(self, name) for name in names})

    def sampled(self) -> dict[str, int]:
        """Tokens of the longest response with its prompt, by the keys that set them."""
        evaluated = self.eval.sampling.of(self.sampling)
        return sampled_lengths(self.data, sampling=self.sampling, eval_sampling=evaluated)

    def monitor(self) -> CollapseMonitor | None:
        """What watches the policy; None where nothing is to."""
        return CollapseMonitor(self.collapse) if self.collapse.action != OFF else None


def finished(folder: Path) -> Settings:
    """The settings of a run that is done.

    Raises:
      ValueError: the folder holds no finished run of PPO.
    """
    if read_summary(folder) is None:
        raise ValueError(f"{folder} holds no finished run: give that of experiments.ppo_max")
    content = read_config(folder / "config.json")["config"]
    if content.get("experiment") != "ppo_max":
        raise ValueError(f"{folder} is a run of {content.get('experiment')}: give one of ppo_max")
    return typed(Settings, content)


def require_stages(settings: Settings) -> None:
    """Finds or runs the stages before: SFT (and its `policy_variant`), reward model, judges.

    Raises:
      ValueError: texts may become longer than one of the models reads.
    """
    inputs = settings.inputs
    # Judges first: one that may not judge is refused before anything is trained.
    judging.require_judges(judge_names(settings.judges, settings.prompt_task()), settings)
    variant = (inputs.policy_variant,) if inputs.policy_variant else ()
    start = policy_stage(settings.variants)
    scored_by = (inputs.reward_variant,) if inputs.reward_variant else ()
    for folder, stage, variants in (
        (inputs.reference, start, ()),
        (inputs.model, start, variant),
        (inputs.reward_model, "reward_model", scored_by),
    ):
        argument = common.stage_argument(stage, settings, *variants)
        stages.require(folder, stage=stage, argument=argument, build=inputs.build)
    lengths = {"data.ptx_length": settings.data.ptx_length} if settings.ppo.ptx_coef else {}
    stages.check_lengths(lengths, inputs.model, inputs.reference, sampled=settings.sampled())
    stages.check_lengths(settings.sampled(), inputs.reward_model)


def load_policies(settings: Settings, sharding: Sharding) -> tuple[Tuning, Transformer]:
    """π_θ to be trained, and π_ref; with adapters on the same weights one copy serves both."""
    inputs, options = settings.inputs, settings.model
    start = stages.load_policy(inputs.model, options, sharding)
    policy = stages.make_tuning(settings, start)
    if policy.trunk is not None and inputs.model == inputs.reference:
        return policy, policy.trunk
    return policy, stages.load_policy(inputs.reference, options, sharding, frozen=True)


def load_reward_model(settings: Settings, policy: Tuning, sharding: Sharding) -> ScalarModel:
    """The reward model, on the policy's frozen weights if it was trained on the same ones."""
    folder = settings.inputs.reward_model
    beside = stages.load_scalar_beside(folder, policy.trunk, sharding)
    return beside or stages.load_scalar(folder, settings.model, sharding, frozen=True)


def load_critic(
    settings: Settings, language: Transformer, reward_model: ScalarModel, sharding: Sharding
) -> Tuning | None:
    """The critic's start: the reward model (PPO-max), the policy with a zero head, or none.

    Adapters use the frozen weights of the model that they start from: the reward model's own, or
    the policy's where the reward model is adapters on these, which then train further.
    """
    init = settings.train.critic_init
    if init == "none":
        return None
    start = ScalarModel(language)
    if init == "reward_model":
        start = reward_model
        if not settings.lora.rank:
            folder = settings.inputs.reward_model
            start = stages.load_scalar(folder, settings.model, sharding)
    return stages.make_tuning(settings, start, name="critic")


def load_ptx(settings: Settings, task: Task, tokenizer: Any) -> list[Any]:
    """Batches of SFT text for the ptx loss, as many rows as a minibatch has; none without it."""
    if not settings.ppo.ptx_coef:
        return []
    length = settings.data.ptx_length
    return [
        packed_batches(
            task.documents(tokenizer, "train", max_length=length),
            rows=settings.train.minibatch,
            length=length,
            seed=settings.seed,
            pad_id=tokenizer.pad_token_id,
            packed=False,  # one document per row, as the released code draws them
        )
    ]


def make_respondents(
    settings: Settings, task: Task, tokenizer: Any, batch: int, **parts: Any
) -> dict[str, Respondent]:
    """Validation and test prompts to answer, in batches as large as an iteration's."""
    pad_id, longest = tokenizer.pad_token_id, settings.data.longest_prompt
    return {
        split: Respondent(
            batches=fixed_prompts(
                task.prompts(tokenizer, split, max_length=longest), batch, longest, pad_id, split
            ),
            tokenizer=tokenizer,
            show=task.shown(tokenizer),
            **parts,
        )
        for split in ("validation", "test")
    }


def derived_numbers(settings: Settings, prompts: Any, sharding: Sharding) -> dict[str, str]:
    """Every number that follows from the config, for the banner."""
    train, data, batch = settings.train, settings.data, settings.train.rollout_batch
    longest = prompts.shapes[-1].length + settings.sampling.max_new_tokens
    return {
        "reward model": settings.inputs.reward_model,
        "prompts": f"{prompts.count_text()} of {data.prompt_source or data.source}, "
        f"{train.prompts_per_iteration} per iteration, "
        f"buckets of {', '.join(str(shape.length) for shape in prompts.shapes)} tokens",
        "responses per iteration": f"{batch} of at most {settings.sampling.max_new_tokens} tokens "
        f"({train.samples_per_prompt} per prompt)",
        "updates per iteration": f"{train.updates_per_iteration} of {train.minibatch} responses "
        f"in {train.microbatches} microbatches",
        "iterations": f"{train.iterations} ({train.critic_pretrain_iterations} of the critic "
        f"alone), {prompts.epochs_text(train.iterations)} of prompts",
        "tokens per iteration": f"at most {batch * longest:,}, prompts included",
        "devices": f"{sharding.mesh.size}, {sharding.mode}",
        "run folder": settings.workdir,
    }


@retried
def main(config: ConfigDict, on_step: OnStep | None = None) -> None:
    """Trains, compares with SFT and reports; resumes where an earlier run stopped."""
    settings = command.open_config("ppo_max", config, Settings)
    if not folders.claim(settings, "PPO"):
        return
    # After each rollback from a collapse a run learns half as fast.
    method_config = settings.method().slower(len(rollbacks(settings.workdir)))
    sharding, task, text = settings.sharding.make(), settings.prompt_task(), settings.task()
    method_config.check_devices(sharding.data)
    train, data, inputs = settings.train, settings.data, settings.inputs

    # 1. What the stages before left: policy and reference from SFT, and the reward model.
    require_stages(settings)
    models = {
        f"inputs.{name}": getattr(inputs, name) for name in ("model", "reference", "reward_model")
    }
    date = folders.date(settings.workdir)
    tokenizer = stages.load_tokenizer(inputs.reference, *models.values(), date=date)
    policy, reference = load_policies(settings, sharding)
    reward_model = load_reward_model(settings, policy, sharding)

    # 2. Prompts to train on, and SFT text for the ptx loss.
    pad_id, eos_ids = tokenizer.pad_token_id, tuple(stop_tokens(tokenizer))
    prompts = prompt_batches(
        task.prompts(tokenizer, "train", max_length=data.longest_prompt),
        batch_size=train.prompts_per_iteration,
        buckets=data.prompt_buckets,
        seed=settings.seed,
        pad_id=pad_id,
    )
    cursors = [prompts, *load_ptx(settings, text, tokenizer)]
    for batches in cursors:
        batches.share(sharding.local_rows)
    ptx = cursors[-1]

    # 3. The state and its functions.
    method = PPOMax(
        method_config,
        policy=policy,
        reference=reference,
        reward_model=reward_model,
        make_critic=lambda language: load_critic(settings, language, reward_model, sharding),
        eos_ids=eos_ids,
        pad_id=pad_id,
        sharding=sharding,
    )
    state = method.start()
    policy_line = f"{stages.parameters_line(policy, state.policy.model)}, from {inputs.model}"
    reporting.banner(
        "PPO",
        {"policy": policy_line}
        | derived_numbers(settings, prompts, sharding)
        | stages.memory_lines(
            sharding,
            {"policy": state.policy, "critic": state.critic},
            {"reference": reference, "reward model": reward_model},
            accumulated=train.microbatches > 1,
        ),
    )

    # 4. Prompts that no stage has seen, and SFT's responses to compare with.
    judges = judging.load_judges(judge_names(settings.judges, task), settings)
    eval_sampling = settings.eval.sampling.of(settings.sampling)
    generate = method.generate  # one program serves both where nothing differs
    if eval_sampling != settings.sampling:
        generate = make_generate(eval_sampling, eos_ids=eos_ids, pad_id=pad_id, sharding=sharding)
    respond = make_respondents(
        settings,
        task,
        tokenizer,
        train.rollout_batch,
        generate=generate,
        temperature=eval_sampling.policy_temperature,
        judges=judges,
        reference=reference,
        reward_model=reward_model,
        sharding=sharding,
    )
    compare = AgainstBaseline(
        respond["validation"], reference, method.eval_key, settings.eval.prompts
    )

    # 5. Algorithm 1.
    show = ("reward/mean", *(f"win_rate/{name}" for name in judges), "policy/kl_ref_sequence")
    pinned = stages.inputs(tokenizer, task, text, date=date, models=models)
    monitor = settings.monitor()
    with settings.run(train.iterations, "PPO", show, pinned, monitor, on_step=on_step) as run:
        state = run.restore(state, *cursors)
        for iteration in run.steps():
            rollout = method.sample(state, next(prompts), iteration)  # line 2
            experience, state = method.score(state, rollout)  # lines 3 and 4
            updates = []
            for minibatch in method.minibatches(experience, iteration):
                state, metrics = method.update(state, minibatch, ptx, iteration)  # 5 and 6
                updates.append(metrics)
            metrics = method.metrics(experience, updates)
            state = method.adapt(state, metrics)
            metrics |= method.settings_now(state)
            if (iteration + 1) % settings.eval.every == 0:
                metrics |= compare(method.policy(state))
            run.log(iteration, metrics)
            run.checkpoint(iteration, state, *cursors)

    # 6. Save, compare with SFT on prompts that no stage has seen, report.
    trained = state.policy.model
    model = stages.save_tuned(policy, trained, run.workdir, tokenizer, base=inputs.model)
    answers = {
        name: respond["test"](model, method.eval_key, settings.eval.final_prompts)
        for name, model in (("SFT", reference), (settings.label, model))
    }
    notes = () if settings.kl.coef else reporting.figure_4(run.workdir, answers)
    collapses = run.collapses()
    reporting.write(
        settings,
        run,
        answers,
        judges,
        notes=(*collapses, *notes),
        summary={"collapses": collapses},
    )


if __name__ == "__main__":
    command.cli(main, default="configs/ppo_max.py:quickstart")
