"""Reward modelling from pairs.

  python -m experiments.reward_model --config configs/reward_model.py:quickstart

Scales:
  tiny        seconds on two CPU cores; for tests
  quickstart  from the quickstart's SFT model, pairs of reviews whose human ratings differ by >= 1;
              held-out pair accuracy .77 to .78 over seeds 0, 1, 2, the VADER rule .70 to .73;
              2 minutes on two CPU cores (AMD EPYC), 1.8 GiB
  smollm2     the first 15 of 30 layers of SmolLM2-135M-Instruct, adapters of rank 8, all texts of a
              batch compared; movie reviews of up to 64 tokens (97%) in its chat template; held-out
              pair accuracy .87 to .91 on 400 pairs over seeds 0, 1, 2, the VADER rule .66 to .74; 4
              minutes on two CPU cores (AMD EPYC), 8.2 GiB
  paper_en    LLaMA-7B on HH-RLHF, learning rate 5e-6, 10% warm-up, 1000 steps, 4 to 128 pairs a
              step, beta_rm 1 (deck: "Training Implementations for the RM")
  paper_zh    OpenChineseLLaMA-7B on your own pairs, the same numbers
  moss_en, moss_zh  the released script: 32 pairs a step, no LM loss
Variants:
  no_lm       without the LM loss
  harm        people's harm scores of answers of language models, opt-in: `smollm2,harm`; a prompt
              is in one split only
"""

from ml_collections import ConfigDict

from configs import common


def _quickstart() -> ConfigDict:
    config = common.shared()
    # `model`: folder with the model to start from; `build`: run the stage before if it is missing.
    # `layers`: how many of its layers are kept; 0 is all.
    config.inputs = ConfigDict({"model": "", "build": True, "variant": "quickstart", "layers": 0})
    config.model = ConfigDict({"dtype": "float32", "remat": "none", "attention": "xla"})
    config.data = ConfigDict(
        {"source": "reviews", "domains": ("movie", "amazon"), "limit": 0, "max_length": 128}
    )
    # Reviews in a chat: what the system asks of the assistant; empty is plain text.
    config.data.instruction = ""
    config.data.update(min_gap=1.0, pairs=20_000, eval_pairs=2_000, reference_texts=1_000)
    # A step takes as many pairs as fit into `max_tokens`, at least min_pairs, at most max_pairs.
    config.train = ConfigDict(
        {"steps": 300, "max_tokens": 4096, "min_pairs": 8, "max_pairs": 64, "microbatches": 1}
    )
    config.train.eval_every = 50
    # Comparisons of a batch: its pairs, or all of its texts whose ratings differ by min_gap.
    config.loss = ConfigDict({"lm_coef": 0.3, "comparisons": "pairs"})
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.1, "b2": 0.98}
    )
    config.optimizer.weight_decay = 0.1
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.inputs.variant = "tiny"
    config.data.update(limit=200, max_length=96, pairs=200, eval_pairs=40, reference_texts=20)
    config.train.update(steps=6, max_tokens=2048, min_pairs=8, max_pairs=16, eval_every=3)
    config.checkpoint.every = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.inputs.update(model=common.SMOLLM2, variant="smollm2", layers=15)
    config.data.update(domains=("movie",), max_length=64, instruction=common.INSTRUCTION)
    config.data.update(pairs=4_000, eval_pairs=400, reference_texts=256)
    config.train.update(steps=32, max_tokens=2304, min_pairs=8, max_pairs=32, eval_every=32)
    # No LM loss: its logits over 49,152 tokens would cost a third more, and the policy is another
    # model.
    config.loss.update(lm_coef=0.0, comparisons="batch")
    config.lora.rank = 8
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    return config


def _paper_en() -> ConfigDict:
    config = _quickstart()
    config.inputs = ConfigDict(
        {"model": "huggyllama/llama-7b", "build": False, "variant": "paper_en"}
    )
    config.inputs.layers = 0
    config.model = ConfigDict({"dtype": "bfloat16", "remat": "full", "attention": "cudnn"})
    config.data = ConfigDict({"source": "hh", "domains": (), "limit": 0, "max_length": 2048})
    config.data.instruction = ""
    config.data.update(min_gap=0.0, pairs=160_000, eval_pairs=1_000, reference_texts=1_000)
    # "4 to 128" can only be per device: 160k pairs x 1.06 epochs / 1000 steps = 170 pairs a step.
    config.train.update(
        steps=1000, max_tokens=262_144, min_pairs=32, max_pairs=1024, microbatches=4, eval_every=50
    )
    config.loss.lm_coef = 1.0
    config.optimizer = ConfigDict(
        {"learning_rate": 5e-6, "schedule": "inverse_sqrt", "warmup_fraction": 0.1, "b2": 0.95}
    )
    config.optimizer.weight_decay = 0.0
    return config


def _paper_zh() -> ConfigDict:
    config = _paper_en()
    config.inputs.update(model="models/open-chinese-llama-7b", variant="paper_zh")
    config.data.source = "jsonl:data/preferences_zh.jsonl"
    config.data.pairs = 30_000
    return config


def _moss(base: ConfigDict, variant: str) -> ConfigDict:
    config = base
    config.inputs.variant = variant
    config.train.update(max_tokens=131_072, min_pairs=32, max_pairs=32)
    config.loss.lm_coef = 0.0
    return config


def _harm(config: ConfigDict) -> None:
    config.data.update(source="harm", instruction="", min_gap=0.25, max_length=256)
    config.data.update(pairs=1_000, eval_pairs=200, reference_texts=100)
    config.train.update(min_pairs=4)
    config.loss.comparisons = "pairs"


def _no_lm(config: ConfigDict) -> None:
    config.loss.lm_coef = 0.0


def _finish(config: ConfigDict) -> None:
    config.inputs.variant = common.with_seed(config.inputs.variant, config.seed)
    if not config.inputs.model:
        config.inputs.model = common.with_seed(f"runs/sft/{config.scale}", config.seed) + "/model"


SCALES = {
    "tiny": _tiny,
    "quickstart": _quickstart,
    "smollm2": _smollm2,
    "paper_en": _paper_en,
    "paper_zh": _paper_zh,
    "moss_en": lambda: _moss(_paper_en(), "moss_en"),
    "moss_zh": lambda: _moss(_paper_zh(), "moss_zh"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    variants = {"no_lm": _no_lm, "harm": _harm}
    return common.build("reward_model", arg, scales=SCALES, variants=variants, finish=_finish)
