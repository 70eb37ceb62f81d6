"""A Chromium that tests drive by its keyboard, through chromedriver's HTTP (W3C WebDriver)."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver") or ""
MISSING = "" if CHROMIUM and DRIVER else "no chromium and chromedriver: the page was not driven"
# Names of keys in WebDriver.
KEYS = {
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "Control": "\ue009",
    "ArrowUp": "\ue013",
    "ArrowDown": "\ue015",
    "PageUp": "\ue00e",
    "PageDown": "\ue00f",
    "Tab": "\ue004",
}
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Browser:
    """One window; close it at the end."""

    def __init__(self):
        self._driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        self._url = f"http://127.0.0.1:{found[1]}"
        options = {"args": [*_ARGUMENTS, "--lang=en"], "binary": CHROMIUM}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{made['sessionId']}"

    def close(self) -> None:
        """Ends the browser and its driver."""
        try:
            self._call("DELETE", "")
        finally:
            self._driver.kill()
            self._driver.wait()

    def open(self, url: str) -> None:
        """Loads a page."""
        self._call("POST", "/url", {"url": url})

    def press(self, *keys: str) -> None:
        """Presses keys one by one; `Control+z` holds the first of two."""
        for key in keys:
            parts = [KEYS.get(part, part) for part in (key.split("+") if len(key) > 1 else [key])]
            down = [{"type": "keyDown", "value": part} for part in parts]
            up = [{"type": "keyUp", "value": part} for part in reversed(parts)]
            board = {"type": "key", "id": "keyboard", "actions": [*down, *up]}
            self._call("POST", "/actions", {"actions": [board]})

    def type(self, text: str) -> None:
        """Presses the key of each letter."""
        self.press(*text)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns, which reads `arguments`."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def until(self, true: Callable[[], Any], seconds: float = 20.0) -> Any:
        """Waits until something is so, and returns it."""
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, "it did not become so in time"
            time.sleep(0.05)
        return found

    def devtools(self, command: str, **arguments: Any) -> Any:
        """A command of Chromium's own."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": arguments})

    def labels(self, selector: str) -> list[str]:
        """What a screen reader calls the elements."""
        found = self._call("POST", "/elements", {"using": "css selector", "value": selector})
        ids = [next(iter(one.values())) for one in found]
        return [self._call("GET", f"/element/{one}/computedlabel") for one in ids]

    def complaints(self) -> list[str]:
        """Messages of the console that are errors, since the last call."""
        log = self._call("POST", "/se/log", {"type": "browser"})
        return [line["message"] for line in log if line["level"] == "SEVERE"]

    def new_tab(self) -> str:
        """Opens a tab and goes there; returns where one was."""
        before = self._call("GET", "/window")
        made = self._call("POST", "/window/new", {"type": "tab"})["handle"]
        self.go(made)
        return before

    def go(self, tab: str) -> str:
        """Goes to a tab; returns where one was."""
        before = self._call("GET", "/window")
        self._call("POST", "/window", {"handle": tab})
        return before

    def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None
