"""Engine `stream_batches`: every batch is answered as the batch engine answers it alone, in the order of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launches import count_launches
from test_engine_graphs import Plain
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
from fastkd.engines import packed_layers
from fastkd.engines.cuda_graphs import CudaGraphs
from fastkd.engines.stream_batches import BatchStream, size_of_run
from fastkd_kernels import _triton
from fastkd_kernels.ops import compact, exit_gate, layer_norm, packed, student_head

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: a stream on a CPU captures nothing")
Model = fastkd.EarlyExitForSequenceClassification
Batch = dict[str, Tensor]


def some_batches(family: str = "bert", rows: tuple[int, ...] = (13, 5, 1, 13, 8, 13)) -> list[Batch]:
    """Batches of different sizes, lengths and contents."""
    return [
        {name: value.to(DEVICE) for name, value in random_batch(family, count, 7 + number, seed=number).items()}
        for number, count in enumerate(rows)
    ]


def _recorder(plain: Plain | None = None) -> Plain | None:
    """On a GPU the real thing."""
    return None if DEVICE.type == "cuda" else plain or Plain()


def stream(model: Model, batches: Any, speed: Any, plain: Plain | None = None, **options: Any) -> BatchStream:
    """`options` are those of `stream_batches`."""
    exits = {name: options.pop(name) for name in ("criterion", "top_n", "exit_layers") if name in options}
    return BatchStream(model, batches, rule=model.exit_rule(speed, **exits), recorder=_recorder(plain), **options)


def assert_answers(model: Model, batches: list[Batch], outputs: list[Any], speed: Any, **options: Any) -> None:
    assert len(outputs) == len(batches)
    for batch, output in zip(batches, outputs, strict=True):
        if len(batch["input_ids"]) == 0:
            assert output.logits.shape == (0, 3)
            continue
        expected = infer(model, batch, speed, engine="batch", **options)
        assert torch.equal(output.exit_layer, expected.exit_layer)
        torch.testing.assert_close(output.logits, expected.logits, **TOLERANCE)
        torch.testing.assert_close(output.uncertainty, expected.uncertainty, **TOLERANCE)


@pytest.mark.parametrize("tokens_per_run", [1, 40, 128, 4096])
@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
def test_every_batch_is_answered_as_if_it_were_alone(criterion: str, top_n: int | None, tokens_per_run: int) -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches()
    options: dict[str, Any] = {"criterion": criterion, "top_n": top_n}
    speed = mixed_speed(model, batches[0], criterion, top_n)
    outputs = list(stream(model, batches, speed, tokens_per_run=tokens_per_run, **options))
    assert len(torch.cat([output.exit_layer for output in outputs]).unique()) > 1, "the speed should split the rows"
    assert_answers(model, batches, outputs, speed, **options)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_every_family_and_head(family: str, head: str) -> None:
    model, batches = early_exit_model(family, head=head).to(DEVICE), some_batches(family)
    speed = mixed_speed(model, batches[0])
    assert_answers(model, batches, list(stream(model, batches, speed, tokens_per_run=64)), speed)


@pytest.mark.parametrize("exit_layers", [[LAYERS], [2, LAYERS]])
def test_heads_may_be_left_out(exit_layers: list[int]) -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches()
    outputs = list(stream(model, batches, 0.6, exit_layers=exit_layers, tokens_per_run=64))
    assert_answers(model, batches, outputs, 0.6, exit_layers=exit_layers)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_full_model(num_labels: int) -> None:
    model, batches = early_exit_model(num_labels=num_labels).to(DEVICE), some_batches()
    for batch, output in zip(batches, stream(model, batches, 0.0, tokens_per_run=64), strict=True):
        expected = infer(model, batch, 0.0, engine="batch")
        torch.testing.assert_close(output.logits, expected.logits, **TOLERANCE)
        assert (output.exit_layer == LAYERS).all()
        assert (output.uncertainty is None) == (num_labels == 1)


def test_without_masks_and_segments() -> None:
    model = early_exit_model().to(DEVICE)
    batches = [{"input_ids": batch["input_ids"]} for batch in some_batches()]
    batches[1]["token_type_ids"] = torch.ones_like(batches[1]["input_ids"])
    speed = mixed_speed(model, batches[0])
    assert_answers(model, batches, list(stream(model, batches, speed, tokens_per_run=64)), speed)


def test_survivors_of_different_batches_share_runs() -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches(rows=(8,) * 40)
    speed = mixed_speed(model, batches[0])
    answers = stream(model, batches, speed, tokens_per_run=256)
    outputs = list(answers)
    assert_answers(model, batches, outputs, speed)
    exit_layer, lengths = torch.cat([output.exit_layer for output in outputs]), []
    for batch in batches:
        lengths.append(batch["attention_mask"].sum(1))
    reached = [int(torch.cat(lengths)[exit_layer > layer].sum()) for layer in range(LAYERS)]
    statistics = answers.statistics
    assert statistics.tokens == reached
    # full runs, and at the end one that is not; a run is at least three quarters full, since no row has 64 tokens
    assert all(runs <= tokens / (256 * 3 / 4) + 2 for runs, tokens in zip(statistics.runs, reached, strict=True))
    assert all(more >= tokens for more, tokens in zip(statistics.rounded, statistics.tokens, strict=True))


def test_a_size_is_captured_once_for_each_lane() -> None:
    model, batches, plain = early_exit_model().to(DEVICE), some_batches(rows=(16,) * 30), Plain()
    batches = [{"input_ids": batch["input_ids"][:, :4]} for batch in batches]
    answers = stream(model, batches, 0.0, plain, tokens_per_run=64)
    assert len(list(answers)) == 30
    assert answers.statistics.runs == [30]
    assert plain.recorded in (0, 2)  # 0 on a GPU, where the recorder is another


@pytest.mark.parametrize("max_rows_waiting", [13, 14, 30])
def test_few_rows_of_the_record(max_rows_waiting: int) -> None:
    """Rows of the oldest batch run on in a run that is far from full, so that theirs can be given to others."""
    model, batches = early_exit_model().to(DEVICE), some_batches(rows=(13, 5, 0, 13, 8, 13, 1, 1, 13))
    speed = mixed_speed(model, batches[0])
    outputs = list(stream(model, batches, speed, max_rows_waiting=max_rows_waiting, tokens_per_run=4096))
    assert_answers(model, batches, outputs, speed)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 20), max_size=30),
    tokens_per_run=st.integers(1, 200),
    max_rows_waiting=st.integers(20, 200),
    seed=st.integers(0, 1000),
)
def test_any_pattern_of_exits_in_any_batches(
    sizes: list[int], tokens_per_run: int, max_rows_waiting: int, seed: int
) -> None:
    """Each row is answered once, by the layer that the pattern names, and no queue outgrows its memory."""
    generator = torch.Generator().manual_seed(seed)
    model = early_exit_model().to(DEVICE)
    patterns = [torch.randint(1, LAYERS + 1, (size,), generator=generator) for size in sizes]
    lengths = [int(torch.randint(1, 12, (), generator=generator)) for _ in sizes]
    batches = [
        {"input_ids": torch.randint(5, 40, (size, length), generator=generator).to(DEVICE)}
        for size, length in zip(sizes, lengths, strict=True)
    ]

    class Imposed(BatchStream):
        given = 0

        def _thresholds_of(self, rows: int) -> Tensor:
            pattern = torch.cat(patterns)[self.given : self.given + rows]
            self.given += rows
            return (pattern[None, :] <= torch.arange(1, LAYERS + 1)[:, None]).float().to(DEVICE)

    answers = Imposed(
        model,
        batches,
        rule=model.exit_rule(0.5),
        tokens_per_run=tokens_per_run,
        max_rows_waiting=max_rows_waiting,
        recorder=_recorder(),
    )
    outputs = list(answers)
    assert [output.exit_layer.tolist() for output in outputs] == [pattern.tolist() for pattern in patterns]
    for batch, pattern, output in zip(batches, patterns, outputs, strict=True):
        if len(pattern):
            with torch.no_grad():
                every = model.all_exit_logits(**batch)
            expected = every[torch.arange(len(pattern)), pattern - 1]
            torch.testing.assert_close(output.logits, expected, **TOLERANCE)


def test_a_row_longer_than_a_run_is_a_run_of_its_own() -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches()
    answers = stream(model, batches, 0.6, tokens_per_run=3)
    assert_answers(model, batches, list(answers), 0.6)
    assert max(answers.statistics.runs) > 6


def test_in_inference_mode_and_out_of_it() -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches()
    with torch.inference_mode():
        inside = list(stream(model, batches, 0.6, tokens_per_run=64))
    assert_answers(model, batches, inside, 0.6)
    assert_answers(model, batches, list(stream(model, batches, 0.6, tokens_per_run=64)), 0.6)


def test_an_error_of_the_input_comes_after_the_answers_to_what_was_read() -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches()

    def broken() -> Iterator[Batch]:
        yield from batches
        raise OSError("the disk is gone")

    answers = stream(model, broken(), 0.6, tokens_per_run=64)
    assert_answers(model, batches, [next(answers) for _ in batches], 0.6)
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)
    assert list(answers) == []


def test_rows_run_on_while_the_input_has_nothing() -> None:
    """An input that waits for the answers to its first batch before it gives the second."""
    model, batches, outputs = early_exit_model().to(DEVICE), some_batches(), []

    def patient() -> Iterator[Batch | None]:
        for number, batch in enumerate(batches):
            yield None
            yield batch
            for _ in range(2 * LAYERS + 2):
                if len(outputs) <= number:
                    yield None
            assert len(outputs) == number + 1

    for output in stream(model, patient(), 0.6, tokens_per_run=4096):
        outputs.append(output)
    assert_answers(model, batches, outputs, 0.6)


def test_an_error_of_the_model_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches()
    answers = stream(model, batches, 0.6, tokens_per_run=64)
    monkeypatch.setattr(BatchStream, "_launch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(answers)
    monkeypatch.undo()
    assert list(answers) == []


def test_nan_is_warned_of_at_the_end() -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches()
    with torch.no_grad():
        for head in model.heads.values():
            head.out_proj.bias[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="NaN"):
        outputs = list(stream(model, batches, 0.6, tokens_per_run=64))
    assert (torch.cat([output.exit_layer for output in outputs]) == LAYERS).all()


def test_no_batches() -> None:
    assert list(early_exit_model().stream_batches([], speed=0.5)) == []


@pytest.mark.parametrize(
    ("message", "batch", "options"),
    [
        ("first token of a row is masked", {"input_ids": [[1, 2]], "attention_mask": [[0, 1]]}, {}),
        ("on the right only", {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, {}),
        ("input_ids: got 99 tokens per row", {"input_ids": [[1] * 99]}, {}),
        ("got one of 2 rows, expected at most max_rows_waiting, 1", {"input_ids": [[1], [2]]}, {"max_rows_waiting": 1}),
        ("tokens_per_run: got 0", {}, {"tokens_per_run": 0}),
        ("max_rows_waiting: got 0", {}, {"max_rows_waiting": 0}),
    ],
)
def test_bad_input(message: str, batch: dict[str, Any], options: dict[str, Any]) -> None:
    model = early_exit_model()
    batches = [{name: torch.tensor(value) for name, value in batch.items()}]
    with pytest.raises(ValueError, match=message):
        next(model.stream_batches(batches, speed=0.5, **options))


def test_a_criterion_of_the_host_is_refused() -> None:
    with pytest.raises(ValueError, match="which waits for the host"):
        early_exit_model(learned_exit=True).stream_batches([], speed=0.5, criterion="learned")


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        early_exit_model().train().stream_batches([], speed=0.5)


@pytest.mark.skipif(not _triton.interpreting, reason="a GPU captures the runs, which fails where one waits")
def test_a_run_is_few_launches_and_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph of a run holds, by running the code of a GPU in Triton's interpreter."""
    attention = fk.varlen_attention

    def not_interpreted(*arguments: Any, **options: Any) -> Tensor:
        with fk.backend("cpu"):
            return attention(*arguments, **options)

    monkeypatch.setattr(fk, "varlen_attention", not_interpreted)
    monkeypatch.setattr(packed_layers, "linear_on", lambda device: packed_layers.JoinedLinear)
    # values are looked at on a CPU only
    for op in (compact, exit_gate, layer_norm, packed, student_head):
        monkeypatch.setattr(op, "values_are_free", lambda *_: False)
    # a captured launch has its counters from memory that was zeroed before
    counters = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(student_head.tickets, "take", lambda *_: counters)
    model, batches = early_exit_model(), some_batches()
    runs: list[Callable[[], Any]] = []

    def recorder(run: Callable[[], Any]) -> Callable[[], None]:
        runs.append(run)
        return run

    list(BatchStream(model, batches[:1], rule=model.exit_rule(1e-6), tokens_per_run=4096, recorder=recorder))
    assert len(runs) == LAYERS
    with fk.backend("cuda"), torch.no_grad():
        first, later, *_, last = [count_launches(run, monkeypatch) for run in runs]
    layer = {
        "aten.addmm.default": 4,  # queries, keys and values; output; expand; contract
        "fastkd_kernels.varlen_attention_.default": 1,
        "aten.gelu.default": 1,
        "_add_layer_norm_kernel": 2,
    }
    decision = {"aten.index_select.default": 1, "_student_head_kernel": 1, "_compact_packed_kernel": 1}
    assert later == {**layer, **decision}
    assert first == {**layer, **decision, "_embed_layer_norm_kernel": 1}
    assert "_compact_packed_kernel" not in last
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & (
        first.keys() | later.keys() | last.keys()
    )


@pytest.mark.parametrize(("tokens", "expected"), [(1, 64), (64, 64), (65, 128), (512, 512), (513, 640), (4096, 4096)])
def test_sizes_of_runs(tokens: int, expected: int) -> None:
    assert size_of_run(tokens) == expected


def half_of_a_gpu() -> Model:
    """What a GPU captures: a model in bfloat16."""
    return torch.nn.Module.to(early_exit_model(), device=DEVICE, dtype=torch.bfloat16)


@needs_gpu
def test_graphs_answer_as_plain_calls() -> None:
    model, batches = half_of_a_gpu(), some_batches(rows=(13, 5, 0, 13, 8) * 4)
    for tokens_per_run in (40, 4096):
        captured = model.stream_batches(batches, speed=0.6, tokens_per_run=tokens_per_run)
        assert isinstance(captured._memory.recorder, CudaGraphs)
        rule = model.exit_rule(0.6)
        plain = BatchStream(model, batches, rule=rule, tokens_per_run=tokens_per_run, recorder=lambda run: run)
        pairs = list(zip(captured, plain, strict=True))
        layers, expected_layers = (torch.cat([pair[side].exit_layer for pair in pairs]) for side in (0, 1))
        logits, expected = (torch.cat([pair[side].logits for pair in pairs]) for side in (0, 1))
        # the library of matrix products may choose another kernel in a graph, and with it another rounding
        same = layers == expected_layers
        assert same.double().mean() >= 0.9
        torch.testing.assert_close(logits[same], expected[same], rtol=0.05, atol=0.1)


@needs_gpu
def test_graphs_are_kept_until_weights_change() -> None:
    model, batches = half_of_a_gpu(), some_batches()
    first = model.stream_batches(batches, speed=0.6)
    before = [output.logits for output in first]
    second = model.stream_batches(batches, speed=0.6)
    assert second._memory is first._memory
    assert all(torch.equal(ours, output.logits) for ours, output in zip(before, second, strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    third = model.stream_batches(batches, speed=0.6)
    assert third._memory is not first._memory
    assert not all(torch.equal(ours, output.logits) for ours, output in zip(before, third, strict=True))


@needs_gpu
def test_float32_runs_without_graphs() -> None:
    model = early_exit_model().to(DEVICE)
    assert not isinstance(model.stream_batches([], speed=0.6)._memory.recorder, CudaGraphs)
