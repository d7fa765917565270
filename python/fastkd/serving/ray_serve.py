"""The same application by Ray Serve: several replicas, on one machine or a cluster, behind one address.

Each replica is a `Service` of its own, with its own queue, metrics and monitor. Serve sends a request to the replica
that has the fewest on their way, starts a replica again that died, and drains one that it stops.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from fastkd.serving.app import create_app
from fastkd.serving.errors import Refusal
from fastkd.serving.options import TOKEN_VARIABLE, ServeOptions
from fastkd.serving.ray_proxy import AFTER_REPLICAS, VARIABLES
from fastkd.serving.server import start_logging
from fastkd.serving.service import Service

_NAME = "fastkd"
JOB_VARIABLES = VARIABLES | {
    # as long as `serve.start` waits: on a busy machine the proxy takes more than the 5 seconds after which it is killed
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Environment of a job that starts Serve."""


def application(arguments: Mapping[str, Any]) -> Any:
    """The application that a Serve configuration names as `import_path`.

    Args:
        arguments: `options` of `ServeOptions`, `replicas`, and `threads` of each; the token comes from the environment.
    """
    options = ServeOptions(**{"token": os.environ.get(TOKEN_VARIABLE) or None, **arguments["options"]})
    return bound(options, int(arguments.get("replicas", 1)), arguments.get("threads"))


def bound(options: ServeOptions, replicas: int, threads: int | None) -> Any:
    """The deployment, bound to its options."""
    values = asdict(options)
    services: list[Service] = []

    def build() -> FastAPI:
        """In the replica: its own service and application."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        start_logging()
        services.append(Service(ServeOptions(**values)))
        return create_app(services[0])

    class Replica:
        async def reload(self) -> None:
            with contextlib.suppress(Refusal):  # what was wrong is in the log, and the model before goes on
                await services[0].reload()

    deployed: Any = serve.deployment(
        name=_NAME,
        num_replicas=replicas,
        # what a replica refuses it refuses with 429 and a reason; Serve would hold requests back and say nothing
        max_ongoing_requests=2 * options.max_concurrent_requests,
        graceful_shutdown_timeout_s=options.shutdown_seconds,
        ray_actor_options={"num_cpus": threads or 1},
    )(serve.ingress(build)(Replica))
    return deployed.bind()


def start_proxy(options: ServeOptions) -> None:
    """Start what listens, which is not bound to any deployment, in a job whose environment has `JOB_VARIABLES`."""
    wait = options.request_timeout + AFTER_REPLICAS
    serve.start(http_options={"host": options.host, "port": options.port, "request_timeout_s": wait})


def serve_on_ray(
    options: ServeOptions,
    replicas: int,
    address: str | None,
    threads: int | None,
    on_start: Callable[[str], None] = lambda address: None,
) -> None:
    """Answer until SIGTERM or Ctrl-C; SIGHUP makes every replica load the model anew.

    Args:
        options: of each replica.
        replicas: how many.
        address: of a Ray cluster; None starts one on this machine, which ends with this process.
        threads: of each replica; default: as many as torch takes.
        on_start: gets the address once requests are answered.

    Raises:
        RuntimeError: the replicas cannot be started.
        ConnectionError: no cluster at the address.
    """
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def note(number: int, frame: object) -> None:
        signals.put(number)

    signal.signal(signal.SIGHUP, note)  # the first requests are answered before the start is over
    if address is None:
        # processes that Ray starts here inherit it; by itself Ray gives way to every other process, with niceness 15
        os.environ.update(JOB_VARIABLES | {"RAY_worker_niceness": "0"} | os.environ)
        ray.init(num_cpus=max(os.cpu_count() or 1, replicas * (threads or 1) + 1), include_dashboard=False)
    else:
        ray.init(address=address, runtime_env={"env_vars": JOB_VARIABLES})
    try:
        start_proxy(options)
        handle: Any = serve.run(bound(options, replicas, threads), name=_NAME, route_prefix="/")
        on_start(f"http://{options.host}:{options.port}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)
        while signals.get() == signal.SIGHUP:
            handle.broadcast("reload").results(return_exceptions=True)
        serve.delete(_NAME)
    finally:
        if address is None:
            serve.shutdown()
            ray.shutdown()
