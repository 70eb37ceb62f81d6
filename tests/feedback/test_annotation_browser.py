"""The page in a Chromium, by the keyboard alone. Skipped, with a line, where there is none."""

import threading
import time

import pytest
import uvicorn

from rlhf_jax.feedback import server, store
from rlhf_jax.feedback.desk import Desk
from rlhf_jax.feedback.items import Item
from tests import browser as browsers
from tests.annotations import make_file, make_items

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browsers.MISSING), reason=browsers.MISSING),
    pytest.mark.xdist_group("browser"),
]


class Site:
    """A server of a file in a thread; `restart` opens the file anew at the same port."""

    def __init__(self, path):
        self.path, self.port = path, 0
        self.start()

    def start(self):
        self.file = store.Store(self.path)
        opened, access = server.listen(server.Access("127.0.0.1", self.port))
        self.port, self.url = access.port, access.url
        sheet = self.file.sheet
        about = {"mode": sheet.mode, "range": list(sheet.bounds), "items": len(sheet.items)}
        app = server.make_app(Desk(self.file), about | {"guidelines": ""}, access)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._uvicorn.run, args=([opened],))
        self._thread.start()
        while not self._uvicorn.started:
            time.sleep(0.01)

    def stop(self):
        self._uvicorn.should_exit = True
        self._thread.join()
        self.file.close()

    def answers(self):
        found = store.read(self.path).ledger.answers()
        return {item.id: said for item, said in found}


@pytest.fixture(scope="module")
def browser():
    opened = browsers.Browser()
    yield opened
    opened.close()


@pytest.fixture
def serve(tmp_path, browser):
    """Starts a site of items and opens it as anna."""
    sites = []

    def start(items, name="anna"):
        make_file(tmp_path / "a.jsonl", items).close()
        sites.append(Site(tmp_path / "a.jsonl"))
        browser.open(sites[-1].url)
        browser.until(lambda: browser.run("return document.activeElement.id") == "name-input")
        browser.type(name)
        browser.press("Enter")
        ready(browser)
        return sites[-1]

    yield start
    assert browser.complaints() == []
    for site in sites:
        site.stop()


def ready(browser):
    """Waits for the next item, or the end."""
    browser.until(
        lambda: browser.run(
            "return !state.busy && (document.querySelector('#done') !== null || "
            "document.querySelector('#work .text') !== null)"
        )
    )


def now(browser):
    """The item on the page."""
    return browser.run("return state.item && state.item.id")


def submit(browser, *keys):
    before = now(browser)
    browser.press(*keys, "Enter")
    browser.until(lambda: now(browser) != before and not browser.run("return state.busy"))
    return before


def test_pairs_by_keys_with_tie_skip_undo_and_reload(browser, serve):
    items = {item.id: item for item in make_items("pair", 5)}
    site = serve(list(items.values()))
    order = browser.run("return state.item.texts")
    first = submit(browser, "2")
    second = submit(browser, "1", "0")  # changed before it is submitted
    skipped = now(browser)
    browser.press("s", "2")
    browser.until(lambda: now(browser) != skipped)
    said = site.answers()
    assert items[first].texts[said[first].answer] == order[1]
    assert said[second].answer == "tie" and len(said) == 2
    # Undo twice: of the skip and of the tie, which is there again.
    browser.press("Control+z")
    browser.until(lambda: now(browser) == skipped)
    browser.press("Control+z")
    browser.until(lambda: now(browser) == second)
    assert browser.run("return state.answer") == "tie"
    assert len(site.answers()) == 1
    # A choice that was not submitted survives a reload.
    browser.press("1")
    browser.open(site.url)
    ready(browser)
    assert now(browser) == second and browser.run("return state.answer") == 0
    while now(browser):
        submit(browser, "1")
    assert "Everything is judged" in browser.text("#done") and len(site.answers()) == 5
    # Enter without a choice does nothing, at the end as well.
    browser.press("Enter")
    assert len(site.answers()) == 5 and "5 done" in browser.text("#counts")


def test_scores_by_keys(browser, serve):
    site = serve(make_items("score", 3))
    given = {submit(browser, key): int(key) for key in "153"}
    assert {item: said.answer for item, said in site.answers().items()} == given
    # A browser's clock is coarse: one key may come in no time.
    assert sum(said.seconds for said in site.answers().values()) > 0


def test_rankings_by_keys_and_by_dragging(browser, serve):
    items = {item.id: item for item in make_items("ranking", 3)}
    site = serve(list(items.values()))
    order = browser.run("return state.item.texts")
    first = submit(browser, "3", "1", "4", "1")  # 1 is taken away again
    ranks = site.answers()[first].answer
    assert {items[first].texts[i]: rank for i, rank in enumerate(ranks)} == {
        order[2]: 1,
        order[3]: 2,
        order[0]: None,
        order[1]: None,
    }
    browser.press("1", "2")
    drop = """
        const data = new DataTransfer();
        data.setData('text/plain', arguments[0]);
        document.querySelectorAll('#ranks li')[arguments[1]].dispatchEvent(
            new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
    """
    browser.run(drop, "3", 0)
    assert browser.run("return state.answer") == [2, 3, None, 1]
    browser.run(drop, "2", 3)
    assert browser.run("return state.answer") == [2, 3, 4, 1]
    browser.run(drop, "x", 0)
    assert browser.run("return state.answer") == [2, 3, 4, 1]


def test_steps_by_keys_and_unmarked_is_not_zero(browser, serve):
    site = serve(make_items("steps", 2))
    first = submit(browser, "1", "2", "3")
    second = submit(browser, "1", "1", "ArrowUp", "0")
    assert site.answers()[first].answer == [1, 0, -1]
    assert site.answers()[second].answer == [1, None, None]


def test_a_server_that_stops_loses_nothing(browser, serve):
    site = serve(make_items("pair", 3))
    first = submit(browser, "1")
    site.stop()
    second = now(browser)
    browser.press("2", "Enter")
    browser.until(lambda: "does not answer" in browser.text("#notice"))
    assert now(browser) == second and browser.run("return state.answer") == 1
    site.start()
    submit(browser)
    assert set(site.answers()) == {first, second}
    assert any("ERR_CONNECTION_REFUSED" in line for line in browser.complaints())


def test_the_second_tab_is_told(browser, serve):
    site = serve(make_items("pair", 4))
    one = browser.new_tab()
    browser.open(site.url)
    ready(browser)
    assert "open in another tab" in browser.text("#notice")
    item = submit(browser, "1")
    two = browser.go(one)
    assert now(browser) == item
    browser.press("2", "Enter")
    browser.until(lambda: "gone on in another tab" in browser.text("#notice"))
    assert len(site.answers()) == 1 and now(browser) != item
    browser.go(two)
    browser.run("window.close()")
    browser.go(one)
    submit(browser, "2")
    assert len(site.answers()) == 2
    assert all("409" in line for line in browser.complaints())


FORGED = "<script>window.forged = 1</script><img src=x onerror='window.forged = 1'>&amp;<b>bold</b>"


def test_texts_are_text_in_any_direction(browser, serve):
    serve([Item("pair", FORGED, (FORGED, "שלום עולם"), ("a", "b"))])
    assert browser.text("#prompt .text") == FORGED
    shown = browser.run(
        "return [...document.querySelectorAll('.response .text')].map(n => n.textContent)"
    )
    assert sorted(shown) == sorted((FORGED, "שלום עולם"))
    assert (
        browser.run("return document.querySelectorAll('main script, main img, main b').length") == 0
    )
    assert browser.run("return window.forged === undefined")
    direction = """return [...document.querySelectorAll('.response .text')].map(
        n => [n.textContent[0] === '<' ? 'ltr' : 'rtl', getComputedStyle(n).direction])"""
    assert all(wanted == found for wanted, found in browser.run(direction))


def test_languages_guidelines_and_keys(browser, serve):
    serve(make_items("ranking", 1))
    browser.press("l")
    assert browser.text("#submit span") == "提交"
    assert browser.run("return document.documentElement.lang") == "zh-Hans"
    browser.press("l")
    assert browser.text("#submit span") == "Submit"
    assert "Order the responses" in browser.text("#guidelines-text")
    browser.press("g")
    assert browser.run("return document.querySelector('#guidelines').hidden")
    browser.press("g", "?")
    assert browser.run("return document.querySelector('#keys-dialog').open")
    assert "give a response the next rank" in browser.text("#keys-list")
    browser.press("1")  # nothing behind an open dialog
    assert browser.run("return state.answer") == [None] * 4
    browser.press("Escape", "n")
    assert browser.run("return document.activeElement.value") == "anna"
    browser.press("Escape")


def test_long_answers_scroll_together(browser, serve):
    serve([Item("pair", "Hi", ("a\n" * 400, "b\n" * 900), ("a", "b"))])
    browser.press("PageDown")
    share = """return [...document.querySelectorAll('.response .text')].map(
        n => n.scrollTop / (n.scrollHeight - n.clientHeight))"""
    one, other = browser.until(lambda: all(browser.run(share)) and browser.run(share))
    assert one == pytest.approx(other, abs=0.01) and one > 0
    browser.press("PageUp")
    browser.until(lambda: not any(browser.run(share)))


@pytest.mark.parametrize("mode", ["score", "pair", "ranking", "steps"])
def test_phones_the_dark_and_screen_readers(browser, serve, mode):
    serve(make_items(mode, 1))
    phone = {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    browser.devtools("Emulation.setDeviceMetricsOverride", **phone)
    assert browser.run("return document.scrollingElement.scrollWidth") <= 375
    lefts = """return [...document.querySelectorAll('.response')].map(
        n => n.getBoundingClientRect().left)"""
    assert len(set(browser.run(lefts))) <= 1
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    ground = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    for scheme, dark in (("dark", True), ("light", False)):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.devtools("Emulation.setEmulatedMedia", features=features)
        assert (max(browser.run(ground)) < 64) == dark
    labels = browser.labels("#work button, #work .text, nav button, footer button, main, aside")
    assert len(labels) > 10 and all(labels)
    progress, *_ = browser.labels("progress")
    assert "0 done, 0 skipped, 1 left" in progress


def test_nothing_is_asked_of_others(browser, serve):
    site = serve(make_items("pair", 1))
    names = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) > 4 and all(name.startswith(site.url) for name in names)
    # Not even by a script of the page.
    refused = "return fetch('http://127.0.0.1:1/x').then(() => 'sent', () => 'refused')"
    assert browser.run(refused) == "refused"
    assert any("Content Security Policy" in line for line in browser.complaints())
