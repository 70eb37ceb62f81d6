"""Reward models of every form through their own `main`, and their table."""

import json

import numpy as np
import pytest

from configs import common
from configs import reward_model as configs
from experiments import feedback_forms, reward_model
from rlhf_jax.runtime.metrics import read_rows
from rlhf_jax.training.record import read_summary


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    """Runs a tiny reward model on the session's SFT model, each once."""
    made = {}

    def of(argument):
        if argument not in made:
            config = configs.get_config(
                ",".join(part for part in ("tiny", "sharding.devices=1", argument) if part)
            )
            config.workdir = str(tmp_path_factory.mktemp("forms") / "run")
            config.inputs.model = str(chain.sft)
            config.log.tensorboard = False
            reward_model.main(config)
            made[argument] = common.resolve(config).workdir
        return made[argument]

    return of


@pytest.mark.parametrize("form", ["pointwise", "listwise", "plackett_luce", "votes"])
def test_a_reward_model_of_every_form(run, form):
    folder = run(form)
    summary, name = read_summary(folder), "bradley_terry" if form == "votes" else "ranked"
    losses = [row[f"loss/{name}"] for _, row in read_rows(folder)]
    assert len(losses) == 6 and np.isfinite(losses).all() and len(set(losses)) == 6
    assert 0 <= summary["accuracy"] <= 1 and -1 <= summary["numbers"]["Spearman with people"] <= 1
    assert 0 <= summary["numbers"]["Brier score"] <= 1


def test_the_table_counts_texts_and_labels_alike(run, tmp_path):
    folders = [run(form) for form in ("pointwise", "listwise", "votes")]
    feedback_forms.main(feedback_forms.parse([*folders, "--out", str(tmp_path)]))
    runs = json.loads((tmp_path / "feedback_forms.json").read_text())["runs"]
    found = {one["form"]: (one["texts"], one["labels"]) for one in runs}
    assert found == {
        "pointwise": (400, 400),
        "listwise": (400, 300),
        "pairs, single raters": (400, 200),
    }
    text = (tmp_path / "feedback_forms.md").read_text()
    assert "Spearman with people" in text and "listwise" in text
    assert (tmp_path / "feedback_forms.png").stat().st_size > 10_000


def test_runs_of_other_stages_are_refused(chain, tmp_path):
    with pytest.raises(ValueError, match="is a run of sft"):
        feedback_forms.collect([chain.sft.parent])
    with pytest.raises(ValueError, match="is no folder"):
        feedback_forms.collect([tmp_path / "none"])
