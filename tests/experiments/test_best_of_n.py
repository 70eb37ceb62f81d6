"""Best-of-n against a policy: both measured by the same numbers, at equal KL."""

import numpy as np
import pytest

from experiments import best_of_n
from rlhf_jax.evaluation.best_of_n import best_of_n_kl
from rlhf_jax.rollouts.respond import Responses


def responses(rewards, judged, kl=0.0):
    count = len(rewards)
    return Responses(
        [""] * count,
        [""] * count,
        np.array(rewards),
        {"judge": np.array(judged)},
        {"policy/kl_ref_sequence": kl},
    )


def drawn(kl, rewards=(5.0, 5.0), judged=(1.0, 1.0)):
    """Three answers of SFT to two prompts, those to compare with, and a policy's."""
    samples = [
        responses([1.0, 6.0], [1.0, 0.0]),
        responses([2.0, 4.0], [0.0, 0.0]),
        responses([3.0, 5.0], [1.0, 1.0]),
    ]
    baseline = responses([0.0, 0.0], [0.5, 0.5])
    return [*samples, baseline], responses(rewards, judged, kl)


def test_the_curve_is_of_the_best_by_the_reward_model():
    found = best_of_n.compare(*drawn(0.0))
    assert found["n"] == [1, 2, 3] and found["prompts"] == 2
    assert found["kl"] == pytest.approx([0, best_of_n_kl(2), best_of_n_kl(3)])
    reward, judge = found["measured"]["reward"], found["measured"]["win_rate/judge"]
    # Of two: the highest of three with chance 2/3, the one in the middle with 1/3.
    assert reward["curve"] == pytest.approx([(2 + 5) / 2, (8 / 3 + 17 / 3) / 2, (3 + 6) / 2])
    # The judge prefers the first and third answer of one prompt, the third of the other.
    assert judge["curve"] == pytest.approx([(2 / 3 + 1 / 3) / 2, (2 / 3 + 1 / 3) / 2, 1 / 2])
    assert judge["policy"][0] == 1.0


def test_a_policy_is_compared_at_its_own_kl():
    """At the KL of the best of 2 with that; between two n with what lies between; then with N."""
    at = {
        kl: best_of_n.compare(*drawn(kl))
        for kl in (0.0, best_of_n_kl(2), best_of_n_kl(2) / 2, best_of_n_kl(3) + 1)
    }
    value = [one["measured"]["reward"]["at_equal_kl"] for one in at.values()]
    curve = at[0.0]["measured"]["reward"]["curve"]
    assert value == pytest.approx([curve[0], curve[1], (curve[0] + curve[1]) / 2, curve[2]])
    for one in at.values():
        reward = one["measured"]["reward"]
        assert reward["difference"][0] == pytest.approx(5.0 - reward["at_equal_kl"])
    assert [one["reached"] for one in at.values()] == [True, True, True, False]
    text = best_of_n.table({"runs": [one | {"variants": [], "seed": 3} for one in at.values()]})
    assert "PPO-max, seed 3" in text and text.count("of N = 3") == 2


@pytest.mark.parametrize("arguments", [["x", "--samples", "0"], []])
def test_what_cannot_be_asked_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        best_of_n.parse(arguments)
    assert "--samples 0" in capsys.readouterr().err or not arguments
