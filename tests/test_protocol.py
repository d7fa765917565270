"""Engines ask a model for nothing but what `ExitModel` lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine_graphs import Plain
from test_model import TOLERANCE, infer, mixed_speed
from tiny_models import early_exit_model, one_thread, random_batch, row_of  # noqa: F401  # one is a fixture
from torch import Tensor

from fastkd.encoders.recording import EncoderInputs
from fastkd.engines import batch, packed
from fastkd.engines.graphs import GraphEngine
from fastkd.engines.packed_encoder import encoder_of
from fastkd.engines.protocol import ExitModel
from fastkd.engines.stream import Stream
from fastkd.engines.stream_batches import BatchStream
from fastkd.exits.rule import ExitRule

ASKED = {name for name in (*vars(ExitModel), *ExitModel.__annotations__) if not name.startswith("_")}


class OnlyWhatIsAsked:
    """A model of which nothing can be seen but the members of the protocol."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        assert name in ASKED, f"an engine asks for {name!r}, which ExitModel does not list"
        return getattr(self._model, name)


def in_a_padded_batch(model: Any, inputs: dict[str, Tensor], rule: ExitRule) -> Tensor:
    mask = inputs["attention_mask"].bool()
    return batch.run(model, EncoderInputs(inputs["input_ids"], mask, inputs["token_type_ids"]), rule).logits


def packed_tokens(model: Any, inputs: dict[str, Tensor], rule: ExitRule) -> Tensor:
    mask = inputs["attention_mask"].bool()
    return packed.run(model, encoder_of(model), inputs["input_ids"], mask, inputs["token_type_ids"], rule).logits


def by_graphs(model: Any, inputs: dict[str, Tensor], rule: ExitRule) -> Tensor:
    engine, mask = GraphEngine(model, Plain()), inputs["attention_mask"].bool()
    return engine.run(inputs["input_ids"], mask, rule, token_type_ids=inputs["token_type_ids"]).logits


def as_a_stream_of_batches(model: Any, inputs: dict[str, Tensor], rule: ExitRule) -> Tensor:
    (output,) = BatchStream(model, [inputs], rule=rule, recorder=Plain())
    assert output.logits is not None
    return output.logits


@pytest.mark.parametrize("run", [in_a_padded_batch, packed_tokens, by_graphs, as_a_stream_of_batches])
@torch.no_grad()
def test_engines_of_batches(run: Any) -> None:
    model, inputs = early_exit_model(), random_batch()
    rule = model.exit_rule(mixed_speed(model, inputs))
    expected = infer(model, inputs, list(rule.thresholds), engine="batch")
    assert len(expected.exit_layer.unique()) > 1
    torch.testing.assert_close(run(OnlyWhatIsAsked(model), inputs, rule), expected.logits, **TOLERANCE)


def test_the_stream() -> None:
    model, inputs = early_exit_model(), random_batch()
    rule = model.exit_rule(mixed_speed(model, inputs))
    rows = [{name: values[0].tolist() for name, values in row_of(inputs, row).items()} for row in range(13)]
    expected = infer(model, inputs, list(rule.thresholds), engine="batch")
    answers = list(Stream(OnlyWhatIsAsked(model), rows, rule=rule, tokens_per_run=40))
    assert [answer.exit_layer for answer in answers] == expected.exit_layer.tolist()
