"""Which logged metrics a picture of a run shows, panel by panel; `rlhf_jax.plots` draws them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Panel(NamedTuple):
    """One set of axes: a title, the unit of the y axis and the metrics drawn there by label."""

    title: str
    ylabel: str
    metrics: Mapping[str, str]  # metric name -> label within the panel, "" if it is alone
    log: bool = False


PPO_PANELS = (
    Panel("Reward", "reward model score", {"reward/mean": ""}),
    Panel("Judge", "judge score", {"judge/mean": ""}),
    Panel("Win rate against SFT", "share of prompts", {"judge/win_rate": ""}),
    Panel("KL to the reference", "nats per response", {"policy/kl_ref_sequence": ""}),
    Panel("KL per token", "nats per token", {"policy/kl_ref": ""}),
    Panel("Response perplexity", "perplexity", {"policy/perplexity": ""}),
    Panel("exp(NLL / length): the paper's", "not a perplexity", {"policy/perplexity_moss": ""}),
    Panel("Response length", "tokens", {"response/length": ""}),
    Panel("Distinct bigrams", "distinct-2", {"response/distinct_2": ""}),
    Panel("Entropy", "nats per token", {"policy/entropy": ""}),
    Panel("Policy loss", "loss", {"loss/policy": ""}),
    Panel("Value loss", "loss", {"loss/value": ""}),
)

DPO_PANELS = (
    Panel("Loss", "nats", {"loss/dpo": ""}),
    Panel("Implicit accuracy", "share of pairs", {"dpo/accuracy": ""}),
    Panel("Implicit reward margin", "nats", {"dpo/margin": ""}),
    Panel(
        "Log-probability of the pair",
        "nats per response",
        {"dpo/chosen_log_prob": "chosen", "dpo/rejected_log_prob": "rejected"},
    ),
    Panel(
        "Implicit rewards",
        "nats",
        {"dpo/chosen_reward": "chosen", "dpo/rejected_reward": "rejected"},
    ),
)
