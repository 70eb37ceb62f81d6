"""Losses against other people's code: rlax, and TRL's PPO, DPO, CPO and ORPO on torch.

TRL keeps most formulas inside its trainers. They are called here unchanged: methods on a bare
object that has the attributes they read, and two passages of `PPOTrainer.train` cut out by name.
Needs the [parity] extra: `pytest -m parity tests/parity`.
"""

import ast
import collections
import inspect
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses

pytestmark = [pytest.mark.parity, pytest.mark.slow]

torch = pytest.importorskip("torch")
rlax = pytest.importorskip("rlax")
pytest.importorskip("trl")

RNG = np.random.default_rng(0)
ROWS, T, V = 4, 9, 11
LENGTHS = np.array([9, 5, 1, 7])
WHERE = np.arange(T)[None] < LENGTHS[:, None]
REWARDS, VALUES, ADVANTAGES = RNG.normal(size=(3, ROWS, T)).astype(np.float32)
LOG_PROBS, OLD_LOG_PROBS = -RNG.uniform(0.01, 3, (2, ROWS, T)).astype(np.float32)
CUT = RNG.normal(size=ROWS).astype(np.float32)


def close(found, expected):
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-5)


def lines_of(function, names):
    """The source of the assignments to `names`, and of loops over them, compiled to run alone."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))

    def wanted(node):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.For):
            targets = [t for n in node.body if isinstance(n, ast.Assign) for t in n.targets]
        return any(isinstance(t, ast.Name) and t.id in names for t in targets)

    found, pending = [], collections.deque(tree.body)
    while pending:
        node = pending.popleft()
        if wanted(node) and not isinstance(node, ast.FunctionDef):
            found.append(node)
            continue
        pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
    assert found, f"{function.__qualname__} has no {names}: another version of TRL?"
    found.sort(key=lambda node: node.lineno)
    return compile(ast.Module(body=found, type_ignores=[]), "trl", "exec")


@pytest.mark.parametrize("lambda_", [0.0, 0.95, 1.0])
def test_gae_and_k_step_returns_against_rlax(lambda_):
    found = losses.gae(
        REWARDS, VALUES, discount=0.99, lambda_=lambda_, where=WHERE, bootstrap=jnp.asarray(CUT)
    )
    k_step = losses.k_step_returns(
        REWARDS, VALUES, discount=0.99, k=3, where=WHERE, bootstrap=jnp.asarray(CUT)
    )
    for row, n in enumerate(LENGTHS):
        rewards, discounts = jnp.asarray(REWARDS[row, :n]), jnp.full(n, 0.99)
        values = jnp.asarray([*VALUES[row, :n], CUT[row]])
        wanted = rlax.truncated_generalized_advantage_estimation(
            rewards, discounts, lambda_, values
        )
        close(found[row, :n], wanted)
        wanted = rlax.n_step_bootstrapped_returns(rewards, discounts, values[1:], 3)
        close(k_step[row, :n], wanted)


def test_ppo_clip_against_rlax():
    ratio = jnp.exp(LOG_PROBS - OLD_LOG_PROBS)
    for row in range(ROWS):
        found = losses.ppo_clip_loss(
            LOG_PROBS[row], OLD_LOG_PROBS[row], ADVANTAGES[row], clip_eps=0.2
        )
        close(found.mean(), rlax.clipped_surrogate_pg_loss(ratio[row], ADVANTAGES[row], 0.2))


def test_gae_against_trl():
    from trl.experimental.ppo import PPOTrainer

    names = {"lastgaelam", "advantages_reversed", "gen_length", "delta"}
    scope = {
        "rewards": torch.tensor(REWARDS),
        "values": torch.tensor(VALUES),
        "responses": torch.tensor(REWARDS),
        "args": SimpleNamespace(gamma=0.99, lam=0.95),
    }
    exec(lines_of(PPOTrainer.train, names), scope)
    wanted = torch.stack(scope["advantages_reversed"][::-1], axis=1)
    everything = np.ones_like(WHERE)
    close(losses.gae(REWARDS, VALUES, discount=0.99, lambda_=0.95, where=everything), wanted)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_against_trl(estimator):
    from trl.experimental.ppo import PPOTrainer

    scope = {
        "logprobs": torch.tensor(LOG_PROBS),
        "ref_logprobs": torch.tensor(OLD_LOG_PROBS),
        "args": SimpleNamespace(kl_estimator=estimator),
    }
    exec(lines_of(PPOTrainer.train, {"logr", "kl"}), scope)
    found = losses.kl_estimate(LOG_PROBS, OLD_LOG_PROBS, estimator=estimator)
    close(found, scope["kl"])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_against_torch_distributions(estimator):
    """TRL has no k2. Over all tokens of a vocabulary k1 and k3 average to torch's exact KL, and
    half the mean square that torch computes is k2."""
    p, q = (torch.log_softmax(torch.tensor(RNG.normal(size=V)), -1) for _ in range(2))
    found = losses.kl_estimate(
        jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32), estimator=estimator
    )
    mean = np.sum(np.exp(p.numpy()) * np.asarray(found))
    if estimator == "k2":
        weighted = torch.nn.functional.mse_loss(p, q, reduction="none") * p.exp()
        close(mean, weighted.sum() / 2)
        return
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    close(mean, exact)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_statistics_against_trl(shift_mean):
    from trl.experimental.ppo import ppo_trainer as trl_ppo

    x, mask = torch.tensor(REWARDS), torch.tensor(WHERE)
    close(losses.masked_mean(REWARDS, where=WHERE), trl_ppo.masked_mean(x, mask))
    close(losses.masked_var(REWARDS, where=WHERE), trl_ppo.masked_var(x, mask, unbiased=False))
    # TRL divides the variance by n − 1, the losses by n.
    bessel = np.sqrt(WHERE.sum() / (WHERE.sum() - 1))
    mean = 0 if shift_mean else float(trl_ppo.masked_mean(x, mask))
    wanted = (trl_ppo.masked_whiten(x, mask, shift_mean=shift_mean) - mean) * bessel + mean
    found = losses.masked_whiten(REWARDS, where=WHERE, shift_mean=shift_mean)
    close(found[WHERE], wanted[mask])


def dpo_inputs():
    """Logits, tokens and masks of chosen and rejected responses after a prompt of two tokens."""
    logits = RNG.normal(size=(2, T, V)).astype(np.float32) * 2
    tokens = RNG.integers(0, V, (2, T))
    completion = (np.arange(T) >= 2)[None] & (np.arange(T)[None] < np.array([[T], [6]]))
    reference = -RNG.uniform(5, 12, 2).astype(np.float32)
    return logits, tokens, completion, reference


def trl_dpo(kind, logits, tokens, completion, reference, beta):
    """Runs `DPOTrainer._compute_loss` on one pair; returns the loss and what it logs."""
    from trl import DPOTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.ones_like(torch.tensor(tokens)),
        "completion_mask": torch.tensor(completion).long(),
        "ref_chosen_logps": torch.tensor(reference[:1]),
        "ref_rejected_logps": torch.tensor(reference[1:]),
    }
    loss = DPOTrainer._compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=torch.tensor(logits)), inputs, False
    )
    return float(loss), {k: v[-1] for k, v in trainer._metrics["train"].items()}


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_dpo_family_from_logits_against_trl(kind):
    loss = {"sigmoid": losses.dpo_loss, "ipo": losses.ipo_loss, "hinge": losses.dpo_hinge_loss}[
        kind
    ]
    for _ in range(4):
        logits, tokens, completion, reference = dpo_inputs()
        wanted, logged = trl_dpo(kind, logits, tokens, completion, reference, beta=0.3)
        where = jnp.asarray(completion[:, 1:])
        log_probs = losses.token_log_probs(jnp.asarray(logits), jnp.asarray(tokens))
        # TRL's IPO divides sums by the length of the response, the reference's too.
        mean = kind == "ipo"
        response = losses.sequence_log_prob(log_probs, where=where, normalize=mean)
        ref = jnp.asarray(reference / (completion.sum(-1) if mean else 1), jnp.float32)
        close(loss(*response, *ref, beta=0.3), wanted)
        total = losses.sequence_log_prob(log_probs, where=where)
        rewards = losses.implicit_rewards(total, jnp.asarray(reference), beta=0.3)
        close(rewards, [logged["rewards/chosen"], logged["rewards/rejected"]])
        entropies = losses.entropy(jnp.asarray(logits[:, :-1]))
        close(losses.masked_mean(entropies, where=where), logged["entropy"])


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_dpo_family_and_its_gradient_against_trl_cpo(kind):
    """CPO is DPO with a reference of probability 1; its loss is unreduced and smooths labels."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        beta=0.3,
        loss_type=kind,
        label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )
    pair = [torch.tensor(x[:, 0], requires_grad=True) for x in (LOG_PROBS, OLD_LOG_PROBS)]
    wanted, *_ = CPOTrainer.cpo_loss(trainer, *pair)
    wanted.sum().backward()
    loss, settings = {
        "sigmoid": (losses.dpo_loss, {"label_smoothing": 0.1}),
        "ipo": (losses.ipo_loss, {}),
        "hinge": (losses.dpo_hinge_loss, {}),
    }[kind]

    def total(chosen, rejected):
        zero = jnp.zeros(ROWS)
        found = loss(chosen, rejected, zero, zero, beta=0.3, **settings)
        return found.sum(), found

    ours = [jnp.asarray(x[:, 0]) for x in (LOG_PROBS, OLD_LOG_PROBS)]
    gradients, found = jax.grad(total, argnums=(0, 1), has_aux=True)(*ours)
    close(found, wanted.detach())
    for mine, theirs in zip(gradients, pair, strict=True):
        close(mine, theirs.grad)


def test_orpo_against_trl():
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = LOG_PROBS[:, 0], OLD_LOG_PROBS[:, 0]
    bonus, *_ = ORPOTrainer.odds_ratio_loss(trainer, torch.tensor(chosen), torch.tensor(rejected))
    found = losses.orpo_loss(jnp.asarray(chosen), jnp.asarray(rejected), weight=0.1)
    close(found, -chosen - bonus.numpy())
