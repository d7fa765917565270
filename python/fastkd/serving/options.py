"""`ServeOptions`: everything that a server is told, checked before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TOKEN_VARIABLE = "FASTKD_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """What a server is told; the defaults are those of `fastkd serve`."""

    model: str
    """Folder of an early-exit model."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one."""
    device: str = "auto"
    dtype: str | None = None
    """As `fastkd.model.loading.load_model` takes it."""
    speed: float | list[float] | None = None
    """Of requests that name none; default: what the model says."""
    criterion: str | None = None
    top_n: int | None = None
    pressure_speed: float | None = None
    """While the queue is long, requests that name no speed get this one."""
    monitor: float = 0.0
    """Share of the rows at the server's speed that also run to full depth."""
    max_length: int | None = None
    """Tokens of a row; default: what the model takes."""
    auto_truncate: bool = True
    """Whether longer rows are cut where a request does not say."""
    tokens_per_run: int = 1024
    max_queue_tokens: int = 65536
    """Accepted and not yet answered; more is refused with 429."""
    max_concurrent_requests: int = 512
    """Inputs accepted and not yet answered."""
    max_batch: int = 32
    """Inputs of one request."""
    max_body_bytes: int = 2_000_000
    token: str | None = None
    """The bearer token that clients show; None asks for none."""
    log_texts: bool = False
    request_timeout: float = 60.0
    """Seconds after which a request without its answers is refused with 503."""
    shutdown_seconds: float = 30.0
    """In which what was accepted is answered after SIGTERM."""

    def __post_init__(self) -> None:
        bounds = {
            "port": (0, 65535),
            "tokens_per_run": (1, None),
            "max_queue_tokens": (1, None),
            "max_concurrent_requests": (1, None),
            "max_batch": (1, None),
            "max_body_bytes": (1, None),
            "monitor": (0, 1),
            "request_timeout": (0.1, 3600),
            "shutdown_seconds": (0, 3600),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):
                expected = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name}: got {value}, expected {expected}")
        if self.pressure_speed is not None and not 0 < self.pressure_speed <= 1:
            raise ValueError(f"pressure_speed: got {self.pressure_speed}, expected a speed above 0 and up to 1")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ValueError("token: got an empty one or characters that no header carries, expected printable ASCII")

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


def read_token(file: Path | None) -> str | None:
    """The bearer token in `file`, or in the environment; None where neither is given.

    Raises:
        ValueError: a file without a token.
        OSError: no such file.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    token = file.read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"token: {file} is empty, expected the token in it")
    return token
