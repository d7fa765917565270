"""The tables of OpenVINO and ONNX Runtime beside ours: what they say, and that docs/measured.md says it too."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import bench_router
import pytest
import rival_table
import rivals
import torch
import typer
from tiny_models import early_exit_model

ROOT = Path(__file__).parents[1]
FACTS = {
    "processor": "P", "instruction_set": "AVX512, AVX512-VNNI", "threads": 2, "date": "2026-01-01", "data": "sst2",
    "rows": 10, "repeats": 3,
}  # fmt: skip


def row(form: str, contestant: str, speed: float = 0.0, gflops: float | None = 200.0) -> rival_table.RivalRow:
    return rival_table.RivalRow(
        form=form, contestant=contestant, how="latency hint" if "openvino" in contestant else "", speed=speed,
        ms_per_row=2.5, accuracy=0.9, agreement=0.99, average_layers=6.0, gflops=gflops,
        share_of_peak=None if gflops is None else 0.25, over_best_rival=0.5,
    )  # fmt: skip


def test_a_table_names_machine_instruction_set_and_peak(tmp_path: Path) -> None:
    rows = [row("8", "openvino bf16"), row("8", "fastkd bf16, forward", 0.5, None)]
    rival_table.write(rows, FACTS, tmp_path / "a.json")
    table = (tmp_path / "a.md").read_text(encoding="utf-8")
    for words in (
        "AVX512-VNNI",
        "bf16 800",
        "| 8 | openvino bf16 | 0 | 2.500 | 0.50x |",
        "200 | 25% |",
        "latency hint",
    ):
        assert words in table
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert saved["rows"][1]["speed"] == 0.5
    page = rival_table.page_table([saved, {**saved, "rows": [row("file", "fastkd bf16, stream", 0.5).__dict__]}])
    assert "| contestant | speed | sst2, B=8 | sst2 |" in page
    assert "| fastkd bf16 | 0.5 | 2.50 | 2.50, 90.00% |" in page


def test_the_page_has_what_was_measured() -> None:
    results = sorted((ROOT / "bench" / "results").glob("cpu-rivals-*.json"))
    table = rival_table.page_table([json.loads(path.read_text(encoding="utf-8")) for path in results])
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert rival_table.page_with(page, table) == page


def test_what_is_missing_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert rivals.missing()["openvino"] == (
        "openvino is left out: openvino and nncf not installed; pip install 'fastkd-kernels[rivals]'"
    )


@pytest.mark.parametrize(("average", "layers"), bench_router.PATTERNS.items())
def test_imposed_exits_have_their_average(average: float, layers: tuple[int, ...]) -> None:
    assert sum(layers) / len(layers) == average
    for layer in layers:
        speeds = bench_router.speeds_for(layer, 11)
        assert len(speeds) == 11
        assert [speed == 1 for speed in speeds].index(True) == layer - 1
        assert all(speeds)


def router_row(contestant: str, layers: float, over_own_full: float | None, flops_speedup: float) -> Any:
    return bench_router.RouterRow(
        length=128, contestant=contestant, average_layers=layers, ms_per_prompt=10.0, over_best_rival=2.0,
        over_own_full=over_own_full, flops_speedup=flops_speedup,
    )  # fmt: skip


def test_rows_of_imposed_exits_say_what_they_save_and_what_of_it_was_reached() -> None:
    rows = [
        router_row("openvino int8", 12, None, 1.0),
        router_row("fastkd bf16", 12, 1.0, 1.0),
        router_row("fastkd bf16", 3, 2.5, 4.0),
    ]
    assert [row.share_reached for row in rows[:2]] == [None, None]
    saved = rows[2].to_dict()
    assert saved["operations_saved"] == pytest.approx(0.75)
    assert saved["seconds_saved"] == pytest.approx(0.6)
    assert saved["share_reached"] == pytest.approx(0.8)
    lines = bench_router.markdown(rows, FACTS | {"prompts": 8}).splitlines()
    header, rival, full, early = lines[2], *lines[4:]
    assert header.endswith("| operations saved | seconds saved | share reached, goal 0.9 |")
    assert rival.endswith("| 2.00x |  | | | |")
    assert full.endswith("| 1.00x | | | |")
    assert early.endswith("| 2.50x | 75.0% | 60.0% | 0.80 |")
    assert {line.count("|") for line in lines[2:]} == {10}


def test_operations_of_imposed_exits_are_those_of_their_layers_and_heads() -> None:
    config = bench_router.base_config()
    all_heads = bench_router.flops_speedup(config, 128, (12,))
    saved = [bench_router.flops_speedup(config, 128, layers) for layers in bench_router.PATTERNS.values()]
    assert 0.95 < all_heads < 1  # the full model asks one head of twelve
    assert 12 / 1.5 > saved[0] > saved[1] > 3
    assert saved[1] < 12 / 3


def test_prompts_leave_where_it_is_imposed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = early_exit_model()
    prompts = [{"input_ids": torch.randint(5, 300, (1, 9))} for _ in range(4)]
    with torch.no_grad():
        bench_router.ours(model, prompts, (1, 2, 3, 4))
        monkeypatch.setattr(bench_router, "speeds_for", lambda layer, heads: [1.0] * heads)
        with pytest.raises(AssertionError, match="left after layer 1, and 2 was imposed"):
            bench_router.ours(model, prompts, (2,))


def test_no_pattern_of_exits_is_cut() -> None:
    bench_router.check_prompts(8)
    for prompts in (0, 2, 6):
        with pytest.raises(typer.BadParameter, match="expected a multiple of 4"):
            bench_router.check_prompts(prompts)
