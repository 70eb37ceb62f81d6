"""Progress on a terminal and in a log file."""

import io

from rlhf_jax.runtime.progress import Progress, progress


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_file_gets_few_lines_with_the_last_numbers():
    stream = io.StringIO()
    with Progress(1000, "SFT", initial=200, stream=stream) as bar:
        for step in range(800):
            bar.update()
            bar.set_postfix({"loss": step / 8})
    first, last = stream.getvalue().splitlines()
    assert first.startswith("SFT: 201/1000")
    assert last.startswith("SFT: 1000/1000")
    assert last.endswith("loss 99.88")  # 799 / 8 = 99.875
    assert "\r" not in stream.getvalue()


def test_file_gets_a_line_every_so_often():
    stream = io.StringIO()
    with Progress(None, "rollout", every_seconds=0.0, stream=stream) as bar:
        for _ in range(3):
            bar.update(2)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "rollout: 2",
        "rollout: 4",
        "rollout: 6",
    ]


def test_terminal_gets_a_bar():
    stream = _Terminal()
    with Progress(4, "PPO", initial=1, stream=stream) as bar:
        for _ in range(3):
            bar.update()
            bar.set_postfix({"reward": 0.123456, "kl": "2.1"})
        bar.write("saved")
    text = stream.getvalue()
    assert "PPO" in text and "4/4" in text
    assert "reward=0.1235" in text and "kl=2.1" in text
    assert "saved\n" in text


def test_message_in_a_file():
    stream = io.StringIO()
    with Progress(2, "PPO", stream=stream) as bar:
        bar.write("saved")
    assert stream.getvalue() == "saved\n"


def test_progress_writes_to_standard_error(capsys):
    with progress(2, "SFT", initial=1) as bar:
        bar.update()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("SFT: 2/2")
