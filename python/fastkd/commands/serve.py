"""`fastkd serve`: a model behind an address."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastkd.commands.options import Checkpoint, Device, Dtype, DtypeOption, OneCriterion, TopN, parse_share
from fastkd.commands.screen import quieten, screen_for


class ServeEngine(str, Enum):
    """What runs the server."""

    local = "local"
    ray = "ray"


def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 listens on all of them.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8080,
    engine: Annotated[
        ServeEngine, typer.Option(help="local: one process; ray: Ray Serve, for several replicas or machines.")
    ] = ServeEngine.local,
    replicas: Annotated[int | None, typer.Option(min=1, help="Copies of the model, run by Ray Serve.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster, such as auto or ray://head:10001.")
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Speed of requests that name none; default: the model's."),
    ] = None,
    criterion: OneCriterion = None,
    top_n: TopN = None,
    pressure_speed: Annotated[
        float | None,
        typer.Option(help="Speed of requests that name none while the queue is long; must be certified."),
    ] = None,
    monitor: Annotated[
        str | None,
        typer.Option(help="Also run this share of the rows (0.01, 1%) to full depth; raise an alarm on disagreement."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Most tokens per row; default: the model's limit.")
    ] = None,
    auto_truncate: Annotated[
        bool, typer.Option("--auto-truncate/--no-auto-truncate", help="Cut longer rows, or refuse them.")
    ] = True,
    tokens_per_run: Annotated[int, typer.Option(min=1, help="Most tokens per run; more make rows wait longer.")] = 1024,
    max_queue_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that may wait in the queue; more are refused.")
    ] = 65536,
    max_concurrent_requests: Annotated[
        int, typer.Option(min=1, help="Inputs that may wait in the queue; more are refused.")
    ] = 512,
    max_batch: Annotated[int, typer.Option(min=1, help="Most inputs per request.")] = 32,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest request, in bytes.")] = 2_000_000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token of clients; default: FASTKD_API_KEY, else none.")
    ] = None,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Write the texts of requests to the log.")] = False,
    request_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=3600,
            help="Refuse a request (503, try again) that is still unanswered after this many seconds.",
        ),
    ] = 60.0,
    shutdown_seconds: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, keep answering accepted requests for this many seconds.")
    ] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; default: torch's choice.")] = None,
    dtype: DtypeOption = Dtype.fp32,
    device: Device = "auto",
) -> None:
    """Answer over HTTP: a drop-in for text-embeddings-inference's /predict.

    Requests that arrive together share runs at every depth, and each is answered
    as soon as its rows leave. It has /predict, /rerank, /info, /health and
    /metrics; /v1/classify also takes a speed, a criterion and a deadline per
    request. Try it by hand at /; the interface is at /docs. SIGHUP reloads the
    model; SIGTERM answers accepted requests and ends. The log is JSON on standard
    error.

    [bold]Examples[/]

    \b
      [cyan]fastkd serve model --speed 0.5[/]
      [cyan]fastkd serve model --host 0.0.0.0 --token-file token --replicas 4[/]
    """
    with screen_for(False, reads=(checkpoint,)) as screen:
        quieten()

        import torch

        from fastkd.serving.options import ServeOptions, read_token

        uses_ray = engine is ServeEngine.ray or replicas is not None or ray_address is not None
        options = ServeOptions(
            model=checkpoint, host=host, port=port, device=device, dtype=dtype.value, speed=speed,
            criterion=criterion and criterion.value, top_n=top_n, pressure_speed=pressure_speed,
            monitor=0.0 if monitor is None else parse_share(monitor, "--monitor"), max_length=max_length,
            auto_truncate=auto_truncate, tokens_per_run=tokens_per_run, max_queue_tokens=max_queue_tokens,
            max_concurrent_requests=max_concurrent_requests, max_batch=max_batch, max_body_bytes=max_body_bytes,
            token=read_token(token_file), log_texts=log_texts, request_timeout=request_timeout,
            shutdown_seconds=shutdown_seconds,
        )  # fmt: skip
        _check_installed(uses_ray)
        if threads is not None:
            torch.set_num_threads(threads)

        def started(address: str) -> None:
            screen.say(f"answering at {address}; Ctrl-C ends")
            if not options.is_loopback and options.token is None:
                screen.say(
                    "[bold yellow]warning:[/] anyone who can reach this address can send requests; see --token-file"
                )

        if uses_ray:
            from fastkd.serving.ray_serve import serve_on_ray

            serve_on_ray(options, replicas or 1, ray_address, threads, started)
        else:
            from fastkd.serving.server import serve as serve_here

            serve_here(options, started)


def _check_installed(uses_ray: bool) -> None:
    """Raise ModuleNotFoundError, with the remedy, where a package is missing."""
    import importlib.util

    extra = "serve,ray" if uses_ray else "serve"
    needed = ["fastapi", "uvicorn", "prometheus_client", *(["ray"] if uses_ray else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} not installed: pip install 'fastkd-kernels[{extra}]'", name=missing[0]
        )
