"""A run goes on with what it began with: rows, weights, template and date, or not at all."""

import contextlib
import datetime
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import sft as sft_configs
from experiments import sft
from rlhf_jax.runtime.metrics import read_metrics
from rlhf_jax.training.run import Run, Stopped
from tests.experiments.test_golden_steps import load_weights

FIRST, NEXT = datetime.date(2026, 1, 31), datetime.date(2026, 2, 1)
# The date stands in every document, and so in the numbers.
DATED = (
    "{{ bos_token + strftime_now('%d %B %Y') + '\n' }}{% for m in messages %}"
    "{{ m['content'] + (eos_token if m['role'] == 'assistant' else '\n') }}{% endfor %}"
)


@contextlib.contextmanager
def day(date):
    """Makes it that day."""

    class Day(datetime.date):
        @classmethod
        def today(cls):
            return date

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datetime, "date", Day)
        yield


class World:
    """A model with a dated template, a file of conversations, and runs on both."""

    def __init__(self, model: Path, root: Path):
        self.root, self.model, self.rows = root, root / "model", root / "rows.jsonl"
        shutil.copytree(model, self.model)
        self.template = self.model / "chat_template.jinja"
        self.template.write_text(DATED)
        words = ("the", "sea", "is", "wide", "and", "people", "are", "kind", "to", "old", "friends")
        rows = [
            {"prompt": [{"role": "user", "content": f"{word} {n}?"}], "response": f"{word} and {n}"}
            for n in range(20)
            for word in words
        ]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, name: str, *changes: str) -> Path:
        """Trains in the folder `name`, or goes on there."""
        config = sft_configs.get_config(
            ",".join(("tiny", "sharding.devices=1", "log.tensorboard=False", *changes))
        )
        config.workdir = str(self.root / name)
        config.data.source = f"jsonl:{self.rows}"
        config.inputs.model = str(self.model)
        sft.main(config)
        return self.root / name


@pytest.fixture(scope="module")
def world(chain, tmp_path_factory):
    """With the run "whole", and the run "parts" that was stopped at step 2, on the first day."""
    world = World(chain.sft, tmp_path_factory.mktemp("inputs"))
    original = Run.checkpoint

    def stopping(self, step, *states):
        self._stop.requested = step == 1
        return original(self, step, *states)

    with day(FIRST):
        world.run("whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "checkpoint", stopping)
            with pytest.raises(Stopped, match="stopped at step 2 of 6"):
                world.run("parts")
    return world


def edited(world):
    text = world.rows.read_text()
    world.rows.write_text(text.replace("wide and 7", "wide and 8"))


def reordered(world):
    first, second, *rest = world.rows.read_text().splitlines(keepends=True)
    world.rows.write_text("".join([second, first, *rest]))


def swapped(world):
    """Two numbers of the weights change places."""
    file = world.model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8] + content[-4:] + content[-8:-4])


def spoken(world):
    world.template.write_text(DATED.replace("%d %B %Y", "%d.%m.%Y"))


@pytest.mark.parametrize(
    ("change", "file", "named"),
    [
        (edited, "rows", "rows of sft train"),
        (reordered, "rows", "rows of sft train"),
        (swapped, "model/model.safetensors", "weights of inputs.model"),
        (spoken, "template", "chat_template"),
    ],
)
def test_other_inputs_are_refused_by_name(world, change, file, named):
    path = world.model / "model.safetensors" if "/" in file else getattr(world, file)
    before, noted = path.read_bytes(), (world.root / "parts" / "config.json").read_bytes()
    change(world)
    assert path.read_bytes() != before
    try:
        with pytest.raises(ValueError) as caught:
            world.run("parts")
    finally:
        path.write_bytes(before)
    message = str(caught.value)
    assert f"began with other inputs ({named} was " in message and "\n" not in message
    assert message.endswith(
        "put back what it began with, choose another --config.workdir, or remove the folder"
    )
    assert (world.root / "parts" / "config.json").read_bytes() == noted


def test_a_run_that_is_resumed_tomorrow_is_of_today(world):
    """The same files, of another age, in another place of the disk: bit for bit the same."""
    world.rows.touch()
    with day(NEXT):
        world.run("parts")
        another = world.run("another", "train.steps=1")
    one, other = (read_metrics(world.root / name) for name in ("whole", "parts"))
    for name in one.keys() - {"time"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    whole, parts = (load_weights(world.root / name / "model") for name in ("whole", "parts"))
    for name, weights in whole.items():
        np.testing.assert_array_equal(weights, parts[name], err_msg=name)
    # A run that begins on the next day is of that day, and reads other tokens.
    pinned = [
        json.loads((folder / "config.json").read_text())["inputs"]
        for folder in (world.root / "parts", another)
    ]
    assert [inputs["date"] for inputs in pinned] == ["2026-01-31", "2026-02-01"]
    assert pinned[0]["rows"] != pinned[1]["rows"]
    assert pinned[0]["chat_template"] == pinned[1]["chat_template"]
