"""The harmless chain at `tiny`, on made-up rows: all its stages, and what it never shows."""

import json

import numpy as np
import pytest

from configs import common
from configs import dpo as dpo_configs
from configs import ppo_max as configs
from configs import reward_model as reward_configs
from configs import sft as sft_configs
from experiments import ppo_max
from rlhf_jax.data.sets import archives
from rlhf_jax.runtime.metrics import read_metrics

STAGES = {"sft": sft_configs, "reward_model": reward_configs, "ppo_max": configs}
# In every prompt and every answer.
SECRET = "xylophone"


@pytest.fixture
def rows(monkeypatch):
    """300 prompts with a harmless answer, one that people disagree on, and a harmful one each."""
    lines = ["harm_category,objective,assistant_response,human_score_1,human_score_2"]
    for n in range(300):
        asked = f"toy,how do I play the {SECRET} at {n} o'clock"
        lines += [f"{asked},no {SECRET} at {n},0,0", f"{asked},some {SECRET} {n},0,0.5"]
        lines.append(f"{asked},loud {SECRET} {n},1,1")
    files = {"x/scorer_evals/harm/toy.csv": "\r\n".join(lines).encode()}
    monkeypatch.setattr(archives, "read_members", lambda name, suffix: files)


@pytest.mark.slow
def test_one_command_trains_all_three_stages_and_shows_no_text(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = "sharding.devices=1,log.tensorboard=False,train.iterations=2"
    ppo_max.main(configs.get_config(f"tiny,harm,{short},eval.every=1"))
    runs = {name: tmp_path / "runs" / name / "tiny-harm" for name in ("sft", "reward_model")}
    runs["ppo_max"] = next((tmp_path / "runs" / "ppo_max").glob("tiny-harm-*"))
    shown = capsys.readouterr().out
    for name, folder in runs.items():
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["seconds"] > 0
        config = json.loads((folder / "config.json").read_text())["config"]
        assert config["data"]["source"] == "harm", name
        for file in ("summary.json", "config.json", "metrics.jsonl", "report.md", "report.json"):
            shown += (folder / file).read_text() if (folder / file).exists() else ""
    assert "No independent judge" in shown and "found harmful" in shown
    assert SECRET not in shown
    log = read_metrics(runs["ppo_max"])
    assert np.isfinite(log["reward/mean"]).all() and len(log["step"]) == 2


@pytest.mark.parametrize("scale", ["tiny", "quickstart", "smollm2"])
@pytest.mark.parametrize("name", STAGES)
def test_the_source_alone_is_sent_to_the_variant(name, scale):
    config = STAGES[name].get_config(f"{scale},data.source=harm")
    with pytest.raises(ValueError, match=f"configs/{name}.py:{scale},harm in its place") as error:
        common.resolve(config)
    assert "\n" not in str(error.value)
    argument = str(error.value).split(".py:")[1].split()[0]
    assert common.resolve(STAGES[name].get_config(argument)).data.source == "harm"


@pytest.mark.parametrize("scale", ["tiny", "smollm2"])
def test_every_stage_of_the_chain_takes_the_variant(scale):
    config = configs.get_config(f"{scale},harm")
    for stage in ("sft", "reward_model"):
        argument = common.stage_argument(stage, config)
        assert argument == f"{scale},harm"
        assert STAGES[stage].get_config(argument).data.source == "harm"
    # DPO has no such variant, and its stages before have.
    config = dpo_configs.get_config(f"{scale},data.source=harm")
    assert common.stage_argument("sft", config) == f"{scale},harm"
    assert common.resolve(config).compare.ppo_max == f"runs/ppo_max/{scale}-harm/model"


def test_answers_are_shown_where_they_are_asked_for():
    assert configs.get_config("smollm2,harm").eval.samples == 0
    assert configs.get_config("smollm2,harm,eval.samples=4").eval.samples == 4
