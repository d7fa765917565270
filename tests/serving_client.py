"""A served tiny model, for the tests of the server: one in this process without a port, and one that is a process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from tiny_models import early_exit_model, tokenizer_of

from fastkd.serving.app import create_app
from fastkd.serving.options import ServeOptions
from fastkd.serving.service import Service
from fastkd.serving.worker import Worker

ROOT = Path(__file__).parents[1]
TEXTS = ("good fun", "bad and dull", "a warm film", "cold")


def save_model(folder: Path, num_labels: int = 3, seed: int = 0, **options: Any) -> Path:
    model = early_exit_model(num_labels=num_labels, **options)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.last_head.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return folder


def serving(model: Path, check: Callable[[httpx.AsyncClient, Service], Awaitable[Any]], **options: Any) -> Any:
    """What `check` gives, of a client and the service behind it; `worker` makes the workers of that."""
    worker = options.pop("worker", Worker)

    async def run() -> Any:
        service = Service(ServeOptions(model=str(model), **options), worker)
        app = create_app(service)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await check(client, service)

    return asyncio.run(run())


@contextmanager
def server(model: Path, *arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fastkd serve` as a process, and its address."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, sys.path)])
    command = [sys.executable, "-m", "fastkd", "serve", str(model), "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path, **environment}, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, address_of(process)
    finally:
        process.kill()
        process.communicate()


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("{") and (entry := json.loads(line))["event"] == "started":
            return entry["address"]
    raise AssertionError("".join(seen))


def entries(text: str) -> list[dict[str, Any]]:
    """The log's lines."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def post(address: str, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status and parsed body; 0 where there was no answer."""
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        text = error.read()
        # Ray Serve's own errors are no JSON
        return error.code, json.loads(text) if text.startswith(b"{") else None
    except (OSError, ValueError):
        return 0, None


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def descendants(process: int) -> list[int]:
    """The processes below one, by /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = [process]
    for pid in found:
        found += children.get(pid, [])
    return sorted(found[1:])


def command_of(process: int) -> str:
    """Its command line; empty where it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
