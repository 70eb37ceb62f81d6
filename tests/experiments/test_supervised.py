"""Every method of supervised alignment at `tiny`, on one file of samples, and curation of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import curate as curate_configs
from configs import supervised as configs
from experiments import curate, curating
from experiments import supervised as experiment
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.methods.supervised import METHODS, PROMPTED
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.tasks import TaskConfig, make_task
from rlhf_jax.training.record import read_config, read_summary

pytestmark = pytest.mark.slow
CONTRASTS = sorted(set(METHODS) - set(PROMPTED))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Of all runs: samples that one of them has drawn serve the others."""
    return tmp_path_factory.mktemp("supervised")


def tiny(chain, root: Path, workdir: Path, *changes: str):
    """A tiny config on the session's models; it finds neither PPO-max nor DPO."""
    # One update compiles one shape; it is as long as several.
    parts = ["tiny", "sharding.devices=1", "log.tensorboard=False", "train.steps=1", "eval.every=1"]
    parts += ["optimizer.warmup_fraction=0.0", "optimizer.learning_rate=0.003"]
    config = configs.get_config(",".join([*parts, *changes]))
    config.root, config.workdir = str(root), str(workdir)
    config.inputs.update(model=str(chain.sft), reward_model=str(chain.reward_model))
    return config


def run(chain, root: Path, *changes: str) -> Path:
    workdir = root / "-".join(part.replace("/", "_") for part in changes)
    if not (workdir / "summary.json").exists():
        experiment.main(tiny(chain, root, workdir, *changes))
    return workdir


def test_every_method_is_a_variant():
    methods = {configs.get_config(f"tiny,{name}").objective.method for name in METHODS}
    assert methods == set(METHODS) == set(configs.VARIANTS) - {"half"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_reports_what_it_read(chain, root, method):
    folder = run(chain, root, method)
    assert (folder / "model" / "model.safetensors").exists()
    log, summary = read_metrics(folder), read_summary(folder)
    loss = log["loss/supervised"]
    assert np.all(np.isfinite(loss)) and loss.shape == (1,)
    terms = log["loss/sft"] + log.get("loss/aux", np.zeros(1))
    np.testing.assert_allclose(loss, terms, rtol=1e-5)
    assert ("rank/accuracy" in log) == (method in CONTRASTS)
    report = (folder / "report.md").read_text()
    assert "no_ppo" not in report and "DPO is not in this report" in report
    assert f"# {method} against SFT (tiny, seed 0)" in report
    read = summary["read"]
    pairs = configs.get_config(f"tiny,{method}").candidates.read == "pairs"
    # Of a pair people said one thing, of each sample the reward model.
    assert (read["labels"] == read["prompts"]) == pairs
    assert f"{read['labels']:,} " + ("comparisons" if pairs else "scores") in report
    assert 0 < read["responses"] <= 2 * read["prompts"] * (1 if pairs else 2)
    assert bool(summary["asked_with"]) == (method in PROMPTED)
    assert ("is asked with" in report) == (method in PROMPTED)
    statistics = summary["statistics"]
    assert set(statistics) == {"SFT", method}
    assert abs(statistics["SFT"]["policy/kl_ref_sequence"]) < 1e-3
    assert abs(statistics[method]["policy/kl_ref_sequence"]) > 1e-3


def test_the_methods_share_one_file_of_samples(chain, root):
    run(chain, root, "rrhf"), run(chain, root, "slic")
    file, *others = (root / curating.KEPT).iterdir()
    assert not others
    rows = curating.read_rows(file)
    assert len(rows) == 24 and all(len(row["responses"]) == 4 for row in rows)
    assert max(len(ids) for row in rows for ids in row["tokens"]) == 8  # max_new_tokens
    pinned = read_config(root / "rrhf" / "config.json")["inputs"]["rows"]
    assert set(pinned) >= {"candidates", "prompt train"}


def test_a_file_of_candidates_is_read_in_place_of_samples(chain, root, tmp_path):
    rows = [
        {"prompt": f"I think {n} is", "responses": [" good", " bad"], "scores": [1.0, float(n % 3)]}
        for n in range(60)
    ]
    curating.write_rows(tmp_path / "rows.jsonl", rows)
    changes = ("orpo", f"candidates.read=jsonl:{tmp_path / 'rows.jsonl'}")
    experiment.main(tiny(chain, root, tmp_path / "run", *changes))
    summary = read_summary(tmp_path / "run")
    # A third of the prompts has two responses that are worth the same, and teaches nothing.
    assert summary["read"] == {
        "prompts": 60, "responses": 120, "labels": 120, "rows": 40, "sequences": 80
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            ("rrhf",),
            "line 1: candidates need .*missing: .'responses', 'scores'.*experiments.curate",
        ),
        (
            [{"prompt": "a b", "responses": [" b", " c"], "scores": [1, 1]}] * 9,
            ("rrhf",),
            "all scores are equal",
        ),
        (
            [{"prompt": "a b", "responses": [" b", " c"], "scores": [1, 2]}],
            ("quark",),
            "2 responses are fewer than the 5 quantiles",
        ),
        (
            [{"prompt": "a b", "responses": [" b", " c"], "scores": [1, 2]}],
            ("c_rlft", "objective.texts=('<|bad|>','<|good|>')"),
            "'<|bad|>', and the tokenizer has no such control token: use words",
        ),
    ],
)
def test_bad_input_is_one_line(chain, root, tmp_path, rows, changes, message):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny(chain, root, tmp_path / "run", *changes, f"candidates.read=jsonl:{file}")
    with pytest.raises(ValueError, match=message) as caught:
        experiment.main(config)
    assert "\n" not in str(caught.value)


def curated(chain, root: Path, *changes: str) -> Path:
    """A tiny run of curation on the session's models."""
    parts = ["tiny", "sharding.devices=1", "log.tensorboard=False", *changes]
    config = curate_configs.get_config(",".join(parts))
    config.root, config.workdir = str(root), str(root / f"curate-{'-'.join(changes)}")
    config.inputs.update(model=str(chain.sft), reward_model=str(chain.reward_model))
    curate.main(config)
    return Path(config.workdir)


def test_curation_keeps_the_samples_of_the_methods_as_rankings(chain, root, capsys):
    run(chain, root, "rrhf")
    capsys.readouterr()
    folder = curated(chain, root, "rankings")
    assert "training prompts: kept in " in capsys.readouterr().out  # and not drawn again
    assert len(list((root / curating.KEPT).iterdir())) == 1
    rows, summary = curating.read_rows(folder / curate.DATA), read_summary(folder)
    assert len(rows) == summary["rows"] == summary["kept"]["curate/prompts"]
    assert summary["drawn"]["curate/answers"] == 96
    kept = sum(len(row["responses"]) for row in rows)
    assert kept == summary["kept"]["curate/answers"]
    assert kept + sum(int(n) for n in summary["dropped"].values()) == 96
    assert len({row["id"] for row in rows}) == len(rows)
    assert {"inputs.model", "inputs.reward_model", "seed"} <= set(rows[0]["sampler"])
    report = (folder / "report.md").read_text()
    assert "| reward, mean" in report and "nats an answer" in report
    # As pairs the rows are a source of every stage.
    tokenizer = load_tokenizer(chain.sft)
    task = make_task(TaskConfig(f"jsonl:{folder / curate.DATA}"))
    pairs = task.preferences(tokenizer, "all", max_length=96, count=0)
    assert 0 < len(pairs) <= len(rows) and all(pair.margin > 0 for pair in pairs)
    assert len(task.documents(tokenizer, "all", max_length=96)) > 0
    assert len(task.prompts(tokenizer, "all", max_length=96)) == len(rows)


def test_curation_for_fine_tuning_keeps_the_best(chain, root):
    folder = curated(chain, root, "best_of_n", "samples.per_prompt=4", "keep.cut=True")
    summary = read_summary(folder)
    assert summary["kept"]["curate/reward"] > summary["drawn"]["curate/reward"]
    # Of four without ties, log 4 - 3/4; a little more where some say nothing.
    assert summary["kl"] == pytest.approx(np.log(4) - 3 / 4, abs=0.2)
    task = make_task(TaskConfig(f"jsonl:{folder / curate.DATA}"))
    documents = task.documents(load_tokenizer(chain.sft), "all", max_length=96)
    assert len(documents) == summary["rows"]
