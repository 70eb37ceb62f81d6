"""Checkpoints: bit for bit, whole or not at all, and a run that was stopped goes on as if it had
not been."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import losses
from rlhf_jax.runtime.sharding import Sharding, make_mesh
from rlhf_jax.runtime.signals import GracefulStop
from rlhf_jax.training.checkpoint import Checkpointer
from rlhf_jax.training.step import TrainState, create_state, make_train_step
from tests import tiny

ADAM = optax.adam(0.1)


def filled(state, seed: int):
    """A state or its shapes with other numbers: the moments of a new state are zero."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        numbers = jnp.asarray(rng.normal(0, 9, x.shape), x.dtype)
        return numbers if x.sharding is None else jax.device_put(numbers, x.sharding)

    return jax.tree.map(leaf, state)


def run_state(seed: int):
    """What a run saves: a half-precision model, its master, its optimizer, running moments."""
    model = tiny.scalar_model(tiny.model_config(dtype="bfloat16"))

    def make(model):
        master = jax.tree.map(lambda x: x.astype(jnp.float32), model)
        policy = TrainState(jnp.zeros((), jnp.int32), model, master, ADAM.init(master))
        return {"policy": policy, "moments": losses.RunningMoments.zeros()}

    return filled(jax.eval_shape(make, model), seed)


def small_state(seed: int, devices: int, mode: str):
    model = {"w": jnp.ones((16, 8), jnp.bfloat16), "bias": jnp.ones(8, jnp.bfloat16)}
    return filled(create_state(model, ADAM, Sharding(make_mesh(devices), mode)), seed)


def equal(one, other) -> bool:
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)), one, other
    )
    return jax.tree.all(same)


def test_everything_comes_back_bit_for_bit_in_a_new_process(tmp_path):
    saved, other = run_state(0), run_state(1)
    assert not equal(saved, other)
    writer = Checkpointer(tmp_path)
    writer.save(3, saved, {"cursor": [1, 2], "name": "x"})
    writer.close()
    reader = Checkpointer(tmp_path)
    step, restored, position = reader.restore(other)
    reader.close()
    assert (step, position) == (3, {"cursor": [1, 2], "name": "x"})
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert equal(restored, saved)


def test_the_newest_is_kept_and_found(tmp_path):
    keeper = Checkpointer(tmp_path / "not" / "yet there", keep=2)
    assert keeper.latest_step() is None
    for step in (1, 2, 5):
        keeper.save(step, {"x": jnp.full(2, float(step))}, {})
    assert keeper.latest_step() == 5
    step, state, _ = keeper.restore({"x": jnp.zeros(2)})
    assert step == 5 and state["x"].tolist() == [5.0, 5.0]
    keeper.close()
    kept = sorted(
        int(p.name) for p in (tmp_path / "not" / "yet there").iterdir() if p.name.isdigit()
    )
    assert kept == [2, 5]


def test_nothing_to_restore(tmp_path):
    keeper = Checkpointer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in "):
        keeper.restore({"x": jnp.zeros(2)})
    keeper.close()


def test_a_write_that_was_cut_off_is_not_a_checkpoint(tmp_path):
    keeper = Checkpointer(tmp_path)
    keeper.save(1, {"x": jnp.ones(2)}, {})
    keeper.close()
    # What Orbax leaves when it is killed before the final rename.
    half = tmp_path / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").mkdir()
    again = Checkpointer(tmp_path)
    assert again.latest_step() == 1
    again.save(2, {"x": jnp.zeros(2)}, {})
    assert again.latest_step() == 2
    again.close()


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        ({"x": jnp.ones(2)}, {"x": jnp.ones(3)}, r"x is .*2.* on disk and .*3.* now \(1 differ\)"),
        ({"x": jnp.ones(2)}, {"y": jnp.ones(2)}, r"x is .*2.* on disk and None now \(2 differ\)"),
        (
            {"x": jnp.ones(2)},
            {"x": jnp.ones(2, jnp.bfloat16)},
            r"x is .*float32.* on disk and .*bfloat16.* now \(1 differ\)",
        ),
    ],
)
def test_another_config_is_one_clear_line(tmp_path, saved, wanted, message):
    keeper = Checkpointer(tmp_path)
    keeper.save(1, saved, {})
    with pytest.raises(ValueError, match=message) as error:
        keeper.restore(wanted)
    keeper.close()
    assert "written by another config" in str(error.value) and "\n" not in str(error.value)


def test_restores_onto_another_number_of_devices(tmp_path):
    saved = small_state(0, 8, "zero3")
    keeper = Checkpointer(tmp_path)
    keeper.save(1, saved, {})
    for devices, mode in ((4, "zero2"), (1, "zero0")):
        like = small_state(1, devices, mode)
        _, restored, _ = keeper.restore(like)
        assert equal(restored, saved)
        placed = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, like)
        assert jax.tree.all(placed)
    keeper.close()


def loss(model, batch, key):
    noise = jax.random.normal(key, batch.shape)
    value = jnp.sum(jnp.square(model["w"] - batch - noise))
    return value, {"loss": value}


class Loop:
    """A small run with what a real one has: optimizer, running moments, a data cursor, keys."""

    def __init__(self, folder, *, total: int, stop_after: int | None = None):
        self.folder, self.total, self.stop_after = folder, total, stop_after
        self.train = make_train_step(loss, ADAM, Sharding(make_mesh(1), "zero0"))
        self.log: list[tuple[int, float]] = []

    def run(self):
        policy = create_state({"w": jnp.zeros(3)}, ADAM, Sharding(make_mesh(1), "zero0"))
        state = {"policy": policy, "moments": losses.RunningMoments.zeros()}
        keeper, first, cursor = Checkpointer(self.folder), 0, 0
        if keeper.latest_step() is not None:
            first, state, position = keeper.restore(state)
            cursor = position["cursor"]
        with GracefulStop() as stop:
            for step in range(first, self.total):
                state, cursor = self.step(step, state, cursor)
                if step == self.stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop.requested:
                    break
            keeper.save(step + 1, state, {"cursor": cursor})
        keeper.close()
        return state

    def step(self, step: int, state, cursor: int):
        data = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
        key = jax.random.fold_in(jax.random.key(1), step)
        policy, metrics = self.train(state["policy"], data[cursor], key)
        self.log.append((step, float(metrics["loss"])))
        moments = losses.update_moments(state["moments"], metrics["loss"])
        return {"policy": policy, "moments": moments}, cursor + 2


def test_a_stopped_and_resumed_run_equals_one_that_was_not(tmp_path, capsys):
    whole = Loop(tmp_path / "whole", total=7)
    expected = whole.run()
    first = Loop(tmp_path / "parts", total=7, stop_after=2)
    first.run()
    assert [step for step, _ in first.log] == [0, 1, 2]
    assert "SIGTERM: saving after this step" in capsys.readouterr().out
    second = Loop(tmp_path / "parts", total=7)
    resumed = second.run()
    assert first.log + second.log == whole.log
    assert equal(resumed, expected)
