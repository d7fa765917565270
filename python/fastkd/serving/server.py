"""One process that answers: uvicorn, the application and the stream, from start to a bounded end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from fastkd.serving.app import create_app
from fastkd.serving.options import ServeOptions
from fastkd.serving.service import Service, log, logger

_BEFORE_END = 1.0  # seconds in which those that were not answered are told so


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `serve` takes them, and ends by itself instead of by the signal


def serve(options: ServeOptions, on_start: Callable[[str], None] = lambda address: None) -> None:
    """Answer until SIGTERM or Ctrl-C.

    Args:
        options: of the server.
        on_start: gets the address once requests are answered.

    Raises:
        ValueError, OSError: a model that cannot be served, or an address that cannot be had.
    """
    start_logging()
    asyncio.run(_serve(options, on_start))


def start_logging() -> None:
    """Lines of JSON on standard error, and nothing else of ours."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


async def _serve(options: ServeOptions, on_start: Callable[[str], None]) -> None:
    service = Service(options)
    app = create_app(service)
    # started here, so that what is wrong with the model is raised and not logged
    app.router.lifespan_context = _started_already
    await service.start()
    try:
        await _answer(service, app, options, on_start)
    finally:
        await service.close()


@contextlib.asynccontextmanager
async def _started_already(app: object):  # type: ignore[no-untyped-def]
    yield


def bound_socket(config: uvicorn.Config) -> socket.socket:
    """Where uvicorn listens.

    The connections inherit that they send at once. asyncio asks that of sockets that name their protocol, which
    uvicorn's do not, and an answer of two packets then waits 40 ms for the client to acknowledge the first.
    """
    found = config.bind_socket()
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


async def _answer(service: Service, app: Any, options: ServeOptions, on_start: Callable[[str], None]) -> None:
    config = uvicorn.Config(
        app, host=options.host, port=options.port, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=int(options.shutdown_seconds + _BEFORE_END) + 1, timeout_keep_alive=30,
        limit_concurrency=None, h11_max_incomplete_event_size=65536,
    )  # fmt: skip
    sock = bound_socket(config)
    server = _Server(config)
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = loop.create_task(_reload(service))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    running = loop.create_task(server.serve(sockets=[sock]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    port = sock.getsockname()[1]
    name = f"[{options.host}]" if ":" in options.host else options.host
    log("started", address=f"http://{name}:{port}", model=service.worker.fingerprint)
    on_start(f"http://{name}:{port}")
    ending = loop.create_task(end.wait())
    await asyncio.wait({running, ending}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    log("stopping", waiting=service.accepted_rows - service.ended_rows)
    service.drain()
    server.should_exit = True
    _, late = await asyncio.wait({running}, timeout=options.shutdown_seconds)
    if late:
        service.give_up()
    await running


async def _reload(service: Service) -> None:
    with contextlib.suppress(Exception):  # what was wrong is in the log
        await service.reload()
