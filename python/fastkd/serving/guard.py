"""`Guard`: what stands before every request: host, token, size, type, a number of its own, and a line in the log."""

from __future__ import annotations

import hmac
import time
from typing import Any

from starlette.exceptions import HTTPException

from fastkd.serving.answers import SAFE, request_id_of, respond
from fastkd.serving.errors import Refusal
from fastkd.serving.options import LOOPBACK
from fastkd.serving.service import Service, log

OPEN_PATHS = frozenset({"/", "/health", "/ping", "/metrics", "/docs", "/openapi.json", "/api-doc/openapi.json"})
"""GET needs no token, as with TEI."""


class Guard:
    """ASGI middleware; plain, because Starlette's own hides from a handler that its client has gone."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app = app
        self._service = service
        token = service.options.token
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = dict(scope["headers"])
        request_id = request_id_of(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_marked(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *SAFE]
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await respond(send_marked, *refusal)
            else:
                await self._app(scope, self._measured(receive), send_marked)
        finally:
            self._note(scope, request_id, status, time.monotonic() - began)

    def _refusal(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, Any, dict[str, str]] | None:
        options = self._service.options
        if not self._is_known_host(headers):
            # a page of another site, whose name was made to lead here, is not the one who started this server
            return 403, {"error": "host: this server answers to its own address only", "error_type": "Validation"}, {}
        if self._token is not None and not (scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS):
            kind, _, shown = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self._token):
                return 401, None, {"WWW-Authenticate": "Bearer"}
        length = headers.get(b"content-length")
        if length is not None and (not length.isdigit() or int(length[:20]) > options.max_body_bytes):
            refusal = self._too_large()
            return refusal.status, refusal.body, {"Connection": "close"}
        has_body = length not in (None, b"0") or b"transfer-encoding" in headers
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and has_body and kind != b"application/json":
            body = {"error": "content-type: expected application/json", "error_type": "MediaType"}
            return 415, body, {"Connection": "close"}
        return None

    def _is_known_host(self, headers: dict[bytes, bytes]) -> bool:
        options = self._service.options
        if not options.is_loopback or self._token is not None:
            return True
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        return name in LOOPBACK

    def _too_large(self) -> Refusal:
        return Refusal("TooLarge", f"body: expected at most {self._service.options.max_body_bytes} bytes")

    def _measured(self, receive: Any) -> Any:
        seen = 0

        async def measured() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._service.options.max_body_bytes:
                # of the framework's own kind, because it takes any other for JSON that cannot be read
                raise HTTPException(413, str(self._too_large()))
            return message

        return measured

    def _note(self, scope: Any, request_id: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"  # one series a path that exists, not one a path that is tried
        self._service.metrics.request(path, status or 499, seconds)
        more = scope["state"].get("log", {})
        log(
            "request", id=request_id, method=scope["method"], path=path, status=status or 499,
            ms=round(1000 * seconds, 2), **more,
        )  # fmt: skip
