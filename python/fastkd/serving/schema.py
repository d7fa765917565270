"""The bodies of requests and answers; the OpenAPI page is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastkd.serving.errors import Refusal

OneInput = Annotated[list[str], Field(min_length=1, max_length=2)]


class _Body(BaseModel):
    # TEI ignores what it does not know, and its clients rely on that
    model_config = ConfigDict(extra="ignore", strict=True)


class PredictRequest(_Body):
    """As text-embeddings-inference takes it."""

    inputs: str | list[str] | list[OneInput] = Field(
        description='A text; ["a"] is a text, ["a", "b"] one pair; [["a"], ["a", "b"], ...] a batch.',
        examples=["What a film!", ["A premise.", "A hypothesis."], [["One text."], ["A pair,", "of two."]]],
    )
    truncate: bool | None = Field(None, description="Cut texts that are too long; default: the server's setting.")
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"
    raw_scores: bool = Field(False, description="Return logits instead of probabilities.")
    parameters: dict[str, Any] | None = Field(
        None, description="Sent by huggingface_hub, which expects the answer to one input inside a list."
    )


class Prediction(BaseModel):
    """One label."""

    score: float
    label: str


class ClassifyRequest(_Body):
    """What only early exits have."""

    inputs: str | list[str | Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        description="A text, or a list of texts and pairs [a, b].",
        examples=["What a film!", ["One text.", ["A premise.", "A hypothesis."]]],
    )
    speed: float | None = Field(
        None, ge=0, le=1, description="0 (the full model) to 1 (leave at once); default: the server's.", strict=False
    )
    criterion: str | None = Field(None, description="How certainty is measured; default: the server's.")
    top_n: int | None = Field(None, description="How many classes the criterion top_n reads.")
    deadline_ms: float | None = Field(
        None, gt=0, le=3_600_000, strict=False,
        description="Rows that can only just make the deadline run first; a row that has not started by then gets 504.",
    )  # fmt: skip
    truncate: bool | None = Field(None, description="Cut texts that are too long; default: the server's setting.")
    scores: bool = Field(False, description="Also return the probabilities of all labels.")
    stream: bool = Field(False, description="Send one line of JSON per answer, as soon as its row leaves.")


class Classification(BaseModel):
    """One row's answer."""

    label: str | float
    score: float | None
    exit_layer: int
    uncertainty: float | None
    scores: dict[str, float] | None = None


class ClassifyResponse(BaseModel):
    """The answers in the order of the inputs."""

    answers: list[Classification]
    speed: float | list[float]
    criterion: str
    layers: int
    tokens: int


class RerankRequest(_Body):
    """As text-embeddings-inference takes it, and what only early exits have."""

    query: str
    texts: list[str] = Field(min_length=1)
    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"
    raw_scores: bool = Field(
        False, description="Return the number of a regression, or the log-odds, instead of its sigmoid."
    )
    return_text: bool = False
    top_k: int | None = Field(
        None,
        ge=1,
        description="How many texts to return; the others leave early as the certificate or the speed allows.",
    )
    speed: float | None = Field(
        None, ge=0, le=1, strict=False,
        description="Default: the certificate for ranking, if it covers top_k; else 0, the full model.",
    )  # fmt: skip
    label: str | None = Field(
        None, description="The class whose probability ranks; default: the certificate's. Not for a regression."
    )


class Rank(BaseModel):
    """One text's score."""

    index: int
    score: float
    text: str | None = None


class ErrorBody(BaseModel):
    """Why a request has no answer."""

    error: str
    error_type: str


def texts_to_predict(inputs: str | list[str] | list[list[str]]) -> tuple[list[tuple[str, str | None]], bool]:
    """The texts and pairs of /predict, and whether they came as a batch.

    Raises:
        Refusal: no input, or a list of three texts, which is neither a text nor a pair.
    """
    if isinstance(inputs, str):
        return [(inputs, None)], False
    if not inputs:
        raise Refusal(
            "Validation", "inputs: got [], expected a text, a pair, or a batch such as [[text], [text, text]]"
        )
    if isinstance(inputs[0], str):
        if len(inputs) > 2:
            raise Refusal(
                "Validation",
                f"inputs: got {len(inputs)} texts, but a pair has two; send a batch as [[text], [text], ...]",
            )
        return [(str(inputs[0]), str(inputs[1]) if len(inputs) == 2 else None)], False
    return [(one[0], one[1] if len(one) == 2 else None) for one in inputs], True


def texts_to_classify(inputs: str | list[str | list[str]]) -> list[tuple[str, str | None]]:
    """The texts and pairs of /v1/classify."""
    several = [inputs] if isinstance(inputs, str) else inputs
    if not several:
        raise Refusal("Validation", "inputs: got [], expected at least one text")
    return [(one, None) if isinstance(one, str) else (one[0], one[1]) for one in several]
