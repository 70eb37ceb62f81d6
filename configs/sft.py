"""Supervised fine-tuning.

  python -m experiments.sft --config configs/sft.py:quickstart

Scales:
  tiny        seconds on two CPU cores; for tests
  quickstart  a 1 M Llama from scratch on movie and product reviews; held-out perplexity 78 to 98
              over seeds 0, 1, 2; 3 minutes on two CPU cores (AMD EPYC), 1.8 GiB
  smollm2     SmolLM2-135M-Instruct, adapters of rank 8, 640 rows of reviews in its chat template;
              not part of the chain of ppo_max's smollm2, whose SFT model is the instruct model
  paper_en    LLaMA-7B, 2 epochs, learning rate 9.5e-6, global batch 1024 (deck: "Training Setup")
  paper_zh    OpenChineseLLaMA-7B, the same numbers
Variants:
  pretrain    other text (editorials and tweets) instead of the task's: a model without SFT, for
              the ablation `policy_pretrained` of ppo_max
"""

from ml_collections import ConfigDict

from configs import common


def _quickstart() -> ConfigDict:
    config = common.shared()
    # An empty folder name trains from scratch: `model` gives the sizes, `tokenizer` the BPE.
    config.inputs = ConfigDict({"model": ""})
    config.model = ConfigDict(
        {
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 344,
            "max_length": 256,
        }
    )
    config.tokenizer = ConfigDict({"vocab_size": 2048})
    config.data = ConfigDict(
        {"source": "reviews", "domains": ("movie", "amazon"), "limit": 0, "max_length": 128}
    )
    # Reviews in a chat: what the system asks of the assistant; empty is plain text.
    config.data.instruction = ""
    # Sequences are packed into rows of `row_length` tokens; `minibatch` rows make one update.
    config.train = ConfigDict(
        {"steps": 420, "minibatch": 32, "microbatch": 32, "row_length": 128, "eval_every": 60}
    )
    config.optimizer = ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_fraction": 0.05, "b2": 0.98}
    )
    config.optimizer.weight_decay = 0.1
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.model.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    config.tokenizer.vocab_size = 512
    config.data.limit = 200
    config.data.max_length = 96
    config.train.update(steps=6, minibatch=8, microbatch=4, row_length=96, eval_every=3)
    config.checkpoint.every = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.inputs.model = common.SMOLLM2
    config.model = ConfigDict({"dtype": "float32", "remat": "none", "attention": "xla"})
    config.data.update(domains=("movie",), max_length=96, instruction=common.INSTRUCTION)
    config.train.update(steps=40, minibatch=16, microbatch=16, row_length=128, eval_every=20)
    config.lora.rank = 8
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    return config


def _paper_en() -> ConfigDict:
    config = _quickstart()
    config.inputs.model = "huggyllama/llama-7b"
    config.model = ConfigDict({"dtype": "bfloat16", "remat": "full", "attention": "cudnn"})
    config.data = ConfigDict({"source": "hh", "domains": (), "limit": 0, "max_length": 2048})
    config.data.instruction = ""
    # 2 epochs of 1 M conversations in batches of 1024.
    config.train.update(steps=1953, minibatch=1024, microbatch=64, row_length=2048, eval_every=200)
    config.optimizer = ConfigDict(
        {"learning_rate": 9.5e-6, "schedule": "cosine", "warmup_fraction": 0.03, "b2": 0.95}
    )
    config.optimizer.weight_decay = 0.0
    return config


def _paper_zh() -> ConfigDict:
    config = _paper_en()
    # Published as a patch to LLaMA-7B: the folder is where it was applied.
    config.inputs.model = "models/open-chinese-llama-7b"
    config.data.source = "jsonl:data/sft_zh.jsonl"
    return config


def _pretrain(config: ConfigDict) -> None:
    config.data.domains = ("nyt", "tweets")


SCALES = {
    "tiny": _tiny,
    "quickstart": _quickstart,
    "smollm2": _smollm2,
    "paper_en": _paper_en,
    "paper_zh": _paper_zh,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("sft", arg, scales=SCALES, variants={"pretrain": _pretrain})
