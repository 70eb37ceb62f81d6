"""The page's calls: whole judgements in each mode, other origins, tokens, bodies, headers."""

import random

import pytest
from starlette.testclient import TestClient

from rlhf_jax.feedback import server, store
from rlhf_jax.feedback.desk import Desk
from tests.annotations import draw, make_file, make_items

PORT = 8765
HOME = f"http://127.0.0.1:{PORT}"
MODES = ("score", "pair", "ranking", "steps")
TOKEN = "abcdefgh12345678"


def make_client(file, access=None, **options):
    """The page's side of a desk over a file."""
    sheet = file.sheet
    about = {"mode": sheet.mode, "range": list(sheet.bounds), "items": len(sheet.items)}
    access = access or server.Access("127.0.0.1", PORT)
    app = server.make_app(Desk(file, **options), about | {"guidelines": ""}, access)
    return TestClient(app, base_url=HOME)


@pytest.fixture
def file(tmp_path):
    opened = make_file(tmp_path / "a.jsonl", make_items("pair", 4))
    yield opened
    opened.close()


def body(view, number=0, **said):
    item = view["item"]["id"]
    step = {"annotator": "anna", "turn": view["turn"], "key": f"k{view['turn']}.{number}"}
    return {**step, "item": item, "seconds": 1.5, **said}


@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_judgements_with_reloads_and_restarts(tmp_path, mode):
    """Every 20 answers the page is loaded again, every 50 the file is opened anew; some undone."""
    path, generator = tmp_path / "a.jsonl", random.Random(2)
    items = {item.id: item for item in make_items(mode, 200)}
    file = make_file(path, list(items.values()))
    client, given, tab = make_client(file).__enter__(), {}, "tab"
    view = client.post("/api/next", json={"annotator": "anna", "tab": tab}).json()
    while view["item"]:
        shown = view["item"]
        if len(given) % 50 == 49:
            file.close()
            file = store.Store(path)
            client.__exit__()
            client = make_client(file).__enter__()
        if len(given) % 20 == 19:
            again = client.post("/api/next", json={"annotator": "anna", "tab": tab}).json()
            assert again["item"] == shown and again["turn"] == view["turn"]
        answer = draw(mode, len(shown["texts"]), generator)
        sent = body(view, answer=answer)
        reply = client.post("/api/answer", json=sent)
        assert reply.status_code == 200, reply.text
        if generator.random() < 0.1:  # the reply is lost, and the page sends it again
            assert client.post("/api/answer", json=sent).json() == reply.json()
        given[shown["id"]] = (shown["texts"], answer)
        view = reply.json()
        if generator.random() < 0.1:
            undo = {"annotator": "anna", "turn": view["turn"], "key": f"u{view['turn']}"}
            view = client.post("/api/undo", json=undo).json()
            assert view["item"]["id"] == shown["id"] and view["before"] == answer
    client.__exit__()
    file.close()
    found = list(store.read(path).ledger.answers())
    assert len(found) == len(given) == 200
    for item, said in found:
        texts, answer = given[item.id]
        assert texts == [item.texts[i] for i in said.order]
        assert said.seconds == 1.5
        if mode == "pair" and answer != "tie":
            assert item.texts[said.answer] == texts[answer]
        elif mode == "ranking":
            ranks = {item.texts[i]: said.answer[i] for i in range(4)}
            assert [ranks[text] for text in texts] == answer
        else:
            assert said.answer == answer


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": HOME}, 200),
        ({"host": f"localhost:{PORT}", "origin": f"http://localhost:{PORT}"}, 200),
        ({"origin": HOME, "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": f"http://localhost:{PORT}"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": f"evil.example:{PORT}", "origin": f"http://evil.example:{PORT}"}, 403),
        ({"host": "127.0.0.1:9999"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_another_origin_is_refused(file, headers, status):
    client = make_client(file)
    asked = {"annotator": "anna", "tab": "t"}
    assert client.post("/api/next", json=asked, headers=headers).status_code == status
    reply = client.get("/api/about", headers=headers)
    assert reply.status_code == status
    if status == 403:
        assert reply.json()["error"] == "origin" and "\n" not in reply.json()["message"]
        assert "item" not in reply.text


def test_a_link_may_open_the_page_and_nothing_else(file):
    client = make_client(file)
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/", headers=link | {"sec-fetch-mode": "no-cors"}).status_code == 403


def test_every_reply_says_that_nothing_is_loaded_from_elsewhere(file):
    client = make_client(file)
    for path in [*server.FILES, "/api/about", "/missing"]:
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
    refused = client.get("/", headers={"host": "evil.example"})
    assert "content-security-policy" in refused.headers


def test_a_token_is_asked_for_by_every_call(file):
    client = make_client(file, server.Access("0.0.0.0", PORT, TOKEN))
    assert client.get("/").status_code == 200  # the empty page, without an item
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {TOKEN}x"}):
        for reply in (
            client.get("/api/about", headers=given),
            client.post("/api/next", json={"annotator": "a", "tab": "t"}, headers=given),
        ):
            assert reply.status_code == 401 and reply.json()["error"] == "token"
    known = {"authorization": f"Bearer {TOKEN}", "host": "lab.example:80"}
    assert client.get("/api/about", headers=known).status_code == 200
    other = known | {"origin": "https://evil.example"}
    assert client.get("/api/about", headers=other).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "lab.example"])
def test_another_address_needs_a_token(host):
    with pytest.raises(ValueError, match=r"can be reached from other machines: give --token"):
        server.Access(host)
    assert f"#token={TOKEN}" in server.Access(host, 1, TOKEN).url
    with pytest.raises(ValueError, match="--token must be 16 letters and digits or more"):
        server.Access(host, 1, "short")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_needs_none(host):
    assert server.Access(host, 80).local


def test_a_port_in_use_is_one_line():
    opened, access = server.listen(server.Access("127.0.0.1", 0))
    assert access.port > 0
    with opened, pytest.raises(ValueError) as error:
        server.listen(access)
    assert f"port {access.port} of 127.0.0.1: " in str(error.value)
    assert "give another --port, or 0 for any" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "choice 2 must be 0, 1 or 'tie'"),
        ({"answer": [0]}, "choice [0] must be"),
        ({"item": "x"}, "item 'x' is not among the 4 here"),
        ({"item": ["x"]}, "item must be a text"),
        ({"turn": "0"}, "turn must be a whole number"),
        ({"annotator": ""}, "annotator must be a text"),
        ({"seconds": "3"}, "seconds='3' must be a number"),
        ({"seconds": -3}, "must be finite, and 0 or more"),
        ({"key": None}, "key must be a text"),
        ({"reason": " "}, "a skip needs a reason"),
    ],
)
def test_calls_of_another_form_are_refused_and_nothing_is_kept(file, change, message):
    client, before = make_client(file), file.sheet.path.read_bytes()
    view = client.post("/api/next", json={"annotator": "anna", "tab": "t"}).json()
    reply = client.post("/api/answer", json=body(view, answer=0) | change)
    assert reply.status_code == 400 and message in reply.json()["message"]
    assert file.sheet.path.read_bytes() == before


def test_bodies_that_are_no_json_object(file):
    client = make_client(file)
    plain = {"content-type": "text/plain"}
    for content, headers in ((b"{}", plain), (b"[1]", {}), (b"{", {}), (b"[" * 2_000_000, {})):
        headers = {"content-type": "application/json"} | headers
        reply = client.post("/api/next", content=content, headers=headers)
        assert reply.status_code == 400 and reply.json()["error"] == "input", content[:10]
    assert client.get("/api/next").status_code == 405


def test_tabs_skips_and_full_disks_have_their_own_words(file, monkeypatch):
    client = make_client(file)
    asked = {"annotator": "anna", "tab": "one"}
    view = client.post("/api/next", json=asked).json()
    assert client.post("/api/next", json=asked | {"tab": "two"}).json()["elsewhere"]
    after = client.post("/api/answer", json=body(view, reason="unclear")).json()
    assert after["progress"]["skipped"] == 1
    late = client.post("/api/answer", json=body(view, 1, answer=0))
    assert late.status_code == 409 and late.json()["error"] == "behind"

    def full(event):
        raise OSError(28, "No space left on device", "a.jsonl")

    monkeypatch.setattr(file, "append", full)
    reply = client.post("/api/answer", json=body(after, answer=0))
    assert reply.status_code == 507 and reply.json()["error"] == "disk"
