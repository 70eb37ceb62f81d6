"""The command: a server that is killed, what it refuses, and the rows that it writes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from experiments import annotate, command
from rlhf_jax.feedback import server, store
from tests.annotations import draw, event, rows

ROWS = [
    {"prompt": f"prompt {n}", "responses": {"SFT": f"a{n}", "PPO-max": f"b{n}"}} for n in range(200)
]


@pytest.fixture
def source(tmp_path):
    """A run folder with responses."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "responses.jsonl").write_text(lines)
    return folder


def start(*arguments):
    """A server as a process, and its address."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "experiments.annotate",
            "serve",
            *map(str, arguments),
            "--port",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"open (http://\S+)", line):
            return process, found[1], "".join(said)
    raise AssertionError("".join(said))


def call(url, path, body):
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


@pytest.mark.slow
def test_kills_lose_and_double_nothing(tmp_path, source):
    """200 answers of two people; the server is killed at any moment, six times."""
    out, generator = tmp_path / "answers.jsonl", random.Random(0)
    acknowledged, views = {}, {}
    for life in range(7):
        # A file, not the run: the process need not import jax.
        process, url, said = start("pair", source / "responses.jsonl", "--out", out)
        assert f"200 items, mode pair, {len(acknowledged)} answers" in said
        left = generator.randint(10, 30) if life < 6 else 1000
        try:
            for name in ("anna", "bob"):
                views[name] = call(url, "api/next", {"annotator": name, "tab": "t"})
            while any(view["item"] for view in views.values()):
                left -= 1
                if not left:  # within one of the next answers
                    threading.Timer(generator.uniform(0, 0.02), process.kill).start()
                name = generator.choice([n for n, view in views.items() if view["item"]])
                view = views[name]
                sent = {
                    "annotator": name,
                    "turn": view["turn"],
                    "key": f"{name}{view['turn']}",
                    "item": view["item"]["id"],
                    "answer": draw("pair", 2, generator),
                    "seconds": 1.0,
                }
                pending = (name, sent["item"])
                views[name] = call(url, "api/answer", sent)
                acknowledged[pending] = sent["answer"]
            assert life == 6
        except (OSError, ValueError):
            assert life < 6
            # What was not acknowledged may be there or not; it is not lost where it was.
            process.wait()
            for item, event in store.read(out).ledger.answers():
                if (event.annotator, item.id) == pending:
                    acknowledged.setdefault(pending, sent["answer"])
        finally:
            process.kill()
            process.wait()
        found = {(e.annotator, item.id): (item, e) for item, e in store.read(out).ledger.answers()}
        assert set(found) == set(acknowledged)
        for key, (_, event) in found.items():
            given = acknowledged[key]
            assert event.answer == (given if given == "tie" else event.order[given])
    assert len(found) == 200


@pytest.mark.slow
def test_a_stop_and_a_port_in_use(tmp_path, source):
    out = tmp_path / "answers.jsonl"
    process, url, said = start(
        "score", source / "responses.jsonl", "--out", out, "--range", 1, 7, "--limit", 5
    )
    assert "5 items, mode score, 0 answers" in said
    with pytest.raises(urllib.error.HTTPError) as refused:
        request = urllib.request.Request(
            f"{url}api/about", headers={"Origin": "http://evil.example"}
        )
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 403
    port = url.rstrip("/").rpartition(":")[2]
    arguments = ["serve", "score", "--out", str(out), "--port", port]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.annotate", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: port {port} of 127.0.0.1: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (130, -signal.SIGINT)


def serve(*arguments):
    annotate.main(annotate.parse(["serve", *map(str, arguments), "--port", "0"]))


def told(*arguments):
    """The line with which a command ends."""
    with pytest.raises(command.USER_ERRORS) as error:
        annotate.main(annotate.parse([*map(str, arguments)]))
    line = command.told(error.value)
    assert "\n" not in line
    return line


@pytest.fixture
def quiet(monkeypatch):
    """Servers that end at once."""
    monkeypatch.setattr(server, "run", lambda app, port: None)


def test_the_same_command_goes_on_and_another_is_refused(tmp_path, source, quiet, capsys):
    out = tmp_path / "deep" / "a.jsonl"
    assert "does not exist: give a run folder or a file" in told("serve", "pair", "--out", out)
    serve("pair", source, "--out", out)
    serve("pair", source, "--out", out)
    serve("pair", "--out", out)
    assert capsys.readouterr().out.count("200 items, mode pair, 0 answers") == 3
    for arguments in (["score", source], ["pair", source, "--limit", 5], ["pair", "--range", 1, 3]):
        line = told("serve", *arguments, "--out", out, "--port", "0")
        assert "holds 200 other items, mode pair, range 1 5: give another --out" in line
    # A refused command lets the file go.
    serve("pair", "--out", out)


def test_a_cut_file_is_said_and_goes_on(tmp_path, source, quiet, capsys):
    out = tmp_path / "a.jsonl"
    serve("pair", source, "--out", out)
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"event": "answ')
    serve("pair", "--out", out)
    assert "the last line is cut and left out (15 bytes); the 201 whole" in capsys.readouterr().out
    assert out.read_bytes() == whole


def test_what_the_command_refuses(tmp_path, source, quiet):
    out = tmp_path / "a.jsonl"
    reached = told("serve", "pair", source, "--out", out, "--host", "0.0.0.0")
    assert "can be reached from other machines: give --token" in reached
    assert "two whole numbers" in told("serve", "score", source, "--out", out, "--range", 1, 50)
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "Hi", "responses": ["a"]}\n')
    assert "one.jsonl, line 1: mode pair compares responses" in told(
        "serve", "pair", one, "--out", out, "--port", "0"
    )
    missing = tmp_path / "missing"
    assert "missing does not exist" in told("serve", "pair", missing, "--out", out, "--port", "0")
    assert not out.exists()
    for wrong in (
        ["serve", "guess", "--out", "a"],
        ["serve", "pair"],
        ["serve", "pair", "--out", "a", "--overlap", "0"],
    ):
        with pytest.raises(SystemExit):
            annotate.parse(wrong)


def test_guidelines_reach_the_page(tmp_path, source, monkeypatch):
    told = []
    monkeypatch.setattr(server, "run", lambda app, port: None)
    make = server.make_app
    monkeypatch.setattr(
        server,
        "make_app",
        lambda desk, about, access: told.append(about) or make(desk, about, access),
    )
    (tmp_path / "g.txt").write_text("Prefer 简短 answers.")
    serve("pair", source, "--out", tmp_path / "a.jsonl", "--guidelines", tmp_path / "g.txt")
    assert told[0]["guidelines"] == "Prefer 简短 answers." and told[0]["items"] == 200


def test_export_writes_rows_and_says_what_it_left_out(tmp_path, source, quiet, capsys):
    out = tmp_path / "a.jsonl"
    serve("pair", source, "--out", out, "--limit", 3)
    assert "has no answer yet: there is nothing to write" in told("export", out, "--out", tmp_path)
    file = store.Store(out)
    for item, answer in zip(file.sheet.items, (0, "tie"), strict=False):
        file.append(event(item, "anna", answer))
    file.close()
    with out.open("ab") as end:
        end.write(b'{"event"')
    capsys.readouterr()
    annotate.main(annotate.parse(["export", str(out), "--out", str(tmp_path / "rows")]))
    said = capsys.readouterr().out
    assert "note: " in said and "the 6 whole lines before it count" in said
    assert "2 answers of 1 annotators" in said
    assert "pairs: kept 1 of 3, dropped 2 (1 tie, 1 not judged)" in said
    (row,) = rows(tmp_path / "rows/pairs.jsonl")
    assert row == {"prompt": "prompt 0", "chosen": "a0", "rejected": "b0"}
    other = tmp_path / "b.jsonl"
    serve("pair", source, "--out", other, "--limit", 4)
    assert "different items or ranges: 3 and 4 items, 3 in both" in told(
        "export", out, other, "--out", tmp_path
    )
