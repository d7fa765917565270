"""What Ray Serve's proxy says where no replica answers, in the codes and bodies of the server.

By itself the proxy says 408, or 500, in plain text. It calls `middlewares` where the environment has `VARIABLES`.
"""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware

from fastkd.serving.answers import SAFE, request_id_of, respond
from fastkd.serving.errors import Refusal

VARIABLES = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "fastkd.serving.ray_proxy:middlewares",
    "FASTKD_LAZY": "1",
}
"""Environment of the proxy."""
AFTER_REPLICAS = 1.0
"""Seconds by which the proxy waits longer than a replica, which knows better what to say."""
_OWN_PATHS = ("/-/healthz", "/-/routes")
_HINTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""Headers by which the proxy would let a client change how long it waits."""
_DIED = "the replica that had this request has died; try again"
_REASONS = {
    404: "the server is starting or shutting down; try again",
    408: "no replica was ready in time; try again",
    429: "too many requests are waiting for a replica; try again",
    503: "no replica can be started now; try again",
}
"""By the code that the proxy gives."""


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around its proxy."""
    return [Middleware(ProxyInOurWords)]


class ProxyInOurWords:
    """ASGI middleware: what the proxy answers without a replica becomes 503, to be asked again."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in _OWN_PATHS:
            await self._app(scope, receive, send)
            return
        number = b"x-request-id", request_id_of(dict(scope["headers"])).encode()
        scope["headers"] = [*_without(scope["headers"], *_HINTS, number[0]), number]
        has_answer = is_replaced = False

        async def send_marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*_without(message["headers"], number[0]), number]
            await send(message)

        async def send_in_our_words(message: Any) -> None:
            nonlocal has_answer, is_replaced
            if message["type"] == "http.response.start":
                has_answer = True
                is_replaced = message["status"] in _REASONS and not _is_of_replica(message)
                if is_replaced:
                    await _refuse(send_marked, _REASONS[message["status"]])
            if not is_replaced:
                await send_marked(message)

        await self._app(scope, receive, send_in_our_words)
        if not has_answer:
            await _refuse(send_marked, _DIED)


def _without(headers: Any, *names: bytes) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in names]


def _is_of_replica(message: Any) -> bool:
    return SAFE[0] in [(name.lower(), value) for name, value in message["headers"]]


async def _refuse(send: Any, reason: str) -> None:
    refusal = Refusal("Unhealthy", reason, retry_after=1)
    await respond(send, refusal.status, refusal.body, refusal.headers, SAFE)
