"""Supervised fine-tuning.

  python -m experiments.sft --config configs/sft.py:quickstart

Scales:
  tiny        seconds on two CPU cores; for tests
  quickstart  a 1 M Llama from scratch on movie and product reviews; held-out perplexity 78 to 98
              over seeds 0, 1, 2; 3 minutes on two CPU cores (AMD EPYC), 1.8 GiB
  smollm2     SmolLM2-135M-Instruct, adapters of rank 8, 640 rows of reviews in its chat template;
              not part of the chain of ppo_max's smollm2, whose SFT model is the instruct model
  paper_en    LLaMA-7B, 2 epochs, learning rate 9.5e-6, batches of about 1024 conversations
              (the paper's "Models and Training Setup")
  paper_zh    OpenChineseLLaMA-7B, the same numbers
Variants:
  pretrain    other text (editorials and tweets) instead of the task's: a model without SFT, for
              the ablation `policy_pretrained` of ppo_max
  zh          Chinese shop reviews
  harm        answers to harmful prompts that everybody found harmless, opt-in: `smollm2,harm`
  arithmetic  sums in steps, each with what remains of the sum; at `smollm2` word problems
"""

from ml_collections import ConfigDict

from configs import common
from configs.unread import EMPTY, Unread


def _quickstart() -> ConfigDict:
    config = common.shared()
    config.inputs = ConfigDict()
    config.inputs.model = ""  # folder or hub name to start from; empty trains from scratch
    config.sizes = ConfigDict()  # of a model from scratch; read only where inputs.model is empty
    config.sizes.hidden_size = 128
    config.sizes.num_layers = 4
    config.sizes.num_heads = 4
    config.sizes.intermediate_size = 344
    config.sizes.max_length = 256  # the longest row that the model takes
    config.tokenizer = ConfigDict()
    config.tokenizer.vocab_size = 2048  # of a BPE from scratch; read only where `sizes` is
    config.data = common.task()
    config.data.max_length = 128  # tokens of a document; longer ones lose their oldest turns
    config.train = ConfigDict()
    config.train.steps = 420  # updates; 0 where train.epochs says how long
    config.train.epochs = 0.0  # how often every document is read; 0 where train.steps says it
    config.train.minibatch = 32  # rows of an update
    config.train.microbatches = 1  # parts of a minibatch, one after the other
    config.train.row_length = 128  # tokens of a row, into which documents are packed
    config.optimizer = common.optimizer(3e-3, "cosine", warmup_fraction=0.05, b2=0.98)
    config.optimizer.weight_decay = 0.1
    config.eval = ConfigDict()
    config.eval.every = 60  # updates between two measurements on held-out documents
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.sizes.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    config.tokenizer.vocab_size = 512
    config.data.update(limit=200, max_length=96)
    config.train.update(steps=6, minibatch=8, microbatches=2, row_length=96)
    config.eval.every = 3
    config.checkpoint.every = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.inputs.model = common.SMOLLM2
    config.data.update(domains=("movie",), max_length=96, instruction=common.INSTRUCTION)
    config.train.update(steps=40, minibatch=16, row_length=128)
    config.eval.every = 20
    config.lora.rank = 8
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    return config


def _paper_en() -> ConfigDict:
    config = _quickstart()
    config.inputs.model = "huggyllama/llama-7b"
    config.model = common.full_size()
    config.data.update(source="hh", domains=(), max_length=2048)
    # The paper's million instructions (400k of one turn, 600k of several) are not public: the
    # chosen conversations of HH stand in. Where you have such sets, put them in data.source as
    # mix:0.4@jsonl:single_turn.jsonl+0.6@jsonl:multi_turn.jsonl.
    # The paper's batch of 1024 counts conversations, of which a packed row of 2,048 tokens holds
    # several; the banner says how many an update reads.
    config.train.update(steps=0, epochs=2.0, minibatch=128, microbatches=16, row_length=2048)
    config.optimizer = common.optimizer(9.5e-6, "cosine", warmup_fraction=0.03, b2=0.95)
    config.eval.every = 200
    return config


def _paper_zh() -> ConfigDict:
    config = _paper_en()
    # Published as a patch to LLaMA-7B: the folder is where it was applied.
    config.inputs.model = "models/open-chinese-llama-7b"
    # Put conversations of your own here, one JSON object a line, in any shape that docs/data.md
    # lists; the paper's are not public, and mixed as this says.
    config.data.source = (
        "mix:0.4@jsonl:data/sft_zh_single_turn.jsonl+0.6@jsonl:data/sft_zh_multi_turn.jsonl"
    )
    return config


def _pretrain(config: ConfigDict) -> None:
    if config.data.source != "reviews":
        raise ValueError(
            f"the variant pretrain takes other reviews, and data.source={config.data.source!r} has "
            "none: give inputs.model a pretrained model instead"
        )
    config.data.domains = ("nyt", "tweets")


def _harm(config: ConfigDict) -> None:
    config.data.update(source="harm", domains=(), instruction="", max_length=256)
    # With SmolLM2's tokenizer 154 answers fit, which nine updates read once.
    config.train.update(steps=min(config.train.steps, 24), minibatch=8, row_length=256)
    config.eval.every = min(config.eval.every, 6)


def _arithmetic(config: ConfigDict) -> None:
    config.data.update(domains=(), instruction="")
    if config.inputs.model:
        config.data.update(source="arithmetic:gsm_symbolic", max_length=320)
        config.train.row_length = 320
        return
    config.tokenizer.vocab_size = 280  # bytes, and the few words of sums
    # Longer than the prose of the scale: a policy that ends no solution teaches nothing.
    if config.scale == "tiny":
        config.data.update(source="arithmetic", max_length=128)
        config.train.update(steps=150, row_length=128)
    else:
        config.data.update(source=common.SUMS, max_length=192)
        config.train.update(steps=1600, row_length=192)


SCALES = {
    "tiny": _tiny,
    "quickstart": _quickstart,
    "smollm2": _smollm2,
    "paper_en": _paper_en,
    "paper_zh": _paper_zh,
}


def _zh(config: ConfigDict) -> None:
    common.zh(config)
    if config.scale != "tiny" and not config.inputs.model:
        # A letter is three bytes: common ones become tokens of their own.
        config.tokenizer.vocab_size = 4096


VARIANTS = {"zh": _zh, "pretrain": _pretrain, "harm": _harm, "arithmetic": _arithmetic}
# A pretrained model has its own sizes and tokenizer.
UNREAD = (
    Unread("sizes.* tokenizer.*", unless="inputs.model", is_=EMPTY),
    Unread("train.epochs", unless="train.steps", is_=EMPTY),
)


def derive(config: ConfigDict) -> None:
    """Nothing: there is no stage before."""


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("sft", arg, scales=SCALES, variants=VARIANTS)
