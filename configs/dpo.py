"""Direct preference optimisation.

  python -m experiments.dpo --config configs/dpo.py:quickstart
  python -m experiments.dpo --config configs/dpo.py:quickstart,ipo,seed=1

Scales:
  tiny        seconds on two CPU cores; for tests
  smollm2     SmolLM2-135M-Instruct, adapters of rank 8, movie reviews in its chat template
  quickstart  from the quickstart's SFT policy, pairs of reviews ranked by their human ratings; win
              rate against SFT by the judge .66 (seed 0), KL 11 nats per response; 2.5 minutes on
              two CPU cores (AMD EPYC, shared), 1.9 GiB
  paper_en    LLaMA-7B on HH-RLHF: beta 0.1, batch 64, learning rate 1e-6, 150 steps of warm-up, one
              epoch (Rafailov et al. 2023, appendix B). Their RMSprop is AdamW with b1 = 0 and no
              weight decay here: the same update except for the bias correction of early steps
Variants:
  ipo                     squared distance of the margin from 1 / (2 beta) (Azar et al. 2023)
  hinge                   pairs that are right by a margin of 1 are left alone (Liu et al. 2023)
  simpo                   means over tokens, a margin, no reference (Meng et al. 2024)
  kto                     each response by itself, above or below a reference point (Ethayarajh et
                          al. 2024)
  label_smoothing         one label in ten is assumed to be flipped (Mitchell 2023)
  beta_0.05, beta_0.5     a weaker and a stronger pull to the reference
  sft                     with -0.01 log pi(chosen), the other term of the slides' L_total

  zh                      Chinese shop reviews
  half                    the first half of the texts, so that the judge `gold` may be asked

Pairs are those of the reward model and prompts those of PPO-max, read from their configs, so that
the methods can be compared.
"""

from ml_collections import ConfigDict

from configs import common, ppo_max, reward_model
from configs.unread import Unread, among


def _task(scale: str) -> ConfigDict:
    """Pairs of the reward model, prompts and sampling of PPO-max, at one of their scales."""
    pairs, prompts = reward_model.get_config(scale), ppo_max.get_config(scale)
    config = common.shared()
    config.label = "DPO"  # how the report calls the result; the variants, if there are any
    config.inputs = ConfigDict()
    # Folder of the SFT policy: training starts there, and it is the reference. Empty is the SFT
    # model of the same scale.
    config.inputs.model = prompts.inputs.model
    config.inputs.build = pairs.inputs.build  # run SFT where its model is missing
    config.compare = ConfigDict()  # what the report compares with; left out where missing
    config.compare.ppo_max = ""  # folder; empty is PPO-max of the same scale
    config.compare.reward_model = ""  # folder; empty is the reward model of the same scale
    config.model, config.lora = pairs.model, pairs.lora
    config.data = pairs.data
    for key in ("reference_texts", "responses", "votes"):
        del config.data[key]
    config.data.prompt_source = prompts.data.prompt_source  # of prompts; empty is data.source
    config.data.prompt_buckets = prompts.data.prompt_buckets  # lengths of padded prompts
    config.sampling = prompts.sampling
    config.eval = prompts.eval
    # The same prompts in the same batches get the same keys, and so the same SFT responses.
    config.eval.batch = prompts.train.prompts_per_iteration
    config.judges = prompts.judges
    return config


def _quickstart() -> ConfigDict:
    config = _task("quickstart")
    # One epoch: every pair costs a forward pass of the reference, whether it is used or not.
    config.data.update(pairs=5_000, validation_pairs=500)
    config.dpo = ConfigDict()
    config.dpo.objective = "dpo"  # or "ipo", "hinge", "simpo", "kto"
    config.dpo.beta = 0.1  # strength of the pull to the reference
    config.dpo.label_smoothing = 0.0  # assumed share of flipped labels, for "dpo"
    config.dpo.sft_coef = 0.0  # weight of -log pi(chosen)
    config.dpo.labels = "hard"  # or "soft": rows have p_chosen, as AI feedback gives it; for "dpo"
    config.dpo.margin = 1.0  # gamma, by which the chosen is to win, for "simpo"
    config.dpo.desirable_weight = 1.0  # lambda of chosen responses, for "kto"
    config.dpo.undesirable_weight = 1.0  # lambda of rejected responses, for "kto"
    config.train = ConfigDict()
    config.train.steps = 150  # updates
    config.train.max_tokens = 4096  # a step takes as many pairs as fit, padding included
    config.train.min_pairs = 8  # the fewest pairs of a step
    config.train.max_pairs = 64  # the most pairs of a step
    config.train.microbatches = 1  # parts of a step, one after the other
    config.optimizer = common.optimizer(5e-4, "cosine", warmup_fraction=0.1, b2=0.98)
    config.eval.every = 50
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    task = _task("tiny")
    for group in ("inputs", "data", "sampling", "eval"):
        config[group] = task[group]
    config.train.update(steps=6, max_tokens=2048, min_pairs=8, max_pairs=16)
    config.eval.every = 3
    config.checkpoint.every = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    task = _task("smollm2")
    for group in ("inputs", "model", "data", "sampling", "eval", "lora"):
        config[group] = task[group]
    config.data.update(pairs=1_000, validation_pairs=100, eval_pairs=200)
    config.train.update(steps=40, max_tokens=2304, min_pairs=8, max_pairs=32)
    config.optimizer.learning_rate = 1e-3
    config.eval.every = 20
    return config


def _paper_en() -> ConfigDict:
    config = _quickstart()
    task = _task("paper_en")
    for group in ("inputs", "model", "data", "sampling", "eval"):
        config[group] = task[group]
    config.data.max_length = 512
    # 160,800 pairs in batches of 64.
    config.train.update(steps=2512, max_tokens=65_536, min_pairs=64, max_pairs=64, microbatches=4)
    config.optimizer = common.optimizer(1e-6, "constant", warmup_fraction=150 / 2512, b2=0.99)
    config.optimizer.update(b1=0.0, max_grad_norm=10.0)
    config.eval.every = 250
    return config


def _dpo(**values):
    """A variant that updates keys of `config.dpo`."""

    def change(config: ConfigDict) -> None:
        config.dpo.update(values)

    return change


VARIANTS = {
    "ipo": _dpo(objective="ipo"),
    "hinge": _dpo(objective="hinge"),
    "simpo": _dpo(objective="simpo", beta=2.0),
    "kto": _dpo(objective="kto"),
    "label_smoothing": _dpo(label_smoothing=0.1),
    "beta_0.05": _dpo(beta=0.05),
    "beta_0.5": _dpo(beta=0.5),
    "sft": _dpo(sft_coef=0.01),
    "zh": common.zh,
    "half": common.half,
}


UNREAD = (
    Unread("dpo.margin", unless="dpo.objective", is_=among("simpo")),
    Unread("dpo.desirable_weight dpo.undesirable_weight", unless="dpo.objective", is_=among("kto")),
)
SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2, "paper_en": _paper_en}


def derive(config: ConfigDict) -> None:
    """The folders of the stages before, and of what the report compares with."""
    compare = config.compare
    config.inputs.model = config.inputs.model or common.stage_folder("sft", config)
    compare.ppo_max = compare.ppo_max or common.stage_folder("ppo_max", config)
    compare.reward_model = compare.reward_model or common.stage_folder("reward_model", config)


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("dpo", arg, scales=SCALES, variants=VARIANTS)
