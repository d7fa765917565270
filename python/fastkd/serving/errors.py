"""What a request is refused with: text-embeddings-inference's kinds and codes, and two of our own."""

from __future__ import annotations

_STATUS = {
    "Empty": 400,
    "Malformed": 400,
    "TooLarge": 413,
    "MediaType": 415,
    "Validation": 422,
    "Tokenizer": 422,
    "Backend": 424,
    "Overloaded": 429,
    "Unhealthy": 503,
    "Deadline": 504,
}


class GoneError(Exception):
    """The client has left before its answer."""


class Refusal(Exception):
    """A request that is not answered, and why.

    Attributes:
        kind: "Validation", "Tokenizer", "Backend", "Overloaded", "Unhealthy", "Deadline"...
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, kind: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        return _STATUS[self.kind]

    @property
    def body(self) -> dict[str, str]:
        return {"error": str(self), "error_type": self.kind}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def no_answer(seconds: float, retry_after: int) -> Refusal:
    """What a request is refused with that waited so long."""
    return Refusal("Unhealthy", f"no answer within {seconds:g} seconds; try again", retry_after)
