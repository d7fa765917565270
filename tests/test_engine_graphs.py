"""The graphs engine with plain calls in the place of CUDA graphs: it answers as the batch engine does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_model import TOLERANCE, infer, mixed_speed
from tiny_models import (
    CRITERIA,
    LAYERS,
    MAIN_FAMILIES,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
)
from torch import Tensor

import fastkd
import fastkd_kernels as fk
from fastkd.engines import graphs, packed_encoder, packed_layers
from fastkd.engines.graphs import GraphEngine, round_up_rows
from fastkd.exits.rule import ExitRule, head_speeds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Plain:
    """In the place of CUDA graphs: runs a stage when it is recorded, as a warm-up does, and again at every replay."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Any]) -> Callable[[], None]:
        self.recorded += 1
        run()
        return run


def recorder() -> Plain | None:
    """On a GPU the real thing."""
    return Plain() if DEVICE.type == "cpu" else None


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def rule_of(
    model: fastkd.EarlyExitForSequenceClassification,
    speed: float,
    criterion: str = "entropy",
    top_n: int | None = None,
    layers: list[int] | None = None,
) -> ExitRule:
    """A rule that asks the heads after `layers`, by default all of them, also where no row leaves there."""
    asked = tuple(layers or model.exit_layers)
    speeds = head_speeds(speed, model.exit_layers)
    return ExitRule(criterion, top_n, asked, tuple(speeds.get(layer, 0.0) for layer in asked[:-1]))


def answer(engine: GraphEngine, batch: dict[str, Tensor], speed: float | Tensor, **options: Any) -> fk.ExitRecord:
    thresholds = speed if isinstance(speed, Tensor) else None
    return engine.run(
        batch["input_ids"],
        batch["attention_mask"].bool(),
        rule_of(engine._model, 0.5 if isinstance(speed, Tensor) else speed, **options),
        token_type_ids=batch.get("token_type_ids"),
        thresholds=thresholds,
    )


def assert_same(record: fk.ExitRecord, output: fastkd.EarlyExitOutput) -> None:
    assert torch.equal(record.exit_layer, output.exit_layer)
    torch.testing.assert_close(record.logits, output.logits, **TOLERANCE)
    torch.testing.assert_close(record.uncertainty, output.uncertainty, **TOLERANCE)


@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_it_answers_as_the_batch_engine_does(head: str, criterion: str, top_n: int | None) -> None:
    model = early_exit_model(head=head).to(DEVICE)
    engine = GraphEngine(model, recorder())
    batch = on_device(random_batch())
    speed = mixed_speed(model, batch, criterion, top_n)
    options: dict[str, Any] = {"criterion": criterion, "top_n": top_n}
    expected = infer(model, batch, speed, engine="batch", **options)
    assert len(expected.exit_layer.unique()) > 1, "the speed should split the batch"
    for _ in range(3):  # captured, then replayed on memory that the run before has used
        assert_same(answer(engine, batch, speed, **options), expected)


@pytest.mark.parametrize("layers", ["from parts", "from parts, as on a GPU", "modules"])
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_family(family: str, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if layers == "modules":
        monkeypatch.setattr(packed_encoder, "runs_from_parts", lambda model: False)
    if layers == "from parts, as on a GPU":
        monkeypatch.setattr(packed_layers, "linear_on", lambda device: packed_layers.JoinedLinear)
    model = early_exit_model(family).to(DEVICE)
    batch = on_device(random_batch(family))
    speed = mixed_speed(model, batch)
    assert_same(answer(GraphEngine(model, recorder()), batch, speed), infer(model, batch, speed, engine="batch"))


@pytest.mark.parametrize("exit_layers", [[1], [2, 4], [4]])
def test_layers_between_heads_are_one_stage(exit_layers: list[int]) -> None:
    model = early_exit_model(exit_layers=exit_layers).to(DEVICE)
    batch, plain = on_device(random_batch()), Plain()
    engine = GraphEngine(model, plain)
    assert_same(answer(engine, batch, 0.6), infer(model, batch, 0.6, engine="batch"))
    assert plain.recorded <= len(model.exit_layers)


@pytest.mark.parametrize("layers", [[LAYERS], [2, LAYERS]])
def test_heads_may_be_left_out(layers: list[int]) -> None:
    model = early_exit_model().to(DEVICE)
    batch, plain = on_device(random_batch()), Plain()
    engine = GraphEngine(model, plain)
    record = answer(engine, batch, 0.6, layers=layers)
    assert_same(record, infer(model, batch, 0.6, exit_layers=layers, engine="batch"))
    assert plain.recorded == len(layers)


def test_the_engine_of_a_model_dies_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(model: Any) -> GraphEngine:
        made.append(GraphEngine(model, Plain()))
        return made[-1]

    monkeypatch.setattr(graphs, "GraphEngine", make)
    model, batch = early_exit_model(), random_batch()
    expected = infer(model, batch, 0.6, engine="batch")
    for _ in range(2):
        output = infer(model, batch, 0.6, engine="graphs")
        assert torch.equal(output.exit_layer, expected.exit_layer)
        torch.testing.assert_close(output.logits, expected.logits, **TOLERANCE)
    assert len(made) == 1
    reference = weakref.ref(model)
    del model, expected, output
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    "changes", [{"speed": 0.0}, {"position_ids": torch.arange(11)[None].expand(13, -1)}], ids=["speed", "position_ids"]
)
def test_what_graphs_do_not_take(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="engine: got 'graphs', which needs a speed above 0"):
        infer(early_exit_model(), random_batch(), **{"speed": 0.5, "engine": "graphs", **changes})


def test_batches_of_other_sizes_and_lengths() -> None:
    model = early_exit_model().to(DEVICE)
    engine = GraphEngine(model, recorder())
    for rows, longest in ((13, 11), (3, 11), (1, 5), (9, 33), (13, 11)):
        batch = on_device(random_batch(rows=rows, longest=longest, seed=rows))
        speed = mixed_speed(model, batch) if rows > 1 else 0.5
        assert_same(answer(engine, batch, speed), infer(model, batch, speed, engine="batch"))


def test_without_padding_there_is_no_mask() -> None:
    model = early_exit_model().to(DEVICE)
    engine = GraphEngine(model, recorder())
    ids = torch.randint(5, 320, (6, graphs.TOKEN_STEP), device=DEVICE)
    for tokens in (graphs.TOKEN_STEP, 7):
        expected = infer(model, {"input_ids": ids[:, :tokens]}, 0.6)
        assert_same(engine.run(ids[:, :tokens], None, rule_of(model, 0.6)), expected)
    assert [memory.masks is None for memory in engine._memories.values()] == [True, False]


@pytest.mark.parametrize(("speed", "layer"), [(1.0, 1), (1e-9, LAYERS), (0.0, LAYERS)])
def test_every_row_leaves_or_none_does(speed: float, layer: int) -> None:
    model = early_exit_model().to(DEVICE)
    batch, plain = on_device(random_batch()), Plain()
    record = answer(GraphEngine(model, plain), batch, speed)
    assert record.exit_layer.tolist() == [layer] * 13
    assert plain.recorded == layer, "no stage runs for an empty batch"
    if layer == LAYERS:
        torch.testing.assert_close(record.logits, infer(model, batch, 0.0).logits, **TOLERANCE)


def test_a_speed_for_each_head_and_row_imposes_the_exits() -> None:
    model = early_exit_model().to(DEVICE)
    batch = on_device(random_batch())
    engine = GraphEngine(model, recorder())
    for seed in range(3):
        wanted = torch.randint(1, LAYERS + 1, (13,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        speeds = (wanted[None, :] <= torch.arange(1, LAYERS + 1, device=DEVICE)[:, None]).float()
        record = answer(engine, batch, speeds)
        assert torch.equal(record.exit_layer.long(), wanted)
    assert_same(answer(engine, batch, 0.5), infer(model, batch, 0.5, engine="batch"))


def test_stages_are_recorded_once_until_a_weight_changes() -> None:
    model, plain = early_exit_model().to(DEVICE), Plain()
    engine, batch = GraphEngine(model, plain), on_device(random_batch())
    answer(engine, batch, 0.5)
    recorded = plain.recorded
    answer(engine, batch, 0.5)
    assert plain.recorded == recorded
    with torch.no_grad():
        model.heads["0"].out_proj.bias += 1.0
    assert_same(answer(engine, batch, 0.5), infer(model, batch, 0.5, engine="batch"))
    assert plain.recorded > recorded
    recorded = plain.recorded
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    optimizer.step()
    answer(engine, batch, 0.5)
    assert plain.recorded > recorded, "a fused optimizer raises no version"


def test_answers_are_not_overwritten_by_the_next_batch() -> None:
    model = early_exit_model().to(DEVICE)
    engine = GraphEngine(model, recorder())
    with torch.inference_mode():
        first = answer(engine, on_device(random_batch(seed=1)), 0.5)
    kept = first.logits.clone()
    answer(engine, on_device(random_batch(seed=2)), 0.5)
    assert torch.equal(first.logits, kept)


def test_old_shapes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_SHAPES", 2)
    model = early_exit_model().to(DEVICE)
    engine = GraphEngine(model, recorder())
    for rows in (1, 2, 3):
        answer(engine, on_device(random_batch(rows=rows)), 0.5)
    assert [key[0] for key in engine._memories] == [2, 3]


@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_nan_logits_stay_and_are_reported(head: str) -> None:
    model = early_exit_model(head=head).to(DEVICE)
    batch = on_device(random_batch())
    with torch.no_grad():
        model.heads[str(LAYERS - 1)].out_proj.bias.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="NaN logits"):
        record = answer(GraphEngine(model, recorder()), batch, 1e-9)
    assert record.exit_layer.tolist() == [LAYERS] * 13


def test_numbers_of_rows_are_few_and_near() -> None:
    sizes = [round_up_rows(rows) for rows in range(1, 257)]
    assert all(rows <= size < 1.25 * rows + 1 for rows, size in enumerate(sizes, start=1))
    assert sizes[:8] == list(range(1, 9))
    assert len(set(sizes)) < 30
    assert all(round_up_rows(size) == size for size in sizes)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="this machine has a GPU")
def test_it_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="model: got one on cpu, CUDA graphs need a CUDA device"):
        GraphEngine(early_exit_model())


def test_it_needs_sdpa() -> None:
    with pytest.raises(ValueError, match="'eager', the graphs engine needs 'sdpa'"):
        GraphEngine(early_exit_model(attn_implementation="eager"), Plain())
