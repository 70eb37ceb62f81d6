"""What happened to a checkpoint on disk is told, and the one before it is used."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from rlhf_jax.runtime.checksums import checksums
from rlhf_jax.training.checkpoint import Checkpointer, CheckpointError
from rlhf_jax.training.run import CheckpointConfig, Run

STEPS = (1, 2)


def state_of(step: int):
    """Numbers that no compression makes smaller, in the types that states have."""
    rng = np.random.default_rng(step)
    draw = rng.standard_normal
    return {
        "w": jnp.asarray(draw((64, 32)), jnp.float32),
        "half": jnp.asarray(draw((32, 32)), jnp.bfloat16),
        "count": jnp.asarray(rng.integers(0, 2**31, 16), jnp.int32),
    }


def position_of(step: int) -> dict:
    return {"cursors": [{"epoch": 0, "taken": 10 * step}]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two steps."""
    folder = tmp_path_factory.mktemp("saved")
    keeper = Checkpointer(folder)
    for step in STEPS:
        keeper.save(step, state_of(step), position_of(step))
    keeper.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restored(folder) -> int:
    """The step that is restored, once its numbers are known to be right."""
    keeper = Checkpointer(folder)
    step, state, position = keeper.restore(state_of(0))
    keeper.close()
    wanted = state_of(step)
    for name in wanted:
        assert state[name].dtype == wanted[name].dtype
        assert np.asarray(state[name]).tobytes() == np.asarray(wanted[name]).tobytes(), name
    assert position == position_of(step)
    return step


def files(step_folder) -> list:
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def largest(step_folder):
    """The file with most of the numbers."""
    return max(files(step_folder / "state"), key=lambda path: path.stat().st_size)


def test_what_is_whole_is_used(folder, capsys):
    assert restored(folder) == 2
    assert not capsys.readouterr().out


def flip(path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("draw", range(30))
def test_a_flipped_bit_never_gives_other_numbers(folder, draw, capsys):
    """In the arrays, in the position or in what Orbax keeps beside them."""
    rng = np.random.default_rng(draw)
    several = files(folder / "2")
    path = largest(folder / "2") if draw < 15 else several[rng.integers(len(several))]
    if path.stat().st_size:
        flip(path, int(rng.integers(8 * path.stat().st_size)))
    step, told = restored(folder), capsys.readouterr().out
    assert step in STEPS
    if step == 1:
        assert told.startswith(f"checkpoint {folder / '2'} is refused, now 2.refused: ")
        assert told.count("\n") == 1


def cut(path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def edit_position(folder):
    path = folder / "2" / "position" / "metadata"
    path.write_text(path.read_text().replace('"taken": 20', '"taken": 21'))


def forget_checksums(folder):
    path = folder / "2" / "position" / "metadata"
    path.write_text(json.dumps(position_of(2)))


DAMAGE = {
    "its largest file is cut in half": (
        lambda folder: cut(largest(folder / "2"), largest(folder / "2").stat().st_size // 2),
        "arrays",
    ),
    "its largest file is empty": (lambda folder: cut(largest(folder / "2"), 0), "arrays"),
    "its largest file is gone": (lambda folder: largest(folder / "2").unlink(), "arrays"),
    "its arrays are gone": (lambda folder: shutil.rmtree(folder / "2" / "state"), "arrays"),
    "its position is torn": (lambda folder: cut(folder / "2/position/metadata", 30), "is torn"),
    "its position is empty": (lambda folder: cut(folder / "2/position/metadata", 0), "is torn"),
    "its position is gone": (
        lambda folder: shutil.rmtree(folder / "2" / "position"),
        "it has no position/metadata",
    ),
    "its position is edited": (edit_position, "differs from what was saved"),
    "it has no checksums": (forget_checksums, "it has no checksums"),
    "it is an empty folder": (
        lambda folder: (shutil.rmtree(folder / "2"), (folder / "2").mkdir()),
        "it has no position/metadata",
    ),
    "arrays of another step": (
        lambda folder: (
            shutil.rmtree(folder / "2" / "state"),
            shutil.copytree(folder / "1" / "state", folder / "2" / "state"),
        ),
        "3 of its 3 arrays differ from what was saved",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_is_named_and_the_one_before_is_used(folder, kind, capsys):
    damage, reason = DAMAGE[kind]
    damage(folder)
    assert restored(folder) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"checkpoint {folder / '2'} is refused, now 2.refused: ")
    assert reason in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: (folder / "50").mkdir(),
        lambda folder: shutil.copytree(folder / "2", folder / "50"),
    ],
    ids=["empty", "a copy"],
)
def test_a_step_that_never_was_is_refused(folder, make, capsys):
    make(folder)
    assert restored(folder) == 2
    assert f"checkpoint {folder / '50'} is refused" in capsys.readouterr().out


def test_other_things_in_the_folder_are_no_steps(folder):
    (folder / "50").write_text("a file")
    (folder / "7.orbax-checkpoint-tmp").mkdir()
    (folder / "notes").mkdir()
    assert restored(folder) == 2


def test_the_number_of_a_refused_step_can_be_saved_again(folder, capsys):
    edit_position(folder)
    keeper = Checkpointer(folder)
    assert keeper.restore(state_of(0))[0] == 1
    keeper.save(2, state_of(2), position_of(2))
    keeper.close()
    assert restored(folder) == 2
    assert capsys.readouterr().out.count("is refused") == 1
    assert (folder / "2.refused").is_dir()


def test_no_whole_step_is_one_error_and_nothing_is_renamed(folder):
    edit_position(folder)
    shutil.rmtree(folder / "1" / "state")
    keeper = Checkpointer(folder)
    with pytest.raises(CheckpointError) as error:
        keeper.restore(state_of(0))
    keeper.close()
    told = str(error.value)
    assert told.startswith(f"no checkpoint in {folder} is whole (step 2: position/metadata differs")
    assert "step 1: its arrays cannot be read" in told and "\n" not in told
    assert {"1", "2"} <= {path.name for path in folder.iterdir()}


class Cursor:
    """Counts the batches that were taken."""

    def __init__(self):
        self.taken = 0

    def state(self) -> dict:
        return {"taken": self.taken}

    def restore(self, state: dict) -> None:
        self.taken = state["taken"]


def run(folder, total: int):
    """A run of `total` additions; its last state and the steps that it did."""
    state, cursor, steps = {"x": jnp.zeros(3)}, Cursor(), []
    with Run(folder, total=total, desc="sums", checkpoint=CheckpointConfig(every=1)) as run:
        state = run.restore(state, cursor)
        for step in run.steps():
            cursor.taken += 1
            state = {"x": state["x"] + cursor.taken}
            steps.append(step)
            run.log(step, {"sum": state["x"][0]})
            run.checkpoint(step, state, cursor)
    return state["x"].tolist(), steps


def test_a_run_goes_on_from_the_step_before_to_the_same_end(tmp_path, capsys):
    wanted, _ = run(tmp_path / "whole", 5)
    run(tmp_path / "parts", 3)
    record = tmp_path / "parts" / "checkpoints" / "3" / "position" / "metadata"
    record.write_text(record.read_text().replace('"taken": 3', '"taken": 4'))
    ended, steps = run(tmp_path / "parts", 5)
    assert (ended, steps) == (wanted, [2, 3, 4])
    told = capsys.readouterr().out
    assert "checkpoints/3 is refused" in told and "sums: resuming at step 2 of 5" in told


def test_runs_keep_a_step_to_fall_back_on():
    assert common.shared().checkpoint.keep == CheckpointConfig().keep == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_a_checksum_sees_every_element(dtype):
    numbers = np.random.default_rng(0).integers(0, 2, (6, 5))
    array = jnp.asarray(numbers, dtype)
    known = checksums({"x": array})["x"]
    assert known == checksums({"y": jnp.array(array)})["y"]
    seen = {known}
    for i in range(array.size):
        other = np.array(array)
        other.reshape(-1)[i] = 1 - other.reshape(-1)[i] if dtype != "bool" else not other.flat[i]
        seen.add(checksums({"x": jnp.asarray(other)})["x"])
    assert len(seen) == array.size + 1
