"""All criteria on one plane: each is what it is alone, on the same rows, and PCEE-BERT is its plain loop."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import (
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
)
from typer.testing import CliRunner

import fastkd
import fastkd_kernels as fk
from fastkd.commands import app
from fastkd.exits.comparison import patient_answers
from fastkd.exits.flops import FlopsShape

FUSED = list(fk.CRITERIA)
RULES = ["pcee_bert", "performance"]
ALL = FUSED + RULES


def made_up_trace(rows: int = 400, num_labels: int = 3, seed: int = 0) -> fastkd.ExitTrace:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 1, num_labels, generator=generator)
    return fastkd.ExitTrace(
        logits=logits + torch.randn(rows, 4, num_labels, generator=generator),
        labels=torch.randint(0, num_labels, (rows,), generator=generator),
        lengths=torch.full((rows,), 9, dtype=torch.int32),
        exit_layers=[1, 2, 3, 4],
        max_length=12,
        shape=FlopsShape.of(early_exit_model(num_labels=num_labels).config),
    )


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_pcee_bert_against_a_plain_loop(patience: int) -> None:
    trace = made_up_trace(rows=80)
    trace.logits[3, 1] = torch.nan
    for speed in (0.0, 0.3, 0.6, 0.9, 1.0):
        answers = patient_answers(trace, speed, patience)
        for row in range(80):
            run = 0
            for head in range(4):
                probabilities = trace.logits[row, head].double().softmax(-1)
                entropy = float(-(probabilities * probabilities.log()).sum()) / math.log(3)
                run = run + 1 if speed > 0 and entropy <= speed else 0
                if run == patience:
                    break
            assert answers.exit_layer[row] == head + 1
            assert torch.equal(answers.logits[row], trace.logits[row, head])
    if patience == 1:
        assert torch.equal(patient_answers(trace, 0.6, 1).exit_layer, trace.answers(0.6).exit_layer)


def test_each_criterion_is_what_it_is_alone() -> None:
    trace, others = made_up_trace(), made_up_trace(seed=1)
    swept = fastkd.compare(trace, others, top_n=2, patience=3, seq_len=40)
    assert list(swept) == ALL
    full = trace.sweep([0.0], seq_len=40)[0]
    for name, sweep in swept.items():
        assert sweep[0] == full, name
        assert sweep.seq_len == 40
        assert len(sweep) > (2 if name == "patience" else 10)
        averages = [row.average_layers for row in sweep]
        assert averages == sorted(averages, reverse=True), f"{name}: a higher speed leaves no later"
    for name in FUSED:
        row = swept[name][2]
        assert trace.sweep([row.speed], name, 2 if name == "top_n" else None, seq_len=40)[0] == row
    row = swept["performance"][7]
    assert trace.sweep([row.speed], path=fastkd.threshold_path(others), seq_len=40)[0] == row
    row = swept["pcee_bert"][7]
    assert row.average_layers == patient_answers(trace, row.speed, 3).exit_layer.double().mean().item()


def test_without_other_rows_half_of_them_teach() -> None:
    trace = made_up_trace()
    swept = fastkd.compare(trace)
    assert {sum(row.exits_per_layer) for sweep in swept.values() for row in sweep} == {200}
    assert fastkd.compare(trace)["performance"].to_dicts() == swept["performance"].to_dicts()
    with pytest.raises(ValueError, match="got 1 rows"):
        fastkd.compare(trace.select(torch.tensor([0])))
    with pytest.raises(ValueError, match="points, patience: got 1"):
        fastkd.compare(trace, points=1)


def test_learned_exits_and_regression_take_their_place() -> None:
    learned = early_exit_model(learned_exit=True).trace([random_batch(rows=60)])
    assert list(fastkd.compare(learned, points=5)) == [*FUSED, "learned", *RULES]
    regression = early_exit_model(num_labels=1).trace([{**random_batch(rows=60), "labels": torch.randn(60)}])
    swept = fastkd.compare(regression, points=5)
    assert list(swept) == ["agreement"]
    assert sum(swept["agreement"][0].exits_per_layer) == 60, "no rows are set aside for a rule that needs classes"
    assert all(row.pearson is not None for row in swept["agreement"])


@pytest.mark.slow
def test_command_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    made_up_trace().save(tmp_path / "trace.safetensors")
    arguments = ["compare", str(tmp_path / "trace.safetensors"), "-o", str(tmp_path / "out")]
    shown = CliRunner().invoke(app.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.stdout for name in ALL)
    found = json.loads(CliRunner().invoke(app.app, [*arguments, "--json"]).stdout)
    for name, sweep in found["sweeps"].items():
        kept = [row["speedup_fastbert"] for row in sweep if row["accuracy"] >= sweep[0]["accuracy"] - 0.01]
        assert found["speedup_at_drop"][name]["0.01"] == max(kept)
    with (tmp_path / "out" / "compare.csv").open(encoding="utf-8") as stream:
        assert {row["criterion"] for row in csv.DictReader(stream)} == set(ALL)
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    replace(made_up_trace(), labels=None).save(tmp_path / "blind.safetensors")
    refused = CliRunner().invoke(app.app, ["compare", str(tmp_path / "blind.safetensors")])
    assert refused.exit_code == 2
    assert "have no labels" in refused.output


def test_commands_show_the_correlation_of_a_regression(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly, which draws what the commands write, is not installed")
    labelled = {**random_batch(rows=60), "labels": torch.randn(60)}
    trace = early_exit_model(num_labels=1).trace([labelled])
    trace.save(tmp_path / "trace.safetensors")
    correlation = trace.sweep([0.0])[0].pearson
    for command in ("sweep", "compare"):
        arguments = [command, str(tmp_path / "trace.safetensors"), "-o", str(tmp_path / command)]
        shown = CliRunner().invoke(app.app, arguments).stdout
        assert "correlation" in shown
        assert "accuracy" not in shown.replace("_accuracy", "")
    assert f"full model {fastkd.compare(trace)['agreement'][0].pearson:.4f}" in shown
    table = CliRunner().invoke(app.app, ["sweep", str(tmp_path / "trace.safetensors"), "-o", str(tmp_path)]).stdout
    assert f"{correlation:.4f}" in table
