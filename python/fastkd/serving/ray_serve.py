"""The same application by Ray Serve: several replicas, on one machine or a cluster, behind one address.

Each replica is a `Service` of its own, with its own queue, metrics and monitor. Serve sends a request to the replica
that has the fewest on their way, starts a replica again that died, and drains one that it stops.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from fastkd.serving.app import create_app
from fastkd.serving.options import TOKEN_VARIABLE, ServeOptions
from fastkd.serving.ray_proxy import AFTER_REPLICAS, VARIABLES
from fastkd.serving.server import start_logging
from fastkd.serving.service import Service

_NAME = "fastkd"


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

    def build() -> FastAPI:
        """In the replica: its own service and application."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        start_logging()
        return create_app(Service(ServeOptions(**values)))

    class Replica:
        pass

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
    """Start what listens, which is not bound to any deployment, in a job whose environment has `VARIABLES`."""
    wait = options.request_timeout + AFTER_REPLICAS
    serve.start(http_options={"host": options.host, "port": options.port, "request_timeout_s": wait})


def serve_on_ray(
    options: ServeOptions,
    replicas: int,
    address: str | None,
    threads: int | None,
    on_start: Callable[[str], None] = lambda address: None,
) -> None:
    """Answer until SIGTERM or Ctrl-C.

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
    if address is None:
        os.environ.update(VARIABLES)  # processes that Ray starts here inherit it
        ray.init(num_cpus=max(os.cpu_count() or 1, replicas * (threads or 1) + 1), include_dashboard=False)
    else:
        ray.init(address=address, runtime_env={"env_vars": VARIABLES})
    try:
        start_proxy(options)
        serve.run(bound(replace(options), replicas, threads), name=_NAME, route_prefix="/")
        on_start(f"http://{options.host}:{options.port}")
        end = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: end.set())
        end.wait()
        serve.delete(_NAME)
    finally:
        if address is None:
            serve.shutdown()
            ray.shutdown()
