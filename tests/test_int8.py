"""int8: the formula, the module in the place of a linear layer, and what a quantised model says of itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import early_exit_model, random_batch
from torch import Tensor, nn

import fastkd
from fastkd.encoders import int8
from fastkd.exits.certificate import Certificate
from fastkd.exits.fingerprints import model_fingerprint
from fastkd.model.loading import choose_dtype, in_dtype


def linear(inputs: int = 48, outputs: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(inputs, outputs, bias=bias)


def quantised() -> Any:
    return early_exit_model().eval().quantize()


def test_codes_and_scales_are_those_of_the_formula() -> None:
    codes, scale = int8.quantise(torch.tensor([[1.0, -2.54, 0.0], [0.0, 0.0, 0.0], [0.005, 0.01, 127.0]]))
    assert codes.tolist() == [[50, -127, 0], [0, 0, 0], [0, 0, 127]]
    torch.testing.assert_close(scale[[0, 2], 0], torch.tensor([0.02, 1.0]))
    module = int8.Int8Linear.of(linear())
    again = int8.quantise(module.dequantised)
    assert again[0].equal(module.weight)
    torch.testing.assert_close(again[1][:, 0], module.weight_scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 33])
def test_the_product_is_the_reference(rows: int, bias: bool) -> None:
    module = int8.Int8Linear.of(linear(bias=bias))
    values = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows))
    expected = int8.reference(values, module.weight, module.weight_scale, module.bias)
    torch.testing.assert_close(module(values), expected, rtol=2e-6, atol=2e-6)


def test_without_onednn_the_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    expected = int8.Int8Linear.of(linear())(values)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(int8.Int8Linear.of(linear())(values), expected, rtol=2e-6, atol=2e-6)


def test_a_row_does_not_depend_on_its_mates() -> None:
    module = int8.Int8Linear.of(linear())
    values = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([module(row[None]) for row in values])
    values[1] = torch.nan
    together = module(values)
    assert together[1].isnan().all()
    kept = [0, 2, 3, 4]
    torch.testing.assert_close(together[kept], alone[kept], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0])
def test_every_engine_gives_the_quantised_answer(speed: float) -> None:
    model, batch = quantised(), random_batch(rows=6, longest=11)
    with torch.no_grad():
        outputs = [model(**batch, speed=speed, engine=engine) for engine in ("batch", "packed")]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)
    assert outputs[0].exit_layer.equal(outputs[1].exit_layer)


def test_answers_are_near_those_of_the_float_model() -> None:
    model, batch = early_exit_model().eval(), random_batch(rows=8, longest=11)
    with torch.no_grad():
        exact = model(**batch, speed=0).logits
        near = copy.deepcopy(model).quantize()(**batch, speed=0).logits
    assert 0 < (exact - near).abs().max() < 0.1 * exact.abs().max()


def test_it_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    model, batch = quantised(), random_batch()
    model.save_pretrained(tmp_path)
    loaded = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.weights_dtype == loaded.config.quantized == "int8"
    assert loaded.changed_weights() is None
    assert model_fingerprint(loaded) == model_fingerprint(model) == model_fingerprint(quantised())
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())
    with torch.no_grad():
        assert loaded(**batch, speed=0.5).logits.equal(model(**batch, speed=0.5).logits)
    with pytest.raises(ValueError, match=r"dtype: got torch.bfloat16, but the model in .* is quantised to int8"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    size, float_size = (_bytes(one.state_dict(), "encoder.layer.0") for one in (model, early_exit_model()))
    assert size < 0.4 * float_size


def _bytes(state: dict[str, Tensor], part: str) -> int:
    return sum(value.nbytes for name, value in state.items() if part in name)


def test_traces_and_certificates_know_it() -> None:
    model = quantised()
    trace = model.trace([random_batch()])
    assert trace.source.dtype == "int8"
    certificate = Certificate.from_dict(_certificate("float32"))
    (sentence,) = certificate.mismatches(model.config, model.weights_dtype, speed=0.5, criterion="entropy")
    assert sentence == "it is for dtype float32, in use is int8"


def _certificate(dtype: str) -> dict[str, Any]:
    return {
        "guarantee": "consistency", "method": "fixed-sequence", "max_drop": 0.01, "confidence": 0.95, "speed": 0.5,
        "position": 0.5, "criterion": "entropy", "top_n": None,
        "exit_layers": list(early_exit_model().exit_layers), "dtype": dtype, "tolerance": None, "n": 10, "failures": 0,
        "bound": 0.01, "disagreements": 0, "speedup": 2.0, "average_layers": 1.5, "accuracy": None,
        "full_accuracy": None, "seq_len": 16, "data": "", "model": "", "seen_as": None, "date": "2026-01-01",
        "version": "0",
    }  # fmt: skip


def test_what_cannot_be_quantised_is_refused() -> None:
    model = quantised()
    with pytest.raises(ValueError, match="it is quantised already"):
        model.quantize()
    with pytest.raises(ValueError, match="dtype: got 'int4', expected 'int8'"):
        early_exit_model().quantize("int4")
    hooked = early_exit_model()
    hooked.layers[0].attention.self.query.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="something is hooked to its linear layers"):
        hooked.quantize()
    moved = early_exit_model().to("meta")
    with pytest.raises(ValueError, match="it is on meta, and int8 runs on a CPU"):
        moved.quantize()
    with pytest.raises(ValueError, match="but the model is quantised to int8"):
        in_dtype(model, "bf16")
    module = int8.Int8Linear.of(linear())
    with pytest.raises(ValueError, match="no gradient goes"):
        module(torch.ones(1, 48, requires_grad=True))
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 on cpu"):
        module(torch.ones(1, 48, dtype=torch.bfloat16))


def test_changed_weights_are_noticed() -> None:
    model, batch = quantised(), random_batch()
    with torch.no_grad():
        before = model(**batch, speed=0).logits
        model.layers[0].attention.self.query.weight.neg_()
        assert not model(**batch, speed=0).logits.equal(before)


def test_auto_keeps_what_a_certificate_promises() -> None:
    model = early_exit_model().eval()
    assert choose_dtype(model)[0] in ("fp32", "bf16")
    model.config.certificate = _certificate("bfloat16")
    assert choose_dtype(model) == ("bf16", "its certificate is for it")
    assert choose_dtype(quantised()) == ("int8", "its weights are saved in it")
