"""Runs from a notebook: any folder, any thread, what comes back, what is refused, what is shown."""

import contextlib
import fcntl
import io
import json
import shlex
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from configs import common
from experiments import display, notebook, paper, paper_figures, sft
from experiments.display import LiveCurves, Picture, Table
from rlhf_jax.runtime import lock
from rlhf_jax.runtime.metrics import MetricsWriter
from rlhf_jax.training.record import check_settings, read_summary

ROOT = Path(__file__).parent.parent.parent
PNG = b"\x89PNG\r\n\x1a\n"
STEPS = [(step, {"loss/lm": step + 0.5}) for step in range(3)]


class FakeSFT:
    """In place of an experiment's `main`: a folder as a run leaves it, and no training.

    Attributes:
      trained: The folders in which it has run, in order.
      at_once: How many were running at the same time, at most.
    """

    def __init__(self):
        self.trained, self.at_once, self._running = [], 0, 0
        self.prints = lambda: print("a banner")

    def __call__(self, config, on_step):
        config = common.resolve(config)
        folder = Path(config.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder / "config.json", config.to_dict())
        if read_summary(folder) is not None:
            return
        self.trained.append(folder)
        self._running += 1
        self.at_once = max(self.at_once, self._running)
        time.sleep(0.05)
        self.prints()
        with MetricsWriter(folder, tensorboard=False) as writer:
            for step, metrics in STEPS:
                writer.write(step, metrics)
                on_step(step, metrics)
        (folder / "summary.json").write_text(json.dumps({"seconds": 1.0, "perplexity": 7.0}))
        self._running -= 1


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """No training, in a folder of its own, and the settings of this process as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "_prepare", lambda root: None)
    main = FakeSFT()
    monkeypatch.setattr(sft, "main", main)
    return main


def test_results_come_back_and_every_step_is_reported(fake, tmp_path):
    seen = []
    result = notebook.run("sft", "tiny", root="mine", on_step=lambda *step: seen.append(step))
    assert seen == STEPS
    assert result.folder == tmp_path / "mine/runs/sft/tiny"
    assert result.numbers == {"held-out perplexity": 7.0}
    assert result.curves["loss/lm"].tolist() == [0.5, 1.5, 2.5]
    assert result.settings["experiment"] == "sft" and result.settings["train.row_length"] == 96
    assert result.samples == [] and result.pictures == {}
    assert repr(result) == f"Result(sft, 3 steps, {str(result.folder)!r})"


def test_a_finished_run_comes_back_at_once_with_its_steps(fake):
    notebook.run("sft", "tiny")
    seen = []
    again = notebook.run("sft", "tiny", on_step=lambda *step: seen.append(step))
    assert len(fake.trained) == 1 and seen == STEPS and again.summary["perplexity"] == 7.0


def test_other_settings_go_to_another_folder(fake):
    config = notebook.make_config("sft", "tiny")
    before = config.to_dict()
    folders = [notebook.run(config).folder.name]
    config.train.steps = 5  # in place
    folders.append(notebook.run(config).folder.name)
    folders.append(notebook.run(config, settings={"seed": 2}).folder.name)
    folders.append(notebook.run("sft", "tiny", {"optimizer.b1": np.float64(0.5)}).folder.name)
    steps = "tiny-train.steps=5"
    assert folders == ["tiny", steps, f"tiny-seed=2-{steps[5:]}", "tiny-optimizer.b1=0.5"]
    assert config.to_dict() == before | {"train": {**before["train"], "steps": 5}}
    assert len(fake.trained) == 4


def test_other_settings_in_a_folder_that_is_named_are_refused_by_the_difference(fake):
    notebook.run("sft", "tiny", {"workdir": "mine"})
    with pytest.raises(ValueError, match=r"mine holds a run .*train.steps was 6, now 5; 1 differ"):
        notebook.run("sft", "tiny", {"workdir": "mine", "train.steps": 5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pso_max",), "no experiment 'pso_max': choose one of sft, reward_model, ppo_max, dpo"),
        (("sft", "tiny,nothing"), "unknown variant 'nothing'"),
        (("sft", "tiny", {"train.stepz": 1}), "unknown config key 'train.stepz'"),
        (("sft", "tiny", {"train.steps": "many"}), "train.steps=many has the wrong type"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(fake, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        notebook.run(*arguments)
    assert "\n" not in str(caught.value) and fake.trained == []


def test_a_config_takes_no_argument_besides(fake):
    with pytest.raises(ValueError, match="argument='kl' is part of a config already"):
        notebook.run(notebook.make_config("sft", "tiny"), "kl")


def test_runs_of_one_kernel_take_turns(fake):
    calls = [("a", 1), ("a", 1), ("b", 2)]
    threads = [
        threading.Thread(target=notebook.run, args=("sft", "tiny", {"workdir": name, "seed": seed}))
        for name, seed in calls
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.at_once == 1
    assert sorted(folder.name for folder in fake.trained) == ["a", "b"]


def test_a_quiet_run_prints_to_its_folder_and_nobody_else_does(fake, capsys):
    def banner():
        print("a banner")
        print("a warning", file=sys.stderr)
        other = threading.Thread(target=print, args=("of another cell",))
        other.start()
        other.join()

    fake.prints = banner
    result = notebook.run("sft", "tiny", quiet=True, on_step=lambda step, _: print("saw", step))
    assert capsys.readouterr() == ("of another cell\nsaw 0\nsaw 1\nsaw 2\n", "")
    assert (result.folder / notebook.LOG_FILE).read_text() == "a banner\na warning\n"
    print("after")
    assert capsys.readouterr().out == "after\n"
    assert "_Stream" not in type(sys.stdout).__name__


def test_what_fails_puts_the_streams_back(fake):
    fake.prints = lambda: 1 / 0
    before = io.StringIO()
    with contextlib.redirect_stdout(before):
        with pytest.raises(ZeroDivisionError):
            notebook.run("sft", "tiny", quiet=True)
        assert sys.stdout is before


def test_what_fails_leaves_the_folder_to_others(fake):
    """A kernel lives on, and the command line goes on with the run."""
    claimed = []

    def fail():
        claimed.append(lock.claim(fake.trained[0]))
        raise KeyboardInterrupt

    fake.prints = fail
    with pytest.raises(KeyboardInterrupt):
        notebook.run("sft", "tiny")
    assert claimed == [True]
    with (fake.trained[0] / lock.LOCK_FILE).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as another process


def test_a_run_notes_the_command_that_would_make_it(fake, tmp_path):
    settings = {"data.domains": ("nyt", "movie"), "seed": 3, "root": "with space"}
    config = notebook.make_config("sft", "tiny,pretrain", settings)
    result = notebook.run(config)
    command = json.loads((result.folder / "config.json").read_text())["command"]
    words = shlex.split(command)
    argument = "configs/sft.py:tiny,pretrain"
    assert words[:5] == ["python", "-m", "experiments.sft", "--config", argument]
    again = notebook.make_config("sft", argument.partition(":")[2])
    for word in words[5:]:
        common.assign(again, word.removeprefix("--config."))
    assert common.resolve(again).to_dict() == common.resolve(config).to_dict()
    assert again.root == str(tmp_path / "with space")


def test_a_table_shows_texts_as_they_are():
    table = Table({"prompt": f"<b>{i}\nx", "score": i / 3} for i in range(30))
    shown = table._repr_html_()
    assert "&lt;b&gt;0<br>x" in shown and "<b>" not in shown and "0.3333" in shown
    assert shown.count("<tr>") == display.MAX_ROWS + 1 and "10 more rows" in shown
    assert list(table)[29]["score"] == 29 / 3
    assert table.head(2).columns("score", "none") == [{"score": 0.0}, {"score": 1 / 3}]
    assert "<table>" in table.head(2)._repr_html_()


def test_live_curves_follow_each_run_and_forget_what_was_rolled_back(monkeypatch):
    shown = []
    with LiveCurves("reward", "policy/entropy", every=0.0) as curves:
        curves._handle = type("Handle", (), {"update": lambda _, picture: shown.append(picture)})()
        assert curves.picture() is None
        kl, other = curves.of("kl"), curves.of("entropy")
        kl(0, {"optim/learning_rate": 1.0})
        assert shown == []  # nothing of what is drawn yet
        for step in range(4):
            kl(step, {"reward/mean": float(step)})
        kl(2, {"reward/mean": -1.0})
        other(0, {"policy/entropy": 3.0})
    assert len(shown) == 7 and all(picture.png.startswith(PNG) for picture in shown)
    drawn = []
    monkeypatch.setattr(display, "draw_panels", lambda logs, panels: drawn.append((logs, panels)))
    monkeypatch.setattr(Picture, "of", lambda figure: None)
    curves.picture()
    ((logs, panels),) = drawn
    (log,) = logs["kl"]
    assert log["step"].tolist() == [0, 1, 2] and log["reward/mean"].tolist() == [0, 1, -1]
    assert [panel.title for panel in panels] == ["Reward", "Entropy"]


def test_live_curves_are_not_drawn_at_every_step():
    shown = []
    with LiveCurves("loss/lm", every=60.0) as curves:
        curves._handle = type("Handle", (), {"update": lambda _, picture: shown.append(picture)})()
        add = curves.of("sft")
        for step in range(50):
            add(step, {"loss/lm": 1.0})
        assert len(shown) == 1
    assert len(shown) == 2  # and at the end
    with pytest.raises(ValueError, match="name at least one metric"):
        LiveCurves()
    with pytest.raises(ValueError, match="no panel and no metric 'rewardz'"):
        LiveCurves("rewardz")


def test_runs_are_compared_as_results_folders_and_seeds(fake):
    seeds = [notebook.run("sft", "tiny", {"seed": seed}) for seed in (0, 1)]
    compared = notebook.compare_runs({"both": seeds, "one": seeds[0].folder}, ["loss/lm"])
    assert compared.picture.png.startswith(PNG)
    assert [row["run"] for row in compared.table] == ["both", "one"]
    assert [row["held-out perplexity"] for row in compared.table] == ["7 [7, 7]", "7"]
    shown = compared._repr_html_()
    assert "<img" in shown and "<table>" in shown
    assert "<img" in seeds[0]._repr_html_()
    with pytest.raises(ValueError, match="no panel and no metric 'no/such'"):
        notebook.compare_runs({"one": seeds[0]}, ["no/such"])


def test_figures_are_opened_with_their_claims_beside_the_paper():
    opened = notebook.open_figures(ROOT / "docs" / "figures")
    written = (ROOT / "docs" / "figures").glob("figure_*.json")
    assert list(opened) == sorted((path.stem.split("_")[1] for path in written), key=int)
    assert all(one.picture.png.startswith(PNG) for one in opened.values())
    assert opened["4"].title.startswith("Figure 4: Vanilla PPO (quickstart, 3 seeds)")
    assert {row["verdict"] for row in opened["7"].claims} >= {"reproduced", "not reproduced"}
    rows = {(row["series"], row["metric"]): row for row in opened["4"].readings}
    reward = rows["vanilla", "reward/mean"]
    assert reward["paper"] == "3 → 15 (jumps at steps 400 to 450 of 1,000)"
    curves = [s["curves"]["reward/mean"] for s in figure_4()["series"]["vanilla"]["seeds"].values()]
    sides = [
        [float(f"{np.mean(curve['value'][part]):.3g}") for curve in curves]
        for part in (slice(3), slice(-3, None))
    ]
    assert reward["here"] == " → ".join(
        f"{np.mean(side):.4g} [{min(side):.4g}, {max(side):.4g}]" for side in sides
    )
    assert ("vanilla", "win_rate/vader") in rows
    assert "Beside the paper" in opened["4"]._repr_html_()


def figure_4() -> dict:
    return json.loads((ROOT / "docs/figures/figure_4.json").read_text())


def test_a_folder_without_figures_says_what_writes_them(tmp_path):
    with pytest.raises(ValueError, match=r"holds no figure_N.json: `python -m experiments.figures"):
        notebook.open_figures(tmp_path)


def test_what_is_read_off_the_paper_names_curves_that_are_drawn():
    for reading in paper.READINGS:
        figure = paper_figures.FIGURES[reading.figure]
        assert reading.series in {series.label for series in figure.series}, reading
        assert reading.metric in {name for panel in figure.panels for name in panel.metrics}
    assert len({(r.figure, r.series, r.metric) for r in paper.READINGS}) == len(paper.READINGS)
