"""PPO-max and its ablations.

  python -m experiments.ppo_max --config configs/ppo_max.py:quickstart
  python -m experiments.ppo_max --config configs/ppo_max.py:quickstart,reward_scale,seed=1

Scales (model, data and batch sizes):
  tiny        seconds on two CPU cores; for tests
  quickstart  the review task; runs SFT and reward model where missing; win rate against SFT by
              the judge .78 to .88 over seeds 0, 1, 2, KL 5.9 to 7.9 nats per response; 2 minutes on
              two CPU cores (AMD EPYC), 7 with the stages before, 1.8 GiB
  smollm2     SmolLM2-135M-Instruct, unchanged, for SFT model; adapters of rank 8, movie reviews in
              its chat template, without ptx; win rate against it by the judge .65 to .71 (seeds 0,
              1 and 2), KL 3.3 to 3.9 nats per response; 10 minutes on two CPU cores (AMD EPYC), 14
              with the reward model, 8.2 GiB
  paper_en, paper_zh  7B models, HH-RLHF, 8 x A100-80G, the paper's numbers
  moss_en, moss_zh    the released scripts' numbers

Variants (what an ablation changes; PPO-max is the default):
  vanilla            no KL penalty, no reward normalisation, no value clipping, no ptx, no critic
                     pre-training (Figure 4)
  reward_scale, reward_norm_0.3, reward_norm_0.8, adv_norm_0.5, adv_norm_0.12
                     on vanilla (Figure 6)
  kl, entropy, importance_sample, kl_importance_sample
                     on vanilla (Figure 7)
  policy_pretrained, critic_sft   on PPO-max; critic_pretrain on vanilla (Figure 8)
  no_kl, no_ptx, no_value_clip, no_reward_norm, no_critic_pretrain
                     PPO-max without one of its parts
  kl_0.05, kl_0.1, kl_0.2 (Figure 15); entropy_clip (16); no_clip, clip_0.5 (17);
  grad_clip_0, grad_clip_0.5 (18); lambda_0, lambda_1 (19)
  steps_0.8 (the length of Figure 7), steps_10 (of Figure 9)
  penalty, penalty_adaptive  PPO-penalty; adaptive_kl  adaptive token-level KL coefficient; trpo
  harm               harmful prompts and a reward model of people's harm scores, opt-in:
                     `smollm2,harm`
  zh                 Chinese shop reviews; no rule judges them: quickstart,zh,half with
                     judges=('gold',)
  half               prompts and reward model of the first half of the texts, so that the judge
                     `gold` may be asked: quickstart,half,judges=('vader','gold')
  rlaif              the reward model learns from AI labels in place of people's ratings (Lee et al.
                     2023): variant ai_labels of configs/reward_model.py
  constitutional     from the SL-CAI model, with a reward model of comparisons by the principles
                     (Bai et al. 2022): smollm2,constitutional
  reinforce, total_return, reward_to_go, reward_to_go_baseline, td, rloo, grpo
                     the choices of Φ_t on the slide "Policy Gradient Methods"
"""

from ml_collections import ConfigDict

from configs import common, sft
from configs.ai_labels import CONSTITUTIONAL
from configs.unread import EMPTY, SET, Unread, among, no


def _quickstart() -> ConfigDict:
    config = common.shared()
    config.label = "PPO-max"  # how the report calls the result; the variants, if there are any
    config.inputs = ConfigDict()
    config.inputs.model = ""  # folder the policy starts from; empty is the SFT model of the scale
    config.inputs.policy_variant = ""  # variant of configs/sft.py that the policy starts from
    config.inputs.reference = ""  # folder of the frozen reference; empty is that SFT model
    config.inputs.reward_model = ""  # folder; empty is the reward model of the same scale
    config.inputs.reward_variant = ""  # variant of configs/reward_model.py that scores
    config.inputs.build = True  # run the stages before where their models are missing
    # What the stages before learn from and the ptx loss reads; prompts too where the next is empty.
    config.data = common.task()
    config.data.prompt_source = ""  # prompts from another source, such as one of prompts alone
    config.data.prompt_buckets = (16,)  # lengths to which prompts are padded
    config.data.ptx_length = 64  # tokens of a row of SFT text for the ptx loss
    # The batch vocabulary, all global: an iteration samples prompts x samples responses and makes
    # epochs x (prompts x samples / minibatch) updates of policy and critic.
    config.train = ConfigDict()
    config.train.iterations = 100  # buffers of experience
    config.train.prompts_per_iteration = 64
    config.train.samples_per_prompt = 1
    config.train.minibatch = 32  # responses in an update
    config.train.microbatches = 1  # parts of a minibatch, one after the other
    config.train.epochs = 1  # how often an iteration goes over its buffer
    config.train.critic_pretrain_iterations = 10  # at the start, the critic alone
    config.train.critic_init = "reward_model"  # or "policy" with a zero head, or "none"
    config.sampling = common.sampling(32)
    config.reward = ConfigDict()
    # "none", "scale", "scale_discounted" or "normalize", by running moments.
    config.reward.transform = "normalize"
    config.reward.clip = 0.8  # scores are clipped to +-clip after the transform; 0 is off
    config.reward.missing_eos_penalty = 1.0  # what a cut response costs
    config.kl = ConfigDict()
    config.kl.coef = 0.05  # eta of the token-level KL penalty; 0 is off
    config.kl.target = 0.0  # above 0 adapts eta to this KL per response (Ziegler et al. 2019)
    config.kl.horizon = 10_000  # responses over which eta adapts
    config.advantage = ConfigDict()
    # Phi_t: "gae", "total_return", "reward_to_go", "reward_to_go_baseline", "td", "k_step",
    # "batch_mean", "rloo", "grpo".
    config.advantage.method = "gae"
    config.advantage.discount = 1.0  # gamma
    config.advantage.lambda_ = 0.9  # for "gae"
    config.advantage.k = 1  # for "k_step"
    config.advantage.returns = "gae"  # the critic's target with "gae"; or "monte_carlo"
    config.ppo = ConfigDict()
    config.ppo.objective = "clip"  # or "penalty", "surrogate", "policy_gradient", "trpo"
    config.ppo.clip_eps = 0.2  # epsilon of "clip"; other objectives count what leaves it
    config.ppo.value_clip_eps = 0.2  # the critic's move is clipped to it; 0 is off
    config.ppo.ratio_denominator = "old"  # or "reference" (Figure 7)
    config.ppo.entropy_coef = 0.0  # weight of the entropy bonus; 0 is off
    config.ppo.entropy_max = 0.0  # no bonus above this entropy, nats; 0 is no bound
    config.ppo.ptx_coef = 0.1  # weight of the language-model loss on SFT text; 0 is off
    config.ppo.normalize_advantages = False  # mean 0 and std 1 over the minibatch
    config.ppo.advantage_clip = 0.0  # advantages are clipped to it; 0 is off
    config.ppo.reduction = "token_mean"  # or "sequence_mean", "sequence_sum"
    config.penalty = ConfigDict()  # of ppo.objective="penalty", and refused elsewhere
    config.penalty.coef = 1.0  # beta
    config.penalty.target = 0.0  # above 0 adapts beta (Schulman et al. 2017, section 4)
    config.trpo = ConfigDict()  # of ppo.objective="trpo", and refused elsewhere
    config.trpo.max_kl = 0.01  # the trust region, nats per token
    config.trpo.damping = 0.1  # added to the diagonal of the Fisher matrix
    config.trpo.cg_iterations = 10  # products with the Fisher matrix
    config.optimizer = common.optimizer(1e-3, "inverse_sqrt", warmup_fraction=0.1, b2=0.95)
    config.optimizer.eps = 1e-6
    config.critic_optimizer = common.optimizer(1e-3, "inverse_sqrt", warmup_fraction=0.1, b2=0.95)
    config.eval = ConfigDict()
    config.eval.every = 20  # iterations between two measurements on validation prompts
    config.eval.prompts = 128  # for these measurements
    config.eval.final_prompts = 512  # test prompts for the report
    config.eval.samples = 8  # responses that the report shows
    config.eval.sampling = common.eval_sampling()
    config.collapse = ConfigDict()  # see rlhf_jax/evaluation/collapse.py
    config.collapse.action = "log"  # or "stop", "rollback" (to before it, slower), "off"
    config.collapse.retries = 2  # of "rollback"; then it stops
    config.collapse.start = 5  # iterations whose median the policy is compared with
    config.collapse.kinds = 2  # of evidence that must speak at once
    config.collapse.patience = 2  # iterations in a row
    config.judges = ()  # such as ("vader",); () asks the task
    return config


def _tiny() -> ConfigDict:
    config = _quickstart()
    config.data.update(limit=200, ptx_length=32)
    config.train.update(iterations=4, prompts_per_iteration=16, minibatch=8)
    config.train.critic_pretrain_iterations = 1
    config.sampling.max_new_tokens = 8
    config.eval.update(every=2, prompts=16, final_prompts=16)
    config.checkpoint.every = 2
    return config


def _smollm2() -> ConfigDict:
    config = _quickstart()
    config.inputs.update(model=common.SMOLLM2, reference=common.SMOLLM2)
    config.data.update(domains=("movie",), instruction=common.INSTRUCTION, prompt_buckets=(24,))
    config.train.update(iterations=20, prompts_per_iteration=32, minibatch=16)
    config.train.critic_pretrain_iterations = 2
    config.sampling.update(max_new_tokens=24)
    # A batch of ptx text costs as much as the responses, and the adapters stay near the reference.
    config.ppo.ptx_coef = 0.0
    # With 0.05 one of three seeds kept less than 70% of the reference's distinct-2.
    config.kl.coef = 0.1
    config.lora.rank = 8
    config.optimizer.update(learning_rate=1e-3, schedule="constant")
    config.critic_optimizer.update(learning_rate=1e-3, schedule="constant")
    config.eval.update(every=10, prompts=32)
    return config


def _paper_en() -> ConfigDict:
    config = _quickstart()
    config.inputs.build = False
    config.model = common.full_size()
    config.data.update(source="hh", domains=(), prompt_buckets=(128, 256, 512), ptx_length=1024)
    # The paper's 8,000 harmless and 20,000 helpful queries. With a copy of HH, where data.source is
    # hh:FOLDER, put hh:FOLDER:harmless-base and hh:FOLDER:helpful-base here.
    config.data.prompt_source = "mix:8000@hh:harmless-base+20000@hh:helpful-base"
    # 250 buffers of 128 in minibatches of 32 are the paper's 1000 updates of the policy; before
    # them the critic trains alone (the paper does not say for how long).
    config.train.update(iterations=275, prompts_per_iteration=128, minibatch=32)
    config.train.critic_pretrain_iterations = 25
    config.sampling.update(max_new_tokens=512)
    config.reward.missing_eos_penalty = 0.0
    config.optimizer.update(learning_rate=5e-7)
    config.critic_optimizer.update(learning_rate=1.65e-6)
    config.eval.update(every=10, prompts=256)
    # Section 6.1. Its length penalty of 1.2 weighs beams, of which sampling has none.
    config.eval.sampling.update(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
    config.eval.sampling.max_new_tokens = 1536  # 2,048 with the longest prompt
    return config


def _paper_zh() -> ConfigDict:
    config = _paper_en()
    # The paper's data are not public. Text of your own for the ptx loss, as in configs/sft.py.
    config.data.source = sft.get_config("paper_zh").data.source
    # And prompts of your own, one JSON object a line with prompt, of which a tenth each is kept for
    # validation and test: so many harmless and helpful ones are left to train on.
    config.data.prompt_source = (
        "mix:8000@jsonl:data/prompts_zh_harmless.jsonl+20000@jsonl:data/prompts_zh_helpful.jsonl"
    )
    return config


def _moss(config: ConfigDict, kl_coef: float) -> ConfigDict:
    """The released train_ppo_{en,zh}.sh: scaling only, on-policy, small batch."""
    # 2 responses on each of 7 devices, 2,048 tokens with the prompt.
    config.train.update(iterations=1000, prompts_per_iteration=14, minibatch=14)
    config.train.critic_pretrain_iterations = 0
    config.sharding.devices = 7
    config.seed = 42
    config.data.prompt_buckets = (512, 1024, 1536)
    # The scripts' ratio is at temperature 1, so it differs from 1 on a fresh rollout; here policy
    # and ratio have the sampler's temperature. Repetition is penalised in the response, as there.
    config.sampling.update(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
    config.eval.sampling = common.eval_sampling()
    # The scripts divide by the unbiased standard deviation; the difference is 1 / (2 n).
    config.reward.update(transform="scale", clip=0.0)
    config.kl.coef = kl_coef
    config.advantage.lambda_ = 0.95
    config.ppo.ptx_coef = 0.0
    config.critic_optimizer.learning_rate = 1.5e-6
    return config


def _vanilla(config: ConfigDict) -> None:
    config.kl.coef = 0.0
    config.reward.update(transform="none", clip=0.0)
    config.ppo.update(value_clip_eps=0.0, ptx_coef=0.0)
    config.train.critic_pretrain_iterations = 0


def _changes(vanilla: bool = False, policy_variant: str = "", **groups):
    """A variant that updates groups of keys, after `vanilla` if asked."""

    def change(config: ConfigDict) -> None:
        if vanilla:
            _vanilla(config)
        for group, values in groups.items():
            config[group].update(values)
        if policy_variant:
            config.inputs.policy_variant = policy_variant

    return change


def _critic_pretrain(config: ConfigDict) -> None:
    """A tenth of the iterations, at least one: at every scale the policy trains in most."""
    _vanilla(config)
    config.train.critic_pretrain_iterations = max(1, config.train.iterations // 10)


def _harm(config: ConfigDict) -> None:
    config.data.update(source="harm", prompt_source="", domains=(), instruction="")
    config.data.prompt_buckets = (64, 128)
    # A refusal takes a sentence or two.
    config.sampling.max_new_tokens = max(config.sampling.max_new_tokens, 64)
    # The few answers that nobody found harmful are not enough to draw batches from.
    config.ppo.ptx_coef = 0.0
    config.eval.samples = 0  # reports show no answers to these prompts, unless they are asked to


def _rlaif(config: ConfigDict) -> None:
    config.inputs.reward_variant = "ai_labels"


def _constitutional(config: ConfigDict) -> None:
    config.inputs.update(model="", reference="", reward_variant=CONSTITUTIONAL)


def _longer(times: float):
    """A variant with another number of iterations after those of the critic alone."""

    def change(config: ConfigDict) -> None:
        alone = config.train.critic_pretrain_iterations
        config.train.iterations = alone + round(times * (config.train.iterations - alone))

    return change


_NO_CRITIC = {"critic_init": "none", "critic_pretrain_iterations": 0}


def _sampled(method: str, samples: int = 1):
    """A Φ_t that needs no critic."""
    return _changes(
        advantage={"method": method},
        train={**_NO_CRITIC, "samples_per_prompt": samples},
    )


VARIANTS = {
    "vanilla": _vanilla,
    # Figure 6
    "reward_scale": _changes(vanilla=True, reward={"transform": "scale"}),
    "reward_norm_0.3": _changes(vanilla=True, reward={"transform": "normalize", "clip": 0.3}),
    "reward_norm_0.8": _changes(vanilla=True, reward={"transform": "normalize", "clip": 0.8}),
    "adv_norm_0.5": _changes(
        vanilla=True, ppo={"normalize_advantages": True, "advantage_clip": 0.5}
    ),
    "adv_norm_0.12": _changes(
        vanilla=True, ppo={"normalize_advantages": True, "advantage_clip": 0.12}
    ),
    # Figure 7
    "kl": _changes(vanilla=True, kl={"coef": 0.05}),
    "entropy": _changes(vanilla=True, ppo={"entropy_coef": 0.01, "entropy_max": 30.0}),
    "importance_sample": _changes(vanilla=True, ppo={"ratio_denominator": "reference"}),
    "kl_importance_sample": _changes(
        vanilla=True, kl={"coef": 0.05}, ppo={"ratio_denominator": "reference"}
    ),
    # Figure 8
    "policy_pretrained": _changes(policy_variant="pretrain"),
    "critic_sft": _changes(train={"critic_init": "policy"}),
    "critic_pretrain": _critic_pretrain,
    # PPO-max without one part
    "no_kl": _changes(kl={"coef": 0.0}),
    "no_ptx": _changes(ppo={"ptx_coef": 0.0}),
    "no_value_clip": _changes(ppo={"value_clip_eps": 0.0}),
    "no_reward_norm": _changes(reward={"transform": "none", "clip": 0.0}),
    "no_critic_pretrain": _changes(train={"critic_pretrain_iterations": 0}),
    # Appendix
    "kl_0.05": _changes(kl={"coef": 0.05}),
    "kl_0.1": _changes(kl={"coef": 0.1}),
    "kl_0.2": _changes(kl={"coef": 0.2}),
    "entropy_clip": _changes(vanilla=True, ppo={"entropy_coef": 0.01, "entropy_max": 3.0}),
    "no_clip": _changes(ppo={"objective": "surrogate"}),
    "clip_0.5": _changes(ppo={"clip_eps": 0.5}),
    "grad_clip_0": _changes(
        optimizer={"max_grad_norm": 0.0}, critic_optimizer={"max_grad_norm": 0.0}
    ),
    "grad_clip_0.5": _changes(
        optimizer={"max_grad_norm": 0.5}, critic_optimizer={"max_grad_norm": 0.5}
    ),
    "lambda_0": _changes(advantage={"lambda_": 0.0}),
    "lambda_1": _changes(advantage={"lambda_": 1.0}),
    # Lengths: Figure 7 has 800 of the others' 1000 steps, Figure 9 ten times as many.
    "steps_0.8": _longer(0.8),
    "steps_10": _longer(10),
    # Other objectives
    "penalty": _changes(ppo={"objective": "penalty"}),
    "penalty_adaptive": _changes(ppo={"objective": "penalty"}, penalty={"target": 0.01}),
    "adaptive_kl": _changes(kl={"target": 6.0}),
    "trpo": _changes(ppo={"objective": "trpo", "ptx_coef": 0.0}),
    # Choices of Φ_t
    "reinforce": _changes(
        ppo={"objective": "policy_gradient"}, advantage={"method": "batch_mean"}, train=_NO_CRITIC
    ),
    "total_return": _sampled("total_return"),
    "reward_to_go": _sampled("reward_to_go"),
    "reward_to_go_baseline": _changes(advantage={"method": "reward_to_go_baseline"}),
    "td": _changes(advantage={"method": "td"}),
    "k_step": _changes(advantage={"method": "k_step", "k": 4}),
    "harm": _harm,
    "zh": common.zh,
    "half": common.half,
    "rlaif": _rlaif,
    CONSTITUTIONAL: _constitutional,
    "rloo": _sampled("rloo", samples=4),
    "grpo": _sampled("grpo", samples=4),
}


SCALES = {
    "tiny": _tiny,
    "quickstart": _quickstart,
    "smollm2": _smollm2,
    "paper_en": _paper_en,
    "paper_zh": _paper_zh,
    "moss_en": lambda: _moss(_paper_en(), kl_coef=0.01),
    "moss_zh": lambda: _moss(_paper_zh(), kl_coef=0.1),
}


UNREAD = (
    Unread("inputs.reward_variant", unless="inputs.reward_model", is_=EMPTY),
    Unread("trpo.*", unless="ppo.objective", is_=among("trpo")),
    Unread("penalty.*", unless="ppo.objective", is_=among("penalty")),
    # The trust region takes the place of all of these.
    Unread("optimizer.* ppo.clip_eps", unless="ppo.objective", is_=no("trpo")),
    Unread(
        "ppo.ratio_denominator",
        unless="ppo.objective",
        is_=among("clip", "penalty", "surrogate"),  # the others have no ratio, or their own
    ),
    Unread("ppo.entropy_max", unless="ppo.entropy_coef", is_=SET),
    Unread("data.ptx_length", unless="ppo.ptx_coef", is_=SET),
    Unread("kl.horizon", unless="kl.target", is_=SET),
    Unread("advantage.lambda_ advantage.returns", unless="advantage.method", is_=among("gae")),
    Unread("advantage.k", unless="advantage.method", is_=among("k_step")),
    Unread("collapse.retries", unless="collapse.action", is_=among("rollback")),
    Unread(
        "collapse.start collapse.kinds collapse.patience", unless="collapse.action", is_=no("off")
    ),
    Unread("critic_optimizer.* ppo.value_clip_eps", unless="train.critic_init", is_=no("none")),
)


def derive(config: ConfigDict) -> None:
    """The folders of the stages before."""
    inputs = config.inputs
    if inputs.model and inputs.policy_variant:
        raise ValueError(
            f"inputs.policy_variant={inputs.policy_variant!r} is read where inputs.model is empty, "
            f"and here it is {inputs.model!r}"
        )
    if CONSTITUTIONAL in config.variants:
        trained = common.stage_folder(CONSTITUTIONAL, config)
        inputs.model, inputs.reference = inputs.model or trained, inputs.reference or trained
    if not inputs.model:
        inputs.model = common.stage_folder("sft", config, *_named(inputs.policy_variant))
    inputs.reference = inputs.reference or common.stage_folder("sft", config)
    inputs.reward_model = inputs.reward_model or common.stage_folder(
        "reward_model", config, *_named(inputs.reward_variant)
    )


def _named(variant: str) -> tuple[str, ...]:
    return (variant,) if variant else ()


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring for what `arg` may hold."""
    return common.build("ppo_max", arg, scales=SCALES, variants=VARIANTS)
