"""The full model as one graph: compiled, exported, in ONNX, quantised; and models of its first layers."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, LAYERS, MAIN_FAMILIES, early_exit_model, one_thread, random_batch
from torch import Tensor, nn

import fastkd

__all__ = ["one_thread"]


def shapes_of(batch: dict[str, Tensor]) -> dict[str, Any]:
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens", max=64)
    return {name: {0: rows, 1: tokens} for name in batch}


def exported(model: nn.Module, batch: dict[str, Tensor]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (), kwargs=batch, dynamic_shapes=shapes_of(batch))


def assert_answers(program: Any, model: Any, family: str = "bert") -> None:
    """For other numbers of rows and tokens than it was made with."""
    for rows, longest in ((2, 5), (13, 11), (20, 9)):
        batch = random_batch(family, rows, longest, seed=rows)
        with torch.no_grad():
            torch.testing.assert_close(program(batch), model(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "head"), [("bert", "fastbert"), ("distilbert", "linear")])
def test_an_exported_model_holds_no_op_of_ours(tmp_path: Path, family: str, head: str) -> None:
    model, batch = early_exit_model(family, head=head), random_batch(family)
    program = exported(model, batch)
    assert not [node for node in program.graph.nodes if "fastkd" in str(node.target)]
    torch.export.save(program, os.fspath(tmp_path / "model.pt2"))
    run = torch.export.load(os.fspath(tmp_path / "model.pt2")).module()
    assert_answers(lambda batch: run(**batch).logits, model, family)


@pytest.mark.parametrize("layer", [None, 2])
def test_onnx_answers_as_the_model(tmp_path: Path, layer: int | None) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install onnx onnxscript onnxruntime")
    import onnxruntime

    model, batch = early_exit_model(), random_batch()
    model = model if layer is None else model.first_layers(layer)
    with torch.no_grad():
        program: Any = torch.onnx.export(
            model, (), kwargs=batch, dynamic_shapes=shapes_of(batch), dynamo=True, verbose=False
        )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")

    def run(batch: dict[str, Tensor]) -> Tensor:
        (logits,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
        return torch.from_numpy(logits)

    assert_answers(run, model)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_the_full_model_compiles_into_one_graph(head: str) -> None:
    model, batch = early_exit_model(head=head), random_batch()
    with torch.no_grad():
        output = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)
        torch.testing.assert_close(output.logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
        assert output.exit_layer.tolist() == [LAYERS] * 13


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("layer", [1, 3, LAYERS])
def test_first_layers_answer_as_rows_that_leave_there(tmp_path: Path, family: str, layer: int) -> None:
    model, batch = early_exit_model(family, exit_layers=[1, 3]), random_batch(family)
    part = model.first_layers(layer)
    assert part.num_layers == layer
    assert part.exit_layers == [number for number in (1, 3, LAYERS) if number <= layer]
    assert not part.training
    with torch.no_grad():
        left = model(**batch, speed=1.0, exit_layers=[layer]) if layer < LAYERS else model(**batch)
        torch.testing.assert_close(part(**batch).logits, left.logits, rtol=1e-5, atol=1e-5)
        next(part.parameters()).add_(1)
    assert model.changed_weights() is None
    part.save_pretrained(tmp_path)
    assert fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path).num_layers == layer


def test_first_layers_leave_behind_what_is_not_theirs() -> None:
    model = early_exit_model(speed=[0.1, 0.2, 0.3])
    model.config.certificate = {"speed": 0.5}
    part = model.first_layers(2)
    assert (part.config.certificate, part.config.speed) == (None, 0.0)
    assert model.config.certificate is not None
    with pytest.raises(ValueError, match=r"layer: got 5, but this model has heads after the layers \[1, 2, 3, 4\]"):
        model.first_layers(5)


@pytest.mark.parametrize("part", ["encoder", "model"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_dynamically_quantised_model_answers_nearly_alike(part: str) -> None:
    model, batch = early_exit_model(), random_batch()
    quantised = copy.deepcopy(model)
    whole = quantised if part == "model" else quantised.backbone
    torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8, inplace=True)
    with torch.no_grad():
        for speed in (0.0, 0.5):
            output, expected = quantised(**batch, speed=speed), model(**batch, speed=speed)
            assert output.logits.shape == expected.logits.shape
            assert output.logits.isfinite().all()
        full = quantised(**batch)
        difference = (full.logits - model(**batch).logits).abs().max()
        assert 0 < difference < 2
        assert full.exit_layer.tolist() == [LAYERS] * 13
    assert quantised.config.hidden_size == HIDDEN


def test_an_encoder_quantised_by_torchao_answers_nearly_alike() -> None:
    quantization: Any = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install torchao"
    )
    model, batch = early_exit_model(), random_batch()
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised.backbone, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        for speed in (0.0, 0.5):
            difference = quantised(**batch, speed=speed).logits - model(**batch, speed=speed).logits
            assert difference.isfinite().all()
        assert 0 < (quantised(**batch).logits - model(**batch).logits).abs().max() < 2
