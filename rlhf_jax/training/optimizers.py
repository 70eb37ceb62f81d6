"""Optimizers and learning-rate schedules, from the names in a config."""

from __future__ import annotations

import dataclasses

import jax
import optax

from rlhf_jax.runtime.settings import check

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule and global gradient clipping.

    Attributes:
      learning_rate: peak learning rate.
      schedule: after warm-up: "constant", "linear" or "cosine" (down to `end_fraction` of the peak
        at the last step), or "inverse_sqrt" (times sqrt(warmup / step), as in PPO-max's code).
      warmup_fraction: share of all steps in which the rate rises linearly from a tenth of the peak.
      end_fraction: final rate as a share of the peak.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: epsilon, added outside the square root.
      weight_decay: decoupled weight decay.
      max_grad_norm: global norm to which gradients are clipped; 0 is off.
    """

    learning_rate: float
    schedule: str = "constant"
    warmup_fraction: float = 0.1
    end_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self):
        check(
            self,
            learning_rate="[0, 1e6]",
            schedule=SCHEDULES,
            warmup_fraction="[0, 1]",
            end_fraction="[0, 1]",
            b1="[0, 1)",
            b2="[0, 1)",
            eps="(0, 1e6]",  # 0 divides by 0 where a gradient is 0
            weight_decay="[0, 1e6]",
            max_grad_norm="[0, inf)",
        )

    def scaled(self, factor: float) -> OptimizerConfig:
        """The same with so many times the learning rate."""
        return dataclasses.replace(self, learning_rate=self.learning_rate * factor)


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, 0-based."""
    peak = config.learning_rate
    warmup = int(config.warmup_fraction * total_steps)
    rest = max(total_steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.end_fraction, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.end_fraction)
    else:
        start = max(warmup, 1)
        after = lambda step: peak * (start / (start + step)) ** 0.5  # noqa: E731
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.1 * peak, peak, warmup), after], [warmup])


def make_optimizer(
    config: OptimizerConfig, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer, and its schedule for logging.

    Weight decay is applied to matrices only, not to norms, biases or heads of one column. Layer
    weights are stacked, so that a norm has two axes and a matrix three.
    """
    schedule = make_schedule(config, total_steps)

    def decayed(params):
        def is_matrix(path, leaf):
            names = [getattr(part, "key", getattr(part, "name", "")) for part in path]
            return leaf.ndim >= (3 if "layers" in names else 2)

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    parts = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    parts.append(
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    )
    return optax.chain(*parts), schedule
