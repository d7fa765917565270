"""Certificates: they stay with their weights and tell where something else is in use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
)

import fastkd
from fastkd.exits.certificate import CalibrationWarning, Certificate, warn_if_uncertified
from fastkd.exits.fingerprints import model_fingerprint
from fastkd.exits.trace import TraceSource


def traced_model(**options: Any) -> tuple[Any, fastkd.ExitTrace]:
    model = early_exit_model(**options)
    trace = model.trace([random_batch(rows=400, longest=6, seed=4)])
    return model, trace


def test_certificate_stays_with_the_model(tmp_path: Path) -> None:
    model, trace = traced_model()
    certificate = fastkd.calibrate(trace, 0.6)
    certificate.apply(model)
    assert (model.config.speed, model.config.criterion) == (0.0, "entropy"), "only where the user asks"
    model.save_pretrained(tmp_path)
    again = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert Certificate.of(again.config) == certificate
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate
    assert Certificate.of(early_exit_model().config) is None
    fastkd.calibrate(trace, 0.6, criterion="margin").apply(model, set_default=True)
    assert model.config.criterion == "margin"
    batch = random_batch()
    with torch.no_grad():
        expected = model(**batch, speed=model.config.speed, criterion="margin")
        assert torch.equal(model(**batch).exit_layer, expected.exit_layer)


@pytest.mark.parametrize("with_path", [False, True])
def test_save_touches_nothing_else(tmp_path: Path, with_path: bool) -> None:
    model, trace = traced_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    path = fastkd.threshold_path(model.trace([random_batch(rows=300, seed=9)])) if with_path else None
    certificate = fastkd.calibrate(trace, 0.6, path=path)
    certificate.save(tmp_path, model_fingerprint(model), set_default=True)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    config, old = json.loads(after.pop("config.json")), json.loads(before.pop("config.json"))
    assert after == before
    changed = {"certificate", "speed", "criterion", "top_n"}
    assert {name: value for name, value in config.items() if name not in changed} == {
        name: value for name, value in old.items() if name not in changed
    }
    again = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.speed == certificate.speed
    batch = random_batch(rows=400, longest=6, seed=4)
    with torch.no_grad():
        answers = again(**batch)
    assert torch.equal(answers.exit_layer, trace.answers(certificate.speed).exit_layer)


def test_what_is_not_as_certified_is_told() -> None:
    model, trace = traced_model()
    certificate = fastkd.calibrate(trace, 0.6, criterion="margin")
    assert (certificate.dtype, certificate.exit_layers) == ("float32", model.exit_layers)

    def told(dtype: torch.dtype = torch.float32, **exits: Any) -> list[str]:
        return certificate.mismatches(model.config, dtype, **{"speed": speed, "criterion": "margin", **exits})

    speed = certificate.speed
    assert told() == told(exit_layers=model.exit_layers) == []
    assert told(torch.bfloat16) == ["it is for dtype float32, but bfloat16 is in use"]
    assert told(criterion="entropy") == ["it is for criterion margin, but entropy is in use"]
    assert told(speed=0.125) == [f"it is for speed {speed}, but 0.125 is in use"]
    assert told(exit_layers=[2]) == ["it is for exit layers 1, 2, 3, 4, but 2, 4 is in use"]
    assert told(speed=[speed] * 3) == [f"it is for speed {speed}, but {', '.join(3 * [str(speed)])} is in use"]
    assert told(criterion="top_n", top_n=2)[1] == "it is for top_n None, but 2 is in use"
    assert told(torch.bfloat16, speed=0.0) == [], "the full model gives the full model's answers"
    assert certificate.mismatches(model.config, "float32") == [], "the default is still the full model"
    certificate.apply(model, set_default=True)
    assert certificate.mismatches(model.config, "float32") == []
    assert certificate.mismatches(model.config, "float32", 0.125), "what is given wins over the default"
    unknown = fastkd.calibrate(replace(trace, source=replace(trace.source, dtype="")), 0.6)
    assert unknown.mismatches(model.config, "float32", unknown.speed, "entropy") == [
        "it is for dtype unknown, but float32 is in use"
    ]


def test_uncertified_calls_warn() -> None:
    model, trace = traced_model()
    assert warn_if_uncertified(model, speed=0.125) == [], "without a certificate there is nothing to tell"
    certificate = fastkd.calibrate(trace, 0.6)
    certificate.apply(model)
    assert warn_if_uncertified(model, speed=certificate.speed) == []
    with pytest.warns(
        CalibrationWarning, match=r"certificate: it is for speed 0\.\d+, but 0.125 is in use; nothing is"
    ):
        assert len(warn_if_uncertified(model, speed=0.125)) == 1
    with pytest.warns(CalibrationWarning, match="it is for dtype float32, but bfloat16 is in use"):
        warn_if_uncertified(model.bfloat16(), speed=certificate.speed)


def test_certificate_of_other_weights_is_refused(tmp_path: Path) -> None:
    model, trace = traced_model()
    certificate = fastkd.calibrate(trace, 0.6)
    with torch.no_grad():
        model.last_head.out_proj.bias[0] += 1e-3
    with pytest.raises(ValueError, match="it is for other weights"):
        certificate.apply(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is for other weights"):
        certificate.save(tmp_path, model_fingerprint(model))
    unknown = fastkd.calibrate(replace(trace, source=TraceSource()), 0.6)
    with pytest.raises(ValueError, match="does not say which weights"):
        unknown.apply(model)
    with pytest.raises(ValueError, match="fields surprise are missing or unknown"):
        Certificate.from_dict({**certificate.to_dict(), "surprise": 1})


def test_fingerprints_tell_rows_and_weights_apart() -> None:
    model = early_exit_model()
    first, second = random_batch(seed=1), random_batch(seed=2)
    source = model.trace([first]).source
    assert model.trace([first]).source == source
    assert source.data.startswith("tokens:")
    assert model.trace([second]).source.data != source.data
    assert model.trace([second]).source.model == source.model
    assert model.trace([first], "rows").source.data == "rows"
    assert model.bfloat16().trace([first]).source.model != source.model
