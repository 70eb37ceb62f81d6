"""The figures of the paper: which runs each needs, and how it is drawn.

`experiments.figures` makes them. A curve is an ordinary run with a variant, in a folder of its own
that names what was changed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from configs import common
from configs import reward_model as reward_model_configs
from experiments import claims
from rlhf_jax.evaluation.panels import Panel

# Iterations of a figure with 1,000 steps in the paper: at least twice what vanilla PPO takes to
# collapse, which on `quickstart` was 16 to 22 over three seeds.
ITERATIONS = {"tiny": 8, "quickstart": 60, "smollm2": 60}
# Iterations of Figure 9: ten times as many, as in the paper, where an hour allows.
LONG = {"tiny": 16, "quickstart": 600, "smollm2": 120}
# A guess, until a run of the scale has finished: seconds of an iteration, evaluations included.
SECONDS = {"tiny": 3.0, "quickstart": 3.5, "smollm2": 30.0}
JUDGES = ("vader", "language_model")
EVALUATIONS = 6  # of a run

PPO, REWARD_MODEL = "ppo_max", "reward_model"
# How a figure is drawn.
CURVES, DIFFERENCES, BARS, FAN = "curves", "differences", "bars", "fan"


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve of a figure.

    Attributes:
      label: in the legend, and in the claims.
      variants: of the experiment's config file.
      times: so many times the iterations of a figure; 0 is the long run.
      settings: assignments.
      evaluations: of a run, evenly spread.
      experiment: which makes the run. A reward model has the length of its scale.
    """

    label: str
    variants: tuple[str, ...] = ()
    times: float = 1.0
    settings: tuple[str, ...] = ()
    evaluations: int = EVALUATIONS
    experiment: str = PPO

    def iterations(self, scale: str) -> int:
        """Of its run."""
        if self.experiment == REWARD_MODEL:
            return reward_model_configs.get_config(scale).train.steps
        return round(self.times * ITERATIONS[scale]) or LONG[scale]

    def folder(self, scale: str, seed: int) -> str:
        """Of its run: what is changed, the seed, the iterations."""
        if self.experiment == REWARD_MODEL:
            return common.resolve(
                reward_model_configs.get_config(self.argument(scale, seed))
            ).workdir
        settings = [part.split(".", 1)[-1] for one in self.settings for part in one.split(",")]
        ends = [f"seed={seed}", f"iterations={self.iterations(scale)}"]
        return "runs/ppo_max/" + "-".join([scale, *self.variants, *settings, *ends])

    def argument(self, scale: str, seed: int) -> str:
        """What follows the colon of `--config configs/EXPERIMENT.py:`."""
        if self.experiment == REWARD_MODEL:
            # The folder in which PPO looks for it.
            return ",".join([scale, *self.variants, *([f"seed={seed}"] if seed else [])])
        iterations = self.iterations(scale)
        judges = [] if scale == "tiny" else [f"judges={JUDGES}".replace(" ", "")]
        return ",".join(
            [
                scale,
                *self.variants,
                f"seed={seed}",
                f"train.iterations={iterations}",
                f"eval.every={max(1, iterations // self.evaluations)}",
                *judges,
                *self.settings,
                f"workdir={self.folder(scale, seed)}",
            ]
        )


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper.

    Attributes:
      title: what it shows.
      series: its curves, in the order of the legend.
      panels: in the paper's order.
      columns: panels side by side.
      drawing: "curves"; "differences" of held-out pairs; "bars" of wins, ties and losses; a "fan"
        of the quantiles of each panel's metrics.
    """

    title: str
    series: tuple[Series, ...]
    panels: tuple[Panel, ...]
    columns: int = 4
    drawing: str = CURVES


def _of(*variants: str, **settings: Any) -> tuple[Series, ...]:
    return tuple(Series(name, (name,), **settings) for name in variants)


REWARD = Panel("Reward", "reward model score", {"reward/mean": ""})
LENGTH = Panel("Response length", "tokens", {"response/length": ""})
KL = Panel("KL to SFT", "nats per token", {"policy/kl_ref": ""})
PERPLEXITY = Panel("Perplexity", "of the responses", {"policy/perplexity": ""})
WINS = Panel("Win rate against SFT", "share of prompts", {"win_rate/*": ""}, baseline=0.5)
DISTINCT = Panel("Distinct bigrams", "distinct-2", {"response/distinct_2": ""})
POLICY_LOSS = Panel("PG loss", "loss", {"loss/policy": ""})
VALUE_LOSS = Panel("VF loss", "loss", {"loss/value": ""})
ADVANTAGE = Panel("Advantage", "mean", {"critic/advantage": ""})
RETURN = Panel("Return", "mean", {"critic/return": ""})
FOUR = (REWARD, LENGTH, KL, PERPLEXITY)
ACCURACY = Panel(
    "Accuracy",
    "share of pairs",
    {"reward/accuracy": "train", "eval/accuracy": "held out"},
    baseline=0.5,
)
QUANTILES = Panel(
    "Reward", "reward model score", {name: f"{int(name[-2:])}%" for name in claims.QUANTILES}
)
# Judged twice as often as the others: how far had the judge fallen when the monitor spoke?
VANILLA = Series("vanilla", ("vanilla",), evaluations=2 * EVALUATIONS)
# Of Figure 14.
_NORMALIZED = "reward.transform=normalize,reward.clip=0.8"
_ADVANTAGES = "ppo.normalize_advantages=True,ppo.advantage_clip=0.8"
_VALUE_CLIP = "ppo.value_clip_eps=0.2"
BESIDE = (WINS, DISTINCT)  # what the paper does not have in these figures

FIGURES = {
    "2": PaperFigure(
        "Held-out pairs: preferred minus dispreferred score",
        (Series("reward model", experiment=REWARD_MODEL),),
        (ACCURACY,),
        drawing=DIFFERENCES,
    ),
    "3": PaperFigure(
        "Accuracy of the reward model",
        (Series("reward model", experiment=REWARD_MODEL),),
        (ACCURACY,),
    ),
    "4": PaperFigure(
        "Vanilla PPO",
        (VANILLA,),
        (REWARD, WINS, POLICY_LOSS, VALUE_LOSS, KL, PERPLEXITY, LENGTH, DISTINCT),
    ),
    "6": PaperFigure(
        "Score re-parameterisation, on vanilla PPO",
        (
            VANILLA,
            *_of(*claims.REPARAMETERISED),
            Series("reward_norm_0.3, three times as long", ("reward_norm_0.3",), times=3),
        ),
        (*FOUR, *BESIDE),
    ),
    "7": PaperFigure(
        "Policy constraints, on vanilla PPO", _of(*claims.CONSTRAINED, times=0.8), (*FOUR, *BESIDE)
    ),
    "8": PaperFigure(
        "Initialisation",
        (
            Series("PPO-max"),
            *_of("policy_pretrained", "critic_sft", "critic_pretrain"),
            VANILLA,
        ),
        (*FOUR, POLICY_LOSS, VALUE_LOSS, ADVANTAGE, RETURN, *BESIDE),
    ),
    "9": PaperFigure(
        "PPO-max, long", (Series("PPO-max, long", times=0),), (*FOUR, *BESIDE), columns=3
    ),
    "10": PaperFigure(
        "PPO-max against SFT, test prompts", (Series("PPO-max"),), (WINS,), drawing=BARS
    ),
    "13": PaperFigure(
        "Rewards of an iteration's responses",
        (VANILLA, Series("PPO-max")),
        (QUANTILES,),
        drawing=FAN,
    ),
    "14": PaperFigure(
        "Re-parameterised rewards and advantages",
        tuple(
            Series(label, ("vanilla",), settings=settings)
            for label, settings in {
                "reward norm 0.8, advantage norm 0.8": (_NORMALIZED, _ADVANTAGES),
                "reward norm 0.8, advantage norm 0.8, value clip": (
                    _NORMALIZED,
                    _ADVANTAGES,
                    _VALUE_CLIP,
                ),
                "reward norm 0.8, advantage norm, value clip": (
                    _NORMALIZED,
                    "ppo.normalize_advantages=True,ppo.value_clip_eps=0.2",
                ),
                "reward norm 0.8, value clip": (_NORMALIZED, _VALUE_CLIP),
                "reward scaling, advantage norm 0.8, value clip": (
                    "reward.transform=scale",
                    _ADVANTAGES,
                    _VALUE_CLIP,
                ),
            }.items()
        ),
        (*FOUR, *BESIDE),
    ),
    "15": PaperFigure("The KL penalty's weight", _of("kl_0.05", "kl_0.1", "kl_0.2"), FOUR),
    "16": PaperFigure(
        "The entropy bonus, with and without bound", _of("entropy", "entropy_clip"), FOUR
    ),
    "17": PaperFigure(
        "The policy's clip, without KL penalty",
        (
            Series("KL penalty", ("kl",)),
            Series("no clip", ("vanilla",), settings=("ppo.objective=surrogate",)),
            Series("clip 0.5", ("vanilla",), settings=("ppo.clip_eps=0.5",)),
        ),
        FOUR,
    ),
    "18": PaperFigure(
        "Clipping gradients, without KL penalty",
        (
            *(
                Series(
                    f"gradient clip {norm}",
                    ("vanilla",),
                    settings=(
                        f"optimizer.max_grad_norm={norm}",
                        f"critic_optimizer.max_grad_norm={norm}",
                    ),
                )
                for norm in (0.0, 0.5)
            ),
            dataclasses.replace(VANILLA, label="gradient clip 1.0"),
        ),
        (*FOUR, POLICY_LOSS, VALUE_LOSS),
    ),
    "19": PaperFigure(
        "GAE's lambda",
        (
            dataclasses.replace(VANILLA, label="lambda 0.9"),
            Series("lambda 0", ("vanilla",), settings=("advantage.lambda_=0.0",)),
            Series("lambda 1", ("vanilla",), settings=("advantage.lambda_=1.0",)),
        ),
        FOUR,
    ),
}
