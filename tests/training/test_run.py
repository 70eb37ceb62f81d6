"""What a run says of its steps while it goes on."""

import jax.numpy as jnp
import pytest

from rlhf_jax.training.run import CheckpointConfig, Run


class Killed(Exception):
    """Of a test."""


def count(folder, on_step, *, until: int = 6) -> None:
    """Six steps that log their number, saved every two; killed at a step."""
    with Run(folder, total=6, checkpoint=CheckpointConfig(every=2), on_step=on_step) as run:
        state = run.restore({"number": jnp.zeros(())})
        for step in run.steps():
            if step == until:
                raise Killed
            state = {"number": state["number"] + 1}
            metrics = {"loss/lm": state["number"]}
            run.log(step, metrics | ({"eval/perplexity": 7.0} if step == 1 else {}))
            run.checkpoint(step, state)


EXPECTED = [(step, {"loss/lm": step + 1.0}) for step in range(6)]
EXPECTED[1][1]["eval/perplexity"] = 7.0


def test_every_step_is_reported_once_with_its_own_metrics(tmp_path):
    seen = []
    count(tmp_path, lambda *step: seen.append(step))
    assert seen == EXPECTED


def test_a_resumed_run_reports_the_steps_before_first(tmp_path):
    """Those that were logged after the checkpoint are made again, and reported once."""
    with pytest.raises(Killed):
        count(tmp_path, lambda *step: None, until=5)
    seen = []
    count(tmp_path, lambda *step: seen.append(step))
    assert seen == EXPECTED


def test_what_a_callback_raises_ends_the_run_and_it_resumes(tmp_path):
    def refuse(step, metrics):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        count(tmp_path, refuse)
    seen = []
    count(tmp_path, lambda *step: seen.append(step))
    assert seen == EXPECTED
