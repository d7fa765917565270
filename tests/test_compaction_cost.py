"""The cost model of a compaction: the line through two measurements, and what follows from it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import early_exit_model, one_thread, random_batch

from fastkd.engines import compaction_cost, packed_encoder
from fastkd.engines.compaction_cost import CompactionCost, Cost
from fastkd.engines.packed_encoder import encoder_of

__all__ = ["one_thread"]

CPU = torch.device("cpu")


def fitted(seconds: dict[int, list[float]], monkeypatch: pytest.MonkeyPatch) -> Cost:
    """`fit` on a clock that says that the calls on each number of tokens take these `seconds`, one after the other."""
    now, waiting = 0.0, {tokens: iter([0.0, *values]) for tokens, values in seconds.items()}

    def run(tokens: int) -> None:
        nonlocal now
        now += next(waiting[tokens])

    monkeypatch.setattr(compaction_cost.time, "perf_counter", lambda: now)
    return compaction_cost.fit(run, CPU)


def test_the_line_goes_through_the_fastest_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    line = fitted({64: [9.0, 1.64, 2.0], 512: [6.12, 7.0, 8.0]}, monkeypatch)
    assert (line.fixed, line.slope) == pytest.approx((1.0, 0.01))
    assert line(100) == pytest.approx(2.0)


def test_noise_makes_no_negative_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted({64: [3.0] * 3, 512: [2.0] * 3}, monkeypatch) == Cost(3.0, 0.0)
    assert fitted({64: [1.0] * 3, 512: [16.0] * 3}, monkeypatch).fixed == 0.0


@pytest.mark.parametrize(
    ("tokens", "kept", "layers", "pays"),
    [
        (1000, 900, 1, True),  # saves 100 for 10 + 45
        (1000, 950, 1, False),  # saves 50 for 10 + 47.5
        (1000, 950, 2, True),
        (1000, 1000, 5, False),
    ],
)
def test_a_compaction_pays_where_the_layers_save_more(tokens: int, kept: int, layers: int, pays: bool) -> None:
    assert CompactionCost(layer=Cost(100.0, 1.0), compaction=Cost(10.0, 0.05)).pays(tokens, kept, layers) is pays


def test_an_encoder_measures_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = early_exit_model(), random_batch()
    with torch.no_grad():
        before = model(**inputs, engine="packed").logits
    fitted = []
    monkeypatch.setattr(
        packed_encoder, "fit", lambda *arguments: fitted.append(compaction_cost.fit(*arguments)) or fitted[-1]
    )
    encoder = encoder_of(model)
    assert not encoder.compaction_pays(100, 99, 1), "rows are rounded up alike, so nothing is saved"
    encoder.compaction_pays(512, 16, 3)
    assert len(fitted) == 2
    with torch.no_grad():
        assert model(**inputs, engine="packed").logits.equal(before)
