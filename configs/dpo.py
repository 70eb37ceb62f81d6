"""Direct preference optimisation.

  python -m experiments.dpo --config configs/dpo.py:quickstart
  python -m experiments.dpo --config configs/dpo.py:quickstart,ipo,seed=1

Scales:
  tiny        seconds on two CPU cores; for tests
  smollm2     SmolLM2-135M-Instruct, adapters of rank 8, movie reviews in its chat template
  quickstart  from the quickstart's SFT policy, pairs of reviews ranked by their human ratings; win
              rate against SFT by the judge .66 (seed 0), KL 11 nats a response; 2.5 minutes on two
              CPU cores (AMD EPYC, shared), 1.9 GiB
  paper       LLaMA-7B on HH-RLHF: beta 0.1, batch 64, learning rate 1e-6, 150 steps of warm-up, one
              epoch (Rafailov et al. 2023, appendix B). Their RMSprop is AdamW with b1 = 0 and no
              weight decay here: the same update but for the bias correction of early steps
Variants:
  ipo                     squared distance of the margin from 1 / (2 beta) (Azar et al. 2023)
  hinge                   pairs that are right by 1 are left alone (Liu et al. 2023)
  label_smoothing         one label in ten is thought to be flipped (Mitchell 2023)
  beta_0.05, beta_0.5     a weaker and a stronger pull to the reference
  sft                     with -0.01 log pi(chosen), the other term of the deck's L_total

Pairs are the reward model's and prompts are PPO-max's: both are read from their configs, so that
the methods can be compared.
"""

from ml_collections import ConfigDict

from configs import common, ppo_max, reward_model


def _task(scale: str) -> ConfigDict:
    """Pairs of the reward model, prompts and sampling of PPO-max, at one of their scales."""
    pairs, prompts = reward_model.get_config(scale), ppo_max.get_config(scale)
    config = common.shared()
    config.label = "DPO"
    # `reference`: folder with the SFT policy, from which training starts; `build`: run SFT if it is
    # missing.
    reference = prompts.inputs.reference if scale == "smollm2" else ""
    config.inputs = ConfigDict(
        {"reference": reference, "build": pairs.inputs.build, "variant": scale}
    )
    # Folders of what the report compares with; left out of it where missing.
    config.compare = ConfigDict({"ppo_max": "", "reward_model": ""})
    config.model, config.lora = pairs.model, pairs.lora
    shared = ("source", "domains", "limit", "instruction", "max_length", "min_gap")
    shared += ("pairs", "eval_pairs")
    config.data = ConfigDict({name: pairs.data[name] for name in shared})
    # For the curves; `eval_pairs` of the test split are for the report.
    config.data.validation_pairs = pairs.data.eval_pairs
    config.data.prompt_buckets = prompts.data.prompt_buckets
    config.sampling = prompts.sampling
    # The same prompts in the same batches get the same keys, and so the same SFT responses.
    config.eval = prompts.eval
    config.eval.batch = prompts.train.prompts_per_iteration
    return config


def _quickstart() -> ConfigDict:
    config = _task("quickstart")
    # One epoch: every pair costs a forward pass of the reference, whether it is used or not.
    config.data.update(pairs=5_000, validation_pairs=500)
    config.dpo = ConfigDict({"objective": "dpo", "beta": 0.1, "label_smoothing": 0.0})
    config.dpo.sft_coef = 0.0
    # A step takes as many pairs as fit into `max_tokens`, at least min_pairs, at most max_pairs.
    config.train = ConfigDict(
        {"steps": 150, "max_tokens": 4096, "min_pairs": 8, "max_pairs": 64, "microbatches": 1}
    )
    config.optimizer = ConfigDict(
        {"learning_rate": 5e-4, "schedule": "cosine", "warmup_fraction": 0.1, "b2": 0.98}
    )
    config.optimizer.max_grad_norm = 1.0
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
    config.inputs.reference = common.SMOLLM2
    config.data.update(pairs=1_000, validation_pairs=100, eval_pairs=200)
    config.train.update(steps=40, max_tokens=2304, min_pairs=8, max_pairs=32)
    config.optimizer.learning_rate = 1e-3
    config.eval.every = 20
    return config


def _paper() -> ConfigDict:
    config = _quickstart()
    task = _task("paper_en")
    for group in ("inputs", "model", "data", "sampling", "eval"):
        config[group] = task[group]
    config.data.max_length = 512
    # 160,800 pairs in batches of 64.
    config.train.update(steps=2512, max_tokens=65_536, min_pairs=64, max_pairs=64, microbatches=4)
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-6, "schedule": "constant", "warmup_fraction": 150 / 2512}
    )
    config.optimizer.update(b1=0.0, b2=0.99, max_grad_norm=10.0)
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
    "label_smoothing": _dpo(label_smoothing=0.1),
    "beta_0.05": _dpo(beta=0.05),
    "beta_0.5": _dpo(beta=0.5),
    "sft": _dpo(sft_coef=0.01),
}


def _finish(config: ConfigDict) -> None:
    inputs, compare = config.inputs, config.compare

    def folder(stage: str) -> str:
        return common.with_seed(f"runs/{stage}/{inputs.variant}", config.seed) + "/model"

    inputs.reference = inputs.reference or folder("sft")
    compare.ppo_max = compare.ppo_max or folder("ppo_max")
    compare.reward_model = compare.reward_model or folder("reward_model")
    inputs.variant = common.with_seed(inputs.variant, config.seed)


SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2, "paper": _paper}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("dpo", arg, scales=SCALES, variants=VARIANTS, finish=_finish)
