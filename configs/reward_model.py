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
  paper_en    LLaMA-7B on HH-RLHF, learning rate 5e-6, 10% warm-up, 1000 steps, 4 to 128 pairs
              per step, beta_rm 1 (the paper's "Training Implementations for the RM")
  paper_zh    OpenChineseLLaMA-7B on your own pairs, the same numbers
  moss_en, moss_zh  the released script: 32 pairs per step, no LM loss
Variants:
  no_lm       without the LM loss
  harm        people's harm scores for answers of language models, opt-in: `smollm2,harm`; each
              prompt is in one split only
  zh          Chinese shop reviews, of which people said no more than good or bad
  half        on the first half of the training texts, so that `gold` may judge what it is used for
  ai_labels   on pairs that a language model labels in place of people, softly (RLAIF): those of
              configs/ai_labels.py of the same scale
  constitutional  the same by the principles of a constitution, on samples of its SL-CAI model
  pointwise   from the ratings of texts, by squared error
  listwise    from the order of four texts, by all of its pairs
  plackett_luce  from the order of four texts, by its likelihood
  votes       from pairs with the share of single raters who prefer the chosen, as soft labels
  gold        on the second half, with a seed of its own: the judge `gold`, see docs/judges.md;
              held-out pair accuracy .739 at quickstart, the VADER rule .710
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import common
from configs.ai_labels import CONSTITUTIONAL
from configs.unread import Unread, among, rows_by

RANKED = ("pointwise", "listwise", "plackett_luce")


def _quickstart() -> ConfigDict:
    config = common.shared()
    config.inputs = ConfigDict()
    config.inputs.model = ""  # folder to start from; empty is the SFT model of the same scale
    # Folder of pairs that experiments.ai_labels labelled, in place of the pairs of the data; empty
    # is these.
    config.inputs.labels = ""
    config.inputs.layers = 0  # how many of its layers are kept; 0 is all
    config.inputs.build = True  # run the stage before where its model is missing
    config.data = common.task()
    config.data.max_length = 128  # tokens of a prompt with one response
    config.data.min_gap = 1.0  # the least difference between two ratings that make a pair
    config.data.pairs = 20_000  # to train on
    # Texts of a group, for loss.comparisons "pointwise", "listwise" and "plackett_luce"; there are
    # as many groups as hold the texts of data.pairs pairs.
    config.data.responses = 4
    # For reviews, with soft labels: whether a label is the share of single raters who prefer the
    # chosen, in place of 1.
    config.data.votes = False
    config.data.validation_pairs = 500  # held out, for the curves
    config.data.eval_pairs = 2_000  # held out, for the report
    config.data.reference_texts = 1_000  # responses whose scores get mean 0 and std 1
    # Whether scores are brought to mean 0 and std 1 on the reference texts: PPO's eta is in their
    # units.
    config.normalize_scores = True
    config.train = ConfigDict()
    config.train.steps = 300  # updates
    config.train.max_tokens = 4096  # a step takes as many pairs as fit, padding included
    config.train.min_pairs = 8  # the fewest pairs of a step
    config.train.max_pairs = 64  # the most pairs of a step
    config.train.microbatches = 1  # parts of a step, one after the other
    config.loss = ConfigDict()
    config.loss.lm_coef = 0.3  # beta_rm, weight of the language-model loss on the chosen
    # What is learned: "pairs"; in a "batch" all texts whose ratings differ by data.min_gap; or of
    # groups of texts their scores, "pointwise", or their order, "listwise" or "plackett_luce".
    config.loss.comparisons = "pairs"
    # Weight c of a pair's margin m, the column `margin` or the gap of the ratings, in
    # -log sigmoid(r_w - r_l - c m) (Llama 2, arXiv 2307.09288, eq. 2); 0 is off, as in the paper.
    config.loss.margin_coef = 0.0
    # Whether the chosen of a pair is better, "hard", or so with the probability p_chosen of its
    # row, "soft", as AI feedback has it.
    config.loss.labels = "hard"
    config.optimizer = common.optimizer(1e-3, "cosine", warmup_fraction=0.1, b2=0.98)
    config.optimizer.weight_decay = 0.1
    config.eval = ConfigDict()
    config.eval.every = 50  # updates between two measurements on held-out pairs
    config.judges = ()  # scored on the same pairs as the reward model; () asks the task
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.data.update(limit=200, max_length=96, pairs=200, reference_texts=20)
    config.data.update(validation_pairs=40, eval_pairs=40)
    config.train.update(steps=6, max_tokens=2048, min_pairs=8, max_pairs=16)
    config.eval.every = 3
    config.checkpoint.every = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.inputs.update(model=common.SMOLLM2, layers=15)
    config.data.update(domains=("movie",), max_length=64, instruction=common.INSTRUCTION)
    config.data.update(pairs=4_000, validation_pairs=200, eval_pairs=400, reference_texts=256)
    config.train.update(steps=32, max_tokens=2304, min_pairs=8, max_pairs=32)
    config.eval.every = 32
    # No LM loss: its logits over 49,152 tokens would cost a third more, and the policy is another
    # model.
    config.loss.update(lm_coef=0.0, comparisons="batch")
    config.lora.rank = 8
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    return config


def _paper_en() -> ConfigDict:
    config = _quickstart()
    config.inputs.update(model="huggyllama/llama-7b", build=False)
    config.model = common.full_size()
    config.data.update(source="hh", domains=(), max_length=2048, min_gap=0.0)
    config.data.update(pairs=160_000, reference_texts=1_000)
    # Of the 8.5k pairs of the test file 1k are for the report, the rest for the curves.
    config.data.update(validation_pairs=7_500, eval_pairs=1_000)
    # The paper's 1000 steps are 1.06 epochs of 160k pairs: 170 a step, so its "4 to 128" can only
    # be per device, of batches balanced by tokens. Here every step has 168, what 8 devices and 7
    # microbatches divide; the longest (2,048 tokens a side) fit.
    config.train.update(
        steps=1000, max_tokens=688_128, min_pairs=168, max_pairs=168, microbatches=7
    )
    config.loss.lm_coef = 1.0
    config.optimizer = common.optimizer(5e-6, "inverse_sqrt", warmup_fraction=0.1, b2=0.95)
    config.eval.every = 50
    return config


def _paper_zh() -> ConfigDict:
    config = _paper_en()
    config.inputs.model = "models/open-chinese-llama-7b"
    # The paper's 39k labelled pairs are not public: put pairs of your own here, one JSON object a
    # line with prompt, chosen and rejected. Of its pairs 30k train, 3k test, the rest validate.
    config.data.source = "jsonl:data/preferences_zh.jsonl"
    config.data.update(pairs=30_000, eval_pairs=3_000, validation_pairs=6_000)
    return config


def _moss(config: ConfigDict) -> ConfigDict:
    config.train.update(max_tokens=131_072, min_pairs=32, max_pairs=32)
    config.loss.lm_coef = 0.0
    return config


def _harm(config: ConfigDict) -> None:
    config.data.update(source="harm", instruction="", min_gap=0.25, max_length=256)
    config.data.update(pairs=1_000, validation_pairs=200, eval_pairs=200, reference_texts=100)
    config.train.update(min_pairs=4)
    config.loss.comparisons = "pairs"


def _no_lm(config: ConfigDict) -> None:
    config.loss.lm_coef = 0.0


def _ai_labels(config: ConfigDict) -> None:
    """Soft labels; with few pairs, few updates."""
    config.loss.update(labels="soft", comparisons="pairs")
    config.train.steps = min(config.train.steps, 100)


def _gold(config: ConfigDict) -> None:
    """The half that `half` leaves, and weights that no other run begins with."""
    common.check_halves(config, "gold")
    config.data.half = "second"
    config.seed = 100  # that of its SFT model too, where the scale has one


SCALES = {
    "tiny": _tiny,
    "quickstart": _quickstart,
    "smollm2": _smollm2,
    "paper_en": _paper_en,
    "paper_zh": _paper_zh,
    "moss_en": lambda: _moss(_paper_en()),
    "moss_zh": lambda: _moss(_paper_zh()),
}


def _form(comparisons: str) -> common.Change:
    def change(config: ConfigDict) -> None:
        config.loss.comparisons = comparisons

    return change


def _votes(config: ConfigDict) -> None:
    config.data.votes = True
    config.loss.update(labels="soft", comparisons="pairs")


VARIANTS: dict[str, common.Change] = {
    "zh": common.zh,
    "no_lm": _no_lm,
    "harm": _harm,
    "half": common.half,
}
VARIANTS |= {"gold": _gold, "ai_labels": _ai_labels, CONSTITUTIONAL: _ai_labels, "votes": _votes}
VARIANTS |= {name: _form(name) for name in RANKED}
# Of other sources data.pairs and data.eval_pairs say how many are taken.
UNREAD = (
    Unread("data.limit", unless="data.source", is_=rows_by("limit", streams=True)),
    Unread("data.responses", unless="loss.comparisons", is_=among(*RANKED)),
    Unread("data.votes", unless="data.source", is_=rows_by("votes")),
    Unread("data.votes", unless="loss.labels", is_=among("soft")),
)


def derive(config: ConfigDict) -> None:
    """The folders of the stages before."""
    inputs = config.inputs
    inputs.model = inputs.model or common.stage_folder("sft", config)
    if {"ai_labels", CONSTITUTIONAL} & set(config.variants):
        labelled = labels_variants(config.variants)
        inputs.labels = inputs.labels or common.stage_folder(
            "ai_labels", config, *labelled, leaf="labels"
        )


def labels_variants(variants: Sequence[str]) -> tuple[str, ...]:
    """The variants of configs/ai_labels.py that go with some of these here."""
    return (CONSTITUTIONAL,) if CONSTITUTIONAL in variants else ()


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("reward_model", arg, scales=SCALES, variants=VARIANTS)
