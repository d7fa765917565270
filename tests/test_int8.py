"""int8: the formula, the module in the place of a linear layer, and what a quantised model says of itself."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import QUANTISABLE, early_exit_model, random_batch, row_of, tokenizer_of
from torch import Tensor, nn

import fastkd
import fastkd_kernels as fk
from fastkd.encoders import int8
from fastkd.engines import packed_encoder
from fastkd.engines.packed_layers import LayerFromParts
from fastkd.exits.certificate import Certificate
from fastkd.exits.fingerprints import model_fingerprint
from fastkd.model.loading import choose_dtype, in_dtype


def linear(inputs: int = 48, outputs: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(inputs, outputs, bias=bias)


def quantised(family: str = "bert") -> Any:
    return early_exit_model(family).eval().quantize()


needs_whole_layers = pytest.mark.skipif(
    fk.missing_kernels(("encoder_layer",), "cpu") is not None,
    reason="the compiled extension has no kernel of encoder_layers",
)


def whole_layers(model: Any) -> list[fk.PackedEncoderLayer]:
    """What packed tokens are run by."""
    layers = packed_encoder.encoder_of(model).layers_now
    whole = [layer.whole for layer in layers if isinstance(layer, LayerFromParts)]
    assert len(whole) == len(model.layers)
    return [layer for layer in whole if layer is not None]


def test_codes_and_scales_are_those_of_the_formula() -> None:
    codes, scale = int8.quantise(torch.tensor([[1.0, -2.54, 0.0], [0.0, 0.0, 0.0], [0.005, 0.01, 127.0]]))
    assert codes.tolist() == [[50, -127, 0], [0, 0, 0], [0, 0, 127]]
    torch.testing.assert_close(scale[[0, 2], 0], torch.tensor([0.02, 1.0]))
    module, original = int8.Int8Linear.of(linear()), linear().weight.detach()
    half_a_step = module.weight_scale[:, None] * 0.501
    assert bool(((module.weight * module.weight_scale[:, None] - original).abs() <= half_a_step).all())


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
    monkeypatch.setattr(int8, "_onednn_adds_exactly", lambda: False)
    torch.testing.assert_close(int8.Int8Linear.of(linear())(values), expected, rtol=2e-6, atol=2e-6)


_LARGE_CODES = """
import torch
from fastkd.encoders import int8

codes = torch.full((64, 96), 127, dtype=torch.int8)
codes[::2, ::3] = -127
module = int8.Int8Linear(96, 64)
module.weight = codes
rows = torch.ones(5, 96)
expected = int8.reference(rows, codes, module.weight_scale, module.bias)
torch.testing.assert_close(module(rows), expected, rtol=2e-6, atol=2e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("most", ["AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT"])
def test_no_instruction_set_overflows_or_is_left_to_plain_loops(most: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most, "ONEDNN_VERBOSE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", _LARGE_CODES], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    # oneDNN's implementation for what it has no instructions for, a thousand times slower
    assert not [line for line in result.stdout.splitlines() if ",ref" in line]


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


@needs_whole_layers
@pytest.mark.parametrize("family", QUANTISABLE)
def test_whole_layers_give_the_answers_of_their_products(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(family)
    rows = [row_of(random_batch(family, rows=6, longest=11), row) for row in range(6)]
    ids = [{name: value[0].tolist() for name, value in row.items()} for row in rows]
    for speed in (0.0, 0.5):
        with torch.no_grad():
            found = [model(**row, speed=speed) for row in rows]
            streamed = list(model.stream(ids, speed=speed))
        assert [layer.dtype for layer in whole_layers(model)] == [torch.int8] * len(model.layers)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(LayerFromParts, "_packed_whole", lambda _: None)
            other = quantised(family)
            by_products = [other(**row, speed=speed) for row in rows]
            assert not whole_layers(other)
        for one, line, expected in zip(found, streamed, by_products, strict=True):
            torch.testing.assert_close(one.logits, expected.logits, rtol=1e-4, atol=1e-4)
            assert one.exit_layer.equal(expected.exit_layer)
            assert line.exit_layer == expected.exit_layer.item()


@needs_whole_layers
def test_whole_layers_copy_nothing_but_what_they_rearrange(tmp_path: Path) -> None:
    quantised().save_pretrained(tmp_path)
    model: Any = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path).eval()
    (first, *_) = whole_layers(model)
    weight = first.weights.contract[0]
    assert isinstance(weight, fk.QuantizedWeight)
    linear = model.layers[0].output.dense
    assert weight.codes.data_ptr() == linear.weight.data_ptr()
    assert weight.scales.data_ptr() == linear.weight_scale.data_ptr()
    layers = packed_encoder.encoder_of(model).layers_now
    assert not any(layer.copies for layer in layers if isinstance(layer, LayerFromParts))


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
    assert sentence == "it is for dtype float32, but int8 is in use"


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
    with pytest.raises(ValueError, match="its linear layers have hooks"):
        hooked.quantize()
    dynamic = torch.ao.quantization.quantize_dynamic(early_exit_model(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="something else has already quantised its layers"):
        dynamic.quantize()
    moved = early_exit_model().to("meta")
    with pytest.raises(ValueError, match="it is on meta, and int8 runs on a CPU"):
        moved.quantize()
    with pytest.raises(ValueError, match="but the model is quantised to int8"):
        in_dtype(model, "bf16")
    module = int8.Int8Linear.of(linear())
    with pytest.raises(ValueError, match="has no gradients"):
        module(torch.ones(1, 48, requires_grad=True))
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 on cpu"):
        module(torch.ones(1, 48, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
@pytest.mark.parametrize("in_place", [True, False])
def test_changed_weights_are_noticed(name: str, in_place: bool) -> None:
    model, batch = quantised(), random_batch()
    row = row_of(batch, 0)
    engines: list[dict[str, Any]] = [{}, {"engine": "batch"}, {"engine": "packed"}]

    def answers(of: Any) -> list[Tensor]:
        with torch.no_grad():
            return [of(**inputs, speed=0, **engine).logits for engine in engines for inputs in (batch, row)]

    linear = model.layers[0].output.dense
    linear.bias.normal_(generator=torch.Generator().manual_seed(2))
    before, changed = answers(model), getattr(linear, name)
    changed.neg_() if in_place else setattr(linear, name, -changed)
    after = answers(model)
    assert not any(map(torch.equal, before, after))
    for found, expected in zip(after, answers(copy.deepcopy(model)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
def test_a_layer_by_itself_notices_changed_weights(name: str) -> None:
    module = int8.Int8Linear.of(linear())
    values = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    module(values)
    setattr(module, name, -getattr(module, name))
    torch.testing.assert_close(
        module(values), int8.reference(values, module.weight, module.weight_scale, module.bias), rtol=2e-6, atol=2e-6
    )


def test_auto_keeps_what_a_certificate_promises() -> None:
    model = early_exit_model().eval()
    assert choose_dtype(model)[0] in ("fp32", "bf16")
    model.config.certificate = _certificate("bfloat16")
    assert choose_dtype(model) == ("bf16", "its certificate is for it")
    assert choose_dtype(quantised()) == ("int8", "its weights are saved in it")


def test_heads_are_distilled_anew_on_an_int8_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.training.harness.bf16_is_fast", lambda: True)
    texts, tokenizer = ["good", "bad", "so so"] * 4, tokenizer_of("bert")
    model = quantised()
    before = model.early_heads[0].narrow.weight.clone()
    options = fastkd.DistillOptions(max_length=16, max_steps=3, progress=False)
    fastkd.distill(model, texts, None, tmp_path / "out", options, tokenizer)
    assert not torch.equal(model.early_heads[0].narrow.weight, before)
    with pytest.raises(ValueError, match=r"bf16: got True, but the model is quantised to int8"):
        fastkd.distill(model, texts, None, tmp_path / "other", replace(options, bf16=True), tokenizer)
    along = replace(options, train_backbone=True, learned_exit=True)
    with pytest.raises(ValueError, match="its layers are quantised to int8, which has no gradients"):
        fastkd.distill(model, texts, None, tmp_path / "other", along, tokenizer)
    assert model.learned_exit is None
