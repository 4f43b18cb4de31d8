"""Keeps the app to this machine and to its own pages.

A page on the internet can make a browser call 127.0.0.1, under its own name (DNS rebinding) or across origins. So
requests for another Host are refused, requests from another Origin too, and answers forbid the page to load
anything from elsewhere or to be framed.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
"""Gradio compiles its templates in the page, hence unsafe-eval; what counts here is that nothing leaves the machine."""


class LocalOnly:
    """ASGI middleware: 400 for a foreign Host, 403 for a foreign Origin, and a content policy on the rest."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if _host(f"//{headers.get('host', '')}") not in HOSTS:
            await PlainTextResponse("Unknown host: open http://127.0.0.1", status_code=400)(scope, receive, send)
        elif (origin := headers.get("origin")) is not None and urlsplit(origin).netloc != headers["host"]:
            await PlainTextResponse("Requests from other sites are refused", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, _with_policy(send))


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _with_policy(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
        await send(message)

    return sent
