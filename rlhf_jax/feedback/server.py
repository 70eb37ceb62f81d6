"""The page over HTTP: static files, four calls, and the refusal of every other origin.

Nothing leaves the machine: the page loads from here alone, which its Content-Security-Policy says
to the browser. Beyond 127.0.0.1 every call needs a token.
"""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import json
import socket
from collections.abc import Callable
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_jax.data.schemas import Row, one_line
from rlhf_jax.feedback.desk import Behind, Desk, Step

# Path -> file of the page and its type.
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/texts.json": ("texts.json", "application/json"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
SHORTEST_TOKEN = 16
_LARGEST_BODY = 1_000_000


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may talk to the server.

    Attributes:
      host: the address that it listens at.
      port: its port.
      token: that every call must bring; empty for none, which only the machine itself allows.

    Raises:
      ValueError: an address that other machines reach without a token, or a short token.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: str = ""

    def __post_init__(self):
        if not self.token and not self.local:
            raise ValueError(
                f"--host {self.host} can be reached from other machines: give --token, a secret "
                f"of {SHORTEST_TOKEN} letters or more, or leave --host at 127.0.0.1"
            )
        if self.token and (len(self.token) < SHORTEST_TOKEN or not self.token.isalnum()):
            raise ValueError(f"--token must be {SHORTEST_TOKEN} letters and digits or more")

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the address."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """What to open; the token follows #, which browsers send to nobody."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/" + (f"#token={self.token}" if self.token else "")

    def refusal(self, headers: dict[str, str]) -> str:
        """Why a request is refused; empty where it is not.

        A page of another origin says so in Origin or Sec-Fetch-Site, and one whose name was made to
        point here in Host.
        """
        host = headers.get("host", "")
        names = ("127.0.0.1", "localhost", "[::1]", self.host)
        if self.local and host not in {f"{name}:{self.port}" for name in names}:
            return f"host {host!r:.60} is not this server"
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return f"origin {origin!r:.60} is not this server"
        # A link to the page may stand anywhere: what it opens asks for everything itself.
        opens = headers.get("sec-fetch-mode") == "navigate"
        if not opens and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "the request comes from a page of another site"
        return ""

    def knows(self, headers: dict[str, str]) -> bool:
        """Whether a call brings the token."""
        given = headers.get("authorization", "").removeprefix("Bearer ")
        return not self.token or hmac.compare_digest(given.encode(), self.token.encode())


class Guard:
    """Refuses other origins before anything is looked at, and sets the headers of every reply.

    Args:
      app: what answers the rest.
      access: who may.
    """

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""

        async def send_safe(message: Any) -> None:
            if message["type"] == "http.response.start":
                safe = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *safe]
            await send(message)

        if scope["type"] != "http":  # the server's own start and end; there are no web sockets
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        why = self._access.refusal(headers)
        answer: ASGIApp = self._app
        if why:
            answer = _error("origin", why, 403)
        elif scope["path"].startswith("/api/") and not self._access.knows(headers):
            answer = _error("token", "the token is missing or wrong", 401)
        await answer(scope, receive, send_safe)


def make_app(desk: Desk, about: Row, access: Access) -> Starlette:
    """The application.

    Args:
      desk: gives items out and takes answers in.
      about: what the page is told at its start: "mode", "range", "items", "guidelines".
      access: who may talk to it.
    """

    def act(do: Callable[[Row], Row]) -> Callable[[Request], Any]:
        """A call that takes a JSON object and answers with one."""

        async def reply(request: Request) -> Response:
            try:
                said = await _object(request)
                return JSONResponse(await run_in_threadpool(do, said))
            except Behind as error:
                return _error("behind", str(error), 409)
            except ValueError as error:
                return _error("input", one_line(error), 400)
            except OSError as error:
                return _error("disk", one_line(error), 507)

        return reply

    def step(said: Row) -> Step:
        if type(said.get("turn")) is not int:
            raise ValueError("turn must be a whole number")
        return Step(_text(said, "annotator"), said["turn"], _text(said, "key"))

    def answer(said: Row) -> Row:
        item, seconds = _text(said, "item"), said.get("seconds", 0)
        if "reason" in said:
            return desk.skip(step(said), item, _text(said, "reason"), seconds)
        return desk.answer(step(said), item, said.get("answer"), seconds)

    async def tell(request: Request) -> Response:
        return JSONResponse(about)

    calls = {
        "/api/next": lambda said: desk.next(_text(said, "annotator"), _text(said, "tab")),
        "/api/answer": answer,
        "/api/undo": lambda said: desk.undo(step(said)),
    }
    routes = [
        Route("/api/about", tell, methods=["GET"]),
        *(Route(path, act(do), methods=["POST"]) for path, do in calls.items()),
        *(Route(path, _file(*what), methods=["GET"]) for path, what in FILES.items()),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, access=access)])  # type: ignore[arg-type]


def listen(access: Access) -> tuple[socket.socket, Access]:
    """Opens the port; 0 stands for any that is free.

    Raises:
      ValueError: the port is in use or not to be had, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in access.host else socket.AF_INET
    try:
        opened = socket.create_server((access.host, access.port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"port {access.port} of {access.host}: {reason}; give another --port, or 0 for any"
        ) from None
    return opened, dataclasses.replace(access, port=opened.getsockname()[1])


def run(app: Starlette, opened: socket.socket) -> None:
    """Answers requests at an open port until it is stopped."""
    settings = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(settings).run(sockets=[opened])


def page_file(name: str) -> str:
    """The text of a file of the page."""
    return (resources.files("rlhf_jax.feedback") / "page" / name).read_text(encoding="utf-8")


def _file(name: str, kind: str) -> Callable[[Request], Any]:
    content = page_file(name)

    async def reply(request: Request) -> Response:
        return Response(content, media_type=kind)

    return reply


async def _object(request: Request) -> Row:
    """The JSON object of a request; a type that no form of another page can send."""
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise ValueError("a call takes application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST_BODY:
            raise ValueError(f"a call takes at most {_LARGEST_BODY} bytes")
    said = json.loads(body)
    if not isinstance(said, dict):
        raise ValueError("a call takes a JSON object")
    return said


def _text(said: Row, field: str) -> str:
    value = said.get(field)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field} must be a text, not {value!r:.40}")
    return value


def _error(code: str, message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": code, "message": message}, status_code=status)
