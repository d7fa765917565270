"""Answers that are written where the application is not reached, the headers of all, and the number of a request."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
_ID = re.compile(r"[\w.-]{1,64}\Z", re.ASCII)


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The client's number of a request, or a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _ID.match(given) else uuid.uuid4().hex


async def respond(
    send: Any, status: int, body: Any, headers: dict[str, str], more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer by ASGI's messages; `body` is sent as JSON, None as nothing, and `more` are headers as they are."""
    content = b"" if body is None else json.dumps(body).encode()
    found = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    found += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": content})
