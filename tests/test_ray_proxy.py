"""What Ray's proxy says itself, in the words of the server; without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'fastkd-kernels[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

import httpx
from test_package import python

from fastkd.serving.answers import SAFE, respond
from fastkd.serving.ray_proxy import VARIABLES, middlewares


def asked(answer: Any, path: str = "/v1/classify", **headers: str) -> httpx.Response:
    """What a client gets where Ray's proxy does `answer(scope, send)`."""

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        await answer(scope, send)

    (middleware,) = middlewares()
    transport = httpx.ASGITransport(middleware.cls(proxy, *middleware.args, **middleware.kwargs))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(path, headers=headers)

    return asyncio.run(ask())


def says(status: int, *headers: tuple[bytes, bytes]) -> Any:
    async def answer(scope: Any, send: Any) -> None:
        await respond(send, status, "said", {}, headers)

    return answer


async def nothing(scope: Any, send: Any) -> None:
    """As where the replica died."""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (says(408), "no replica was ready in time"),
        (says(404), "starting or shutting down"),
        (says(429), "too many requests"),
        (says(503), "no replica can be started"),
        (nothing, "has died"),
    ],
)
def test_what_no_replica_answers_is_to_be_asked_again(answer: Any, reason: str) -> None:
    found = asked(answer, **{"x-request-id": "mine"})
    assert (found.status_code, found.json()["error_type"]) == (503, "Unhealthy")
    assert reason in found.json()["error"]
    assert found.headers["retry-after"] == "1"
    assert found.headers["x-request-id"] == "mine"
    assert set(SAFE) <= set(found.headers.raw)


@pytest.mark.parametrize("status", [200, 404, 408, 422, 429, 500, 503, 504])
def test_the_answer_of_a_replica_stays_as_it_is_with_one_number(status: int) -> None:
    found = asked(
        says(status, *SAFE, (b"x-request-id", b"mine"), (b"X-Request-ID", b"mine")), **{"x-request-id": "mine"}
    )
    assert (found.status_code, found.json()) == (status, "said")
    assert found.headers.get_list("x-request-id") == ["mine"]


def test_the_proxy_s_own_paths_stay_as_they_are() -> None:
    assert asked(says(503), "/-/healthz").json() == "said"


def test_a_client_cannot_change_how_long_it_waits_and_gets_a_number_that_a_header_may_carry() -> None:
    seen = {}

    async def answer(scope: Any, send: Any) -> None:
        seen.update(scope["headers"])
        await says(200)(scope, send)

    hints = {"X-Request-Timeout-Seconds": "0", "x-request-disconnect-disabled": "?1"}
    found = asked(answer, **hints, **{"x-request-id": "two words"})
    assert not {name.lower().encode() for name in hints} & seen.keys()
    assert seen[b"x-request-id"].decode() == found.headers["x-request-id"] != "two words"


def test_the_proxy_imports_no_model() -> None:
    python("import fastkd.serving.ray_proxy", "torch", "transformers", **VARIABLES)
