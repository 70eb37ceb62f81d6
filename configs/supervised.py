"""Supervised alignment: L_total = L_SFT + L_aux, one variant for each method.

  python -m experiments.supervised --config configs/supervised.py:quickstart,rrhf

Scales:
  tiny        seconds on two CPU cores; for tests
  quickstart  from the quickstart's SFT policy, on the review task
  smollm2     SmolLM2-135M-Instruct, adapters of rank 8, movie reviews in its chat template
Variants that read the SFT policy's own samples, scored by the reward model:
  rrhf        K responses ranked by likelihood, the best one imitated (the default)
  pro         each response against all that are worse, the best one imitated
  slic        a hinge on the best and the worst of K, the best one imitated (SLiC-HF-sample-rank)
  figa        of the best and the worst of K the tokens in which they differ. The paper's better
              answers are revisions of the policy's; independent samples share few tokens: give
              revisions of your own in candidates.read=jsonl:FILE
  quark       the words of a quantile of scores before each response, near the reference; one round
              of samples, where the paper draws new ones every 500 updates
Variants that read pairs of texts that people rated, and no score of a reward model:
  orpo        the odds ratio of the pair, the better text imitated
  unlikelihood  the worse text unlearned token by token, the better one imitated
  c_rlft      each text behind the words of its class, better or worse, with the weight of the class
  chain_of_hindsight  both texts in one sequence, each behind its words

  half        the first half of the texts, so that the judge `gold` may be asked

Any method reads either: candidates.read=samples, candidates.read=pairs, or candidates.read=
jsonl:FILE with rows of your own, {"prompt", "responses", "scores"}. Samples are kept in
runs/candidates: the methods share them. As many are drawn as PPO-max draws. All methods make as
many updates of as many tokens as DPO, from the same weights, and are asked the prompts of PPO-max.
"""

from ml_collections import ConfigDict

from configs import common, dpo, ppo_max
from configs.unread import Unread, among


def _task(scale: str) -> ConfigDict:
    """Pairs, prompts and sampling of DPO at one of its scales, and where candidates come from."""
    other, prompts = dpo.get_config(scale), ppo_max.get_config(scale)
    config = common.shared()
    config.label = "supervised"  # how the report calls the result; the variants, if there are any
    config.inputs = ConfigDict()
    # Folder of the SFT policy: training starts there, it draws the samples and it is the reference.
    # Empty is the SFT model of the same scale.
    config.inputs.model = other.inputs.model
    config.inputs.reward_model = ""  # folder; scores samples; empty is that of the same scale
    config.inputs.build = other.inputs.build  # run the stages before where models are missing
    config.compare = ConfigDict()  # what the report compares with; left out where missing
    config.compare.ppo_max = ""  # folder; empty is PPO-max of the same scale
    config.compare.dpo = ""  # folder; empty is DPO of the same scale
    config.model, config.lora = other.model, other.lora
    config.data = other.data
    del config.data.validation_pairs, config.data.eval_pairs
    config.candidates = ConfigDict()
    # Responses with what they are worth: "samples" of the policy scored by the reward model,
    # "pairs" of the task, or "jsonl:FILE".
    config.candidates.read = "samples"
    drawn = prompts.train.iterations * prompts.train.prompts_per_iteration
    config.samples = ConfigDict()
    config.samples.per_prompt = 4  # answers to each prompt
    config.samples.prompts = drawn // 4  # training prompts: as many answers as PPO-max draws
    config.samples.rows = 256  # the most answers that are drawn at a time
    config.sampling = other.sampling
    config.eval = other.eval
    config.judges = other.judges
    return config


def _objective() -> ConfigDict:
    keys = ConfigDict()
    # Of quality prompts "quark", "c_rlft" or "chain_of_hindsight"; of quality contrast "rrhf",
    # "slic", "pro", "orpo", "unlikelihood" or "figa".
    keys.method = "rrhf"
    # Words before a prompt, from the worst responses to the best; neither judges nor reward model
    # read them. A control token that the tokenizer has may be named.
    keys.texts = ("Bad: ", "Good: ")
    keys.quark = ConfigDict()
    keys.quark.kl_coef = 0.05  # alpha of the KL to the reference
    keys.quark.entropy_coef = 0.06  # beta of the entropy
    keys.c_rlft = ConfigDict()
    keys.c_rlft.beta = 0.5  # the worse class weighs exp(-1 / beta), the better one 1
    keys.chain_of_hindsight = ConfigDict()
    keys.chain_of_hindsight.max_rate = 0.05  # the largest share of a row's tokens that is hidden
    keys.rrhf = ConfigDict()
    # Weight of the ranking, whose likelihoods are means over tokens; imitation is a sum. The paper
    # has 1, its code 100.
    keys.rrhf.rank_weight = 100.0
    keys.rrhf.length_power = 1.0  # likelihoods are divided by the length to this power
    keys.slic = ConfigDict()
    keys.slic.margin = 1.0  # of the hinge, nats of a whole response
    keys.slic.target_weight = 0.1  # lambda of imitation
    keys.pro = ConfigDict()
    keys.pro.sft_weight = 0.05  # of imitation, times (K - 1)^2
    keys.orpo = ConfigDict()
    keys.orpo.weight = 0.1  # lambda of the odds ratio
    keys.unlikelihood = ConfigDict()
    keys.unlikelihood.weight = 1.0  # of what is unlearned
    keys.figa = ConfigDict()
    keys.figa.weight = 1.0  # of tokens that only the better response has
    keys.figa.negative_weight = 0.5  # of tokens that only the worse one has
    keys.figa.nll_min = 0.6  # these count from this negative log-likelihood on, nats
    keys.figa.nll_max = 1.0  # and up to this one
    return keys


def _quickstart() -> ConfigDict:
    config = _task("quickstart")
    config.objective = _objective()
    config.train = ConfigDict()
    config.train.steps = 150  # updates
    config.train.max_tokens = 4096  # of an update, padding included
    config.train.min_sequences = 16  # the fewest of an update; K of them are one prompt's
    config.train.max_sequences = 128  # the most of an update
    config.train.microbatches = 1  # parts of an update, one after the other
    config.optimizer = common.optimizer(5e-4, "cosine", warmup_fraction=0.1, b2=0.98)
    return config


def _at(scale: str) -> ConfigDict:
    """The quickstart's objective and training on the task of another scale."""
    config, task = _quickstart(), _task(scale)
    for group in ("inputs", "model", "lora", "data", "samples", "sampling", "eval"):
        config[group] = task[group]
    return config


def _tiny() -> ConfigDict:
    config = _at("tiny")
    config.samples.update(prompts=24, rows=64)
    config.train.update(steps=6, max_tokens=2048, min_sequences=8, max_sequences=16)
    config.checkpoint.every = 2
    return config


def _smollm2() -> ConfigDict:
    config = _at("smollm2")
    config.train.update(steps=40, max_tokens=2304, min_sequences=8, max_sequences=64)
    config.optimizer.learning_rate = 1e-3
    return config


def _method(name: str, read: str, **values):
    """A variant that names a method, what it reads, and other keys of `config.objective`."""

    def change(config: ConfigDict) -> None:
        config.objective.update(method=name, **values)
        config.candidates.read = read

    return change


_QUANTILES = ("Terrible: ", "Bad: ", "Fair: ", "Good: ", "Great: ")

SCALES = {"tiny": _tiny, "quickstart": _quickstart, "smollm2": _smollm2}
VARIANTS = {
    "quark": _method("quark", "samples", texts=_QUANTILES),
    "c_rlft": _method("c_rlft", "pairs"),
    "chain_of_hindsight": _method("chain_of_hindsight", "pairs"),
    "rrhf": _method("rrhf", "samples"),
    "slic": _method("slic", "samples"),
    "pro": _method("pro", "samples"),
    "orpo": _method("orpo", "pairs"),
    "unlikelihood": _method("unlikelihood", "pairs"),
    "figa": _method("figa", "samples"),
    "half": common.half,
}
_PROMPTED = ("quark", "c_rlft", "chain_of_hindsight")
_METHODS = tuple(name for name in VARIANTS if name != "half")
UNREAD = (
    *(Unread(f"objective.{n}.*", unless="objective.method", is_=among(n)) for n in _METHODS),
    Unread("objective.texts", unless="objective.method", is_=among(*_PROMPTED)),
    Unread("samples.*", unless="candidates.read", is_=among("samples")),
    Unread("data.pairs data.min_gap", unless="candidates.read", is_=among("pairs")),
)


def derive(config: ConfigDict) -> None:
    """The folders of the stages before, and of what the report compares with."""
    inputs, compare = config.inputs, config.compare
    inputs.model = inputs.model or common.stage_folder("sft", config)
    inputs.reward_model = inputs.reward_model or common.stage_folder("reward_model", config)
    compare.ppo_max = compare.ppo_max or common.stage_folder("ppo_max", config)
    compare.dpo = compare.dpo or common.stage_folder("dpo", config)


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("supervised", arg, scales=SCALES, variants=VARIANTS)
